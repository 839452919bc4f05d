"""The reference trainer under real faults: a run that was killed and resumed equals one to which nothing happened."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mend.heartbeats import Phase
from mend.orders import CheckpointPlan
from mend.reports import Restored, SaveFailed
from mend.store import open_store
from mend_trainer.alone import next_attempt
from trainer_gang import (
    TINY_MODEL,
    TrainerGang,
    TrainerRank,
    Zygote,
    a_gang,
    a_little_text,
    digests_of,
    manifest_of,
    tiny_arguments,
)

_STEPS = 150  # enough that a busy machine does not come too late to kill the gang in the middle
_EXAMPLE = Path(__file__).parents[2] / "examples" / "plain_loop.py"


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    """One import of the trainer for all tests here."""
    process = Zygote()
    yield process
    process.close()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little text to train on."""
    return a_little_text(tmp_path_factory.mktemp("text"))


def a_tiny_run(text: Path, *, steps: int = _STEPS, **changes: object) -> list[str]:
    """Its arguments."""
    return tiny_arguments(text, steps=steps, **changes)


_DROPOUT = TINY_MODEL.replace("}", ", attention_dropout: 0.2}")  # every rank draws random numbers in every step
_LARGE_SCALE = {"parallel.precision": "float16", "optimizer.loss_scale": 2.0**24}  # overflows at first, and adapts


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (4, {"model": _DROPOUT}),
        (2, {"model": _DROPOUT, "parallel.strategy": "fsdp2"}),
        (2, {"model": _DROPOUT, **_LARGE_SCALE}),
    ],
    ids=["ddp", "fsdp2", "float16"],
)
def test_a_killed_and_resumed_run_equals_an_unbroken_one(
    world: int, changes: dict[str, object], zygote: Zygote, text: Path, tmp_path: Path
) -> None:
    """Losses of every step and the digests of the whole final state are equal, generators of all ranks among it.

    DDP has four ranks, since the sum of two does not depend on their order.
    """
    argv = a_tiny_run(text, **changes)
    calm = CheckpointPlan(uri=f"file://{tmp_path}/calm", interval_steps=7)
    with a_gang(zygote, tmp_path / "calm-run", argv, world=world, plan=calm) as gang:
        unbroken = gang.succeed().losses()
        final = manifest_of(calm, gang.commits()[-1])
    assert list(unbroken) == list(range(_STEPS))
    assert final.step == _STEPS - 1

    plan = CheckpointPlan(uri=f"file://{tmp_path}/hit", interval_steps=7)
    with a_gang(zygote, tmp_path / "hit-run", argv, world=world, plan=plan) as gang:
        gang.wait_for(gang.commits)
        gang.kill()
        before, saved = gang.losses(), gang.commits()
    assert len(before) < _STEPS
    with a_gang(zygote, tmp_path / "hit-run", argv, world=world, plan=plan, attempt=2, restore=saved[::-1]) as gang:
        after = gang.succeed().losses()
        again = manifest_of(plan, gang.commits()[-1])
        told = [each for each in gang.ranks[0].reports() if isinstance(each, Restored)]
        assert all(rank.page.phase is Phase.EXITING for rank in gang.ranks)
    assert told == [Restored(checkpoint=saved[-1])]
    assert list(after) == list(range(saved[-1].step + 1, _STEPS))
    assert before == {step: unbroken[step] for step in before}
    assert after == {step: unbroken[step] for step in after}
    assert digests_of(again) == digests_of(final)
    assert (again.values, again.tokens) == (final.values, final.tokens)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_killed_and_resumed_run_on_a_gpu_equals_an_unbroken_one(zygote: Zygote, text: Path, tmp_path: Path) -> None:
    """With deterministic algorithms: losses, state, and the device's generator, from which the dropout is drawn."""
    argv = a_tiny_run(text, model=_DROPOUT, deterministic="true")
    calm = CheckpointPlan(uri=f"file://{tmp_path}/calm", interval_steps=7)
    with a_gang(zygote, tmp_path / "calm-run", argv, world=1, plan=calm) as gang:
        unbroken = gang.succeed().losses()
        final = manifest_of(calm, gang.commits()[-1])
    assert "ranks.0.rng.cuda0" in final.tensors
    plan = CheckpointPlan(uri=f"file://{tmp_path}/hit", interval_steps=7)
    with a_gang(zygote, tmp_path / "hit-run", argv, world=1, plan=plan) as gang:
        gang.wait_for(gang.commits)
        gang.kill()
        saved = gang.commits()
    with a_gang(zygote, tmp_path / "hit-run", argv, world=1, plan=plan, attempt=2, restore=saved[::-1]) as gang:
        after = gang.succeed().losses()
        again = manifest_of(plan, gang.commits()[-1])
    assert after == {step: unbroken[step] for step in range(saved[-1].step + 1, _STEPS)}
    assert digests_of(again) == digests_of(final)
    assert again.values == final.values


def test_a_wish_of_any_rank_makes_all_save_at_one_step(zygote: Zygote, text: Path, tmp_path: Path) -> None:
    """The agent of one worker asks its rank alone; the checkpoint is whole, and no save failed."""
    plan = CheckpointPlan(uri=f"file://{tmp_path}/run")
    with a_gang(zygote, tmp_path / "run-of", a_tiny_run(text, steps=5000), plan=plan) as gang:
        gang.wait_for(lambda: gang.ranks[1].page.step > 2)
        asked_at = gang.ranks[1].page.step
        gang.ranks[1].request_save()
        gang.wait_for(gang.commits)
        (ref,) = gang.commits()
        assert asked_at <= ref.step
        assert manifest_of(plan, ref).world_size == 2
        gang.wait_for(lambda: all(rank.page.committed_step == ref.step for rank in gang.ranks))
        assert not [each for each in gang.ranks[0].reports() if isinstance(each, SaveFailed)]


def test_evaluation_is_a_curve_of_its_own(zygote: Zygote, text: Path, tmp_path: Path) -> None:
    """Every so many steps, on held-out text, the same for all ranks, and without touching the training."""
    with a_gang(zygote, tmp_path / "plain", a_tiny_run(text, steps=7)) as gang:
        plain = gang.succeed().losses()
    argv = a_tiny_run(text, steps=7, **{"evaluation.every_steps": 3, "evaluation.batches": 2})
    with a_gang(zygote, tmp_path / "evaluated", argv) as gang:
        gang.succeed()
        assert gang.losses() == plain
        evaluated = gang.losses("eval_loss")
    assert list(evaluated) == [2, 5]
    assert all(loss is not None and 3 < loss < 8 for loss in evaluated.values())


def test_a_checkpoint_of_another_model_ends_every_rank(zygote: Zygote, text: Path, tmp_path: Path) -> None:
    """Nobody trains on; the log names the tensors."""
    plan = CheckpointPlan(uri=f"file://{tmp_path}/run")
    with a_gang(zygote, tmp_path / "one", a_tiny_run(text, steps=2, **{"schedule.warmup_steps": 1}), plan=plan) as gang:
        saved = gang.succeed().commits()
    wider = a_tiny_run(text, steps=4, **{"schedule.warmup_steps": 1, "model.intermediate_size": 48})
    with a_gang(zygote, tmp_path / "two", wider, plan=plan, attempt=2, restore=saved) as gang:
        assert [rank.exit_code() for rank in gang.ranks] == [1, 1]
        assert all("mlp.up_proj.weight" in rank.log for rank in gang.ranks)


def test_a_plain_loop_goes_on_where_it_was_killed(zygote: Zygote, tmp_path: Path) -> None:
    """The example, alone, run again after a SIGKILL: it ends with exactly the losses of an unbroken one."""

    def a_loop(name: str, uri: str) -> TrainerRank:
        return TrainerRank(zygote, [str(_EXAMPLE), uri], {}, tmp_path / name)

    def losses(rank: TrainerRank) -> dict[int, float]:
        lines = [line.split() for line in rank.log.splitlines() if line.startswith("step ")]
        return {int(words[1]): float(words[3]) for words in lines}

    uri = f"file://{tmp_path}/hit"
    calm = a_loop("calm", f"file://{tmp_path}/calm-run")
    hit = a_loop("first", uri)
    TrainerGang([hit]).wait_for(lambda: next_attempt(open_store(uri))[1])
    TrainerGang([hit]).kill()
    newest = next_attempt(open_store(uri))[1][0].step
    resumed = a_loop("second", uri)
    try:
        assert (resumed.exit_code(), calm.exit_code()) == (0, 0), resumed.log + calm.log
        assert newest < min(losses(resumed))
        assert losses(hit).items() | losses(resumed).items() == losses(calm).items()
    finally:
        for each in (calm, hit, resumed):
            each.close()
