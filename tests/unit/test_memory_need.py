"""What snapshots need in memory is known before training, and a pod that is too small for it is told so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from mend_trainer.need import MemoryTooSmall, check, needed_bytes
from mend_trainer.podmemory import PodMemory, pod_memory

MIB = 1 << 20


def a_model() -> nn.Linear:
    """Of 1 MiB."""
    return nn.Linear(512, 512, bias=False)


@pytest.mark.parametrize(
    ("kind", "options", "states"),
    [
        (torch.optim.AdamW, {}, 2),
        (torch.optim.Adam, {"amsgrad": True}, 3),
        (torch.optim.SGD, {"lr": 0.1}, 0),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, 1),
    ],
)
def test_an_optimizer_that_has_not_stepped_is_foreseen(
    kind: type[torch.optim.Optimizer], options: dict[str, float], states: int
) -> None:
    """Before the first step as much is reckoned with as there is after it."""
    model = a_model()
    optimizer = kind(model.parameters(), **options)  # type: ignore[call-arg]
    foreseen = needed_bytes(model, [optimizer], world=1, ranks_here=1, copies=False)
    assert foreseen == 2 * (1 + states) * MIB
    model(torch.ones(1, 512)).sum().backward()
    optimizer.step()
    found = needed_bytes(model, [optimizer], world=1, ranks_here=1, copies=False)
    assert foreseen <= found < foreseen + 1000


def test_replicas_are_shared_out_and_copies_cost_as_much_again() -> None:
    """Of four ranks on two workers, each worker keeps half of the state, twice, and twice more for a buddy's."""
    model = a_model()
    alone = needed_bytes(model, [], world=4, ranks_here=2, copies=False)
    assert alone == MIB
    assert needed_bytes(model, [], world=4, ranks_here=2, copies=True) == 2 * alone


def test_a_limit_that_is_too_small_is_named_with_the_remedy() -> None:
    """The error names the field, its value, what is needed, and what to set it to; it is fatal."""
    with pytest.raises(MemoryTooSmall) as raised:
        check(300 * MIB, 100 * MIB, PodMemory(limit_bytes=512 * MIB, used_bytes=400 * MIB))
    assert raised.value.mend_fatal
    for words in ("resources.limits.memory: 512Mi", "400Mi are in use", "need 300Mi", "Set it to 600Mi"):
        assert words in str(raised.value)


@pytest.mark.parametrize(
    "pod", [PodMemory(), PodMemory(limit_bytes=700 * MIB, used_bytes=400 * MIB)], ids=["unlimited", "large enough"]
)
def test_a_limit_that_is_large_enough_is_none(pod: PodMemory) -> None:
    """Nothing is raised without a limit, nor if the rest fits."""
    check(300 * MIB, 0, pod)


def a_cgroup(folder: Path, **files: str) -> None:
    """The files of one cgroup; underscores in their names are dots."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_the_tightest_limit_counts(tmp_path: Path) -> None:
    """Of the cgroups above a process the one with the least room is told, without files that can be dropped."""
    stat = "anon 5\ninactive_file 10\n"
    a_cgroup(tmp_path, memory__max="max\n", memory__current="900\n", memory__stat=stat)
    a_cgroup(tmp_path / "pod", memory__max="1000\n", memory__current="600\n", memory__stat=stat)
    a_cgroup(tmp_path / "pod" / "own", memory__max="max\n", memory__current="500\n", memory__stat=stat)
    (tmp_path / "self").write_text("0::/pod/own\n")
    assert pod_memory(tmp_path, tmp_path / "self") == PodMemory(limit_bytes=1000, used_bytes=590)


def test_version_1_says_no_limit_by_a_large_number(tmp_path: Path) -> None:
    """A limit near 2^63 is none; another one is read as in version 2."""
    folder = tmp_path / "memory"
    files = {"memory__usage_in_bytes": "600\n", "memory__stat": "total_inactive_file 100\n"}
    a_cgroup(folder, memory__limit_in_bytes="9223372036854771712\n", **files)
    assert pod_memory(tmp_path, tmp_path / "none") == PodMemory()
    a_cgroup(folder, memory__limit_in_bytes="1000\n", **files)
    assert pod_memory(tmp_path, tmp_path / "none") == PodMemory(limit_bytes=1000, used_bytes=500)
