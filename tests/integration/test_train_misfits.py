"""The reference trainer, changed, on the checkpoint of an unchanged one: it is refused, or goes on as was said."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from mend.exitcodes import ExitCode
from mend.orders import CheckpointPlan
from mend.states import CheckpointRef
from trainer_gang import Zygote, a_gang

_SETTINGS = {
    "steps": 2,
    "global_batch": 4,
    "schedule.warmup_steps": 1,
    "model.hidden_size": 16,
    "model.layers": 1,
    "model.heads": 2,
    "model.kv_heads": 1,
    "model.intermediate_size": 32,
    "model.context": 16,
    "data.sequence_length": 16,
}


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    """One import of the trainer for all tests here."""
    process = Zygote()
    yield process
    process.close()


class Saved:
    """A run of two steps and its checkpoint."""

    def __init__(self, zygote: Zygote, folder: Path) -> None:
        self.zygote = zygote
        self.folder = folder
        self.text = folder / "text"
        self.text.mkdir()
        for number in range(40):
            (self.text / f"{number}.txt").write_text(f"{number} times {number} is {number * number}, they say.\n" * 30)
        self.plan = CheckpointPlan(uri=f"file://{folder}/run")
        self.attempts = 0
        self.refs: Sequence[CheckpointRef] = ()
        code, _ = self.train({})
        assert code == 0

    def train(self, changes: dict[str, object], world: int = 1) -> tuple[int | None, str]:
        """Exit code and log of one more attempt, which does not count as the run's."""
        self.attempts += 1
        settings = {**_SETTINGS, "data.text": self.text, "data.cache": self.folder / "cache", **changes}
        argv = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
        folder = self.folder / "ranks"
        with a_gang(
            self.zygote, folder, argv, world=world, attempt=self.attempts, plan=self.plan, restore=self.refs
        ) as gang:
            codes = {rank.exit_code() for rank in gang.ranks}
            assert len(codes) == 1
            self.refs = self.refs or gang.commits()
            return codes.pop(), gang.ranks[-1].log


@pytest.fixture(scope="module")
def saved(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """One for all changes."""
    return Saved(zygote, tmp_path_factory.mktemp("misfits"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model.intermediate_size": 48}, "mlp.up_proj.weight: float32 [32, 16] in the checkpoint, float32 [48, 16]"),
        ({"model.heads": 4, "model.kv_heads": 2}, "model.heads: 2 in the checkpoint, 4 here"),
        ({"model.context": 32}, "model.context: 16 in the checkpoint, 32 here"),
        ({"model.rope_theta": 500_000}, "model.rope_theta: 10000.0 in the checkpoint, 500000.0 here"),
        ({"optimizer.weight_decay": 0.2}, "optimizer.weight_decay: 0.1 in the checkpoint, 0.2 here"),
        ({"parallel.precision": "float16"}, "scaler: the checkpoint has no state of it"),
        # 257 and 300 pieces are padded to the same number: no tensor tells.
        ({"data.vocabulary": "bpe", "data.vocabulary_size": 300}, "the text or the vocabulary changed"),
        ({"data.sequence_length": 8}, "sequence_length 16, here it is 8: set data.sequence_length back"),
        ({"seed": 1}, "seed 0, here it is 1: set the seed back"),
        ({"global_batch": 8}, "global_batch 4, here it is 8: it stays the same at every world size"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_change_that_does_not_fit_ends_the_attempt(saved: Saved, changes: dict[str, object], told: str) -> None:
    """Before a step is done, naming what differs, where, and what to do."""
    code, log = saved.train({"steps": 3, **changes})
    assert code == 1
    assert told in log
    assert "step 2 " not in log


@pytest.mark.parametrize(
    "changes",
    [
        {"accept_changes": "[model.rope_theta]", "model.rope_theta": 500_000},
        {"accept_changes": "[global_batch]", "global_batch": 8},
        {"micro_batch": 1, "log_every_seconds": 0, "evaluation.every_steps": 1, "optimizer.clip_norm": 0.5},
        {"parallel.strategy": "fsdp2", "parallel.precision": "bfloat16", "parallel.checkpoint_activations": "true"},
    ],
    ids=lambda value: "-".join(value),
)
def test_a_change_that_is_meant_or_changes_no_state_goes_on(saved: Saved, changes: dict[str, object]) -> None:
    """What was accepted by name, how work is cut, how the model is spread and in which precision it computes."""
    code, log = saved.train({"steps": 3, **changes})
    assert code == 0, log
    assert "step 2 " in log


def test_more_ranks_than_sequences_are_a_bad_configuration(saved: Saved) -> None:
    """Not the fault of the checkpoint, and no retry can help."""
    code, log = saved.train({"steps": 3}, world=5)
    assert code == ExitCode.BAD_CONFIG
    assert "global_batch: 4, expected at least one sequence for each of the 5 ranks: raise it in a new run, or" in log
