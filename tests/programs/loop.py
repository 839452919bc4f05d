"""A rank of a plain loop under a session: a small model, gloo, checkpoints; it goes wrong when a file tells it to.

`STEPS`, `STEP_SECONDS`, `WIDTH` of the model, and `BEST_STEP`, at which its evaluations are best, come from the
environment. A file `$FAULTS/rank-N` holds the name of a fault for rank N; it is taken away before it is obeyed, unless
it ends in "!", so that what is restarted stays well.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from mend_trainer.session import Session


def fault_of(rank: int) -> str:
    """The fault that this rank is asked for."""
    path = Path(os.environ.get("FAULTS", "/nonexistent")) / f"rank-{rank}"
    try:
        fault = path.read_text().strip()
        if not fault.endswith("!"):
            path.unlink()
    except FileNotFoundError:
        return ""
    return fault.removesuffix("!")


def savers() -> list[int]:
    """The processes that write what this rank saves."""
    own_agent = f"PPid:\t{os.getppid()}\n"
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            said = status.read_text()
        except OSError:
            continue  # it has just ended
        if said.startswith("Name:\tmend-saver\n") and own_agent in said:
            found.append(int(status.parent.name))
    return found


def fail(fault: str) -> None:
    """Go wrong in the way asked for."""
    match fault:
        case "raise":
            raise RuntimeError("the loss went through the roof")
        case "exit":
            sys.exit(3)
        case "fill-disk" | "empty-disk":  # nearly: no file may grow beyond a few bytes, any more
            for pid in savers():
                _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (16 if fault == "fill-disk" else most, most))
        case "hold-gil":
            ctypes.PyDLL(os.environ["GIL_HOLDER"]).hold()
        case other:
            raise ValueError(other)


def main() -> None:
    """Train to the end, wherever the run was left."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    width, pause = int(os.environ.get("WIDTH", "8")), float(os.environ.get("STEP_SECONDS", "0.02"))
    model = nn.Linear(width, width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    patience = float(os.environ.get("FINAL_SAVE_SECONDS", "900"))
    with Session(model=model, optimizer=optimizer, final_save_seconds=patience) as session:
        for step in session.steps(int(os.environ.get("STEPS", "1000000"))):
            fault = fault_of(rank)
            if fault and fault != "skip":
                fail(fault)
            time.sleep(pause)
            inputs = torch.rand(4, width, generator=torch.Generator().manual_seed(1000 * step + rank))
            loss = (model(inputs) - inputs).square().mean()
            optimizer.zero_grad()
            loss.backward()
            for parameter in model.parameters() if fault != "skip" else ():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
            if fault == "skip":
                time.sleep(3600)  # the others wait in a collective for this rank
            optimizer.step()
            session.completed(loss, tokens=4 * dist.get_world_size())
            if "BEST_STEP" in os.environ and step % 5 == 0:
                session.measured("nearness", -abs(step - int(os.environ["BEST_STEP"])))
            if step % 50 == 0:
                print(f"step {step} is done", flush=True)


if __name__ == "__main__":
    main()
