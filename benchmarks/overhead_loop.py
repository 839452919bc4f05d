"""The training loop that benchmarks/overhead.py measures: blocks of bare steps and of steps under mend, in turn.

In a bare block the session is not called and the agent is stopped (SIGSTOP); so the difference is all that mend costs:
the session's calls in the rank, and the agent's heartbeats beside it. Prints one line of JSON per block.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from mend_trainer.session import Session

STEP_SECONDS = 0.1
SIZE = 256


def main() -> None:
    """`overhead_loop.py BLOCKS STEPS`"""
    blocks, steps = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = torch.nn.Linear(SIZE, SIZE)
    matrix = torch.randn(SIZE, SIZE)
    work = _calibrated(matrix)
    gradient = torch.zeros(SIZE)
    with Session(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)) as session:
        under_mend = session.steps(blocks * steps)
        calls: list[float] = []

        def step() -> None:
            for _ in range(work):
                torch.mm(matrix, matrix)
            dist.all_reduce(gradient)

        def bare() -> None:
            step()

        def watched() -> None:
            began = time.perf_counter()
            next(under_mend)
            called = time.perf_counter() - began
            step()
            began = time.perf_counter()
            session.completed(loss=1.0, tokens=SIZE)
            calls.append(called + time.perf_counter() - began)

        for block in range(2 * blocks):
            is_bare = block % 2 == 0
            _agent(signal.SIGSTOP if is_bare else signal.SIGCONT)
            calls.clear()
            agent, began = _agent_cpu_seconds(), time.perf_counter()
            seconds = _block(bare if is_bare else watched, steps)
            agent_share = (_agent_cpu_seconds() - agent) / (time.perf_counter() - began)
            if dist.get_rank() == 0:
                told = {"bare": is_bare, "seconds": seconds, "calls": calls, "agent_share": agent_share}
                print(json.dumps(told), flush=True)
    _agent(signal.SIGCONT)


def _block(step: Callable[[], None], steps: int) -> list[float]:
    """Lengths of the steps of one block, after one that is not counted."""
    step()
    lengths = []
    for _ in range(steps - 1):
        began = time.perf_counter()
        step()
        lengths.append(time.perf_counter() - began)
    return lengths


def _calibrated(matrix: torch.Tensor) -> int:
    """How many products make a step of about 100 ms; the same on every rank."""
    began = time.perf_counter()
    for _ in range(50):
        torch.mm(matrix, matrix)
    count = torch.tensor(STEP_SECONDS * 50 / (time.perf_counter() - began))
    dist.all_reduce(count, op=dist.ReduceOp.MIN)
    return max(1, int(count))


def _agent_cpu_seconds() -> float:
    """CPU time that the agent has used so far."""
    fields = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _agent(number: signal.Signals) -> None:
    """Stop the agent or let it go on; both ranks wait for it."""
    if dist.get_rank() == 0:
        os.kill(os.getppid(), number)
    dist.barrier()


if __name__ == "__main__":
    main()
