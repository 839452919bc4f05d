"""Events on a real server: told once, counted when repeated, bounded, and never an error of the controller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kube_server import NAMESPACE, Cluster, a_cluster
from mend.kube.client import EVENTS
from mend.kube.events import BURST, EventRecorder, Regarding

RUN = Regarding("mend.dev/v1alpha1", "TrainingRun", NAMESPACE, "clio", "run-uid")


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """A fresh server."""
    async with a_cluster(tmp_path) as cluster:
        yield cluster


@pytest.fixture
async def recorder(cluster: Cluster) -> AsyncIterator[EventRecorder]:
    """A recorder that sends."""
    recorder = EventRecorder(cluster.client, component="mend", instance="mend-0")
    task = asyncio.create_task(recorder.run())
    yield recorder
    assert not task.done(), task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def events(cluster: Cluster) -> list[dict[str, Any]]:
    """Those of the run."""
    found = await cluster.client.list_all(EVENTS, NAMESPACE)
    return [event for event in found.items if event["involvedObject"]["name"] == "clio"]


async def test_an_event_tells_what_happened_to_whom(cluster: Cluster, recorder: EventRecorder) -> None:
    """Type, reason, message, source and the object are as kubectl describe shows them."""
    recorder.record(RUN, "Warning", "RankCrashed", "rank 3 was killed by signal 9")
    await recorder.flush()
    (event,) = await events(cluster)
    assert (event["type"], event["reason"], event["count"]) == ("Warning", "RankCrashed", 1)
    assert event["message"] == "rank 3 was killed by signal 9"
    assert event["involvedObject"]["uid"] == "run-uid"
    assert event["source"]["component"] == "mend"


async def test_repeats_are_counted(cluster: Cluster, recorder: EventRecorder) -> None:
    """The same event again raises the count; another message is another event."""
    for message in ("twice", "once", "twice"):
        recorder.record(RUN, "Normal", "Recovering", message)
    await recorder.flush()
    assert {event["message"]: event["count"] for event in await events(cluster)} == {"twice": 2, "once": 1}


async def test_a_repeat_of_a_forgotten_event_is_a_new_one(cluster: Cluster, recorder: EventRecorder) -> None:
    """API servers forget events: a repeat after that is told anew."""
    recorder.record(RUN, "Normal", "Recovering", "again")
    await recorder.flush()
    (event,) = await events(cluster)
    await cluster.client.delete(EVENTS, NAMESPACE, event["metadata"]["name"])
    recorder.record(RUN, "Normal", "Recovering", "again")
    await recorder.flush()
    (event,) = await events(cluster)
    assert event["count"] == 1


async def test_one_object_cannot_flood(cluster: Cluster, recorder: EventRecorder) -> None:
    """Beyond its allowance an object's events are dropped and counted; another object's are not."""
    for number in range(BURST + 10):
        recorder.record(RUN, "Normal", "Noise", f"number {number}")
    recorder.record(Regarding("v1", "Pod", NAMESPACE, "clio", "pod-uid"), "Normal", "Quiet", "one")
    await recorder.flush()
    assert recorder.dropped == 10
    assert len(await events(cluster)) == BURST + 1


async def test_what_the_api_refuses_is_counted_and_forgotten(cluster: Cluster, recorder: EventRecorder) -> None:
    """Neither errors of the server nor a namespace that is gone reach the controller."""
    await cluster.misbehave(errors=1, errorCode=500)
    recorder.record(RUN, "Normal", "Lost", "to an error")
    recorder.record(Regarding("v1", "Pod", "no-such-namespace", "p", "u"), "Normal", "Lost", "to nowhere")
    recorder.record(RUN, "Normal", "Told", "all the same")
    await recorder.flush()
    assert [event["reason"] for event in await events(cluster)] == ["Told"]
    assert (recorder.sent, recorder.failed) == (1, 2)
