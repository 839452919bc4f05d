"""A gang that does nothing but all_reduce steps; FAULT, FAULT_RANK and FAULT_STEP say what goes wrong, and where.

STEP_SECONDS is how long a step waits before its collective.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time

import torch
import torch.distributed as dist

from mend.environment import ENV_PAGE
from mend.heartbeats import Phase, Point
from mend.reports import Measured
from mend_trainer.progress import ProgressPage
from mend_trainer.reporting import Reporter


class Misfit(RuntimeError):
    """Trying again cannot help."""

    mend_fatal = True


def fail(fault: str) -> None:
    """Go wrong in the way asked for."""
    match fault:
        case "raise":
            raise RuntimeError("the loss went through the roof")
        case "fatal":
            raise Misfit("weights do not fit")
        case "exit":
            sys.exit(3)
        case "hold-gil":
            ctypes.PyDLL(os.environ["GIL_HOLDER"]).hold()
        case "eat":
            eaten = []
            while True:
                eaten.append(b"x" * (32 << 20))
        case "flood":
            for number in range(300_000):
                print(f"flood {number} " + "x" * 80)
        case other:
            raise ValueError(other)


def main() -> None:
    """Do `STEPS` steps."""
    page = ProgressPage.open(os.environ[ENV_PAGE])
    dist.init_process_group("gloo")
    fault = os.environ.get("FAULT", "") if dist.get_rank() == int(os.environ.get("FAULT_RANK", "0")) else ""
    step_of_fault = int(os.environ.get("FAULT_STEP", "3"))
    pause = float(os.environ.get("STEP_SECONDS", "0.005"))
    wishes = page.save_requested
    reporter = Reporter.from_environment()
    for step in range(int(os.environ.get("STEPS", "1000000"))):
        began = time.monotonic()
        page.enter(Phase.STEP)
        time.sleep(pause)
        skips = fault == "skip" and step == step_of_fault
        if fault and step == step_of_fault and not skips:
            fail(fault)
        if not skips:
            page.enter(Phase.COLLECTIVE)
            wished = torch.tensor([float(page.save_requested > wishes)])
            dist.all_reduce(wished)  # a wish for a save at one rank is the wish of all
            if wished.item():
                page.enter(Phase.SAVING)
                wishes = page.save_requested
                page.committed_step = step
                print(f"saved at step {step}")
        seconds, loss = time.monotonic() - began, 1.0 / (step + 1)
        page.complete_step(step, step * 10, seconds, loss)
        if dist.get_rank() == 0:
            reporter.send(Measured(point=Point(step=step, loss=loss, tokens=step * 10, seconds=seconds)))
    if fault == "skip":
        time.sleep(3600)  # its collectives are over, while the others wait for one more
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
