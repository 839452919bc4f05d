"""`mend checkpoint now`: wishes for a save at the end of a run's step, and follows what comes of the wish."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from mend.apply import TRAINING_RUNS
from mend.crstatus import from_resource
from mend.kube.client import KubeClient
from mend.names import ANNOTATION_SAVE_NOW
from mend.status import RunStatus, WishState
from mend.whereabouts import Refused, add_cluster, told

POLL_SECONDS: Final = 0.5


def add_now(commands: Any) -> None:
    """Add the command to the subparsers of `mend checkpoint`."""
    sub = commands.add_parser("now", help="ask a run for a checkpoint at the end of its step")
    sub.add_argument("source", metavar="RUN", help="name of a TrainingRun")
    sub.add_argument("--wait", action="store_true", help="until it is committed")
    sub.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="of --wait (default: %(default)g)")
    add_cluster(sub)
    sub.set_defaults(run=lambda options: told(_now, options))


def _now(options: argparse.Namespace) -> int:
    return asyncio.run(_ask_for_save(options))


async def _ask_for_save(options: argparse.Namespace) -> int:
    if "/" in options.source:
        raise Refused(f"{options.source!r}: expected the name of a TrainingRun; only a run can be asked for a save")
    client = await KubeClient.discover(options.kubeconfig)
    try:
        wish = uuid.uuid4().hex
        run = await client.get(TRAINING_RUNS, options.namespace, options.source)
        status = from_resource(run.get("status"))
        if status.phase.is_final:
            raise Refused(f"{options.namespace}/{options.source} has {status.phase.lower()}: nothing trains any more")
        body = {"metadata": {"annotations": {ANNOTATION_SAVE_NOW: wish}}}
        await client.merge_patch(TRAINING_RUNS, options.namespace, options.source, body)
        if not options.wait:
            print(f"asked for a checkpoint (wish {wish}); the run is {status.phase} at step {status.step}")
            return 0
        return await _follow(client, options, wish, status.step)
    finally:
        await client.close()


async def _follow(client: KubeClient, options: argparse.Namespace, wish: str, asked_step: int) -> int:
    """Until the wish is answered; 1 if nothing comes of it.

    What became of it is not seen where the interval has asked meanwhile: then the step of the checkpoint tells.
    """
    give_up_at = time.monotonic() + options.timeout
    with _spinner() as say:
        while time.monotonic() < give_up_at:
            run = await client.get(TRAINING_RUNS, options.namespace, options.source)
            status = from_resource(run.get("status"))
            known = status.wish if status.wish is not None and status.wish.id == wish else None
            newer = status.checkpoint is not None and status.checkpoint.step >= asked_step
            answered = known is not None and (newer if known.by_interval else known.state is WishState.ANSWERED)
            if answered and status.checkpoint:
                print(f"{status.checkpoint.uri}: step {status.checkpoint.step} is committed")
                return 0
            if known is not None and known.state is WishState.GIVEN_UP:
                raise Refused(f"asked {known.times} times, and no checkpoint was committed: {_why_not(status)}")
            if status.phase.is_final:
                raise Refused(f"the run has {status.phase.lower()} meanwhile")
            asked = f"asked at step {known.step}" if known and known.times else f"waiting for the run, {status.phase}"
            say(f"{asked}, now at step {status.step}")
            await asyncio.sleep(POLL_SECONDS)
    raise Refused(f"no checkpoint within {options.timeout:g} s; the wish stands: mend describe {options.source}")


def _why_not(status: RunStatus) -> str:
    ready = next((each for each in status.conditions if each.type == "StorageReady"), None)
    return ready.message if ready is not None and ready.status != "True" else "see the logs of the worker of rank 0"


@contextmanager
def _spinner() -> Iterator[Callable[[str], None]]:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("asking")
        yield lambda text: progress.update(task, description=text)
