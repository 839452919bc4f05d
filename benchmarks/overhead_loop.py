"""The training loop that benchmarks/overhead.py measures: blocks of bare steps and of watched steps, in turn.

    overhead_loop.py BLOCKS STEPS mend|nvrx|torchrun

In a bare block nothing is called and whatever watches the ranks from outside is stopped (SIGSTOP); so the difference is
all that the watching costs: the calls in the rank, and the processes beside it. Prints one line of JSON per block.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from mend_trainer.procfs import descendants
from mend_trainer.session import Session

STEP_SECONDS = 0.1
SIZE = 256


def main() -> None:
    """Alternate, and tell."""
    blocks, steps, watcher = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    matrix, gradient = torch.randn(SIZE, SIZE), torch.zeros(SIZE)
    work = _calibrated(matrix)
    calls: list[float] = []

    def step() -> None:
        for _ in range(work):
            torch.mm(matrix, matrix)
        dist.all_reduce(gradient)

    with WATCHERS[watcher](blocks * steps) as (before, after):

        def watched() -> None:
            began = time.perf_counter()
            before()
            called = time.perf_counter() - began
            step()
            began = time.perf_counter()
            after()
            calls.append(called + time.perf_counter() - began)

        for block in range(2 * blocks):
            is_bare = block % 2 == 0
            _outside(signal.SIGSTOP if is_bare else signal.SIGCONT)
            calls.clear()
            spent, began = _cpu_seconds_outside(), time.perf_counter()
            seconds = _block(step if is_bare else watched, steps)
            agent_share = (_cpu_seconds_outside() - spent) / (time.perf_counter() - began)
            if dist.get_rank() == 0:
                told = {"bare": is_bare, "seconds": seconds, "calls": calls, "agent_share": agent_share}
                print(json.dumps(told), flush=True)
    _outside(signal.SIGCONT)


Calls = tuple[Callable[[], object], Callable[[], object]]  # before and after each watched step


@contextmanager
def _mend(steps: int) -> Iterator[Calls]:
    model = torch.nn.Linear(SIZE, SIZE)
    with Session(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)) as session:
        under_mend = session.steps(steps)
        yield lambda: next(under_mend), lambda: session.completed(loss=1.0, tokens=SIZE)


@contextmanager
def _nvrx(steps: int) -> Iterator[Calls]:
    from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient

    client = RankMonitorClient()
    client.init_workload_monitoring()
    yield lambda: None, client.send_heartbeat
    client.shutdown_workload_monitoring()


@contextmanager
def _torchrun(steps: int) -> Iterator[Calls]:
    yield lambda: None, lambda: None


WATCHERS = {"mend": _mend, "nvrx": _nvrx, "torchrun": _torchrun}


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
    """How many products make a step of about 100 ms; the same on every rank.

    By the quickest of some rounds: the first is slow, and what else starts just now must not make steps short for good.
    """
    quickest = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        for _ in range(50):
            torch.mm(matrix, matrix)
        quickest = min(quickest, time.perf_counter() - began)
    count = torch.tensor(STEP_SECONDS * 50 / quickest)
    dist.all_reduce(count, op=dist.ReduceOp.MIN)
    return max(1, int(count))


def _helpers() -> list[int]:
    """The process that started the ranks, and all below it that are neither ranks nor below one."""
    parent = os.getppid()
    ranks = {pid for pid in _children(parent) if _is_rank(pid)}
    return [parent, *sorted(descendants([parent]) - ranks - descendants([*ranks]))]


def _children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _is_rank(pid: int) -> bool:
    """Whether it runs this very program; mend's standbys, which would be ranks, are watchers until they are."""
    if pid == os.getpid():
        return True
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    name = Path(f"/proc/{pid}/comm").read_text().strip()
    return name.startswith("rank-") or any(word.endswith(b"overhead_loop.py") for word in words[:3])


def _cpu_seconds_outside() -> float:
    """CPU time that the watchers have used so far."""
    ticks = 0
    for pid in _helpers():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _outside(number: signal.Signals) -> None:
    """Stop the watchers or let them go on; all ranks wait for it."""
    if dist.get_rank() == 0:
        for pid in _helpers():
            os.kill(pid, number)
    dist.barrier()


if __name__ == "__main__":
    main()
