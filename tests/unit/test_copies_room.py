"""Whether a pod has room for copies, from what its cgroup says."""

from __future__ import annotations

from mend_trainer.copies.exchange import refusal
from mend_trainer.podmemory import PodMemory

GIB = 1 << 30


def test_without_a_limit_there_is_room() -> None:
    """No limit, no refusal: the machine's own is nothing that a pod could be told to raise."""
    assert refusal(1 << 50, PodMemory()) == ""


def test_a_refusal_says_what_to_do() -> None:
    """What does not fit beside a reserve is refused with both sizes and the ways out."""
    pod = PodMemory(limit_bytes=4 * GIB, used_bytes=3 * GIB)
    assert refusal(GIB // 2, pod) == ""
    told = refusal(GIB, pod)
    assert "1024Mi more, and 819Mi are left of the limit of 4096Mi; raise resources.limits.memory" in told
    assert "spec.checkpoint.memory.peers to false" in told


def test_a_pod_that_is_full_has_no_room() -> None:
    """Not even for a byte."""
    assert "0Mi are left" in refusal(1, PodMemory(limit_bytes=GIB, used_bytes=2 * GIB))
