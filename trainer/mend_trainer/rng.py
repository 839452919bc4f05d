"""The random number generators of one rank: seeded, and as tensors of fixed shape, so that they fit a checkpoint."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
import xxhash

_CUDA: Final = "cuda"
_PYTHON_VERSION: Final = 3  # of the tuple that random.getstate() returns, since Python 3.2


def seed_generators(seed: int, rank: int) -> None:
    """Start every generator of this rank from the run's seed; each rank draws numbers of its own."""
    drawn = xxhash.xxh3_64_intdigest(f"{seed} {rank}".encode())
    random.seed(drawn)
    np.random.seed(drawn & 0xFFFF_FFFF)
    torch.manual_seed(drawn)  # CUDA's generators too


def seed_anew(origin: bytes, rank: int) -> None:
    """Start the generators of a rank that the restored checkpoint knows nothing of, since fewer ranks made it.

    `origin` tells apart the states that a run was restored from: a rank that comes and goes draws new numbers then.
    """
    seed_generators(xxhash.xxh3_64_intdigest(origin), rank)


def rng_state() -> dict[str, torch.Tensor]:
    """States of `random`, `numpy.random`, torch's CPU generator and, once CUDA is in use, of every CUDA device."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor(math.nan if gauss is None else gauss, dtype=torch.float64),
        "numpy": torch.tensor([*map(int, keys), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states |= {name: torch.cuda.get_rng_state(device) for name, device in _devices().items()}
    return states


def rng_bytes() -> dict[str, bytes]:
    """The same on a CPU in a third of the time, for every step; CUDA's generators are left out."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": np.array(words, dtype=np.uint32).tobytes(),
        "python_gauss": struct.pack("<d", math.nan if gauss is None else gauss),
        "numpy": np.asarray(keys).tobytes() + struct.pack("<qq", position, has_gauss),
        "numpy_gauss": struct.pack("<d", cached),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }


def rng_state_of(held: Mapping[str, bytes]) -> dict[str, torch.Tensor]:
    """The `rng_state` that `rng_bytes` was taken of."""
    keys, counts = held["numpy"][:-16], struct.unpack("<qq", held["numpy"][-16:])
    numpy = [*map(int, np.frombuffer(keys, dtype=np.uint32)), *counts]
    return {
        "python": torch.from_numpy(np.frombuffer(held["python"], dtype=np.uint32).astype(np.int64)),
        "python_gauss": torch.tensor(struct.unpack("<d", held["python_gauss"])[0], dtype=torch.float64),
        "numpy": torch.tensor(numpy, dtype=torch.int64),
        "numpy_gauss": torch.tensor(struct.unpack("<d", held["numpy_gauss"])[0], dtype=torch.float64),
        "torch": torch.frombuffer(bytearray(held["torch"]), dtype=torch.uint8),
    }


def set_rng_state(states: Mapping[str, torch.Tensor]) -> None:
    """Continue every generator from a `rng_state`."""
    gauss = float(states["python_gauss"])
    words = tuple(int(word) for word in states["python"])
    random.setstate((_PYTHON_VERSION, words, None if math.isnan(gauss) else gauss))
    *keys, position, has_gauss = (int(word) for word in states["numpy"])
    cached = float(states["numpy_gauss"])
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    devices = _devices() if any(name.startswith(_CUDA) for name in states) else {}
    for name, device in devices.items():
        if name in states:
            torch.cuda.set_rng_state(states[name], device)


def device_names(own: int, count: int) -> dict[str, int]:
    """Names for `count` devices, counted from the rank's own: `cuda0` is the one it computes on, whatever its number.

    So a rank that comes to another device, as when workers have another number of ranks, finds its numbers again.
    """
    return {f"{_CUDA}{offset}": (own + offset) % count for offset in range(count)}


def _devices() -> dict[str, int]:
    return device_names(torch.cuda.current_device(), torch.cuda.device_count())
