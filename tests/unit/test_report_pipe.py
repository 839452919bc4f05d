"""What the agent reads from the report pipe of a rank: every report, whatever else comes with it."""

from __future__ import annotations

import asyncio
import os

from mend.protocol import encode
from mend.reports import Quarantined, Report
from mend_trainer.told import ReportPipe

_FIRST = Quarantined(uri="file:///store/step-1", reason="torn")
_SECOND = Quarantined(uri="file:///store/step-2", reason="torn")


async def heard_of(written: bytes) -> list[Report]:
    """The reports in what a rank wrote before it died."""
    read, write = os.pipe()
    heard: list[Report] = []
    pipe = ReportPipe(asyncio.get_running_loop(), read, 3, heard.append)
    os.write(write, written)
    os.close(write)
    pipe.drain()
    pipe.close()
    return heard


async def test_what_a_dead_rank_left_is_read_to_the_end() -> None:
    """Both of its reports, oldest first, and not the one that it was writing when it died."""
    third = encode(_FIRST)[:-1]
    assert await heard_of(encode(_FIRST) + b"\n" + encode(_SECOND) + b"\n" + third) == [_FIRST, _SECOND]


async def test_a_line_that_is_no_report_is_passed_over() -> None:
    """Text of a library that writes where it should not takes no report with it."""
    assert await heard_of(b"hello\n\n" + encode(_FIRST) + b"\n") == [_FIRST]
