"""How long a state takes to come back from shared memory, beside a plain copy of it and `dcp.load` from a disk.

restore_loop.py MEGABYTES ROUNDS FOLDER PORT    a line of JSON for each; all in turn, in one process
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from saving_ways import Memcpy, a_state, join_alone, tensors_of

from mend.orders import CheckpointPlan
from mend.states import MEMORY_SCHEME, CheckpointRef
from mend_trainer.checkpoint import Checkpointer

DIGEST_SECONDS = 120.0


def main(megabytes: int, rounds: int, folder: Path, port: str) -> None:
    """Measure."""
    torch.set_num_threads(1)
    join_alone(port)
    state = a_state(megabytes * 1_000_000)
    keeper = Checkpointer(
        CheckpointPlan(uri=f"file://{folder}/mend"), run="bench/run", run_uid="uid", attempt=1, report=lambda _: None
    )
    ref = in_memory(keeper, state)
    dcp.save(state, checkpoint_id=str(folder / "dcp"))
    copy = Memcpy(folder, state)
    ways: dict[str, Callable[[], object]] = {
        "memcpy": lambda: copy.save(0, state),
        "mend": lambda: keeper.restore([ref], state),
        "dcp.load": lambda: dcp.load(state, checkpoint_id=str(folder / "dcp")),
    }
    for way in ways.values():
        way()
    before = [tensor.clone() for tensor in tensors_of(state)[:2]]
    for _ in range(rounds):
        for name, way in ways.items():
            for tensor in tensors_of(state) if name != "memcpy" else ():
                tensor.zero_()
            began = time.perf_counter()
            way()
            print(json.dumps({"way": name, "seconds": time.perf_counter() - began}), flush=True)
            assert all(map(torch.equal, before, tensors_of(state)))


def in_memory(keeper: Checkpointer, state: dict[str, object]) -> CheckpointRef:
    """A snapshot that is owed to nobody, once its digests are taken."""
    assert keeper.save(1, 1, state, {}, owed=False)
    (snapshot,) = keeper.arena.snapshots()
    deadline = time.monotonic() + DIGEST_SECONDS
    while snapshot.digests is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no digests within {DIGEST_SECONDS:g} s: is there a saver?")
        time.sleep(0.01)
    return CheckpointRef(uri=f"{MEMORY_SCHEME}{snapshot.header.save_id}", step=1, attempt=1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
