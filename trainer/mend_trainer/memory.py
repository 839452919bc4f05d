"""How much memory this container may use, and how much of it is left: by its cgroup (v2 or v1) and the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

_PROC: Final = Path("/proc")
_MOUNT: Final = Path("/sys/fs/cgroup")
_UNLIMITED: Final = 1 << 60  # what version 1 says where there is no limit is near 2^63
_RESERVE: Final = 0.05  # of the limit, left to ranks and kernel


class Memory(NamedTuple):
    """In bytes."""

    limit: int  # of the container; 0: none, beside the machine's
    free: int  # until limit or machine is exhausted; what the kernel can drop counts as free


def read_memory(mount: Path = _MOUNT, proc: Path = _PROC) -> Memory:
    """As of now. The smallest limit of any cgroup above counts, where the container sees it."""
    available = _meminfo(proc / "meminfo")
    limits = [found for folder in _folders(mount, proc / "self" / "cgroup") if (found := _read(folder))]
    if not limits:
        return Memory(limit=0, free=available)
    tightest = min(limits, key=lambda found: found.free)
    return Memory(limit=min(found.limit for found in limits), free=min(available, tightest.free))


def refusal(more: int, memory: Memory) -> str:
    """Why so many bytes more had better not be taken; "" if they may."""
    reserve = int(memory.limit * _RESERVE)
    if more <= memory.free - reserve:
        return ""
    mib = 1 << 20
    left = max(0, memory.free - reserve) // mib
    bound = f"the limit of {memory.limit // mib} MiB" if memory.limit else "what the machine has"
    return (
        f"copies would take {more // mib} MiB more, and {left} MiB are left of {bound}; "
        "raise the memory limit of the trainer container, or set spec.checkpoint.memory to take no copies"
    )


def _meminfo(path: Path) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return _UNLIMITED
    kib = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), "")
    return int(kib) * 1024 if kib.isdigit() else _UNLIMITED


def _folders(mount: Path, own: Path) -> list[Path]:
    """The cgroups that may bound this process. A container may see its own as the root of the mount."""
    found = [mount, mount / "memory"]
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root = mount if controllers == "" else mount / "memory"
        if controllers == "" or "memory" in controllers.split(","):
            parts = Path(path.lstrip("/")).parts
            found += [root.joinpath(*parts[:count]) for count in range(1, len(parts) + 1)]
    return found


def _read(folder: Path) -> Memory | None:
    """One cgroup's, None where it sets no limit."""
    limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
    used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes")
    if not limit or limit >= _UNLIMITED:
        return None
    return Memory(limit=limit, free=max(0, limit - used + _droppable(folder / "memory.stat")))


def _number(path: Path) -> int:
    try:
        text = path.read_text().strip()
    except OSError:
        return 0
    return int(text) if text.isdigit() else 0


def _droppable(path: Path) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
