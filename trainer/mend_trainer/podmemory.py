"""How much memory the pod may use, and how much of it is left: its memory cgroup, version 2 or 1."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

_MOUNT: Final = Path("/sys/fs/cgroup")
_OWN: Final = Path("/proc/self/cgroup")
_UNLIMITED: Final = 1 << 60  # version 1 says "no limit" by a number near 2^63


class PodMemory(msgspec.Struct, frozen=True, kw_only=True):
    """The tightest limit that this process is under; 0: none."""

    limit_bytes: int = 0
    used_bytes: int = 0  # without what the kernel would give up at once

    @property
    def free_bytes(self) -> int | None:
        """What may still be allocated; None without a limit."""
        return max(0, self.limit_bytes - self.used_bytes) if self.limit_bytes else None


def pod_memory(mount: Path = _MOUNT, own: Path = _OWN) -> PodMemory:
    """As the cgroup of this process and those above it say. A container may see its own as the root of the mount."""
    found = [memory for folder in _folders(mount, own) if (memory := _read(folder)).limit_bytes]
    return min(found, key=lambda memory: memory.limit_bytes - memory.used_bytes, default=PodMemory())


def _folders(mount: Path, own: Path) -> list[Path]:
    roots = [mount, mount / "memory"]
    folders = list(roots)
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            root = roots[0] if controllers == "" else roots[1]
            parts = Path(path.lstrip("/")).parts
            folders += [root.joinpath(*parts[: count + 1]) for count in range(len(parts))]
    return folders


def _read(folder: Path) -> PodMemory:
    for limit, used, idle in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most = (folder / limit).read_text().strip()
            now = int((folder / used).read_text())
            stat = (folder / "memory.stat").read_text().splitlines()
        except (OSError, ValueError):
            continue
        if not most.isdigit() or int(most) > _UNLIMITED:
            return PodMemory()
        reclaimable = sum(int(line.split()[1]) for line in stat if line.startswith(f"{idle} "))
        return PodMemory(limit_bytes=int(most), used_bytes=max(0, now - reclaimable))
    return PodMemory()
