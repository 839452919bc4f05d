"""A training configuration is right, or every mistake is named with field, value and what is expected."""

from __future__ import annotations

from pathlib import Path

import pytest

from mend_trainer.config import BadConfig, TrainConfig, read_config
from mend_trainer.models.sizes import PRESETS
from mend_trainer.optimization import learning_rate_factor
from mend_trainer.train import main, pieces_per_step


def test_nothing_at_all_is_a_whole_configuration() -> None:
    """A laptop needs no file."""
    assert read_config(None) == TrainConfig()


def test_a_file_and_settings_on_top(tmp_path: Path) -> None:
    """Settings win; a preset may be changed in part; 3e-4 is a number."""
    file = tmp_path / "run.yaml"
    file.write_text("steps: 9\nmodel: {preset: clio-3b, layers: 2}\noptimizer: {learning_rate: 3e-4}\n")
    config = read_config(file, ["steps=7", "schedule.warmup_steps=2", "checkpoint.uri=s3://bucket/run/"])
    assert (config.steps, config.optimizer.learning_rate, config.schedule.warmup_steps) == (7, 3e-4, 2)
    assert (config.model.layers, config.model.hidden_size) == (2, PRESETS["clio-3b"].hidden_size)
    assert config.checkpoint is not None
    plan = config.checkpoint.plan()
    assert (plan.uri, plan.interval_steps, plan.interval_seconds) == ("s3://bucket/run", None, 600.0)


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ("steps=0", "steps: 0, expected `int` >= 1"),
        ("stepz=3", "stepz: unknown field; did you mean steps?"),
        ("data.sequenc=3", "data.sequenc: unknown field; did you mean sequence_length?"),
        ("checkpoint.ur=x", "checkpoint.ur: unknown field; did you mean uri?"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate: 'fast', expected `float`, got `str`"),
        ("data.vocabulary=words", "data.vocabulary: 'words', expected one of bytes, bpe"),
        ("model.preset=huge", "model.preset: 'huge', expected one of tiny, small, clio-3b"),
        ("model.heads=3", "model.hidden_size: 128, expected a multiple of 2 * heads (6)"),
        ("model.kv_heads=3", "model.kv_heads: 3, expected a divisor of heads (4)"),
        ("model.layers=-1", "model.layers: -1, expected at least 1"),
        ("model=tiny", "model: 'tiny', expected `object`, got `str`"),
        ("data.sequence_length=4096", "data.sequence_length: 4096, expected at most model.context (512)"),
        ("schedule.warmup_steps=900", "schedule.warmup_steps: 900, expected at most steps"),
        ("model.attention_dropout=1", "model.attention_dropout: 1.0, expected at least 0 and less than 1"),
        (
            "parallel={strategy: fsdp2, precision: float16}",
            "parallel.precision: 'float16', expected bfloat16 or float32",
        ),
        ("accept_changes=[seed]", "accept_changes: 'seed', expected some of global_batch, model.hidden_size"),
        ("steps", "--set steps: expected FIELD=VALUE"),
        ("steps.deep=1", "--set steps.deep=1: steps holds 5, expected a section of fields"),
        ("steps=[", "--set steps=[: not YAML"),
    ],
)
def test_a_mistake_is_named(setting: str, error: str) -> None:
    """The message is one that the user can act on."""
    with pytest.raises(BadConfig) as caught:
        read_config(None, ["steps=5", "schedule.warmup_steps=1", setting])
    assert error in str(caught.value)


def test_a_missing_or_odd_file_is_named(tmp_path: Path) -> None:
    """By its path."""
    with pytest.raises(BadConfig, match=r"nowhere.yaml: No such file or directory; expected a YAML file"):
        read_config(tmp_path / "nowhere.yaml")
    (tmp_path / "list.yaml").write_text("- steps\n")
    with pytest.raises(BadConfig, match=r"list.yaml: \['steps'\], expected fields"):
        read_config(tmp_path / "list.yaml")


def test_a_bad_configuration_exits_with_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    """78 tells mend that trying again cannot help; no traceback hides the message."""
    with pytest.raises(SystemExit) as left:
        main(["--set", "steps=none"])
    assert left.value.code == 78
    assert capsys.readouterr().err == "mend-train: defaults: steps: 'none', expected `int`, got `str`\n"


def test_more_ranks_than_sequences_are_refused() -> None:
    """Any other world can share the global batch; the message says what can be done."""
    config = read_config(None, ["global_batch=10", "micro_batch=1"])
    assert [pieces_per_step(config, world) for world in (1, 3, 4, 5, 10)] == [10, 4, 3, 2, 1]
    told = (
        "global_batch: 10, expected at least one sequence for each of the 11 ranks: .* give this one 10 ranks at most"
    )
    with pytest.raises(BadConfig, match=told):
        pieces_per_step(config, 11)


@pytest.mark.parametrize(
    ("kind", "decay", "factors"),
    [
        ("cosine", 0, {0: 0.25, 3: 1.0, 4: 1.0, 12: 0.55, 20: 0.1}),
        ("wsd", 8, {0: 0.25, 3: 1.0, 12: 1.0, 16: 0.55, 20: 0.1}),
    ],
)
def test_the_learning_rate_follows_its_schedule(kind: str, decay: int, factors: dict[int, float]) -> None:
    """Warm-up, then the curve, down to the final fraction."""
    config = read_config(
        None, ["steps=20", f"schedule.kind={kind}", "schedule.warmup_steps=4", f"schedule.decay_steps={decay}"]
    )
    assert {step: round(learning_rate_factor(config.schedule, step, 20), 9) for step in factors} == factors
