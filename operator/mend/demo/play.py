"""Plays the demonstration: an unbroken run, then one that is harmed twice, then the proof that nothing was lost."""

from __future__ import annotations

import asyncio
import json
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from mend.apply import TRAINING_RUNS
from mend.chart import draw_run
from mend.demo.verdict import broken_promises, curves_agree, matched, summary, table, weights_agree
from mend.demo.view import View, told
from mend.demo.watch import Harm, Injection, Plan, Sight, Watcher, injure
from mend.journal import CurvePoint, Journal, read_curve
from mend.keys import MANIFEST_NAME
from mend.kube.client import KubeClient
from mend.manifest import Manifest, decode_manifest
from mend.status import RunPhase, RunStatus
from mend.store import Credentials, open_store
from mend.story import tell_ledger
from mend_local.bootstrap import S3_SECRET
from mend_local.cluster import LocalCluster, Places, cluster_id, hold
from mend_local.kubelet import end_earlier_life

NAMESPACE = "default"
UNBROKEN, BROKEN = "unbroken", "clio"
SAVE_STEPS = 10  # as in run.yaml
LEAST_STEPS = 4 * SAVE_STEPS
LOOK_SECONDS = 0.1
PATIENCE_SECONDS = 180.0


class DemoFailed(Exception):
    """The demonstration did not come to its end; the message says where it stuck."""


def plans(steps: int) -> tuple[Plan, ...]:
    """A crash in the first half, a hang in the second, of ranks in different pods; both between two saves.

    Raises `DemoFailed` for a run that is over before both could be done and recovered from.
    """
    if steps < LEAST_STEPS:
        raise DemoFailed(
            f"--steps: got {steps}; expected at least {LEAST_STEPS}, for a run that saves, is harmed twice and goes on"
        )
    first, second = (steps * tenths // 100 * 10 + SAVE_STEPS // 2 for tenths in (3, 6))
    return Plan(Harm.CRASH, 2, first), Plan(Harm.HANG, 1, second)


async def play(folder: Path, steps: int, state_dir: Path) -> int:
    """Run the demonstration; results in `folder`. 0 if every promise was kept.

    The cluster lives in `state_dir`, always the same: should this process be killed with -9, the next demonstration
    finds what it has left there and ends it.
    """
    planned = plans(steps)
    console = Console()
    view = View(console, steps)
    began = time.monotonic()
    with view.shown():
        view.say("starting a laptop-sized Kubernetes, an object store and mend's controller")
        await asyncio.to_thread(_forget_earlier, state_dir)
        async with LocalCluster(state_dir, tell=view.say) as cluster:
            result = await _perform(cluster, view, steps, planned)
    shutil.rmtree(state_dir, ignore_errors=True)
    return _conclude(result, folder, console, view, steps, time.monotonic() - began)


def _forget_earlier(state_dir: Path) -> None:
    """End what a demonstration that was killed has left, and begin from nothing. Raises `AlreadyRunning`."""
    places = Places(root=state_dir)
    with hold(places):
        end_earlier_life(places.pods, cluster_id(places))
        shutil.rmtree(state_dir, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Result:
    """Everything that was seen."""

    status: RunStatus
    planned: tuple[Plan, ...]
    injections: tuple[Injection, ...]
    points: tuple[CurvePoint, ...]
    calm_points: tuple[CurvePoint, ...]
    manifest: Manifest
    calm_manifest: Manifest


async def _perform(cluster: LocalCluster, view: View, steps: int, planned: tuple[Plan, ...]) -> Result:
    client = await KubeClient.from_kubeconfig(str(cluster.kubeconfig))
    watcher = Watcher(client, NAMESPACE)
    try:
        view.say(f"applying TrainingRun {UNBROKEN}: 2 workers with 2 ranks each, nothing will happen to it", "bold")
        await client.create(TRAINING_RUNS, NAMESPACE, _run(cluster, UNBROKEN, steps))
        calm = await _follow(watcher, view, UNBROKEN, ())
        view.say(f"{UNBROKEN} has finished at step {calm.step}")
        view.say(f"applying TrainingRun {BROKEN}: the same, but two of its ranks will be harmed", "bold")
        await client.create(TRAINING_RUNS, NAMESPACE, _run(cluster, BROKEN, steps))
        injections: list[Injection] = []
        status = await _follow(watcher, view, BROKEN, planned, injections)
        view.say(f"{BROKEN} has finished at step {status.step}")
        journal = Journal(cluster.places.controller_data)
        return Result(
            status=status,
            planned=planned,
            injections=tuple(injections),
            points=tuple(read_curve(journal.curve_path(f"{NAMESPACE}/{BROKEN}"))),
            calm_points=tuple(read_curve(journal.curve_path(f"{NAMESPACE}/{UNBROKEN}"))),
            manifest=_manifest(cluster, status),
            calm_manifest=_manifest(cluster, calm),
        )
    finally:
        await watcher.close()
        await client.close()


def _run(cluster: LocalCluster, name: str, steps: int) -> dict[str, Any]:
    """The TrainingRun from run.yaml with its blanks filled in."""
    assert cluster.s3 is not None
    text = files("mend.demo").joinpath("run.yaml").read_text(encoding="utf-8")
    blanks = {
        "NAME": name,
        "STEPS": str(steps),
        "BUCKET": cluster.s3.bucket,
        "SECRET": S3_SECRET,
        "CACHE": str(cluster.places.root / "data"),
    }
    for blank, value in blanks.items():
        text = text.replace(blank, value)
    run: dict[str, Any] = yaml.safe_load(text)
    return run


async def _follow(
    watcher: Watcher, view: View, name: str, harms: Sequence[Plan], done: list[Injection] | None = None
) -> RunStatus:
    """Watch a run to its end, doing the planned harm on the way."""
    left, known = list(harms), set[tuple[int, str]]()
    patience = _Patience()
    while True:
        sight = await watcher.see(name)
        view.update(sight)
        for words, style in told(sight, known):
            view.say(words, style)
        if sight.status.phase is RunPhase.SUCCEEDED:
            return sight.status
        if sight.status.phase is RunPhase.FAILED:
            raise DemoFailed(_why_failed(name, sight.status))
        if left and _is_time(sight, left[0]) and (injection := injure(sight, left[0].rank, left[0].harm)) is not None:
            plan = left.pop(0)
            word = "kill -9" if plan.harm is Harm.CRASH else "kill -STOP"
            view.say(f"{word} rank {plan.rank} after step {injection.step}", "bold yellow")
            if done is not None:
                done.append(injection)
        patience.check(name, sight)
        await asyncio.sleep(LOOK_SECONDS)


def _is_time(sight: Sight, plan: Plan) -> bool:
    return sight.status.phase is RunPhase.RUNNING and sight.step >= plan.step


class _Patience:
    """Raises when a run does not move for too long."""

    def __init__(self) -> None:
        self._at = time.monotonic()
        self._last: tuple[object, ...] = ()

    def check(self, name: str, sight: Sight) -> None:
        now = (sight.status.phase, sight.status.attempt, sight.step, len(sight.ranks))
        if now != self._last:
            self._last, self._at = now, time.monotonic()
        elif time.monotonic() - self._at > PATIENCE_SECONDS:
            waits = "; ".join(each.message for each in sight.status.conditions if each.status == "False")
            raise DemoFailed(
                f"{name} has not moved for {PATIENCE_SECONDS:.0f} s, in phase {now[0]}: {waits or 'no reason'}"
            )


def _why_failed(name: str, status: RunStatus) -> str:
    reasons = [f"{each.reason}: {each.message}" for each in status.conditions if each.type == "Failed"]
    return f"run {name} has failed: {'; '.join(reasons)}"


def _manifest(cluster: LocalCluster, status: RunStatus) -> Manifest:
    """The manifest of a run's last checkpoint, read from the store as anyone could."""
    assert status.checkpoint is not None
    assert cluster.s3 is not None
    keys = Credentials(access_key_id=cluster.s3.access_key_id, secret_access_key=cluster.s3.secret_access_key)
    store = open_store(status.checkpoint.uri, cluster.s3.endpoint, keys)
    return decode_manifest(store.get(MANIFEST_NAME))


def _conclude(result: Result, folder: Path, console: Console, view: View, steps: int, seconds: float) -> int:
    """Compare, tell, draw and write down."""
    status = result.status
    shown = matched(status.incidents, result.injections)
    compared, different = curves_agree(result.points, result.calm_points, steps)
    same_weights = weights_agree(result.manifest, result.calm_manifest)
    failures = broken_promises(
        result.planned, result.injections, shown, different, (result.manifest, result.calm_manifest)
    )
    more = {
        "promises_broken": failures,
        "steps_compared": compared,
        "weights_equal": same_weights,
        "goodput": round(status.ledger.goodput, 4),
        "seconds": round(seconds, 1),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
    }
    facts = summary(status, shown, bit_exact=not different and same_weights, more=more)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    title = f"{BROKEN}: {status.attempt} attempts, one loss curve"
    draw_run(result.points, status.incidents, title, folder / "run.png", unbroken=result.calm_points)
    for line in view.history() if console.is_terminal else ():
        console.print(line)
    console.print()
    console.print(table(shown))
    for entry in tell_ledger(status):
        console.print(entry)
    console.print()
    if not failures:
        console.print(
            f"[bold green]Nothing was lost:[/] the losses of all {compared} steps and the final weights equal "
            f"those of the unbroken run, bit for bit."
        )
    for failure in failures:
        console.print(f"[bold red]Promise broken:[/] {failure}")
    console.print(f"The curve: {folder / 'run.png'}   the facts: {folder / 'summary.json'}   ({seconds:.0f} s)")
    return 1 if failures else 0
