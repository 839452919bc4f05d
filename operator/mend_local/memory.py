"""Memory limits of containers, by memory control groups (v1 or v2) where this user may make them."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

_MOUNT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class MemoryGroups:
    """Where groups can be made; `root` is None, with the reason in `why_not`, where they cannot."""

    root: Path | None
    unified: bool = False
    why_not: str = ""

    def make(self, name: str, limit_bytes: int) -> Path | None:
        """A group with this limit; None where limits are not enforced."""
        if self.root is None:
            return None
        group = self.root / name
        try:
            group.mkdir(exist_ok=True)
            (group / ("memory.max" if self.unified else "memory.limit_in_bytes")).write_text(str(limit_bytes))
        except OSError as error:
            log.warning("memory limit of %s is not enforced: %s", name, error)
            return None
        swap = group / ("memory.swap.max" if self.unified else "memory.memsw.limit_in_bytes")
        with contextlib.suppress(OSError):  # absent where the kernel does not account swap
            swap.write_text("0" if self.unified else str(limit_bytes))
        return group

    def oom_killed(self, group: Path) -> bool:
        """Whether the kernel killed anything in the group for want of memory."""
        try:
            text = (group / ("memory.events" if self.unified else "memory.oom_control")).read_text()
        except OSError:
            return False
        counts = dict(line.split() for line in text.splitlines())
        return int(counts.get("oom_kill", 0)) > 0

    def remove(self, group: Path, *, deadline_seconds: float = 1.0) -> None:
        """Remove an empty group; the kernel may need a moment to see that it is empty."""
        deadline = time.monotonic() + deadline_seconds
        while group.exists():
            try:
                group.rmdir()
            except OSError as error:
                if time.monotonic() > deadline:
                    log.warning("control group %s stays behind: %s", group, error)
                    return
                time.sleep(0.01)


def find_memory_groups(cluster_id: str) -> MemoryGroups:
    """Try to make a group below our own, or say why it does not work."""
    own = _own_group()
    if own is None:
        return MemoryGroups(None, why_not="no memory control group is mounted")
    place, unified = own
    root = place / f"mend-local-{cluster_id}"
    try:
        if unified and "memory" not in (place / "cgroup.subtree_control").read_text().split():
            (place / "cgroup.subtree_control").write_text("+memory")
        root.mkdir(exist_ok=True)
        if unified:
            (root / "cgroup.subtree_control").write_text("+memory")
        else:
            (root / "memory.use_hierarchy").read_text()
    except OSError as error:
        with contextlib.suppress(OSError):
            root.rmdir()
        return MemoryGroups(None, why_not=f"control groups cannot be made in {place}: {error.strerror}")
    return MemoryGroups(root, unified)


def remove_memory_groups(groups: MemoryGroups) -> None:
    """Remove every group of this cluster, also those of an earlier life; their processes must have ended."""
    if groups.root is None or not groups.root.is_dir():
        return
    for group in list(groups.root.iterdir()):
        if group.is_dir():
            groups.remove(group)
    groups.remove(groups.root)


def _own_group() -> tuple[Path, bool] | None:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _MOUNT / "memory" / path.lstrip("/"), False
        if number == "0" and (_MOUNT / "cgroup.controllers").exists():
            return _MOUNT / path.lstrip("/"), True
    return None
