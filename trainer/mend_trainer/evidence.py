"""Gathers evidence about ranks that may be stuck, from outside, within a bounded time, and without disturbing them.

Order matters: a signal can wake a rank from a stuck sleep, so everything is read before the stacks are asked for by
SIGUSR1. All ranks are read at once, so that one stuck in the kernel delays nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from pathlib import Path
from typing import Final

import msgspec

from mend.evidence import Evidence, RankEvidence
from mend_trainer.gang import Gang
from mend_trainer.procfs import GONE, ProcessFacts, has_handler, look_at, memory_room
from mend_trainer.ranks import Rank
from mend_trainer.recorder import Answers, SilentRecorder, ask

log = logging.getLogger(__name__)

_RECORDER_SHARE: Final = 0.5  # of the time given
_STACKS_SHARE: Final = 0.9
_POLL_SECONDS: Final = 0.005
_STACK_BYTES: Final = 16 << 10
_BETWEEN_LOOKS_SECONDS: Final = 0.05
_MOMENTARY: Final = frozenset("DTt")
_ANSWERS_SIGNALS: Final = frozenset("RS")  # a stopped (T), stuck (D) or dead one would not


async def gather(gang: Gang, worker: int, seconds: float) -> Evidence:
    """Everything that can be found about this worker's ranks within `seconds`; what does not answer stays empty."""
    began = time.monotonic()
    # Recorders of all ranks first, then stacks of any: signals to one rank could un-hang another.
    seen = await asyncio.gather(*(_read(rank, seconds * _RECORDER_SHARE) for rank in gang.ranks))
    left = max(0.0, seconds * _STACKS_SHARE - (time.monotonic() - began))
    stacks = await asyncio.gather(*(_stack_of(rank, left) for rank in gang.ranks))
    room = memory_room()
    return Evidence(
        attempt=gang.launch.attempt,
        worker=worker,
        ranks=tuple(msgspec.structs.replace(facts, stack=stack) for facts, stack in zip(seen, stacks, strict=True)),
        gather_seconds=time.monotonic() - began,
        memory_used=room.used if room else 0,
        memory_limit=room.limit if room else 0,
    )


async def _read(rank: Rank, seconds: float) -> RankEvidence:
    """All that can be read of a rank without its help or its noticing."""
    page = rank.progress()
    began, first = time.monotonic(), _look(rank)
    answers = await _ask(rank, seconds) if first.state in _ANSWERS_SIGNALS | {"D"} else None
    await asyncio.sleep(max(0.0, _BETWEEN_LOOKS_SECONDS - (time.monotonic() - began)))
    second, between = _look(rank), time.monotonic() - began
    return RankEvidence(
        rank=rank.rank,
        process_state=lasting_state(first, second),
        threads=second.threads,
        threads_running=second.threads_running,
        kernel_function=second.kernel_function,
        cpu_share=round(max(0.0, second.cpu_seconds - first.cpu_seconds) / between, 2),
        memory_growth=max(0.0, (second.memory_bytes - first.memory_bytes) / between) if first.memory_bytes else 0.0,
        groups=answers.groups if answers else (),
        recorder_answered=answers is not None,
        python_answers=answers.python if answers else None,
        log_tail=rank.tail,
        phase=page.phase,
        progress_seconds=page.progress_seconds,
        step=page.step,
    )


def _look(rank: Rank) -> ProcessFacts:
    """Its process as /proc shows it; one that was never started has no state, one that has ended is gone."""
    return look_at(rank.pid) if rank.is_alive else ProcessFacts(state=GONE if rank.exit else "")


def lasting_state(first: ProcessFacts, second: ProcessFacts) -> str:
    """The state to be judged by: a healthy process too is stopped or in the kernel for moments, not in both looks."""
    if second.state not in _MOMENTARY or second.state == first.state:
        return second.state
    return first.state if first.state not in _MOMENTARY else "S"


async def _ask(rank: Rank, seconds: float) -> Answers | None:
    try:
        return await ask(rank.socket_path, seconds)
    except SilentRecorder:
        return None


async def _stack_of(rank: Rank, seconds: float) -> str:
    """Stacks of all Python threads by faulthandler, or "" where it cannot answer."""
    if not rank.is_alive or look_at(rank.pid).state not in _ANSWERS_SIGNALS:
        return ""
    if not has_handler(rank.pid, signal.SIGUSR1):  # the signal would kill
        return ""
    before = _size(rank.stacks_path)
    with contextlib.suppress(ProcessLookupError):
        os.kill(rank.pid, signal.SIGUSR1)
    deadline = time.monotonic() + seconds
    size = before
    while time.monotonic() < deadline:
        await asyncio.sleep(_POLL_SECONDS)
        previous, size = size, _size(rank.stacks_path)
        if size > before and size == previous:  # written in one go by a signal handler: it has paused, so it is done
            break
    return _read_from(rank.stacks_path, before)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read_from(path: Path, offset: int) -> str:
    try:
        raw = path.read_bytes()[offset:]
    except OSError:
        return ""
    return raw[-_STACK_BYTES:].decode(errors="replace")
