"""What a snapshot costs: the stall of a save and a restore from memory, each beside a memcpy of the same bytes.

    python benchmarks/snapshot.py [--megabytes 400] [--rounds 9] [--small-pages] [--json FILE]

One rank alone and without a saver, whose work is not the loop's; saves and copies take turns in one run, so that what
else the machine does meets both alike. Each restore is done in a process of its own, forked as a standby is, with
tensors that are touched: there the arena is opened for the first time. `--small-pages`: as on a kernel that gives
shared memory no huge pages.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mend.environment import ENV_ARENAS
from mend.orders import CheckpointPlan
from mend.states import CheckpointRef
from mend_trainer.checkpoint import Checkpointer
from mend_trainer.checkpoint.writer import digest_all
from mend_trainer.slots import arena_path

_TENSORS = 100
_PR_SET_THP_DISABLE = 41
State = dict[str, dict[str, torch.Tensor]]


class NoSaver:
    """Nobody: what is measured is the rank's part."""

    tells_agent = True

    def wake(self, staged: object) -> None:
        """Nobody is there."""

    def revive(self) -> None:
        """Nobody is there."""

    def close(self) -> None:
        """Nobody is there."""


def a_state(megabytes: int) -> State:
    """So many bytes in many tensors of two sizes, as a model and its moments have them."""
    elements = (megabytes << 20) // 4 // _TENSORS
    sizes = [elements + (elements // 2 if number % 2 else -(elements // 2)) for number in range(_TENSORS)]
    return {"model": {f"layer.{number}": torch.randn(size) for number, size in enumerate(sizes)}}


def timed(work: object) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - began


class Copying:
    """The least that anybody must do: a plain copy of the tensors' bytes into memory that is there already."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.bytes = sum(tensor.nbytes for tensor in tensors)
        self._target = torch.empty(self.bytes, dtype=torch.uint8).fill_(1)
        self._moves = []
        position = self._target.data_ptr()
        for tensor in tensors:
            self._moves.append((position, tensor.data_ptr(), tensor.nbytes))
            position += tensor.nbytes

    def run(self) -> None:
        """Copy."""
        for to, source, length in self._moves:
            ctypes.memmove(to, source, length)


def a_keeper() -> Checkpointer:
    """Of a rank alone."""
    return Checkpointer(
        CheckpointPlan(uri="file:///nowhere"),
        run="bench/run",
        run_uid="u",
        attempt=1,
        report=lambda _: None,
        saver=lambda arena: NoSaver(),
    )


def come_back(ref: CheckpointRef, state: State) -> dict[str, float]:
    """A copy and a restore, as of a standby: its tensors are there and touched, and it has never seen the arena."""
    keeper = a_keeper()
    into = {"model": {name: torch.empty_like(tensor).fill_(1) for name, tensor in state["model"].items()}}
    copying = Copying(list(state["model"].values()))
    copying.run()
    found = {"memcpy": timed(copying.run), "restore": timed(lambda: keeper.restore([ref], into))}
    assert all(torch.equal(into["model"][name], tensor) for name, tensor in state["model"].items())
    return found


def in_new_process(work: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What it finds in a process that is forked for it, as standbys are."""
    gc.collect()
    gc.freeze()  # as the zygote does: a collection in the child would copy what it shares with this process
    reading, writing = os.pipe()
    if not (child := os.fork()):
        try:
            os.write(writing, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as said:  # noqa: PTH123 - a descriptor
        found: dict[str, float] = json.loads(said.read())
    os.waitpid(child, 0)
    return found


def measure(megabytes: int, rounds: int) -> dict[str, object]:
    """Medians and quartiles, in milliseconds, and their ratios to memcpy."""
    state = a_state(megabytes)
    copying = Copying(list(state["model"].values()))
    keeper = a_keeper()
    os.environ[ENV_ARENAS] = arena_path(keeper.arena.descriptor)  # where new processes find it
    step = 0

    def save() -> None:
        nonlocal step
        step += 1
        assert keeper.save(step, step, state, {"step": step}, owed=False)

    first = timed(save)
    for _ in range(3):  # both slots touched, everything imported
        save()
        copying.run()
    saves, copies, back = [], [], []
    for _ in range(rounds):
        copying.run()  # after a fork its pages are written to for the first time
        copies.append(timed(copying.run))
        saves.append(timed(save))
        snapshot = keeper.arena.snapshots()[-1]
        snapshot.add_digests(digest_all(snapshot))
        ref = CheckpointRef(uri=f"memory:{snapshot.header.save_id}", step=step, attempt=1)
        back.append(in_new_process(lambda ref=ref: come_back(ref, state)))
    restores, beside = ([found[name] for found in back] for name in ("restore", "memcpy"))
    return {
        "megabytes": copying.bytes >> 20,
        "rounds": rounds,
        "first_save_ms": round(1e3 * first, 1),  # it makes the arena's memory present
        "memcpy_ms": spread(copies),
        "save_stall_ms": spread(saves),
        "memcpy_in_new_process_ms": spread(beside),
        "restore_in_new_process_ms": spread(restores),
        "stall_to_memcpy": ratio(saves, copies),
        "restore_to_memcpy": ratio(restores, beside),
    }


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the rounds' own ratios."""
    return round(statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True)), 2)


def spread(seconds: list[float]) -> list[float]:
    """First quartile, median and third quartile in milliseconds."""
    return [round(1e3 * value, 1) for value in statistics.quantiles(seconds, n=4)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--small-pages", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.small_pages and ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0):
        parser.error("this kernel does not let a process do without huge pages")
    torch.set_num_threads(1)  # as an agent starts its ranks
    found = measure(options.megabytes, options.rounds)
    json.dump(found, sys.stdout, indent=2)
    print()
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
