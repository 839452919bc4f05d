"""What /proc and the memory cgroup tell about processes; only files that a process stuck in the kernel cannot block."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

_PROC: Final = Path("/proc")
_NO_LIMIT: Final = 1 << 60  # version 1 writes the largest number that it knows
GONE: Final = "X"
STOPPED: Final = "T"
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


class ProcessFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One process as /proc shows it."""

    state: str  # of the main thread: R, S, D, T, Z, X (gone)
    threads: int = 0
    threads_running: int = 0  # of all threads, how many are on a CPU or want one
    kernel_function: str = ""  # where the main thread sleeps; "" while it runs, and where that may not be read
    cpu_seconds: float = 0.0  # that the main thread has used so far
    memory_bytes: int = 0  # of its own in memory: without files and what it shares with others


def look_at(pid: int) -> ProcessFacts:
    """State of a process's main thread, where it sleeps, the CPU time it has used, and how many threads run."""
    state = _state(_PROC / str(pid) / "stat")
    try:
        threads = os.listdir(_PROC / str(pid) / "task")  # noqa: PTH208 - plain names, and this is polled
    except OSError:
        threads = []
    states = [_state(_PROC / str(pid) / "task" / thread / "stat") for thread in threads]
    return ProcessFacts(
        state=state,
        threads=len(threads),
        threads_running=states.count("R"),
        kernel_function=_kernel_function(pid),
        cpu_seconds=_cpu_seconds(pid),
        memory_bytes=_memory_bytes(pid),
    )


def _kernel_function(pid: int) -> str:
    """The kernel's wchan, which says "0" of a thread that runs, and of all threads where it is denied."""
    try:
        name = (_PROC / str(pid) / "wchan").read_text()
    except OSError:
        return ""
    return "" if name == "0" else name


def _cpu_seconds(pid: int) -> float:
    """By the scheduler's own count, in nanoseconds: ticks of 10 ms would say little about two looks 50 ms apart."""
    try:
        spent, *_ = (_PROC / str(pid) / "task" / str(pid) / "schedstat").read_text().split()
    except (OSError, ValueError):  # a kernel without CONFIG_SCHED_INFO
        return 0.0
    return int(spent) / 1e9


def cpu_ticks(pid: int) -> int:
    """CPU time that all threads of a process have used so far, in the kernel's ticks; 0 when it is gone."""
    fields = _stat_fields(_PROC / str(pid) / "stat")
    return int(fields[11]) + int(fields[12]) if fields else 0


def _memory_bytes(pid: int) -> int:
    """From counters that are read without the lock that a page fault holds."""
    try:
        _, resident, shared, *_ = (_PROC / str(pid) / "statm").read_text().split()
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * _PAGE_BYTES


def _state(stat: Path) -> str:
    fields = _stat_fields(stat)
    return fields[0] if fields else GONE


def _stat_fields(stat: Path) -> list[str]:
    """The fields after the command's name, which may itself hold spaces and parentheses; [] when it is gone."""
    try:
        return stat.read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def has_handler(pid: int, number: signal.Signals) -> bool:
    """Whether the process catches this signal, so that sending it does not kill."""
    try:
        status = (_PROC / str(pid) / "status").read_text(errors="replace")
    except OSError:
        return False
    for line in status.splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def descendants(roots: Iterable[int]) -> set[int]:
    """Every process below `roots`, themselves left out."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir(_PROC):  # noqa: PTH208 - hundreds of plain names, while a fault waits
        if entry.isdigit() and (fields := _stat_fields(_PROC / entry / "stat")):
            children.setdefault(int(fields[1]), []).append(int(entry))
    found: set[int] = set()
    frontier = list(roots)
    while frontier:
        below = [child for child in children.get(frontier.pop(), ()) if child not in found]
        found.update(below)
        frontier.extend(below)
    return found


class MemoryRoom(msgspec.Struct, frozen=True, kw_only=True):
    """What of a container's memory is in use, file pages that can be dropped at once left out, and its limit."""

    used: int
    limit: int


def memory_room(mount: Path = Path("/sys/fs/cgroup"), own: Path = _PROC / "self" / "cgroup") -> MemoryRoom | None:
    """That of this process's memory cgroup (v2 or v1); None where there is none, or without a limit."""
    for folder in (file.parent for file in _event_files(mount, own)):
        for used, limit, idle in (
            ("memory.current", "memory.max", "inactive_file"),
            ("memory.usage_in_bytes", "memory.limit_in_bytes", "total_inactive_file"),
        ):
            try:
                most = (folder / limit).read_text().strip()
                taken, stat = int((folder / used).read_text()), (folder / "memory.stat").read_text()
            except (OSError, ValueError):
                continue
            if not most.isdigit() or int(most) >= _NO_LIMIT:
                return None
            counts = dict(line.split(" ", 1) for line in stat.splitlines() if " " in line)
            return MemoryRoom(used=max(0, taken - int(counts.get(idle, "0"))), limit=int(most))
    return None


class OutOfMemoryKills:
    """Counts what the kernel's OOM killer has killed in this container, where a cgroup (v2 or v1) tells."""

    def __init__(self, mount: Path = Path("/sys/fs/cgroup"), own: Path = _PROC / "self" / "cgroup") -> None:
        self._files = _event_files(mount, own)
        self._accounted = self._count()

    def claim(self) -> bool:
        """Whether there was a kill that has not yet been claimed; claims it."""
        if self._count() <= self._accounted:
            return False
        self._accounted += 1
        return True

    def _count(self) -> int:
        for file in self._files:
            try:
                lines = file.read_text().splitlines()
            except OSError:
                continue
            for line in lines:
                name, _, value = line.partition(" ")
                if name == "oom_kill" and value.isdigit():
                    return int(value)
        return 0


def _event_files(mount: Path, own: Path) -> tuple[Path, ...]:
    """Where the kills may be counted, best first. A container may see its own cgroup as the root of the mount."""
    version_1, version_2 = mount / "memory", mount
    files = [version_2 / "memory.events", version_1 / "memory.oom_control"]
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            files.insert(0, version_2 / path.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            files.insert(0, version_1 / path.lstrip("/") / "memory.oom_control")
    return tuple(files)
