"""Runs whose world changes: killed, gone on with more or fewer ranks, laid out anew; and what was really trained on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from mend.manifest import Manifest
from mend.orders import CheckpointPlan
from mend.states import CheckpointRef
from mend_trainer.data.loader import Loader
from mend_trainer.data.shards import pack
from trainer_gang import TrainerGang, TrainerRank, Zygote, a_gang, manifest_of

_PROGRAM = Path(__file__).parents[1] / "programs" / "witnessed_trainer.py"
_STEPS = 120
_BATCH = 8
_LENGTH = 16
# Float32 sums of the same numbers in another order: two units in the last place (1.2e-7 each) were seen.
# To weigh 2 samples of one rank as 3 of another moves losses by 1e-3.
_ROUNDING = 2e-6
_DDP = {"parallel.strategy": "ddp"}
_FSDP2 = {"parallel.strategy": "fsdp2"}
_TWO_COPIES = {"parallel.strategy": "fsdp2", "parallel.shard_ranks": 2}

Rows = list[list[int]]


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    """One import of the trainer for all tests here."""
    process = Zygote()
    yield process
    process.close()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text of which no two sequences are alike, enough for more than one epoch of the run."""
    folder = tmp_path_factory.mktemp("worlds") / "text"
    folder.mkdir()
    for part in range(12):
        (folder / f"{part}.txt").write_text(
            "".join(f"{number:07d}\n" for number in range(100 * part, 100 * part + 100))
        )
    return folder


@pytest.fixture(scope="module")
def unbroken(zygote: Zygote, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, float], Manifest]:
    """Losses and last checkpoint of a run of one rank to which nothing happened."""
    folder = tmp_path_factory.mktemp("unbroken")
    plan = CheckpointPlan(uri=f"file://{folder}/run", interval_steps=50)
    with a_gang(zygote, folder / "ranks", a_run(text), world=1, plan=plan) as gang:
        losses = gang.succeed().losses()
        return {step: loss for step, loss in losses.items() if loss}, manifest_of(plan, gang.commits()[-1])


def a_run(text: Path, **changes: object) -> list[str]:
    """Arguments of the witnessed trainer for a model of some thousand parameters, one sequence at a time."""
    settings = {
        "steps": _STEPS,
        "global_batch": _BATCH,
        "micro_batch": 1,
        "schedule.warmup_steps": 2,
        "model": "{hidden_size: 16, layers: 2, heads: 2, kv_heads: 1, intermediate_size: 32, context: 16}",
        "data.text": text,
        "data.sequence_length": _LENGTH,
        "data.cache": text.parent / "cache",
        **changes,
    }
    return [str(_PROGRAM), *(word for name, value in settings.items() for word in ("--set", f"{name}={value}"))]


@dataclass
class Attempt:
    """What one attempt trained on: token rows by step and rank."""

    first: int
    ranks: list[list[Rows]]

    def step(self, number: int) -> Rows:
        """All rows of one step, in the order of ranks."""
        return [row for rank in self.ranks for row in rank[number - self.first]]


def seen_by(rank: TrainerRank) -> list[Rows]:
    """The rows of each step that this rank has done."""
    steps: list[Rows] = []
    rows: Rows = []
    for line in (rank.folder / "seen").read_text().splitlines(keepends=True):
        said = json.loads(line) if line.endswith("\n") else None
        if isinstance(said, list):
            rows += said
        elif said == "done" and rows:  # a step without rows is that of zero length, before a state is restored
            steps.append(rows)
            rows = []
    return steps


def the_order(text: Path) -> list[Rows]:
    """What one rank reads that is never disturbed."""
    split = pack(str(text), text.parent / "cache").train
    loader = Loader(split, sequence_length=_LENGTH, global_batch=_BATCH)
    assert loader.sequences < _STEPS * _BATCH, "the run is to go beyond one epoch"
    return [next(loader).inputs.tolist() for _ in range(_STEPS)]


@pytest.mark.parametrize(
    "history",
    [
        [(4, _DDP), (2, _FSDP2), (3, _DDP), (1, _DDP)],
        [(2, _FSDP2), (4, _TWO_COPIES), (3, _FSDP2), (2, _DDP)],
        [(3, _DDP), (2, _DDP), (3, _DDP)],
    ],
    ids=["ddp4-fsdp2-ddp3-alone", "fsdp2-mesh4-fsdp3-ddp2", "shrunk-and-grown"],
)
def test_every_token_is_trained_on_once_and_in_order(
    history: Sequence[tuple[int, dict[str, object]]],
    zygote: Zygote,
    text: Path,
    tmp_path: Path,
    unbroken: tuple[dict[int, float], Manifest],
) -> None:
    """Each attempt but the last is killed with more done than saved; what counts is the order of an undisturbed run."""
    plan = CheckpointPlan(uri=f"file://{tmp_path}/run", interval_steps=5)
    attempts: list[Attempt] = []
    curve: dict[int, float | None] = {}
    restore: list[CheckpointRef] = []
    for number, (world, layout) in enumerate(history, start=1):
        argv = a_run(text, **layout)
        first = restore[0].step + 1 if restore else 0
        with a_gang(zygote, tmp_path / "ranks", argv, world=world, plan=plan, attempt=number, restore=restore) as gang:
            if number < len(history):
                gang.wait_for(gang.commits)
                kill_beyond(gang, gang.commits()[-1].step + 1)
            else:
                gang.succeed()
            attempts.append(Attempt(first, [seen_by(rank) for rank in gang.ranks]))
            curve |= gang.losses()
            restore = [*gang.commits()[::-1], *restore]
    order = the_order(text)
    trained: Counter[tuple[int, ...]] = Counter()
    bounds = [*(attempt.first for attempt in attempts[1:]), _STEPS]
    for attempt, end in zip(attempts, bounds, strict=True):
        assert attempt.first < end
        for step in range(attempt.first, end):
            rows = attempt.step(step)
            assert rows == order[step], f"step {step}"
            trained.update(map(tuple, rows))
    assert trained == Counter(tuple(row) for batch in order for row in batch)
    losses, final = unbroken
    assert list(curve) == list(range(_STEPS))
    assert curve == pytest.approx(losses, rel=_ROUNDING)
    again = manifest_of(plan, restore[0])
    assert [link.attempt for link in again.lineage] == list(range(1, len(history)))
    assert again.tokens == final.tokens == _STEPS * _BATCH * _LENGTH
    assert again.values["loader"] == final.values["loader"]
    assert again.values["scheduler"] == final.values["scheduler"]


def kill_beyond(gang: TrainerGang, step: int) -> None:
    """SIGKILL to all once every rank has done that step, which no checkpoint has."""
    gang.wait_for(lambda: all(rank.page.step >= step for rank in gang.ranks))
    gang.kill()
