"""Log lines on their way from a rank to the agent's output."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator

import pytest

from mend_trainer.logs import TAIL_LINES, Output, RankLog


class Pipe:
    """A pipe whose ends are closed by the fixture, unless somebody did."""

    def __init__(self) -> None:
        self.read, self.write = os.pipe()


@pytest.fixture
def sink() -> Iterator[Pipe]:
    """Where the agent's output goes."""
    pipe = Pipe()
    yield pipe
    os.close(pipe.read)
    os.close(pipe.write)


def a_log(sink: Pipe, prefix: str = "[attempt 2 rank 1] ") -> tuple[RankLog, int, Output]:
    """A log, the end that the rank writes to, and the output behind it."""
    output = Output(sink.write)
    rank = Pipe()
    return RankLog(asyncio.get_running_loop(), rank.read, prefix, output), rank.write, output


async def test_lines_get_attempt_and_rank(sink: Pipe) -> None:
    """Each whole line is prefixed, and a last one without its end is not lost."""
    log, rank, output = a_log(sink)
    os.write(rank, b"one\ntwo\nthr")
    os.close(rank)
    log.drain()
    output.close(10)
    expected = b"[attempt 2 rank 1] one\n[attempt 2 rank 1] two\n[attempt 2 rank 1] thr\n"
    assert os.read(sink.read, 1000) == expected
    assert log.tail() == ("one", "two", "thr")


async def test_a_progress_bar_leaves_its_last_state(sink: Pipe) -> None:
    """Of a line that was rewritten by carriage returns, the visible part is printed."""
    log, rank, output = a_log(sink, "")
    os.write(rank, b"\r10%\r50%\r100%\nplain\r\n")
    os.close(rank)
    log.drain()
    output.close(10)
    assert os.read(sink.read, 1000) == b"100%\nplain\n"


async def test_the_tail_keeps_the_last_lines_and_not_more(sink: Pipe) -> None:
    """Many lines, one endless one and bytes that are no text: the tail stays small and readable."""
    log, rank, output = a_log(sink)
    os.write(rank, b"".join(b"line %d\n" % number for number in range(1000)))
    os.write(rank, b"\xff" * 20_000 + b"\n")
    os.close(rank)
    log.drain()
    tail = log.tail()
    assert len(tail) == TAIL_LINES
    assert max(map(len, tail)) <= 1000
    assert "line 999" in tail
    output.close(10)


async def test_a_flood_is_cut_and_counted(sink: Pipe) -> None:
    """More than the allowance at once: the rest is skipped, the next line says how many were."""
    log, rank, output = a_log(sink, "")
    line = b"x" * 99 + b"\n"
    written = 0
    for _ in range(1000):
        written += os.write(rank, line * 600) // 100
        log.drain()
    received = b""
    await asyncio.sleep(0)
    deadline = time.monotonic() + 60
    os.set_blocking(sink.read, False)
    while b"lines skipped" not in received:  # printed as soon as the allowance has grown again
        assert time.monotonic() < deadline
        os.write(rank, b"again\n")
        log.drain()
        try:
            received += os.read(sink.read, 1 << 20)
        except BlockingIOError:
            await asyncio.sleep(0.01)
    assert received.count(line) < written
    os.close(rank)
    log.drain()
    output.close(0.1)


def test_a_reader_that_stalls_makes_nobody_wait(sink: Pipe) -> None:
    """Writing 40 MB to an output that nobody reads returns, and the reader learns later how much it missed."""
    output = Output(sink.write)
    for _ in range(4000):
        output.write(b"y" * 9_999 + b"\n")
    received, deadline = b"", time.monotonic() + 60
    while b"lines dropped" not in received[-200_000:]:
        assert time.monotonic() < deadline
        received += os.read(sink.read, 1 << 20)
        output.write(b"and now\n")
    output.close(0.1)
