"""One pod as processes: its containers started in order, kept running as its restart policy says, and ended in time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

from mend_local.containers import Output, find_program, image_env, log_path, record_path, start_error
from mend_local.memory import MemoryGroups
from mend_local.podspec import (
    Command,
    ConfigError,
    Json,
    PodFacts,
    Source,
    command_of,
    memory_limit_bytes,
    sources,
)
from mend_local.podstatus import (
    ContainerState,
    Running,
    State,
    Terminated,
    Waiting,
    exit_of,
    now_rfc3339,
    status_of,
    wants_restart,
)
from mend_local.processes import Process
from mend_local.volumes import Volumes

log = logging.getLogger(__name__)

MISSING_IMAGE: Final = "missing/"  # images of this prefix cannot be pulled, so that tests can see what comes of it


@dataclass(frozen=True, slots=True, kw_only=True)
class PodSettings:
    """How patient the kubelet is with containers that fail, and how much of their output it keeps."""

    backoff_seconds: float = 10.0
    backoff_max_seconds: float = 300.0
    config_retry_seconds: float = 1.0
    log_bytes: int = 10 * 2**20


class PodHost(Protocol):
    """What a pod needs from its kubelet."""

    @property
    def settings(self) -> PodSettings:
        """How patient to be."""

    @property
    def memory(self) -> MemoryGroups:
        """Where memory limits can be set."""

    @property
    def cluster_id(self) -> str:
        """Marks the processes of this cluster."""

    def changed(self, pod: PodRunner) -> None:
        """The pod's status is no longer what was published."""

    def event(self, pod: Json, kind: str, reason: str, message: str) -> None:
        """Tell users what happened; `kind` is Normal or Warning."""

    async def fetch(self, source: Source, namespace: str) -> Mapping[str, bytes] | None:
        """The entries of a Secret or ConfigMap; None if there is none. Raises `ConnectionError`."""


class PodRunner:
    """Runs one pod (this very uid) from its start to the end of its last process."""

    def __init__(self, pod: Json, host: PodHost, *, root: Path, ip: str, host_ip: str) -> None:
        self.pod = pod
        self.uid: str = pod["metadata"]["uid"]
        self.name: str = pod["metadata"]["name"]
        self.namespace: str = pod["metadata"]["namespace"]
        self.final: tuple[str, str] | None = None  # reason and message of a pod that is made to fail as a whole
        self.log_open: dict[str, asyncio.Event] = {}
        self._host = host
        self._root = root
        self._facts = PodFacts(pod_ip=ip, host_ip=host_ip)
        self._policy: str = pod["spec"].get("restartPolicy") or "Always"
        self._init = [_fresh(each) for each in pod["spec"].get("initContainers") or []]
        self._main = [_fresh(each) for each in pod["spec"]["containers"]]
        if self._init:
            self._main = [replace(each, state=Waiting("PodInitializing")) for each in self._main]
        self._volumes = Volumes(root / "volumes", host.cluster_id, self.uid)
        self._start_time = now_rfc3339()
        self._processes: dict[str, Process] = {}
        self._stopping = asyncio.Event()
        root.mkdir(parents=True, exist_ok=True)
        self._life = asyncio.create_task(self._live(), name=f"pod {self.namespace}/{self.name}")

    # ------------------------------------------------------------ what others see and do
    @property
    def status(self) -> Json:
        """The pod's status as it is now."""
        return status_of(
            self._init,
            self._main,
            policy=self._policy,
            start_time=self._start_time,
            pod_ip=self._facts.pod_ip,
            host_ip=self._facts.host_ip,
            conditions_before=(self.pod.get("status") or {}).get("conditions") or [],
            final=self.final if self._life.done() else None,
        )

    @property
    def processes(self) -> Mapping[str, Process]:
        """The leader of each container that runs."""
        return self._processes

    @property
    def has_ended(self) -> bool:
        """No container runs, and none will run again."""
        return self._life.done()

    async def ended(self) -> None:
        """Wait until `has_ended`."""
        await asyncio.wait({self._life})

    async def terminate(self, grace_seconds: float) -> None:
        """SIGTERM to each container's main process, SIGKILL to all when the grace is over. May be called again."""
        if not self._stopping.is_set():
            self._stopping.set()
            for process in self._processes.values():
                process.signal(signal.SIGTERM)
        await asyncio.wait({self._life}, timeout=grace_seconds)
        self.kill()
        await self.ended()

    def kill(self) -> None:
        """SIGKILL each container's main process; all that it started goes with it."""
        for process in self._processes.values():
            process.signal(signal.SIGKILL)

    def signal_all(self, number: int, container: str | None = None) -> int:
        """A fault: signal every process of the pod, or of one container; returns how many there were."""
        chosen = [each for name, each in self._processes.items() if container in (None, name)]
        members = [member for each in chosen for member in each.members()]
        for each in chosen:
            each.signal_all(number)
        return len(members)

    def clean_up(self) -> None:
        """Remove what the pod kept on disk and in memory: it is gone."""
        self._volumes.remove()
        shutil.rmtree(self._root, ignore_errors=True)

    # ------------------------------------------------------------ its life
    async def _live(self) -> None:
        try:
            for index, container in enumerate(self.pod["spec"].get("initContainers") or []):
                # An init container that succeeded is done, even where the policy is Always.
                policy = "OnFailure" if self._policy == "Always" else self._policy
                ended = await self._keep(self._init, index, container, policy)
                if ended is None or ended.exit_code:
                    return
            async with asyncio.TaskGroup() as together:
                for index, container in enumerate(self.pod["spec"]["containers"]):
                    together.create_task(self._keep(self._main, index, container, self._policy))
        finally:
            # Once this task is done, and not before, `status` may show the pod's end.
            asyncio.get_running_loop().call_soon(self._host.changed, self)

    async def _keep(self, states: list[ContainerState], index: int, container: Json, policy: str) -> Terminated | None:
        """Run a container until it is not to be started again; None if it was not even started."""
        delay, failures = self._host.settings.backoff_seconds, 0
        ended: Terminated | None = None
        while not self._stopping.is_set():
            command = await self._prepared(states, index, container)
            if command is None:
                return ended
            ended = await self._run(states, index, container, command)
            if self._stopping.is_set() or not wants_restart(policy, ended):
                return ended
            if failures:  # the first restart is at once, as in Kubernetes
                message = f"back-off {delay:g}s restarting failed container={container['name']} pod={self.name}"
                self._host.event(self.pod, "Warning", "BackOff", message)
                self._set(states, index, Waiting("CrashLoopBackOff", message), last=ended)
                if await self._pause(delay):
                    self._set(states, index, ended)
                    return ended
                delay = min(2 * delay, self._host.settings.backoff_max_seconds)
            failures += 1
            self._set(states, index, states[index].state, last=ended, restarts=states[index].restarts + 1)
        return ended

    async def _prepared(self, states: list[ContainerState], index: int, container: Json) -> Command | None:
        """What to run, as soon as image, volumes and sources are there; None when the pod is to end first."""
        delay = self._host.settings.backoff_seconds
        while not self._stopping.is_set():
            image = container.get("image") or ""
            if image.startswith(MISSING_IMAGE):
                trouble: Waiting = Waiting("ErrImagePull", f'failed to pull image "{image}": not found')
                self._host.event(self.pod, "Warning", "Failed", f'Failed to pull image "{image}": not found')
                self._set(states, index, trouble)
                if await self._pause(min(1.0, delay)):
                    break
                self._set(states, index, Waiting("ImagePullBackOff", f'Back-off pulling image "{image}"'))
                await self._pause(delay)
                delay = min(2 * delay, self._host.settings.backoff_max_seconds)
                continue
            try:
                return await self._command(container)
            except ConfigError as error:
                self._host.event(self.pod, "Warning", "Failed", f"Error: {error}")
                self._set(states, index, Waiting("CreateContainerConfigError", str(error)))
            except ConnectionError as error:  # the API server is away; the pod need not know
                log.info("pod %s/%s waits for the API server: %s", self.namespace, self.name, error)
            await self._pause(self._host.settings.config_retry_seconds)
        return None

    async def _command(self, container: Json) -> Command:
        found: dict[Source, Mapping[str, bytes]] = {}
        for source in sources(self.pod):
            entries = await self._host.fetch(source, self.namespace)
            if entries is not None:
                found[source] = entries
        self._volumes.make(self.pod, found)
        mounts = self._volumes.mounts_of(container)
        return command_of(container, self.pod, self._facts, found, mounts, image_env())

    async def _run(self, states: list[ContainerState], index: int, container: Json, command: Command) -> Terminated:
        """Run a container once."""
        name, began = container["name"], now_rfc3339()
        group = self._memory_group(container)
        try:
            process, output = self._start(container, command, group)
        except OSError as error:
            ended = start_error(command, error, began)
            self._host.event(self.pod, "Warning", "Failed", f"Error: {ended.message}")
            self._set(states, index, ended)
            return ended
        self._processes[name] = process
        log_open = self.log_open[name] = asyncio.Event()  # a new one: who follows a log does not follow the next
        log_open.set()
        if self._stopping.is_set():
            process.signal(signal.SIGTERM)
        identity = process.identity
        self._set(states, index, Running(began), container_id=f"process://{identity.pid}-{identity.started_ticks}")
        self._host.event(self.pod, "Normal", "Started", f"Started container {name}")
        try:
            await process.exited()
        finally:  # also when we are cancelled: nothing of the pod outlives this
            process.signal(signal.SIGKILL)
            code = await self._reap(process)
            await output.drained()
            del self._processes[name]
            log_open.clear()
        oom_killed = group is not None and self._host.memory.oom_killed(group)
        if group is not None:
            await asyncio.to_thread(self._host.memory.remove, group)
        ended = exit_of(code, began, oom_killed=oom_killed)
        self._set(states, index, ended)
        return ended

    def _start(self, container: Json, command: Command, group: Path | None) -> tuple[Process, Output]:
        work = self._root / "work" / container["name"]  # where an image would have its working directory
        work.mkdir(parents=True, exist_ok=True)
        cwd = Path(command.cwd) if command.cwd else work
        if not cwd.is_dir():
            raise NotADirectoryError(f"workingDir {command.cwd!r} is no directory of this machine")
        program = find_program(command.words[0], command.env["PATH"], cwd)
        output = Output(log_path(self._root, container["name"]), self._host.settings.log_bytes)
        try:
            process = Process.start(
                [program, *command.words[1:]],
                owner=f"{self._host.cluster_id}/{self.uid}/{container['name']}",
                env=command.env,
                cwd=cwd,
                output=output.inlet,
                cgroup=group,
            )
        except OSError:
            output.close()
            raise
        output.opened()
        try:
            process.record(record_path(self._root, container["name"]))
        except OSError as error:  # a full disk; the owner mark still tells whose process this is
            log.warning("the process of pod %s/%s is not recorded: %s", self.namespace, self.name, error)
        return process, output

    async def _reap(self, process: Process) -> int:
        try:
            return await process.reap()
        except TimeoutError as error:  # stuck in the kernel: it dies when it wakes, and the pod is over all the same
            log.error("pod %s/%s: %s", self.namespace, self.name, error)
            return -signal.SIGKILL

    def _memory_group(self, container: Json) -> Path | None:
        limit = memory_limit_bytes(container)
        return None if limit is None else self._host.memory.make(f"{self.uid}-{container['name']}", limit)

    async def _pause(self, seconds: float) -> bool:
        """Wait; True, at once, if the pod is to end."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)
        return self._stopping.is_set()

    def _set(
        self,
        states: list[ContainerState],
        index: int,
        state: State,
        *,
        last: Terminated | None = None,
        restarts: int | None = None,
        container_id: str | None = None,
    ) -> None:
        old = states[index]
        states[index] = replace(
            old,
            state=state,
            last=last or old.last,
            restarts=old.restarts if restarts is None else restarts,
            container_id=container_id or old.container_id,
        )
        if states[index] != old:
            self._host.changed(self)


def _fresh(container: Json) -> ContainerState:
    return ContainerState(name=container["name"], image=container.get("image") or "")
