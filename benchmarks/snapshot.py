"""What a snapshot costs: the stall of a save and a restore from memory, each beside a memcpy of the same bytes.

    python benchmarks/snapshot.py [--megabytes 400] [--rounds 9] [--json FILE]

One rank alone and without a saver, whose work is not the loop's; saves and copies take turns in one run, so that what
else the machine does meets both alike.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch

from mend.protocol import ENV_ARENAS, CheckpointPlan, CheckpointRef
from mend_trainer.checkpoint import Checkpointer
from mend_trainer.checkpoint.writer import digest_all
from mend_trainer.slots import arena_path

_TENSORS = 100


class NoSaver:
    """Nobody: what is measured is the rank's part."""

    tells_agent = True

    def wake(self, staged: object) -> None:
        """Nobody is there."""

    def revive(self) -> None:
        """Nobody is there."""

    def close(self) -> None:
        """Nobody is there."""


def a_state(megabytes: int) -> dict[str, dict[str, torch.Tensor]]:
    """So many bytes in many tensors of two sizes, as a model and its moments have them."""
    elements = (megabytes << 20) // 4 // _TENSORS
    sizes = [elements + (elements // 2 if number % 2 else -(elements // 2)) for number in range(_TENSORS)]
    return {"model": {f"layer.{number}": torch.randn(size) for number, size in enumerate(sizes)}}


def timed(work: object) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - began


def measure(megabytes: int, rounds: int) -> dict[str, object]:
    """Medians and quartiles, in milliseconds, and their ratios to memcpy."""
    state = a_state(megabytes)
    tensors = list(state["model"].values())
    total = sum(tensor.nbytes for tensor in tensors)
    target = torch.zeros(total, dtype=torch.uint8)
    pieces = []
    position = target.data_ptr()
    for tensor in tensors:
        pieces.append((position, tensor.data_ptr(), tensor.nbytes))
        position += tensor.nbytes

    def memcpy() -> None:
        for to, source, length in pieces:
            ctypes.memmove(to, source, length)

    keeper = Checkpointer(
        CheckpointPlan(uri="file:///nowhere"),
        run="bench/run",
        run_uid="u",
        attempt=1,
        report=lambda _: None,
        saver=lambda arena: NoSaver(),
    )
    step = 0

    def save() -> None:
        nonlocal step
        step += 1
        assert keeper.save(step, step, state, {"step": step}, owed=False)

    for _ in range(3):  # both slots touched, everything imported
        save()
        memcpy()
    saves, copies, restores = [], [], []
    os.environ[ENV_ARENAS] = arena_path(keeper.arena.descriptor)  # mapped anew each time, as by a rank that is new
    into = {"model": {name: torch.zeros_like(tensor) for name, tensor in state["model"].items()}}
    for _ in range(rounds):
        copies.append(timed(memcpy))
        saves.append(timed(save))
        snapshot = keeper.arena.snapshots()[-1]
        snapshot.add_digests(digest_all(snapshot))
        ref = CheckpointRef(uri=f"memory:{snapshot.header.save_id}", step=step, attempt=1)
        restores.append(timed(lambda ref=ref: keeper.restore([ref], into)))
        assert all(torch.equal(into["model"][name], tensor) for name, tensor in state["model"].items())
        for tensor in into["model"].values():
            tensor.zero_()
    memcpy_seconds = statistics.median(copies)
    return {
        "megabytes": total >> 20,
        "rounds": rounds,
        "memcpy_ms": spread(copies),
        "save_stall_ms": spread(saves),
        "restore_ms": spread(restores),
        "stall_to_memcpy": round(statistics.median(saves) / memcpy_seconds, 2),
        "restore_to_memcpy": round(statistics.median(restores) / memcpy_seconds, 2),
    }


def spread(seconds: list[float]) -> list[float]:
    """First quartile, median and third quartile in milliseconds."""
    return [round(1e3 * value, 1) for value in statistics.quantiles(seconds, n=4)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # as an agent starts its ranks
    found = measure(options.megabytes, options.rounds)
    json.dump(found, sys.stdout, indent=2)
    print()
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
