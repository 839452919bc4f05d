"""What saving costs the steps that run meanwhile: DDP ranks over gloo, with one save after the other by each way.

    slowdown_loop.py ROUNDS FOLDER WAY...    started once per rank, with torchrun's variables; rank 0 prints JSON

Each line has the seconds of the steps after a save began; the save itself, as far as the loop waits for it, is left
out, and the next begins only once everything is stored. `copy` is an idle copy of the same bytes to the same folder by
a process of low priority; `bare` is nothing at all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from saving_ways import DcpAsync, clear, opened
from torch.nn.parallel import DistributedDataParallel

WIDTH, LAYERS, BATCH, STEPS = 2048, 6, 12, 10


class Copy:
    """The bytes that this rank saves, copied by another process to where they would be stored."""

    def __init__(self, folder: Path, size: int) -> None:
        self._source, self._folder = folder / f"source-{dist.get_rank()}", folder / "copy"
        self._folder.mkdir(exist_ok=True)
        self._source.write_bytes(os.urandom(1 << 20) * (size >> 20))
        self._process: subprocess.Popen[bytes] | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Begin."""
        target = self._folder / f"{step}-{dist.get_rank()}"
        command = ["nice", "-n", "10", "dd", f"if={self._source}", f"of={target}", "bs=16M", "conv=fsync"]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)

    def finish(self) -> None:
        """It is there."""
        assert self._process is not None
        assert self._process.wait() == 0


class Bare:
    """Nothing."""

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


def main(rounds: int, folder: Path, names: list[str]) -> None:
    """Measure."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    DcpAsync.group = dist.new_group(backend="gloo")
    layers = [torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
    model = DistributedDataParallel(torch.nn.Sequential(*layers))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    inputs = torch.randn(BATCH, WIDTH)
    state = {"model": model.module.state_dict()}
    size = sum(tensor.nbytes for tensor in state["model"].values())

    def step() -> float:
        began = time.perf_counter()
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    step()
    ways = {"bare": Bare(), "copy": Copy(folder, size // dist.get_world_size())}
    for name, way in opened(names, folder, state, dist.barrier):
        if isinstance(way, str):
            tell({"way": name, "why": way})
        else:
            ways[name] = way
    for number in range(1, rounds + 1):
        for name, way in ways.items():
            way.save(number, state)
            tell({"way": name, "steps": [step() for _ in range(STEPS)]})
            way.finish()
            dist.barrier()
            if dist.get_rank() == 0:
                clear(folder / name.replace(" ", "-").replace(",", ""))
            dist.barrier()


def tell(facts: dict[str, Any]) -> None:
    """One line of rank 0."""
    if dist.get_rank() == 0:
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
