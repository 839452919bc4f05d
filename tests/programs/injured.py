"""A gang that trains in small steps until a file tells one of its ranks to go wrong.

Each step loads, computes, and meets the others in two different collectives, so that one left out or swapped shows. A
file `$FAULTS/rank-N` holds `FAULT STEP`: rank N goes wrong so in that step. The file is taken away first, so that
whatever is started in its place stays well.
"""

from __future__ import annotations

import ctypes
import os
import queue
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from mend.environment import ENV_PAGE
from mend.heartbeats import Phase
from mend_trainer.progress import ProgressPage

LONG_SECONDS = 3600.0
LATE_SECONDS = 1.5  # between a rank's goodbye to its peers and its own last word
SLOW_STEPS, SLOW_SECONDS = 5, 0.3


class Injured:
    """One rank, and how it goes wrong."""

    def __init__(self) -> None:
        self.page = ProgressPage.open(os.environ[ENV_PAGE])
        dist.init_process_group("gloo")
        self.rank = dist.get_rank()
        self.request = Path(os.environ["FAULTS"]) / f"rank-{self.rank}"
        self.slow_until = -1
        self.loss = 1.0

    def train(self) -> None:
        """Step after step, for ever."""
        step = 0
        while True:
            began = time.monotonic()
            self.step(step, self.fault_of(step))
            self.page.complete_step(step, step, time.monotonic() - began, self.loss)
            step += 1

    def fault_of(self, step: int) -> str:
        """What this rank is asked to do wrong in this step; "" for nothing."""
        try:
            fault, at = self.request.read_text().split()
        except FileNotFoundError:
            return ""
        if int(at) > step:
            return ""
        self.request.unlink()
        return fault

    def step(self, step: int, fault: str) -> None:
        """One step, with or without a fault."""
        self.page.enter(Phase.DATA)
        if fault == "loader":
            queue.Queue[int]().get()  # whoever should fill it has died
        self.page.enter(Phase.STEP)
        if fault == "slow":
            self.slow_until = step + SLOW_STEPS
        time.sleep(SLOW_SECONDS if step < self.slow_until else 0.01)
        if fault and fault not in ("loader", "slow", "skip", "reorder"):
            self.fail(fault)
        self.page.enter(Phase.COLLECTIVE)
        self.meet(fault)

    def meet(self, fault: str) -> None:
        """The collectives of a step: a sum and a gathering, in this order unless asked otherwise."""
        mine, theirs = torch.ones(4), [torch.empty(2) for _ in range(dist.get_world_size())]
        if fault == "reorder":
            dist.all_gather(theirs, torch.ones(2))
            dist.all_reduce(mine)
            return
        if fault != "skip":
            dist.all_reduce(mine)
        dist.all_gather(theirs, torch.ones(2))

    def fail(self, fault: str) -> None:
        """Go wrong between data and collective."""
        match fault:
            case "raise":
                raise ValueError("the loss went through the roof")
            case "raise-late":  # tells its peers goodbye first, so that all of them end before it does
                dist.destroy_process_group()
                time.sleep(LATE_SECONDS)
                raise ValueError("the loss went through the roof")
            case "exit":
                sys.exit(3)
            case "sleep":
                time.sleep(LONG_SECONDS)
            case "spin":
                while True:
                    pass
            case "locks":
                self.deadlock()
            case "hold-gil":
                ctypes.PyDLL(os.environ["GIL_HOLDER"]).hold()
            case "eat":
                eaten = []
                while True:
                    eaten.append(b"x" * (32 << 20))
            case "fill-disk":
                with Path("/dev/full").open("wb") as disk:
                    disk.write(bytes(1 << 16))
            case "nan":
                self.loss = float("nan")
            case other:
                raise NotImplementedError(other)

    def deadlock(self) -> None:
        """Two threads take two locks, each the one that the other waits for."""
        ours, theirs, met = threading.Lock(), threading.Lock(), threading.Barrier(2)

        def other() -> None:
            with theirs:
                met.wait()
                ours.acquire()

        threading.Thread(target=other, daemon=True).start()
        with ours:
            met.wait()
            theirs.acquire()


if __name__ == "__main__":
    Injured().train()
