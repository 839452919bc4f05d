"""The process that runs a local cluster: in the foreground until a signal, or detached and found by its record."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Final

from mend_local.cluster import ClusterSettings, LocalCluster, Places, cluster_id, hold
from mend_local.kubelet import end_earlier_life
from mend_local.processes import Identity, is_running, look_at, owned_by, send
from mend_local.service import LOG_BYTES

_RECORD: Final = "daemon.json"
START_SECONDS: Final = 120.0
STOP_SECONDS: Final = 60.0


class DaemonFailed(RuntimeError):
    """The cluster did not come up, or did not go down."""


@dataclass(frozen=True, slots=True)
class Daemon:
    """A running daemon; `ready` once its cluster is up."""

    identity: Identity
    ready: bool


def find_daemon(places: Places) -> Daemon | None:
    """The daemon of this state directory if it lives."""
    try:
        record = json.loads((places.root / _RECORD).read_text())
        daemon = Daemon(Identity(record["pid"], record["started_ticks"]), bool(record["ready"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return daemon if is_running(daemon.identity) else None


async def run_until_told(
    places: Places, settings: ClusterSettings, tell: Callable[[str], None], welcome: Callable[[LocalCluster], None]
) -> None:
    """Run the cluster until SIGINT, SIGTERM or SIGHUP; `welcome` is called when it is up."""
    told = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    cluster = LocalCluster(places.root, settings, tell)
    starting = asyncio.create_task(cluster.__aenter__())
    waiting = asyncio.create_task(told.wait())
    await asyncio.wait({starting, waiting}, return_when=asyncio.FIRST_COMPLETED)
    if starting.done() and not starting.exception():
        _record(places)
        welcome(cluster)
        await waiting
        tell("ending")
        await cluster.stop()
    else:  # told to end while it was starting, or it failed: either way it cleans up after itself
        starting.cancel()
        waiting.cancel()
        try:
            await starting
        except asyncio.CancelledError:
            tell("ended before it was up")
    (places.root / _RECORD).unlink(missing_ok=True)


def _record(places: Places) -> None:
    me = look_at(os.getpid())
    assert me is not None, "this process is in /proc"
    facts = {"pid": me.identity.pid, "started_ticks": me.identity.started_ticks, "ready": True}
    temporary = places.root / f"{_RECORD}.tmp"
    temporary.write_text(json.dumps(facts))
    temporary.replace(places.root / _RECORD)


def start_detached(places: Places, arguments: Sequence[str], show: Callable[[str], None]) -> None:
    """Start a daemon with these arguments of `up`, show what it says, and return when its cluster is up.

    Raises `DaemonFailed` when it ends first or takes too long.
    """
    places.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    log_file = places.root / "daemon.log"
    with log_file.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "mend_local", "up", "--foreground", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd="/",
        )
    deadline = time.monotonic() + START_SECONDS
    with log_file.open("r", errors="replace") as said:
        while True:
            daemon = find_daemon(places)
            ended = child.poll()
            for line in said:
                show(line.rstrip("\n"))
            if daemon is not None and daemon.identity.pid == child.pid and daemon.ready:
                return
            if ended is not None:
                raise DaemonFailed(f"the local cluster ended with exit code {ended}; its log: {log_file}")
            if time.monotonic() > deadline:
                child.terminate()
                raise DaemonFailed(f"the local cluster was not up within {START_SECONDS:g} s; its log: {log_file}")
            time.sleep(0.02)


def stop_daemon(places: Places) -> int:
    """End the daemon of this state directory and whatever is left of its cluster; returns how many it had left.

    Raises `DaemonFailed` when something cannot be ended, `AlreadyRunning` when a program that is no daemon of ours
    (a test or a demo) has the cluster.
    """
    daemon = find_daemon(places)
    if daemon is not None:
        send(daemon.identity, signal.SIGTERM)
        if not _gone(daemon.identity, STOP_SECONDS):
            send(daemon.identity, signal.SIGKILL)
            _gone(daemon.identity, STOP_SECONDS)
    identity = cluster_id(places)
    with hold(places):
        try:
            left = end_earlier_life(places.pods, identity)
        except TimeoutError as error:
            raise DaemonFailed(str(error)) from error
    if still := owned_by(f"{identity}/"):
        pids = ", ".join(str(each.identity.pid) for each in still)
        raise DaemonFailed(f"processes {pids} of the cluster are still there: end them by hand")
    (places.root / _RECORD).unlink(missing_ok=True)
    return left


def _gone(identity: Identity, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(identity):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def quiet_logging(path: Path | None = None) -> None:
    """Log state changes of the cluster's parts to stderr, or to a file."""
    kept = RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=1) if path else logging.StreamHandler()
    form = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
    logging.basicConfig(handlers=[kept], level=logging.INFO, format=form)
    for chatty in ("aiohttp.access", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
