"""A rank's generators go on exactly where they were, and differ between ranks."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from mend_trainer.rng import device_names, rng_state, seed_generators, set_rng_state


def draws() -> list[float]:
    """Some of each generator, the second halves of gaussian pairs among them."""
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.normal()),
        float(np.random.random()),
        float(torch.randn(())),
    ]


@pytest.mark.parametrize("drawn_before", [0, 1, 2])
def test_generators_continue(drawn_before: int) -> None:
    """Also in the middle of a pair of gaussians, of which one is kept back."""
    seed_generators(1, 0)
    for _ in range(drawn_before):
        draws()
    saved = {name: state.clone() for name, state in rng_state().items()}
    expected = [draws() for _ in range(3)]
    seed_generators(2, 0)
    set_rng_state(saved)
    assert [draws() for _ in range(3)] == expected


def test_shapes_never_change() -> None:
    """So that a state fits in place whatever was drawn before."""
    before = {name: state.shape for name, state in rng_state().items()}
    draws()
    assert {name: state.shape for name, state in rng_state().items()} == before


@pytest.mark.parametrize("own", range(4))
def test_devices_are_counted_from_the_ranks_own(own: int) -> None:
    """`cuda0` is the one it computes on, so its numbers go with it to a device of another number; none is left out."""
    names = device_names(own, 4)
    assert names["cuda0"] == own
    assert sorted(names.values()) == list(range(4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_generators_of_cuda_devices_continue() -> None:
    """Of every device, whichever is the current one."""
    devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    for device in devices:
        torch.rand(3, device=device)
    saved = rng_state()
    expected = [torch.rand(3, device=device).tolist() for device in devices]
    seed_generators(9, 9)
    set_rng_state(saved)
    assert [torch.rand(3, device=device).tolist() for device in devices] == expected


def test_ranks_draw_numbers_of_their_own() -> None:
    """The same seed, another rank: nothing in common. The same rank: everything."""
    seen = []
    for seed, rank in ((3, 0), (3, 1), (3, 0)):
        seed_generators(seed, rank)
        seen.append(draws())
    assert seen[0] == seen[2]
    assert not set(seen[0]) & set(seen[1])
