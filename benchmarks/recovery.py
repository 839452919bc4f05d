"""Seconds from a fault to its detection and to the first new step, on the local cluster, beside torchrun.

    python benchmarks/recovery.py [--quick] [--json FILE]

One run of 2 workers with 1 rank each is killed (SIGKILL) and stopped (SIGSTOP) again and again; detection is the time
in the run's status, recovery the first new step of all ranks. The same trainer, model and faults under
`torchrun --max-restarts`, on the same machine, right after: it notices by its own log, and a hang not at all.
"""

from __future__ import annotations

import asyncio
import signal
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from figures import Row, arguments, publish, row
from rich.console import Console
from rich.progress import Progress
from torchrun_peer import injured, torchrun

from mend.apply import TRAINING_RUNS
from mend.demo.watch import Harm, Sight, Watcher, injure
from mend.kube.client import KubeClient
from mend.model import RunPhase
from mend_local.bootstrap import S3_SECRET
from mend_local.cluster import LocalCluster

NAME, NAMESPACE, RANKS = "bench", "default", 2
TRAINER = ["mend_trainer.train", "--set", "steps=1000000", "--set", "log_every_seconds=0"]
STEPS_BETWEEN = 12  # enough that the step's limit is learnt and a checkpoint is committed
DETECT_CRASH, DETECT_HANG, RECOVER = 0.2, 2.0, 3.0
PATIENCE_SECONDS = 300.0


def main() -> int:
    """Run it."""
    options = arguments(__doc__ or "")
    return publish("Detection and recovery", asyncio.run(measure(options)), options)


async def measure(options: Namespace) -> list[Row]:
    """All rows."""
    times = 3 if options.quick else 20
    hang_patience = 15.0 if options.quick else 60.0
    with tempfile.TemporaryDirectory(prefix="mend-bench-") as scratch, Progress(console=Console(stderr=True)) as bar:
        ours = await _measure_mend(Path(scratch), times, bar)
        theirs = await _measure_torchrun(Path(scratch), 1 if options.quick else 5, hang_patience, bar)
    rows = []
    for harm, target in ((Harm.CRASH, DETECT_CRASH), (Harm.HANG, DETECT_HANG)):
        detect, recover = zip(*ours[harm], strict=True)
        their_detect, their_recover = theirs[harm]
        limit = f"not in {hang_patience:.0f} s"
        rows.append(row(f"{harm}: fault to detection", detect, target, peers={"torchrun": their_detect}, limit=limit))
        rows.append(
            row(f"{harm}: fault to first new step", recover, RECOVER, peers={"torchrun": their_recover}, limit=limit)
        )
    return rows


async def _measure_mend(scratch: Path, times: int, bar: Progress) -> dict[Harm, list[tuple[float, float]]]:
    results: dict[Harm, list[tuple[float, float]]] = {Harm.CRASH: [], Harm.HANG: []}
    task = bar.add_task("mend: injections", total=2 * times)
    async with LocalCluster(scratch / "cluster") as cluster:
        client = await KubeClient.from_kubeconfig(str(cluster.kubeconfig))
        watcher = Watcher(client, NAMESPACE)
        try:
            await client.create(TRAINING_RUNS, NAMESPACE, _run(cluster, scratch))
            for number in range(2 * times):
                harm = (Harm.CRASH, Harm.HANG)[number % 2]
                results[harm].append(await _injure_once(watcher, harm, rank=number // 2 % RANKS))
                bar.advance(task)
        finally:
            await watcher.close()
            await client.close()
    return results


async def _injure_once(watcher: Watcher, harm: Harm, rank: int) -> tuple[float, float]:
    """(seconds to detect, seconds to recover) of one fault, once the run trains steadily."""
    steady = await _until(watcher, lambda sight: _steps_done(sight) >= STEPS_BETWEEN)
    before = len(steady.status.incidents) and steady.status.incidents[-1].id
    injection = injure(steady, rank, harm)
    assert injection is not None, f"rank {rank} is not there"

    def is_over(sight: Sight) -> bool:
        last = sight.status.incidents[-1] if sight.status.incidents else None
        return last is not None and last.id > before and not last.is_open

    incident = (await _until(watcher, is_over)).status.incidents[-1]
    assert incident.recovered_at is not None
    if incident.culprit_ranks != (rank,):
        raise RuntimeError(f"{harm} of rank {rank}: blamed was {incident.culprit_ranks}: {incident.summary}")
    return incident.detected_at - injection.at, incident.recovered_at - injection.at


def _steps_done(sight: Sight) -> int:
    if sight.status.phase is not RunPhase.RUNNING or len(sight.ranks) < RANKS:
        return 0
    return min(rank.steps_done for rank in sight.ranks)


async def _until(watcher: Watcher, is_so: Any) -> Sight:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        sight = await watcher.see(NAME)
        if is_so(sight):
            return sight
        if sight.status.phase is RunPhase.FAILED:
            raise RuntimeError(f"the run has failed: {[each.message for each in sight.status.conditions]}")
        await asyncio.sleep(0.02)
    raise RuntimeError(f"nothing moved for {PATIENCE_SECONDS} s: {sight}")


def _run(cluster: LocalCluster, scratch: Path) -> dict[str, Any]:
    assert cluster.s3 is not None
    trainer = {
        "name": "trainer",
        "image": "mend-trainer",
        "command": ["python", "-m", *TRAINER, "--set", f"data.cache={scratch}/data"],
        "env": [
            {"name": "GLOO_SOCKET_IFNAME", "value": "lo"},
            {"name": "MEND_PRELOAD", "value": "mend_trainer.train"},
        ],
    }
    plenty = {"user": 1000, "infrastructure": 1000, "hang": 1000, "preemption": 1000}
    return {
        "apiVersion": "mend.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {"name": NAME},
        "spec": {
            "workers": {"replicas": RANKS, "ranksPerWorker": 1, "template": {"spec": {"containers": [trainer]}}},
            "checkpoint": {
                "uri": f"s3://{cluster.s3.bucket}/bench",
                "credentialsSecret": S3_SECRET,
                "interval": "5 steps",
            },
            "recovery": {"budgets": plenty},
        },
    }


async def _measure_torchrun(
    scratch: Path, times: int, hang_patience: float, bar: Progress
) -> dict[Harm, tuple[float | None, float | None]]:
    task = bar.add_task("torchrun: injections", total=times + 1)
    trainer = [*TRAINER, "--set", f"data.cache={scratch}/data"]
    async with torchrun(scratch, trainer, RANKS) as run:
        crashes = []
        for _ in range(times):
            crashes.append(await injured(run, signal.SIGKILL, PATIENCE_SECONDS))
            bar.advance(task)
        hang = await injured(run, signal.SIGSTOP, hang_patience)
        bar.advance(task)
    detect = sorted(each for each, _ in crashes if each is not None)
    recover = sorted(each for _, each in crashes if each is not None)
    return {Harm.CRASH: (_middle(detect), _middle(recover)), Harm.HANG: hang}


def _middle(samples: list[float]) -> float | None:
    return samples[len(samples) // 2] if samples else None


if __name__ == "__main__":
    raise SystemExit(main())
