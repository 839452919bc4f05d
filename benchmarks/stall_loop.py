"""How long each way to save stops its caller: all ways in turn, round after round, in one process.

    stall_loop.py MEGABYTES ROUNDS FOLDER PORT WAY...    a line of JSON for each save, or for why a way cannot be gone

Between two saves everything is stored and the next waits, so that no way pays for another's work.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from saving_ways import a_state, clear, join_alone, opened, tensors_of


def main(megabytes: int, rounds: int, folder: Path, port: str, names: list[str]) -> None:
    """Measure."""
    torch.set_num_threads(1)  # as a rank has it that shares its machine with others
    join_alone(port)
    state = a_state(megabytes * 1_000_000)
    ways = {}
    for name, way in opened(names, folder, state):
        if isinstance(way, str):
            print(json.dumps({"way": name, "why": way}), flush=True)
        else:
            ways[name] = way
    for number in range(1, rounds + 1):
        for name, way in ways.items():
            for tensor in tensors_of(state):
                tensor[0] += 1
            began = time.perf_counter()
            way.save(number, state)
            seconds = time.perf_counter() - began
            way.finish()
            clear(folder / name.replace(" ", "-").replace(",", ""))
            print(json.dumps({"way": name, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5:])
