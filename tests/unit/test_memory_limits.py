"""What a container is told of its memory, from files as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mend_trainer.memory import Memory, read_memory, refusal

GIB = 1 << 30


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A /proc with 8 GiB available and a process in /kubepods/pod."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/kubepods/pod\n")
    return tmp_path / "proc"


def a_cgroup(folder: Path, limit: str, used: int, droppable: int = 0, version: int = 2) -> None:
    """A cgroup's files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, text in zip(names, (limit, str(used)), strict=True):
        (folder / name).write_text(text + "\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {droppable}\nactive_file 7\n")


def test_without_a_limit_the_machine_counts(tmp_path: Path, proc: Path) -> None:
    """No cgroup, or one that says "max": what the machine has available is free."""
    assert read_memory(tmp_path / "none", proc) == Memory(limit=0, free=8 * GIB)
    a_cgroup(tmp_path / "cgroup", "max", GIB)
    assert read_memory(tmp_path / "cgroup", proc) == Memory(limit=0, free=8 * GIB)


@pytest.mark.parametrize("place", ["", "kubepods/pod"])
def test_the_cgroups_limit_counts(tmp_path: Path, proc: Path, place: str) -> None:
    """Whether it is seen as the root or by its path, and what the kernel can drop is free."""
    a_cgroup(tmp_path / "cgroup" / place, str(4 * GIB), 3 * GIB, droppable=GIB // 2)
    assert read_memory(tmp_path / "cgroup", proc) == Memory(limit=4 * GIB, free=GIB + GIB // 2)


def test_the_tightest_of_all_cgroups_counts(tmp_path: Path, proc: Path) -> None:
    """A pod's own limit may be narrower than its container's."""
    a_cgroup(tmp_path / "cgroup" / "kubepods", str(2 * GIB), GIB)
    a_cgroup(tmp_path / "cgroup" / "kubepods" / "pod", str(4 * GIB), GIB)
    assert read_memory(tmp_path / "cgroup", proc) == Memory(limit=2 * GIB, free=GIB)


def test_version_1_counts(tmp_path: Path, proc: Path) -> None:
    """The names of cgroups of version 1, whose "no limit" is a large number."""
    (proc / "self" / "cgroup").write_text("5:cpu,cpuacct:/x\n4:memory:/pod\n")
    a_cgroup(tmp_path / "cgroup" / "memory", str((1 << 63) - 4096), GIB, version=1)
    a_cgroup(tmp_path / "cgroup" / "memory" / "pod", str(4 * GIB), GIB, version=1)
    assert read_memory(tmp_path / "cgroup", proc) == Memory(limit=4 * GIB, free=3 * GIB)


def test_the_machine_bounds_what_a_limit_allows(tmp_path: Path, proc: Path) -> None:
    """A limit beyond what the machine has left promises nothing."""
    a_cgroup(tmp_path / "cgroup", str(64 * GIB), GIB)
    assert read_memory(tmp_path / "cgroup", proc) == Memory(limit=64 * GIB, free=8 * GIB)


def test_a_refusal_says_what_to_do() -> None:
    """What does not fit beside a reserve is refused with both sizes and the way out."""
    memory = Memory(limit=4 * GIB, free=GIB)
    assert refusal(GIB // 2, memory) == ""
    assert "1024 MiB more, and 819 MiB are left of the limit of 4096 MiB; raise the memory limit" in refusal(
        GIB, memory
    )
