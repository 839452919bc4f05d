"""A laptop-sized cluster with mend's controller and small training runs in it, for tests of the whole chain.

It runs in a thread of its own, so that tests are plain functions that call kubectl, kill processes and wait for a
condition. Runs are gangs of real processes on gloo that execute programs/loop.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from api_thread import in_a_thread
from cluster_client import MERGE, Cluster, Kubectl, Namespaced
from mend.crstatus import from_resource
from mend.demo.watch import Sight, Watcher
from mend.heartbeats import RankReport
from mend.kube.client import KubeClient
from mend.names import API_VERSION, KIND, PLURAL
from mend.status import RunPhase, RunStatus
from mend_local.bootstrap import S3_SECRET
from mend_local.cluster import ClusterSettings, LocalCluster, controller_command
from mend_local.kubelet import KubeletSettings
from mend_local.pods import image_env

T = TypeVar("T")
Json = dict[str, Any]
PROGRAMS = Path(__file__).parent / "programs"
NAMESPACE = "default"
FAULTS = "/mend-local/faults"
SECONDS = 150.0  # everything here takes a few seconds; machines that test are busy
HERE = Namespaced(NAMESPACE)
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


class TrainingCluster:
    """A cluster, seen as its users see it, and as no user does."""

    def __init__(self, local: LocalCluster, watcher: Watcher, loop: asyncio.AbstractEventLoop) -> None:
        self.local = local
        self.api = Cluster(local.kubeconfig)
        self.folder = local.places.root
        self._watcher = watcher
        self._loop = loop

    def wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of something that is done in the cluster's own loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(SECONDS)

    def kubectl(self, home: Path) -> Kubectl:
        """A real kubectl."""
        program = os.environ.get("KUBECTL") or shutil.which("kubectl")
        assert program
        return Kubectl(program, self.local.kubeconfig, NAMESPACE, home)

    # ------------------------------------------------------------ runs
    def run(
        self, name: str, *, workers: int = 1, ranks: int = 2, env: dict[str, str] | None = None, **spec: Any
    ) -> Json:
        """A TrainingRun of programs/loop.py that saves every 10 steps; `spec` replaces parts of its spec.

        Two ranks in one pod, unless told otherwise: it is pods that take time to start.
        """
        assert self.local.s3 is not None
        variables = {"GLOO_SOCKET_IFNAME": "lo", "FAULTS": str(self.faults_of(name)), **(env or {})}
        container = {
            "name": "trainer",
            "image": "loop",
            "command": ["python", str(PROGRAMS / "loop.py")],
            "env": [{"name": key, "value": value} for key, value in variables.items()],
        }
        pod = {"terminationGracePeriodSeconds": 5, "containers": [container]}
        template = {"template": {"spec": pod}}
        return {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": {"name": name, "namespace": NAMESPACE},
            "spec": {
                "workers": {"replicas": workers, "ranksPerWorker": ranks, **template},
                "checkpoint": {
                    "uri": f"s3://{self.local.s3.bucket}/{name}",
                    "credentialsSecret": S3_SECRET,
                    "interval": "10 steps",
                },
                # Learnt limits come near the floor; on a busy machine a step may well take a second.
                "health": {"limits": {"start": "2m", "firstStep": "1m", "floor": "4s", "pause": "2s"}},
                **spec,
            },
        }

    def faults_of(self, name: str) -> Path:
        """Where programs/loop.py looks for what is asked of it."""
        folder = self.folder / "asked" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def ask_fault(self, name: str, rank: int, fault: str) -> None:
        """Rank `rank` of the run is to go wrong in its next step."""
        (self.faults_of(name) / f"rank-{rank}").write_text(fault)

    def apply(self, run: Json) -> str:
        """Create a run; its name."""
        self.api.create(HERE.of(API_VERSION, PLURAL), run)
        return str(run["metadata"]["name"])

    def patch(self, name: str, **spec: Any) -> None:
        """Change parts of a run's spec."""
        self.api.patch(HERE.of(API_VERSION, PLURAL, name), {"spec": spec}, MERGE)

    def delete(self, name: str) -> None:
        """Delete a run."""
        self.api.delete(HERE.of(API_VERSION, PLURAL, name))

    def read(self, name: str) -> Json:
        """A run as the API server has it."""
        found: Json = self.api.get(HERE.of(API_VERSION, PLURAL, name))
        return found

    def status(self, name: str) -> RunStatus:
        """What the controller has written of a run."""
        return from_resource(self.read(name).get("status"))

    def exists(self, name: str) -> bool:
        """Whether a run of this name is there."""
        return self.api.call("GET", HERE.of(API_VERSION, PLURAL, name))[0] == 200

    def sight(self, name: str) -> Sight:
        """A run with its living ranks."""
        return self.wait_for(self._watcher.see(name))

    def pids(self, name: str) -> dict[int, int]:
        """Process ids of a run's living ranks."""
        return {rank.rank: rank.pid for rank in self.sight(name).ranks if rank.exit is None}

    def pods(self, name: str) -> list[Json]:
        """The pods of a run."""
        listed: list[Json] = self.api.get(HERE.core("pods"), labelSelector=f"mend.dev/run={name}")["items"]
        return listed

    def events(self, name: str) -> list[tuple[str, str]]:
        """(reason, message) of every event about a run."""
        items = self.api.get(HERE.core("events"))["items"]
        return [(each["reason"], each["message"]) for each in items if each["involvedObject"]["name"] == name]

    def manifests(self, name: str) -> list[str]:
        """Keys of the manifests in the store, as a plain client sees them."""
        import boto3

        access = self.local.s3
        assert access is not None
        client = boto3.client(
            "s3",
            endpoint_url=access.endpoint,
            region_name=access.region,
            aws_access_key_id=access.access_key_id,
            aws_secret_access_key=access.secret_access_key,
        )
        listed = client.list_objects_v2(Bucket=access.bucket, Prefix=f"{name}/").get("Contents", [])
        return sorted(each["Key"] for each in listed if each["Key"].endswith("/manifest.json"))

    # ------------------------------------------------------------ waiting
    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Let time pass without asking the API server for anything."""
        deadline = time.monotonic() + SECONDS
        while not holds():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def until(
        self, name: str, holds: Callable[[RunStatus], Any], what: str = "", seconds: float = SECONDS
    ) -> RunStatus:
        """The run's status once a condition holds; fails at once when it no longer can, as the run has ended."""
        deadline = time.monotonic() + seconds
        while not holds(status := self.status(name)):
            if time.monotonic() > deadline or status.phase.is_final:
                when = "the run has ended before" if status.phase.is_final else f"not within {seconds:g} s"
                pytest.fail(f"{when}: {what or holds}\n{status}\n{self.controller_log()}")
            time.sleep(0.05)
        return status

    def until_seen(self, name: str, holds: Callable[[Sight], Any], what: str = "", seconds: float = SECONDS) -> Sight:
        """The run with its ranks once a condition holds."""
        box: list[Sight] = []

        def seen(_: RunStatus) -> Any:
            box[:] = [self.sight(name)]
            return holds(box[0])

        self.until(name, seen, what, seconds)
        return box[0]

    def training(self, name: str, *, steps: int = 12, attempt: int = 1) -> Sight:
        """The run once every rank has done some steps in this attempt, or a later one."""

        def holds(sight: Sight) -> bool:
            present = sight.status.participants
            return (
                sight.status.phase is RunPhase.RUNNING
                and sight.status.attempt >= attempt
                and len(sight.ranks) >= len(present) > 0
                and all(rank.steps_done >= steps and rank.exit is None for rank in sight.ranks)
            )

        return self.until_seen(name, holds, f"{name} trains in attempt {attempt}")

    def recovered(self, name: str, incidents: int = 1) -> RunStatus:
        """The status once so many incidents have happened and the run is back from all of them."""

        def holds(status: RunStatus) -> bool:
            return len(status.incidents) >= incidents and status.open_incident is None

        return self.until(name, holds, f"{name} is back from {incidents} incidents")

    def succeeded(self, name: str) -> RunStatus:
        """The status once the run has succeeded."""
        return self.until(name, lambda status: status.phase is RunPhase.SUCCEEDED, f"{name} succeeds")

    def condition(self, name: str, kind: str, holds: str = "True", *, says: str = "") -> str:
        """The message of a condition once it is so, and says this."""

        def found(status: RunStatus) -> list[str]:
            mine = [each for each in status.conditions if (each.type, each.status) == (kind, holds)]
            return [f"{each.reason}: {each.message}" for each in mine if says in f"{each.reason}: {each.message}"]

        return found(self.until(name, found, f"{name}: {kind}={holds} {says}"))[0]

    # ------------------------------------------------------------ harm
    def injure(self, name: str, rank: int, number: int) -> RankReport:
        """Send a signal to a rank."""
        victim = next(each for each in self.sight(name).ranks if each.rank == rank)
        os.kill(victim.pid, number)
        return victim

    def kill_pid(self, pid: int) -> None:
        """SIGKILL a rank; for when nobody can be asked who it is."""
        os.kill(pid, signal.SIGKILL)

    def misbehave(self, **faults: Any) -> None:
        """Faults of the API server, instead of those in force; none lifts them."""
        self.api.replace(FAULTS, faults)

    def has_no_errors_left(self) -> bool:
        """Whether the errors and conflicts that were asked for have been given, to whomever."""
        faults = self.api.get(FAULTS)
        return not faults["errors"] and not faults["conflicts"]

    def controller_log(self) -> str:
        """The last lines of the controller."""
        logs = sorted(self.local.places.system.glob("controller*.log"), key=lambda log: log.stat().st_mtime)
        return "".join(f"== {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)


class ControllerProcess:
    """A controller that a test starts, kills and starts again."""

    def __init__(self, cluster: TrainingCluster, name: str = "a", options: Sequence[str] = ()) -> None:
        places = cluster.local.places
        command = controller_command(places.controller_kubeconfig, places.system / "controller-data")
        self._command = [*command, "--lease-seconds", "3", *options]  # else its successor waits for 8 s each time
        self._log = places.system / f"controller-{name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log, env=image_env())

    def send(self, number: int) -> None:
        """Send it a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def end(self, number: int = signal.SIGKILL) -> int:
        """End it and wait for it."""
        if self.process is None:
            return 0
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.send_signal(signal.SIGCONT)
        return self.process.wait(SECONDS)

    def says(self, words: str) -> bool:
        """Whether its log has these words."""
        return words in self._log.read_text(errors="replace")


@contextmanager
def training_cluster(folder: Path, *, with_controller: bool = True, nodes: int = 2) -> Iterator[TrainingCluster]:
    """A cluster with an object store. Without its controller there is everything for a `ControllerProcess`."""

    @asynccontextmanager
    async def everything() -> AsyncIterator[TrainingCluster]:
        async with LocalCluster(folder, ClusterSettings(kubelet=KubeletSettings(nodes=nodes))) as local:
            if not with_controller:
                assert local.controller is not None
                await local.controller.stop()
            client = await KubeClient.from_kubeconfig(str(local.kubeconfig))
            watcher = Watcher(client, NAMESPACE)
            try:
                yield TrainingCluster(local, watcher, asyncio.get_running_loop())
            finally:
                await watcher.close()
                await client.close()

    with in_a_thread(everything) as cluster, cluster.api:
        yield cluster


def is_alive(pid: int) -> bool:
    """Whether there is a process of this number that is no zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False
