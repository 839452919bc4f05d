"""Pods and runs as the API server tells them, turned into facts; nothing that they say stops the controller."""

from __future__ import annotations

from typing import Any

import pytest

from mend.crstatus import UnreadableStatus
from mend.observation import PodPhase
from mend.observe import bare_observation, belongs_to, decoded, targets, worker_pod

NOW = 1_800_000_000.0


def a_pod(**status: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "name": "clio-1-a3",
            "uid": "u1",
            "labels": {"mend.dev/worker": "1", "mend.dev/attempt": "3"},
            "creationTimestamp": "2027-01-15T07:59:50Z",
            "ownerReferences": [{"uid": "run-1"}],
        },
        "spec": {"nodeName": "n1"},
        "status": {"phase": "Running", "podIP": "10.0.0.7", **status},
    }


def ended(code: int, reason: str = "Error") -> dict[str, Any]:
    state = {"terminated": {"exitCode": code, "reason": reason}}
    return {"containerStatuses": [{"name": "sidecar", "state": {}}, {"name": "trainer", "state": state}]}


def test_a_running_worker() -> None:
    """Index, attempt, address, node and age are read off the pod."""
    pod = worker_pod(a_pod(), {}, NOW)
    assert (pod.index, pod.attempt, pod.ip, pod.node, pod.phase) == (1, 3, "10.0.0.7", "n1", PodPhase.RUNNING)
    assert (pod.age_seconds, pod.node_ready, pod.deleting, pod.exit_code) == (10.0, True, False, None)


@pytest.mark.parametrize("label", ["", "one", "-1", "１", None])
def test_a_spoilt_label_is_no_crash(label: str | None) -> None:
    """A pod whose labels somebody has changed stands for no worker."""
    raw = a_pod()
    raw["metadata"]["labels"]["mend.dev/worker"] = label
    assert worker_pod(raw, {}, NOW).index == -1


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (ended(137, "OOMKilled"), "OOMKilled"),
        ({"reason": "Evicted", **ended(143)}, "Evicted"),
        ({"conditions": [{"type": "DisruptionTarget", "status": "True"}], **ended(143)}, "DisruptionTarget"),
        ({"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}]}, "Unschedulable"),
        ({"conditions": [{"type": "PodScheduled", "status": "True", "reason": "Whatever"}]}, ""),
        (
            {"containerStatuses": [{"name": "trainer", "state": {"waiting": {"reason": "ErrImagePull"}}}]},
            "ErrImagePull",
        ),
        ({}, ""),
    ],
)
def test_the_most_telling_reason_is_taken(status: dict[str, Any], reason: str) -> None:
    """A disruption before the pod's own reason, that before the trainer's, that before the scheduler's."""
    assert worker_pod(a_pod(**status), {}, NOW).reason == reason


def test_the_trainers_end_and_no_sidecars() -> None:
    """The exit code is the trainer's."""
    assert worker_pod(a_pod(phase="Failed", **ended(3)), {}, NOW).exit_code == 3


@pytest.mark.parametrize(
    ("nodes", "ready"),
    [
        ({}, True),
        ({"n1": {"status": {}}}, True),
        ({"n1": {"status": {"conditions": [{"type": "Ready", "status": "True"}]}}}, True),
        ({"n1": {"status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}}}, False),
        ({"n2": {"status": {"conditions": [{"type": "Ready", "status": "False"}]}}}, True),
    ],
)
def test_only_a_word_against_a_node_counts(nodes: dict[str, Any], ready: bool) -> None:
    """No news of a node is no evidence against it."""
    assert worker_pod(a_pod(), nodes, NOW).node_ready is ready


def test_what_is_wrong_with_its_node() -> None:
    """Complaints about the machine, conditions that rules may ask for, and the nodes that it was made to avoid."""
    raw = a_pod()
    raw["metadata"]["annotations"] = {"mend.dev/avoids": "n7,n9"}
    ill = {"status": {"conditions": [{"type": "KernelDeadlock", "status": "True"}]}}
    pod = worker_pod(raw, {"n1": ill, "n2": {"status": {}}}, NOW)
    assert pod.node_problems == ("condition KernelDeadlock",)
    assert pod.node_conditions == ("KernelDeadlock=True",)
    assert pod.avoids == ("n7", "n9")
    assert worker_pod(a_pod(), {}, NOW).avoids == ()


def test_why_no_node_took_it() -> None:
    """The scheduler's own words."""
    refusal = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/2 nodes"}
    pod = worker_pod(a_pod(conditions=[refusal]), {}, NOW)
    assert (pod.reason, pod.message) == ("Unschedulable", "0/2 nodes")


def test_whom_to_dial() -> None:
    """Only pods with an address that have not ended, and only once there is a token."""
    pods = [
        worker_pod(a_pod(), {}, NOW),
        worker_pod(a_pod(podIP=""), {}, NOW),
        worker_pod(a_pod(phase="Failed"), {}, NOW),
    ]
    assert [(each.worker, each.ip, each.started) for each in targets(pods, "secret")] == [(1, "10.0.0.7", True)]
    assert targets(pods, None) == []


def test_whose_an_object_is() -> None:
    """By the uid of its owner, since names are given again."""
    assert belongs_to(a_pod(), "run-1")
    assert not belongs_to(a_pod(), "run-2")
    assert not belongs_to({"metadata": {}}, "run-1")


def test_a_secret_in_plain_text() -> None:
    """Data is base64; a Secret without any holds nothing."""
    assert decoded({"data": {"token": "c2VzYW1l", "blob": "/w=="}}, ("token", "absent")) == {"token": "sesame"}
    assert decoded({"data": {"token": "/w=="}}, ("token",)) == {"token": "\ufffd"}
    assert decoded({}, ("token",)) == {}


def test_a_run_by_its_own_word() -> None:
    """Times of the resource are seconds of the controller; a status that mend did not write is not guessed at."""
    meta = {"name": "clio", "namespace": "ml", "uid": "u", "generation": 4, "creationTimestamp": "2027-01-15T08:00:00Z"}
    seen = bare_observation({"metadata": meta, "status": {"attempt": 2}}, NOW)
    assert (seen.generation, seen.created_at, seen.status.attempt, seen.deleting) == (4, NOW, 2, False)
    assert bare_observation({"metadata": {**meta, "deletionTimestamp": "2027-01-15T08:00:00Z"}}, NOW).deleting
    with pytest.raises(UnreadableStatus, match="delete the status or restore it"):
        bare_observation({"metadata": meta, "status": {"attempt": "two"}}, NOW)
