"""The kubelet of every node of the local cluster: gives pods a node, runs them as processes, and tells what they do.

It compares what the API server wants with what runs, whenever either changes, so that it matters neither how it came
to know nor whether it missed something. When it starts, it ends the processes of an earlier life and fails their pods.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import signal
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from mend_local.addresses import SHARED, Addresses
from mend_local.binder import Binder
from mend_local.client import Api, ApiError, ApiUnreachable, insist, sleep_backed_off
from mend_local.containerlog import LogQuery, follow_log, previous, read_log
from mend_local.containers import log_path
from mend_local.memory import MemoryGroups, find_memory_groups, remove_memory_groups
from mend_local.mirror import Mirror
from mend_local.nodekeeper import NodeKeeper
from mend_local.nodes import ADDRESS_NOTE, MEMORY_NOTE, node_names
from mend_local.pods import PodRunner, PodSettings
from mend_local.podspec import Json, Source, contents
from mend_local.podstatus import merge_conditions, now_rfc3339
from mend_local.processes import end_owned, end_recorded
from mend_local.recorder import Recorder
from mend_local.refs import full_name, grace_of, is_over, node_of, path_of, same
from mend_local.volumes import Volumes, remove_shared_memory

log = logging.getLogger(__name__)

SYSTEM: Final = "system"  # in owner marks, the place of the pod's uid for what is no pod
FAULT_NOTE: Final = "local.mend.dev/fault"  # `kubectl annotate pod NAME local.mend.dev/fault=frozen`
RESTARTED: Final = "KubeletRestarted"
SHUTDOWN: Final = ("Terminated", "Pod was terminated in response to imminent node shutdown.")


@dataclass(frozen=True, slots=True, kw_only=True)
class KubeletSettings:
    """The nodes it stands for, and how it treats pods."""

    nodes: int = 2
    heartbeat_seconds: float = 10.0
    shutdown_grace_seconds: float = 10.0
    pods: PodSettings = field(default_factory=PodSettings)


def end_earlier_life(root: Path, cluster_id: str) -> int:
    """End the processes that an earlier life of this cluster left, and free what they held; returns how many.

    Its own children by their records, everything else by the owner mark. It blocks: call it in a thread.
    """
    ended = [each.identity for record in root.glob("*/*.process.json") for each in end_recorded(record)]
    ended += [each.identity for each in end_owned(f"{cluster_id}/")]
    remove_shared_memory(cluster_id)
    remove_memory_groups(find_memory_groups(cluster_id))
    return len(set(ended))


class NoSuchPod(LookupError):
    """No pod of that name runs here."""


class Kubelet:
    """Runs pods below `root`, marked with `cluster_id`, as `api` wants them."""

    def __init__(self, api: Api, root: Path, cluster_id: str, settings: KubeletSettings) -> None:
        self.cluster_id = cluster_id
        self.memory: MemoryGroups = find_memory_groups(cluster_id)
        self._api = api
        self._root = root
        self._settings = settings
        self._addresses = Addresses()
        self._recorder = Recorder(api, "mend-local-kubelet")
        self._keeper = NodeKeeper(api, node_names(settings.nodes), self._notes(), settings.heartbeat_seconds)
        self._pods = Mirror(api, "/api/v1/pods", self._reconcile)
        self._nodes = Mirror(api, "/api/v1/nodes", self._reconcile_node)
        self._binder = Binder(api, self._pods, self._nodes, self._recorder)
        self._runners: dict[str, PodRunner] = {}
        self._dirty: dict[str, asyncio.Event] = {}
        self._publishers: dict[str, asyncio.Task[None]] = {}
        self._ending: dict[str, float] = {}  # uid -> the grace it is being ended with
        self._faults: dict[str, str] = {}  # uid -> the fault that was last asked for in its annotation
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

    @property
    def node_names(self) -> tuple[str, ...]:
        """The nodes it stands for."""
        return self._keeper.names

    @property
    def settings(self) -> PodSettings:
        """How it treats pods."""
        return self._settings.pods

    # ------------------------------------------------------------ life
    async def start(self) -> None:
        """Register the nodes and begin to watch. First call `end_earlier_life`."""
        await self._keeper.register()
        for work in (self._pods.run(), self._nodes.run(), self._recorder.run(), self._binder.run(), self._keeper.run()):
            self._spawn(work)
        await self._pods.synced.wait()

    async def stop(self) -> None:
        """End every pod as a node that shuts down does, tell it, and stop."""
        self._stopping = True
        for runner in self._runners.values():
            runner.final = SHUTDOWN
        grace = self._settings.shutdown_grace_seconds
        await asyncio.gather(*(each.terminate(min(grace, grace_of(each.pod))) for each in self._runners.values()))
        for runner in self._runners.values():
            if node_of(runner.pod) not in self._keeper.lost:
                with contextlib.suppress(ApiError, ApiUnreachable):
                    await self._write_status(runner)
        await self._cancel([*self._tasks, *self._publishers.values()])
        self._addresses.close()
        await asyncio.to_thread(remove_memory_groups, self.memory)

    @staticmethod
    async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _notes(self) -> dict[str, str]:
        """What users should know of its nodes."""
        return {
            MEMORY_NOTE: "enforced" if self.memory.root else f"ignored: {self.memory.why_not}",
            ADDRESS_NOTE: "one per pod" if self._addresses.separate else "shared: 127.0.0.1",
        }

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._settled)

    def _settled(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("the kubelet stumbled: %r", error, exc_info=error)

    # ------------------------------------------------------------ what is wanted against what runs
    def _reconcile(self, uid: str) -> None:
        pod, runner = self._pods.objects.get(uid), self._runners.get(uid)
        self._binder.forget(uid, gone=pod is None)
        if self._stopping or (runner is not None and node_of(runner.pod) in self._keeper.lost):
            return
        if pod is None:
            if runner is not None:
                self._spawn(self._remove(runner))
            elif (self._root / uid).exists():
                self._clean_up(uid)
            return
        node = node_of(pod)
        if not node:
            self._binder.look_again()
        elif node in self.node_names and node not in self._keeper.lost:
            self._reconcile_bound(uid, pod, runner)

    def _reconcile_bound(self, uid: str, pod: Json, runner: PodRunner | None) -> None:
        if runner is not None:
            runner.pod = pod
        if pod["metadata"].get("deletionTimestamp"):
            grace = float(pod["metadata"].get("deletionGracePeriodSeconds") or 0)
            if self._ending.get(uid, float("inf")) > grace:  # new, or told to hurry
                self._ending[uid] = grace
                self._spawn(self._end(uid, pod, runner, grace))
        elif runner is not None:
            self._obey_fault(uid, pod, runner)
        elif not is_over(pod):
            if self._ran_before(uid, pod):
                self._spawn(self._fail(pod))
            else:
                self._run(uid, pod)

    def _run(self, uid: str, pod: Json) -> None:
        ip = self._addresses.of(uid)
        runner = PodRunner(pod, self, root=self._root / uid, ip=ip, host_ip=SHARED)
        self._runners[uid] = runner
        self._dirty[uid] = asyncio.Event()
        self._dirty[uid].set()
        self._publishers[uid] = asyncio.create_task(self._publish(runner))

    async def _end(self, uid: str, pod: Json, runner: PodRunner | None, grace_seconds: float) -> None:
        """A deletion with grace: end it, tell how it ended, then let the object go."""
        if runner is not None:
            if not runner.has_ended:
                self.event(pod, "Normal", "Killing", f"Stopping pod with {grace_seconds:g}s of grace")
            await runner.terminate(grace_seconds)
            with contextlib.suppress(ApiError, ApiUnreachable):  # the deletion counts, not the last word
                await self._write_status(runner)
        options = {"gracePeriodSeconds": 0, "preconditions": {"uid": uid}}
        await insist(
            lambda: self._api.delete(path_of(pod), options),
            lambda: node_of(pod) in self._keeper.lost or uid not in self._pods.objects,
        )
        if node_of(pod) in self._keeper.lost:
            self._ending.pop(uid, None)  # done again when the node is back

    async def _remove(self, runner: PodRunner) -> None:
        """The object is gone: so must be all that ran for it."""
        await runner.terminate(0)
        publisher = self._publishers.pop(runner.uid, None)
        if publisher is not None:
            await self._cancel([publisher])
        if self._runners.pop(runner.uid, None) is not None:
            runner.clean_up()
        self._dirty.pop(runner.uid, None)
        self._ending.pop(runner.uid, None)
        self._faults.pop(runner.uid, None)
        self._addresses.free(runner.uid)

    def _clean_up(self, uid: str) -> None:
        Volumes(self._root / uid / "volumes", self.cluster_id, uid).remove()
        shutil.rmtree(self._root / uid, ignore_errors=True)

    def _ran_before(self, uid: str, pod: Json) -> bool:
        """Whether a process of the pod was started in an earlier life, whatever came to be known of it."""
        statuses = (pod.get("status") or {}).get("containerStatuses") or []
        told = any({"running", "terminated"} & set(each.get("state") or {}) for each in statuses)
        return told or any((self._root / uid).glob("*.process.json"))

    async def _fail(self, pod: Json) -> None:
        """Its processes were ended when this kubelet started: a pod that cannot go on has failed."""
        before = pod.get("status") or {}
        why_not = (False, "PodFailed")
        status = {
            "phase": "Failed",
            "reason": RESTARTED,
            "message": "The kubelet was restarted, and ended the processes that its earlier life had left.",
            "conditions": merge_conditions(
                before.get("conditions") or [], {"ContainersReady": why_not, "Ready": why_not}
            ),
            "containerStatuses": [_ended_unseen(each) for each in before.get("containerStatuses") or []],
        }
        await insist(
            lambda: self._api.merge(f"{path_of(pod)}/status", {"metadata": same(pod), "status": status}),
            lambda: pod["metadata"]["uid"] not in self._pods.objects,
        )

    def _obey_fault(self, uid: str, pod: Json, runner: PodRunner) -> None:
        """A pod's annotation `local.mend.dev/fault`: frozen, killed, or none."""
        asked = (pod["metadata"].get("annotations") or {}).get(FAULT_NOTE, "")
        before = self._faults.get(uid, "")
        if asked == before:
            return
        self._faults[uid] = asked
        match asked:
            case "frozen":
                runner.signal_all(signal.SIGSTOP)
            case "killed":
                runner.signal_all(signal.SIGKILL)
            case "":
                runner.signal_all(signal.SIGCONT)
            case _:
                self.event(pod, "Warning", "UnknownFault", f"{FAULT_NOTE}: {asked!r} is none of frozen, killed")

    def _reconcile_node(self, uid: str) -> None:
        """A node's annotation `local.mend.dev/fault`: lost, or none; and there may be room for who waits."""
        self._binder.look_again()
        node = self._nodes.objects.get(uid)
        if node is None or node["metadata"]["name"] not in self.node_names:
            return
        asked = (node["metadata"].get("annotations") or {}).get(FAULT_NOTE, "")
        before, self._faults[uid] = self._faults.get(uid, ""), asked
        if asked != before and "lost" in (asked, before):
            name = node["metadata"]["name"]
            self._spawn(self.lose_node(name) if asked == "lost" else self.restore_node(name))

    # ------------------------------------------------------------ what a pod needs from us (PodHost)
    def changed(self, pod: PodRunner) -> None:
        """Publish its status soon; several changes at once are one."""
        if pod.uid in self._dirty:
            self._dirty[pod.uid].set()

    def event(self, pod: Json, kind: str, reason: str, message: str) -> None:
        """Tell users."""
        self._recorder.tell({"apiVersion": "v1", "kind": "Pod"} | pod, kind, reason, message)

    async def fetch(self, source: Source, namespace: str) -> Mapping[str, bytes] | None:
        """The entries of a Secret or ConfigMap."""
        kind = {"secrets": "Secret", "configmaps": "ConfigMap"}[source.kind]
        try:
            found = await self._api.get(f"/api/v1/namespaces/{namespace}/{source.kind}/{source.name}")
        except ApiError as error:
            if error.code == 404:
                return None
            raise ApiUnreachable(f"{source.kind} {source.name}: {error}") from error
        return contents({"kind": kind} | found)

    async def _publish(self, runner: PodRunner) -> None:
        failures = 0
        dirty = self._dirty[runner.uid]
        while True:
            await dirty.wait()
            if node_of(runner.pod) in self._keeper.lost:
                dirty.clear()  # set again when the node is back
                continue
            dirty.clear()
            try:
                await self._write_status(runner)
                failures = 0
            except (ApiError, ApiUnreachable) as error:
                log.debug("status of %s/%s: %s", runner.namespace, runner.name, error)
                failures += 1
                dirty.set()
                await sleep_backed_off(failures)

    async def _write_status(self, runner: PodRunner) -> None:
        body = {"metadata": same(runner.pod), "status": runner.status}
        await self._api.merge(f"{path_of(runner.pod)}/status", body)

    # ------------------------------------------------------------ logs
    async def read_log(
        self, namespace: str, name: str, container: str, query: LogQuery, *, follow: bool, of_previous: bool
    ) -> AsyncIterator[bytes]:
        """The output of a container, and with `follow` what comes until it ends. Raises LookupError without one."""
        uid = next((uid for uid, pod in self._pods.objects.items() if full_name(pod) == f"{namespace}/{name}"), "")
        path = log_path(self._root / uid, container)
        if of_previous:
            path = previous(path)
        if not uid or not path.exists():
            why = "has not been restarted" if of_previous else "is waiting to start"
            raise LookupError(f'container "{container}" in pod "{name}" {why}')
        runner = self._runners.get(uid)
        is_open = runner.log_open.get(container) if runner else None
        if follow and is_open is not None and not of_previous:
            async for block in follow_log(path, query, is_open):
                yield block
        else:
            yield await asyncio.to_thread(read_log, path, query)

    # ------------------------------------------------------------ faults, on command
    def running(self, namespace: str, name: str) -> PodRunner:
        """The pod of this name that runs here."""
        for runner in self._runners.values():
            if (runner.namespace, runner.name) == (namespace, name) and not runner.has_ended:
                return runner
        known = ", ".join(sorted(f"{each.namespace}/{each.name}" for each in self._runners.values())) or "none"
        raise NoSuchPod(f"no pod {namespace}/{name} runs here; running are: {known}")

    def freeze_pod(self, namespace: str, name: str) -> int:
        """SIGSTOP every process of a pod; returns how many."""
        return self.running(namespace, name).signal_all(signal.SIGSTOP)

    def thaw_pod(self, namespace: str, name: str) -> int:
        """SIGCONT them."""
        return self.running(namespace, name).signal_all(signal.SIGCONT)

    def kill_pod(self, namespace: str, name: str, number: int = signal.SIGKILL) -> int:
        """Signal every process of a pod, SIGKILL if nothing else is said."""
        return self.running(namespace, name).signal_all(number)

    async def lose_node(self, name: str) -> None:
        """A partition: nothing is heard from the node, nothing reaches it, and its pods' processes live on."""
        self._known_node(name)
        await self._keeper.lose(name)

    async def restore_node(self, name: str) -> None:
        """The partition ends: the node reports again, and ends what it should no longer run."""
        self._known_node(name)
        await self._keeper.find(name)
        for uid in {*self._pods.objects, *self._runners}:
            self._reconcile(uid)
        for dirty in self._dirty.values():
            dirty.set()

    @property
    def lost_nodes(self) -> list[str]:
        """The nodes that are partitioned now."""
        return sorted(self._keeper.lost)

    def runners(self) -> list[PodRunner]:
        """Every pod that is held here, running or over."""
        return list(self._runners.values())

    def _known_node(self, name: str) -> None:
        if name not in self.node_names:
            raise NoSuchPod(f"no node {name!r} here; nodes are: {', '.join(self.node_names)}")


def _ended_unseen(status: Json) -> Json:
    """A container's status when its process was ended without anybody watching."""
    state = status.get("state") or {}
    if "terminated" in state:
        return status
    ended = {
        "exitCode": 137,
        "reason": "ContainerStatusUnknown",
        "message": "The container could not be located when the kubelet was restarted.",
        "startedAt": (state.get("running") or {}).get("startedAt"),
        "finishedAt": now_rfc3339(),
    }
    return status | {"ready": False, "started": False, "state": {"terminated": ended}}
