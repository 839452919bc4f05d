"""Gives pods a node: waits for those that want one, asks the scheduler, and binds or says why not."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter

from mend_local.client import Api, ApiError, ApiUnreachable, sleep_backed_off
from mend_local.mirror import Mirror
from mend_local.podspec import Json
from mend_local.podstatus import now_rfc3339
from mend_local.recorder import Recorder
from mend_local.refs import conditions_of, full_name, is_over, node_of, path_of, same
from mend_local.scheduler import choose_node, wants_a_node

log = logging.getLogger(__name__)


class Binder:
    """Binds what the mirrors of pods and nodes show; `look_again` wakes it, `forget` is told what they show anew."""

    def __init__(self, api: Api, pods: Mirror, nodes: Mirror, recorder: Recorder) -> None:
        self._api = api
        self._pods = pods
        self._nodes = nodes
        self._recorder = recorder
        self._woken = asyncio.Event()
        self._assumed: dict[str, str] = {}  # uid -> the node it was sent to, until the mirror shows it
        self._refused: dict[str, str] = {}  # uid -> why no node takes it, as told

    def look_again(self) -> None:
        """Something changed that may make room."""
        self._woken.set()

    def forget(self, uid: str, *, gone: bool) -> None:
        """The mirror shows a pod anew, or that it is gone."""
        self._assumed.pop(uid, None)
        if gone:
            self._refused.pop(uid, None)
            self._woken.set()

    async def run(self) -> None:
        """Bind until cancelled."""
        await self._pods.synced.wait()
        await self._nodes.synced.wait()
        while True:
            await self._woken.wait()
            self._woken.clear()
            waiting = [pod for uid, pod in self._pods.objects.items() if wants_a_node(pod) and uid not in self._assumed]
            bound = [await self._bind(pod) for pod in sorted(waiting, key=_age)]
            if not all(bound):
                await sleep_backed_off(2)
                self._woken.set()

    async def _bind(self, pod: Json) -> bool:
        """Whether there is nothing to try again: it is bound, or no node will have it."""
        uid = pod["metadata"]["uid"]
        living = [each for each in self._pods.objects.values() if not is_over(each)]
        counts = Counter(node_of(each) for each in living) + Counter(self._assumed.values())
        name, why_not = choose_node(pod, list(self._nodes.objects.values()), counts)
        if name is None:
            if self._refused.get(uid) != why_not:
                self._refused[uid] = why_not
                await self._refuse(pod, why_not)
            return True
        self._assumed[uid] = name
        binding = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": pod["metadata"]["name"], "uid": uid},
            "target": {"apiVersion": "v1", "kind": "Node", "name": name},
        }
        try:
            await self._api.create(f"{path_of(pod)}/binding", binding)
        except (ApiError, ApiUnreachable) as error:
            self._assumed.pop(uid, None)
            log.info("pod %s was not bound: %s", full_name(pod), error)
            return False
        self._recorder.tell(pod, "Normal", "Scheduled", f"Successfully assigned {full_name(pod)} to {name}")
        return True

    async def _refuse(self, pod: Json, why_not: str) -> None:
        conditions = [each for each in conditions_of(pod) if each["type"] != "PodScheduled"]
        conditions.append(
            {
                "type": "PodScheduled",
                "status": "False",
                "reason": "Unschedulable",
                "message": why_not,
                "lastTransitionTime": now_rfc3339(),
            }
        )
        self._recorder.tell(pod, "Warning", "FailedScheduling", why_not)
        with contextlib.suppress(ApiError, ApiUnreachable):  # the event says the same
            status = {"phase": "Pending", "conditions": conditions}
            await self._api.merge(f"{path_of(pod)}/status", {"metadata": same(pod), "status": status})


def _age(pod: Json) -> int:
    return int(pod["metadata"]["resourceVersion"])
