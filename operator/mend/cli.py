"""The `mend` command: the controller, and what people ask of it from a terminal."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import re
import signal
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mend.apply import TRAINING_RUNS
from mend.chart import draw_run
from mend.checkpoints_cli import add_life
from mend.controller import Controller, SteadyClock
from mend.crstatus import UnreadableStatus, from_resource
from mend.dossier import Dossier, UnreadableDossier, decode
from mend.exhibit import exhibit
from mend.export_cli import add_export
from mend.journal import Journal, UnreadableJournal, read_curve, read_journal, replay
from mend.keys import INCIDENTS_FOLDER
from mend.kube.client import PODS, KubeClient
from mend.kube.election import Elector, Timing
from mend.kube.errors import ApiError
from mend.metrics import Metrics
from mend.names import LABEL_RUN
from mend.observe import bare_observation, own_word, worker_pod
from mend.serve import application, serving, token_file
from mend.status import RunStatus
from mend.store import StoreError, open_store
from mend.story import tell

STORE_SECONDS = 15.0  # who asks at a terminal is told soon that the store does not answer
LEASE_NAME = "mend-controller"


class UserError(Exception):
    """Something the user can put right; the message says how."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["local"]:
        from mend_local.cli import main as local  # a program of its own, which the controller's image may lack

        return local(words[1:])
    options = parser().parse_args(words)
    try:
        result = options.run(options)
        return int(result or 0)
    except (UserError, ApiError, UnreadableJournal, UnreadableStatus) as error:
        print(f"mend: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parser() -> argparse.ArgumentParser:
    """All commands with their help."""
    root = argparse.ArgumentParser(prog="mend", description="Fault-tolerant training on Kubernetes.")
    root.add_argument("--version", action="version", version=f"mend {version('mend')}")
    commands = root.add_subparsers(metavar="COMMAND", required=True)
    _add_get(commands)
    _add_describe(commands)
    _add_explain(commands)
    _add_chart(commands)
    _add_replay(commands)
    _add_checkpoint(commands)
    _add_controller(commands)
    commands.add_parser("local", help="a laptop-sized Kubernetes to try mend on")  # see `main`
    _add_demo(commands)
    return root


# ---------------------------------------------------------------- controller
def _add_controller(commands: Any) -> None:
    sub = commands.add_parser("controller", help="watch TrainingRuns and keep them going")
    sub.add_argument("--kubeconfig", help="default: the pod's service account, else as kubectl")
    sub.add_argument("--namespace", help="watch only this namespace (default: all)")
    sub.add_argument(
        "--data-dir", type=Path, default=Path("mend-data"), help="journals and curves (default: %(default)s)"
    )
    sub.add_argument(
        "--journal-size",
        type=_size_bytes,
        default="1Gi",
        metavar="SIZE",
        help="of the volume at --data-dir, half of which is used at the most, for example 512Mi (default: %(default)s)",
    )
    sub.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="metrics (default: any free port)")
    sub.add_argument("--token-file", type=Path, help="file with the bearer token that guards the metrics")
    sub.add_argument(
        "--lease-namespace",
        default="mend-system",
        help="where the leader's Lease and the book of strikes lie (default: %(default)s)",
    )
    sub.add_argument(
        "--lease-seconds",
        type=_lease_seconds,
        default=Timing().lease,
        metavar="N",
        help="how long others wait for a leader that is silent (default: %(default)s)",
    )
    sub.add_argument("--log-level", default="INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    sub.set_defaults(run=lambda options: _until_told(_controller(options)))


def _lease_seconds(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number of at least 2")
    return int(text)


def _size_bytes(text: str) -> int:
    found = re.fullmatch(r"([1-9][0-9]*)(Mi|Gi)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number of Mi or Gi, for example 1Gi")
    return int(found[1]) << {"Mi": 20, "Gi": 30}[found[2]]


async def _controller(options: argparse.Namespace) -> None:
    from prometheus_client import REGISTRY

    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    host, _, port = options.listen.rpartition(":")
    if not port.isdecimal():
        raise UserError(f"--listen: got {options.listen!r}; expected HOST:PORT, for example 127.0.0.1:9300")
    clock = SteadyClock()
    metrics = Metrics(REGISTRY, clock)
    token = token_file(options.token_file) if options.token_file else lambda: ""
    client = await KubeClient.discover(options.kubeconfig)
    try:
        instance = f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
        timing = Timing.of_lease(options.lease_seconds)
        elector = Elector(client, namespace=options.lease_namespace, name=LEASE_NAME, identity=instance, timing=timing)
        controller = Controller(
            client,
            namespace=options.namespace,
            home=options.lease_namespace,
            journal=_journal_in(options.data_dir, options.journal_size // 2),
            metrics=metrics,
            instance=instance,
            clock=clock,
        )
        app = application(REGISTRY, token, unready=controller.trouble)
        async with AsyncExitStack() as stack:
            try:
                bound = await stack.enter_async_context(serving(app, host or "127.0.0.1", int(port)))
            except OSError as error:
                raise UserError(f"--listen {options.listen}: {error.strerror}; choose another port") from error
            logging.getLogger(__name__).info("metrics on http://%s:%d/metrics", *bound)
            await controller.run(elector)
    finally:
        await client.close()


def _journal_in(folder: Path, most_bytes: int) -> Journal:
    try:
        return Journal(folder, most_bytes)
    except OSError as error:
        raise UserError(f"--data-dir {folder}: {error.strerror}; journals and curves are written there") from error


def _until_told(work: Coroutine[Any, Any, int | None]) -> int:
    """Run until done, or until a signal, which ends it in good order (leases are given back, processes are ended).

    Only the first signal counts: a second Ctrl-C must not cut the ending short.
    """

    async def run() -> int:
        task = asyncio.ensure_future(work)
        loop = asyncio.get_running_loop()
        told: list[signal.Signals] = []

        def tell(number: signal.Signals) -> None:
            if not told:
                told.append(number)
                task.cancel()

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, tell, number)
        try:
            return await task or 0
        except asyncio.CancelledError:
            print(f"mend: ended by {told[0].name}" if told else "mend: ended", file=sys.stderr)
            return 128 + told[0] if told and told[0] is not signal.SIGTERM else 0

    return asyncio.run(run())


# ---------------------------------------------------------------- asking
def _add_get(commands: Any) -> None:
    sub = commands.add_parser("get", help="runs in a table: where they are, and what happened to them last")
    sub.add_argument("name", metavar="RUN", nargs="?", help="only this one (default: all)")
    sub.add_argument("-A", "--all-namespaces", action="store_true")
    _add_cluster(sub)
    sub.set_defaults(run=_get)


def _get(options: argparse.Namespace) -> None:
    from rich.console import Console

    from mend.show import runs_table

    runs = asyncio.run(_list_runs(options))
    if not runs:
        where = "any namespace" if options.all_namespaces else f"namespace {options.namespace}"
        print(f"no TrainingRun in {where}", file=sys.stderr)
        return
    now = time.time()
    seen = sorted((own_word(run, now) for run in runs), key=lambda each: (each.namespace, each.name))
    table = runs_table(seen, now, with_namespace=options.all_namespaces)
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


async def _list_runs(options: argparse.Namespace) -> list[dict[str, Any]]:
    async with _client(options) as client:
        if options.name is not None:
            return [await client.get(TRAINING_RUNS, options.namespace, options.name)]
        namespace = None if options.all_namespaces else options.namespace
        return list((await client.list_all(TRAINING_RUNS, namespace)).items)


def _add_describe(commands: Any) -> None:
    sub = commands.add_parser("describe", help="all about one run: workers, conditions, checkpoints, incidents")
    sub.add_argument("name", metavar="RUN", help="name of a TrainingRun")
    _add_cluster(sub)
    sub.set_defaults(run=_describe)


def _describe(options: argparse.Namespace) -> None:
    from rich.console import Console

    from mend.show import description

    run, listed = asyncio.run(_run_with_pods(options))
    now = time.time()
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for part in description(bare_observation(run, now), [worker_pod(pod, {}, now) for pod in listed], now):
        console.print(part)


async def _run_with_pods(options: argparse.Namespace) -> tuple[dict[str, Any], tuple[dict[str, Any], ...]]:
    async with _client(options) as client:
        run = await client.get(TRAINING_RUNS, options.namespace, options.name)
        pods = await client.list_all(PODS, options.namespace, label_selector=f"{LABEL_RUN}={options.name}")
        return run, pods.items


def _add_cluster(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("-n", "--namespace", default="default", help="default: %(default)s")
    sub.add_argument("--kubeconfig", help="default: as kubectl")


@asynccontextmanager
async def _client(options: argparse.Namespace) -> AsyncIterator[KubeClient]:
    client = await KubeClient.discover(options.kubeconfig)
    try:
        yield client
    finally:
        await client.close()


def _add_explain(commands: Any) -> None:
    sub = commands.add_parser("explain", help="tell a run's story: what went wrong, who did it, what it cost")
    sub.add_argument("name", metavar="RUN", help="name of a TrainingRun")
    _add_cluster(sub)
    sub.add_argument(
        "--journal", type=Path, metavar="FILE.journal.jsonl", help="tell it from this file instead of from the cluster"
    )
    sub.add_argument("--incident", type=int, metavar="N", help="show the evidence of this one: counters, stacks")
    sub.add_argument(
        "--evidence",
        type=Path,
        metavar="FILE",
        help="show this evidence, downloaded from the store before",
    )
    sub.set_defaults(run=_explain)


def _explain(options: argparse.Namespace) -> None:
    if options.evidence is not None:
        lines = exhibit(_dossier_of(options.evidence))
    else:
        status, endpoint = _told_status(options)
        if options.incident is None:
            lines = tell(f"{options.namespace}/{options.name}", status)
        else:
            lines = exhibit(_kept_dossier(status, options.incident, endpoint))
    for line in lines:
        print(line)


def _told_status(options: argparse.Namespace) -> tuple[RunStatus, str | None]:
    """The run's status, and the endpoint of its store, from a journal or from the cluster."""
    if options.journal is not None:
        entries = [entry for entry in _journal(options.journal) if entry.seen.name == options.name]
        if not entries:
            raise UserError(f"{options.journal} says nothing of a run named {options.name!r}")
        return entries[-1].decision.status, entries[-1].spec.checkpoint.endpoint
    run = asyncio.run(_get_run(options))
    return from_resource(run.get("status")), run["spec"].get("checkpoint", {}).get("endpoint")


def _kept_dossier(status: RunStatus, incident: int, endpoint: str | None) -> Dossier:
    """The dossier as the store has it, by whatever credentials are at hand."""
    known = {each.id: each for each in status.incidents}
    record = known.get(incident)
    if record is None:
        there = ", ".join(map(str, known)) or "none"
        raise UserError(f"--incident {incident}: the status knows no such incident; there are: {there}")
    if not record.evidence_uri:
        raise UserError(f"--incident {incident}: its evidence was not kept: the store was not known or not ready then")
    prefix, _, name = record.evidence_uri.rpartition(f"/{INCIDENTS_FOLDER}/")
    try:
        raw = open_store(prefix, endpoint, deadline_seconds=STORE_SECONDS).get(f"{INCIDENTS_FOLDER}/{name}")
        return decode(raw)
    except (StoreError, UnreadableDossier) as error:
        remedy = "if it is there, download it and give it by --evidence FILE"
        raise UserError(f"{record.evidence_uri}: {error}; {remedy}") from error


def _dossier_of(path: Path) -> Dossier:
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise UserError(f"evidence {path}: {error.strerror}") from error
    except UnreadableDossier as error:
        raise UserError(f"evidence {path}: {error}") from error


async def _get_run(options: argparse.Namespace) -> dict[str, Any]:
    async with _client(options) as client:
        return await client.get(TRAINING_RUNS, options.namespace, options.name)


def _journal(path: Path) -> list[Any]:
    try:
        return list(read_journal(path))
    except OSError as error:
        raise UserError(f"journal {path}: {error.strerror}; the controller keeps them in its --data-dir") from error


def _add_chart(commands: Any) -> None:
    sub = commands.add_parser("chart", help="draw a run's loss with one colour per attempt")
    sub.add_argument("curve", type=Path, metavar="FILE.curve.jsonl", help="from the controller's --data-dir")
    sub.add_argument("-o", "--output", type=Path, default=Path("run.png"), help="picture (default: %(default)s)")
    sub.set_defaults(run=_chart)


def _chart(options: argparse.Namespace) -> None:
    name = options.curve.name.removesuffix(".curve.jsonl")
    journal = options.curve.with_name(f"{name}.journal.jsonl")
    try:
        points = list(read_curve(options.curve))
    except OSError as error:
        raise UserError(f"curve {options.curve}: {error.strerror}") from error
    entries = _journal(journal) if journal.exists() else []
    incidents = entries[-1].decision.status.incidents if entries else ()
    draw_run(points, incidents, name.replace("_", "/"), options.output)
    print(f"{options.output}: {len(points)} points, {len(incidents)} incidents")


def _add_replay(commands: Any) -> None:
    sub = commands.add_parser("replay", help="decide again on a journal and show where today's code differs")
    sub.add_argument("journal", type=Path, metavar="FILE.journal.jsonl")
    sub.set_defaults(run=_replay)


def _replay(options: argparse.Namespace) -> int:
    count = len(_journal(options.journal))
    differences = list(replay(options.journal))
    for each in differences:
        print(f"line {each.line}: then  {each.then.reason}: {_names(each.then.actions)}")
        print(f"{'':{len(str(each.line)) + 5}}  today {each.today.reason}: {_names(each.today.actions)}")
    print(f"{count} decisions, {len(differences)} differ")
    return 1 if differences else 0


def _names(actions: tuple[Any, ...]) -> str:
    return ", ".join(type(action).__name__ for action in actions) or "no action"


def _add_checkpoint(commands: Any) -> None:
    sub = commands.add_parser("checkpoint", help="what can be done with checkpoints")
    kinds = sub.add_subparsers(metavar="COMMAND", required=True)
    add_life(kinds)
    add_export(kinds)


# ---------------------------------------------------------------- trying
def _add_demo(commands: Any) -> None:
    sub = commands.add_parser("demo", help="watch mend bring a run back from a crash and a hang, on this machine")
    sub.add_argument("--folder", type=Path, default=Path("demo"), help="results (default: %(default)s)")
    sub.add_argument("--steps", type=int, default=120, help="steps of each run, 40 or more (default: %(default)s)")
    sub.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    from mend.demo.play import DemoFailed, play
    from mend_local.cli import default_state_dir
    from mend_local.cluster import AlreadyRunning

    try:
        return _until_told(play(options.folder, options.steps, default_state_dir().with_name("mend-demo")))
    except (DemoFailed, AlreadyRunning) as error:
        raise UserError(str(error)) from error
