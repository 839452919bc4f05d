"""What a standby makes ready: the model that its rank will be asked for, and nothing else is changed by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mend_trainer import prepared, train
from mend_trainer.config import read_config
from mend_trainer.models.llama import build_model
from mend_trainer.parallel import Place, spread_model
from mend_trainer.rng import rng_bytes, rng_state, rng_state_of, seed_generators, set_rng_state

SIZES = "{hidden_size: 16, layers: 1, heads: 2, kv_heads: 1, intermediate_size: 32, context: 16}"
ALONE = Place(0, 1, torch.device("cpu"))


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Of a tiny run."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"{number} is a number, they say.\n" * 30)
    settings = {"model": SIZES, "data.text": text, "data.sequence_length": 16, "data.cache": tmp_path / "cache"}
    return [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


def test_the_model_is_the_one_that_would_be_built(arguments: list[str]) -> None:
    """Its weights are those of a fresh one, without gradients; it is handed out once, and only for the same sizes."""
    train.mend_warm(arguments)
    config = read_config(None, [word for word in arguments if word != "--set"])
    asked = {"vocabulary_size": 320, "seed": config.seed}
    other = spread_model(config.model, config.parallel, ALONE, vocabulary_size=320, seed=config.seed + 1)
    model = spread_model(config.model, config.parallel, ALONE, **asked)
    again = spread_model(config.model, config.parallel, ALONE, **asked)
    assert model is not again
    assert not prepared._shelf
    fresh = build_model(config.model, **asked, device=ALONE.device)
    for mine, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.grad is None
    assert any(
        not torch.equal(mine, theirs) for mine, theirs in zip(other.parameters(), fresh.parameters(), strict=True)
    )


def test_generators_come_back_from_bytes() -> None:
    """The quick way to keep generators holds the same states as the one of checkpoints."""
    seed_generators(3, 1)
    held = rng_bytes()
    before = {name: state.clone() for name, state in rng_state().items()}
    drawn = torch.rand(3)
    assert rng_bytes() != held
    set_rng_state(rng_state_of(held))
    assert torch.equal(torch.rand(3), drawn)
    set_rng_state(rng_state_of(held))
    after = rng_state()
    assert set(after) == set(before)
    assert all(
        torch.equal(after[name], before[name]) or (after[name].isnan().all() and before[name].isnan().all())
        for name in before
    )
