"""Which node a pod goes to, what a pod's status says, and how its log is read."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from mend_local.containerlog import ContainerLog, LogQuery, follow_log, previous, read_log
from mend_local.podstatus import ContainerState, Running, Terminated, Waiting, merge_conditions, phase_of
from mend_local.scheduler import choose_node, wants_a_node
from mend_local.sigv4 import Keys, Request, refusal, sign
from pod_host import a_pod, shell


def a_node(name: str, **spec: Any) -> dict[str, Any]:
    """A node with its hostname as label."""
    return {"metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}}, "spec": spec}


NODES = [a_node("a"), a_node("b"), a_node("c", unschedulable=True)]
DEDICATED = {"key": "dedicated", "value": "gpu", "effect": "NoSchedule"}


def not_on(*names: str) -> dict[str, Any]:
    """Affinity that keeps a pod off nodes, as a run excludes bad ones."""
    term = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "NotIn", "values": list(names)}]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}}


@pytest.mark.parametrize(
    ("spec", "nodes", "expected"),
    [
        ({}, NODES, "b"),
        ({"nodeSelector": {"kubernetes.io/hostname": "a"}}, NODES, "a"),
        ({"affinity": not_on("b")}, NODES, "a"),
        ({}, [a_node("d", taints=[DEDICATED]), a_node("a")], "a"),
        ({"tolerations": [{"key": "dedicated", "operator": "Exists"}]}, [a_node("d", taints=[DEDICATED])], "d"),
        ({"tolerations": [{"key": "dedicated", "value": "cpu"}]}, [a_node("d", taints=[DEDICATED])], None),
        ({"affinity": not_on("a", "b")}, NODES, None),
        ({}, [], None),
    ],
)
def test_choice_of_a_node(spec: dict[str, Any], nodes: list[dict[str, Any]], expected: str | None) -> None:
    """The least loaded node that selectors, affinity, cordons and taints leave."""
    name, why_not = choose_node(a_pod(shell("true"), **spec), nodes, {"a": 3, "b": 1})
    assert name == expected
    assert bool(why_not) == (expected is None)


def test_pods_that_want_no_node() -> None:
    """A pod that has a node, is going, is gated, or has another scheduler is left alone."""
    assert wants_a_node(a_pod(shell("true"), nodeName=""))
    assert not wants_a_node(a_pod(shell("true")))
    assert not wants_a_node(a_pod(shell("true"), nodeName="", schedulingGates=[{"name": "kueue.x-k8s.io/admission"}]))
    assert not wants_a_node(a_pod(shell("true"), nodeName="", schedulerName="volcano"))


def ended(code: int) -> Terminated:
    """A container that ended so."""
    return Terminated(code, "Error" if code else "Completed", "", "")


@pytest.mark.parametrize(
    ("states", "policy", "expected"),
    [
        ([Waiting("ContainerCreating")], "Never", "Pending"),
        ([Running("")], "Never", "Running"),
        ([Running(""), ended(1)], "Never", "Running"),
        ([ended(0), ended(0)], "Never", "Succeeded"),
        ([ended(0), ended(1)], "Never", "Failed"),
        ([ended(1)], "OnFailure", "Running"),
        ([ended(0)], "OnFailure", "Succeeded"),
        ([ended(0)], "Always", "Running"),
    ],
)
def test_phases(states: list[Any], policy: str, expected: str) -> None:
    """The pod's phase from its containers and its restart policy."""
    assert phase_of([], [ContainerState(str(n), "", state=state) for n, state in enumerate(states)], policy) == expected


def test_conditions_of_others_are_kept() -> None:
    """A condition that somebody else set stays, and a transition time moves only with the truth."""
    before = [
        {"type": "DisruptionTarget", "status": "True"},
        {"type": "Ready", "status": "True", "lastTransitionTime": "then"},
    ]
    merged = merge_conditions(before, {"Ready": (True, "")})
    assert merged == [before[0], before[1]]
    assert merge_conditions(before, {"Ready": (False, "PodFailed")})[1]["reason"] == "PodFailed"


def test_a_log_is_read_by_its_tail_and_with_times(tmp_path: Path) -> None:
    """Lines come whole however they were written, with times on request; the last may lack its end."""
    log = ContainerLog(tmp_path / "logs" / "main.log", 1000)
    for chunk in (b"on", b"e\ntwo\r\nthr", b"ee"):
        log.write(chunk)
    log.close()
    path = tmp_path / "logs" / "main.log"
    assert read_log(path, LogQuery()) == b"one\ntwo\r\nthree\n"
    assert read_log(path, LogQuery(tail_lines=1)) == b"three\n"
    assert read_log(path, LogQuery(tail_lines=0)) == b""
    assert read_log(path, LogQuery(limit_bytes=5)) == b"one\nt"
    assert read_log(path, LogQuery(tail_lines=1, timestamps=True))[:2] == b"20"


def test_a_full_log_keeps_the_newest(tmp_path: Path) -> None:
    """A log that is full goes on with the newest lines, and a restart moves it out of the way."""
    path = tmp_path / "main.log"
    log = ContainerLog(path, 400)
    for number in range(100):
        log.write(f"line {number}\n".encode())
    log.close()
    lines = read_log(path, LogQuery()).splitlines()
    assert lines[-1] == b"line 99"
    assert 10 < len(lines) < 30
    ContainerLog(path, 400).close()
    assert read_log(path, LogQuery()) == b""
    assert read_log(previous(path), LogQuery()).splitlines()[-1] == b"line 99"


async def test_a_followed_log_misses_nothing(tmp_path: Path) -> None:
    """Who follows a log gets every line once, also across its rotation, and the end when the container ends."""
    path = tmp_path / "main.log"
    log = ContainerLog(path, 2000)
    is_open = asyncio.Event()
    is_open.set()

    async def write() -> None:
        for number in range(200):
            log.write(f"{number}\n".encode())
            if number % 20 == 0:
                await asyncio.sleep(0.02)
        log.close()
        is_open.clear()

    writing = asyncio.create_task(write())
    got = b"".join([block async for block in follow_log(path, LogQuery(), is_open, poll_seconds=0.001)])
    await writing
    assert [int(line) for line in got.splitlines()] == list(range(200))


async def test_following_ends_with_the_run(tmp_path: Path) -> None:
    """Who follows a log gets the rest of that run even if the container was started anew meanwhile, and no more."""
    path = tmp_path / "main.log"
    first, is_open = ContainerLog(path, 1000), asyncio.Event()
    is_open.set()
    first.write(b"one\n")
    following = follow_log(path, LogQuery(), is_open, poll_seconds=0.001)
    assert await anext(following) == b"one\n"
    first.write(b"two\n")
    first.close()
    is_open.clear()
    second = ContainerLog(path, 1000)
    second.write(b"of the next run\n")
    second.close()
    assert [block async for block in following] == [b"two\n"]


def test_signatures() -> None:
    """A request is accepted with the keys that signed it; a changed path, key or secret is refused by its name."""
    keys = Keys(access_key_id="id", secret_access_key="secret")
    headers = {"host": "localhost", "x-amz-date": "20260102T030405Z", "x-amz-content-sha256": "UNSIGNED-PAYLOAD"}
    request = Request(method="PUT", path="/b/a%20b", query="uploads", headers=headers)
    signed = {**headers, "authorization": sign(request, keys), "user-agent": "not signed"}
    assert refusal(Request(method="PUT", path="/b/a%20b", query="uploads", headers=signed), keys) is None
    changed = Request(method="PUT", path="/b/other", query="uploads", headers=signed)
    assert (refusal(changed, keys) or ("",))[0] == "SignatureDoesNotMatch"
    unsigned = Request(method="GET", path="/", headers=headers)
    assert (refusal(unsigned, keys) or ("",))[0] == "AccessDenied"
    stranger = Keys(access_key_id="other", secret_access_key="secret")
    assert (refusal(Request(method="PUT", path="/", headers=signed), stranger) or ("",))[0] == "InvalidAccessKeyId"
