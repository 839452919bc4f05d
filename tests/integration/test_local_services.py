"""Programs that run beside the local cluster: kept running, with logs that have a bound."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mend_local.service import Service
from pod_host import eventually

LOG_BYTES = 20_000
CHATTER = """
import itertools, time
for number in itertools.count():
    print(f"line {number}", flush=True)
    time.sleep(0.0001)
"""


def first_line(path: Path) -> int:
    """The number of the first whole line; -1 if there is none yet."""
    lines = path.read_text().splitlines()[1:-1] if path.exists() else []
    return int(lines[0].split()[1]) if lines else -1


def logs_in(folder: Path) -> list[str]:
    """Names of all logs, old and new."""
    return sorted(path.name for path in folder.glob("*.log*"))


async def test_the_log_of_a_program_that_runs_for_long_keeps_its_bound(tmp_path: Path) -> None:
    """Beyond its bound the log begins anew and the older part is put aside; no restart is needed, and it goes on."""
    command = [sys.executable, "-c", CHATTER]
    service = Service(
        "chatter",
        lambda: command,
        env=dict(os.environ),
        root=tmp_path,
        owner=f"test-{tmp_path.name}",
        log_bytes=LOG_BYTES,
        log_look_seconds=0.02,
    )
    older = service.log.with_suffix(".log.1")
    service.start()
    try:
        await eventually(lambda: first_line(older) > 3000, "it was put aside more than once")
        await eventually(lambda: first_line(service.log) > 3000, "it goes on")
        assert service.restarts == 0
        assert logs_in(tmp_path) == ["chatter.log", "chatter.log.1"]
    finally:
        await service.stop()
    assert b"\0" not in service.log.read_bytes(), "the program appends, and leaves no hole where it was"
