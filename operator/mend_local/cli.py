"""`mend local up|down|status`: a laptop-sized Kubernetes from the command line."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from mend_local.bootstrap import S3_SECRET, NoDefinition
from mend_local.certificates import credentials
from mend_local.client import Api, ApiError, ApiUnreachable
from mend_local.cluster import AlreadyRunning, ClusterSettings, LocalCluster, Places, api_port
from mend_local.daemon import DaemonFailed, find_daemon, quiet_logging, run_until_told, start_detached, stop_daemon
from mend_local.kubelet import FAULT_NOTE, KubeletSettings
from mend_local.objectstore import StoreFailed, StoreKind
from mend_local.report import processes_by_owner, report

log = logging.getLogger(__name__)

_NOT_RUNNING = 3  # as `systemctl status` and LSB have it


def main(arguments: list[str] | None = None) -> int:
    """`python -m mend_local`: the same commands without mend's own."""
    parser = argparse.ArgumentParser(prog="mend local", description="A laptop-sized Kubernetes to try mend on.")
    register(parser.add_subparsers(metavar="COMMAND", required=True))
    options = parser.parse_args(arguments)
    return int(options.run(options))


def register(commands: Any) -> None:
    """Add the commands to argparse's subparsers; each sets `run`, which takes the options and returns an exit code."""
    up = commands.add_parser("up", help="start a cluster", description=_UP)
    _add_state_dir(up)
    up.add_argument("--nodes", type=_at_least_one, default=2, metavar="N", help="nodes to have (default: 2)")
    up.add_argument("--no-controller", action="store_true", help="without mend's controller")
    up.add_argument(
        "--object-store",
        type=StoreKind,
        choices=list(StoreKind),
        default=StoreKind.MINISTACK,
        help="default: ministack",
    )
    up.add_argument("--foreground", action="store_true", help="stay, and end the cluster at Ctrl-C")
    up.set_defaults(run=_up)
    down = commands.add_parser("down", help="end the cluster and all its processes; its state stays")
    _add_state_dir(down)
    down.add_argument("--purge", action="store_true", help="remove its state, too: all objects and checkpoints")
    down.set_defaults(run=_down)
    status = commands.add_parser("status", help="show what runs (exit code 3: nothing)")
    _add_state_dir(status)
    status.set_defaults(run=_status)


_UP = (
    "Starts an API server that kubectl understands, nodes whose pods are processes of this machine, an S3 object store "
    "and mend's controller. It is no Kubernetes: images are ignored, and the network is loopback."
)


def default_state_dir() -> Path:
    """Where the cluster's state is if nothing else is said."""
    home = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(home) / "mend-local"


def _add_state_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--state-dir", type=Path, default=default_state_dir(), metavar="DIR", help="default: %(default)s"
    )


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number of at least 1")
    return int(text)


# ---------------------------------------------------------------- up
def _up(options: argparse.Namespace) -> int:
    places = Places(root=options.state_dir.resolve())
    try:
        if options.foreground:
            return _stay(places, options)
        if find_daemon(places) is not None:
            print(f"the cluster of {places.root} already runs")
        else:
            start_detached(places, _as_arguments(options), print)
    except (DaemonFailed, AlreadyRunning, NoDefinition, StoreFailed, OSError) as error:
        print(f"mend local: {error}", file=sys.stderr)
        return 1
    return 0


def _stay(places: Places, options: argparse.Namespace) -> int:
    settings = ClusterSettings(
        with_controller=not options.no_controller,
        object_store=options.object_store,
        kubelet=KubeletSettings(nodes=options.nodes),
    )
    places.system.mkdir(parents=True, exist_ok=True, mode=0o700)
    quiet_logging(places.system / "cluster.log")
    asyncio.run(run_until_told(places, settings, _say, _welcome))
    return 0


def _as_arguments(options: argparse.Namespace) -> list[str]:
    words = ["--state-dir", str(options.state_dir.resolve()), "--nodes", str(options.nodes)]
    words += ["--object-store", str(options.object_store)]
    return [*words, "--no-controller"] if options.no_controller else words


def _say(sentence: str) -> None:
    print(sentence, flush=True)


def _welcome(cluster: LocalCluster) -> None:
    _say("")
    _say("The cluster is up. To use it:")
    _say(f"  export KUBECONFIG={cluster.kubeconfig}")
    _say("  kubectl get nodes")
    _say("  kubectl get trun")
    if cluster.s3 is not None:
        _say(f"  checkpoint: uri s3://{cluster.s3.bucket}/RUN, endpoint {cluster.s3.endpoint},")
        _say(f"              credentialsSecret {S3_SECRET} (in namespace default)")
    _say("To break something:")
    _say(f"  kubectl annotate pod POD {FAULT_NOTE}=frozen     (or killed; {FAULT_NOTE}- thaws)")
    _say(f"  kubectl annotate node NODE {FAULT_NOTE}=lost     ({FAULT_NOTE}- brings it back)")
    _say("To end it: mend local down")


# ---------------------------------------------------------------- down and status
def _down(options: argparse.Namespace) -> int:
    places = Places(root=options.state_dir.resolve())
    if not places.root.is_dir():
        print(f"no cluster in {places.root}")
        return 0
    was_running = find_daemon(places) is not None
    try:
        left = stop_daemon(places)
    except (DaemonFailed, AlreadyRunning) as error:
        print(f"mend local: {error}", file=sys.stderr)
        return 1
    print("the cluster is down" if was_running else "the cluster was not running")
    if left:
        print(f"ended {left} processes that it had left")
    if options.purge:
        shutil.rmtree(places.root)
        print(f"removed {places.root}")
    return 0


def _status(options: argparse.Namespace) -> int:
    places = Places(root=options.state_dir.resolve())
    daemon = find_daemon(places)
    if daemon is None:
        print(f"no cluster runs with the state directory {places.root}; start one with `mend local up`")
        return _NOT_RUNNING
    print(f"cluster of {places.root}: running (PID {daemon.identity.pid}); KUBECONFIG={places.kubeconfig}")
    try:
        print("\n".join(asyncio.run(_report(places))))
    except (ApiError, ApiUnreachable) as error:
        print(f"mend local: the API server does not answer: {error}", file=sys.stderr)
        return 1
    return 0


async def _report(places: Places) -> list[str]:
    known = credentials(places.api)
    url = f"https://127.0.0.1:{api_port(places)}"
    async with Api(url, known.admin_token, known.client_context()) as api:
        return await report(api, processes_by_owner(places))
