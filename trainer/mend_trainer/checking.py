"""The agent's part in a check of its machine: `nodecheck` runs as a process of its own, and no longer than it may."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Final

import msgspec

from mend.orders import Check, Checked
from mend_trainer.kernel import Ending, Reaper, kill_group, spawn

log = logging.getLogger(__name__)

_MEASURING_SHARE: Final = 0.15  # of the time given; the rest is for importing torch on a machine that is slow
_OUTPUT_BYTES: Final = 64 << 10
_SAID_CHARACTERS: Final = 200


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What a check has found: so much a second, by what was measured. `problem` says what went wrong."""

    figures: dict[str, float] = {}
    problem: str = ""


_decode = msgspec.json.Decoder(Finding).decode


async def check(order: Check, worker: int, environment: Mapping[str, str], reaper: Reaper) -> Checked:
    """What the machine can do; how the check went wrong, if it did: it died, or had to be killed when time was up."""
    began = time.monotonic()
    read, write = os.pipe2(os.O_CLOEXEC)
    measuring = f"{order.seconds * _MEASURING_SHARE:g}"
    words = [sys.executable, "-m", "mend_trainer.nodecheck", measuring, *order.neighbours]
    pid = spawn(words, environment, write)
    os.close(write)
    ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
    reaper.watch(pid, ended.set_result, lambda: kill_group(pid))
    try:
        how = await asyncio.wait_for(asyncio.shield(ended), order.seconds)
        finding = _read(how, read)
    except TimeoutError:
        kill_group(pid)
        finding = Finding(problem=f"did not end within {order.seconds:g} s")
    finally:
        os.close(read)
    log.info("checked the machine: %s", finding.problem or finding.figures)
    return Checked(
        attempt=order.attempt,
        worker=worker,
        round=order.round,
        figures=finding.figures,
        problem=finding.problem,
        seconds=time.monotonic() - began,
    )


def _read(how: Ending, pipe: int) -> Finding:
    """What an ended check has said; it is small enough to have fitted into the pipe."""
    os.set_blocking(pipe, False)
    try:
        said = os.read(pipe, _OUTPUT_BYTES).decode(errors="replace").strip().splitlines()
    except BlockingIOError:
        said = []
    last = said[-1] if said else ""
    if how.signal is not None:
        return Finding(problem=f"was killed by {signal.Signals(how.signal).name}")
    if how.code != 0:
        return Finding(problem=f"died with exit code {how.code}: {last[:_SAID_CHARACTERS]}".rstrip(": "))
    try:
        return _decode(last)
    except msgspec.MsgspecError as error:
        return Finding(problem=f"said nothing that can be understood: {error}")
