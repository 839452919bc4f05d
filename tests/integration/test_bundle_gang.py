"""The bundle on several real ranks: torch's names under every strategy, and a state that one hands to another."""

from __future__ import annotations

from pathlib import Path

import pytest

from bundle_ranks import hand_over, names
from gang_of_ranks import run_ranks


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_names_are_those_of_torch(kind: str, tmp_path: Path) -> None:
    """So that any torch user reads the checkpoint, and any strategy takes up that of another."""
    for found in run_ranks(2, tmp_path, names, kind):
        for ours, theirs in found.values():
            assert ours == theirs
            assert not any("module." in name for name in ours)


def test_a_layer_without_gradient_is_handed_on_as_one(tmp_path: Path) -> None:
    """A rank that takes a place has room for states that the source has not; both go on alike."""
    kept, new = run_ranks(2, tmp_path, hand_over)
    assert kept == new
