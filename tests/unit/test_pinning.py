"""What CUDA is told of the memory that states are copied into; its part is played here, since CI has no GPU."""

from __future__ import annotations

import pytest
import torch

from mend_trainer.checkpoint.arena import Arena
from mend_trainer.checkpoint.layout import Block


class Cudart:
    """Remembers what is pinned, refuses what CUDA would."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}
        self.refused = 0

    def cudaHostRegister(self, address: int, length: int, flags: int) -> int:
        """0, or that it is pinned already."""
        overlaps = any(begin < address + length and address < begin + size for begin, size in self.pinned.items())
        self.refused += overlaps
        if not overlaps:
            self.pinned[address] = length
        return 712 if overlaps else 0

    def cudaHostUnregister(self, address: int) -> int:
        """0, or that it is not pinned."""
        return 0 if self.pinned.pop(address, 0) else 713


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Cudart:
    """In the place of CUDA's."""
    runtime = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    return runtime


def a_block(length: int) -> Block:
    """Of that many bytes."""
    return Block(name="w", path=("w",), dtype="uint8", shape=(length,), offsets=(0,), sizes=(length,))


def test_a_state_that_grows_is_pinned_anew(cudart: Cudart) -> None:
    """What is mapped no longer is not pinned either, so the same addresses can be again, however often it grows."""
    arena = Arena.create("own")
    for length in (1 << 20, 1 << 22, 1 << 24, 1 << 25):
        arena.prepare([a_block(length)], pinned=True)
        assert sorted(cudart.pinned.values()) == [length, length]
    assert not cudart.refused


def test_a_state_on_no_gpu_is_not_pinned(cudart: Cudart) -> None:
    """CUDA is not even asked."""
    Arena.create("own").prepare([a_block(1 << 20)])
    assert not cudart.pinned
