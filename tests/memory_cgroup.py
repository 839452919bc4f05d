"""A memory cgroup of one's own with a limit, where the system lets a test make one."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_MOUNT = Path("/sys/fs/cgroup")


def _own() -> tuple[Path, str]:
    """The folder of this process's memory cgroup, and the name of the file that limits it."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _MOUNT / "memory" / path.lstrip("/"), "memory.limit_in_bytes"
    return _MOUNT / Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip(), "memory.max"


@contextlib.contextmanager
def limited_memory(limit_bytes: int) -> Iterator[Path]:
    """Write a pid to `cgroup.procs` in the folder that this gives; skips the test where cgroups cannot be made."""
    parent, limit = _own()
    group = parent / f"mend-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"needs a memory cgroup that a test may make: {error}")
    try:
        (group / limit).write_text(str(limit_bytes))
        yield group
    except OSError as error:
        pytest.skip(f"needs a memory controller in the test's cgroup: {error}")
    finally:
        deadline = time.monotonic() + 30
        while group.exists() and time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # busy until the last process is gone
                group.rmdir()
