"""The local cluster as one object: API server, kubelet, object store and controller, for programs and for the CLI."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import secrets
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from mend_local import bootstrap
from mend_local.apiserver import ApiServer
from mend_local.certificates import write_kubeconfig
from mend_local.client import Api
from mend_local.containerlog import LogQuery
from mend_local.containers import image_env
from mend_local.kubelet import SYSTEM, Kubelet, KubeletSettings, end_earlier_life
from mend_local.objectstore import ObjectStore, S3Access, StoreKind
from mend_local.service import Service

log = logging.getLogger(__name__)

METRICS_TOKEN_FILE: Final = "metrics-token"
_CLUSTER_FILE: Final = "cluster.json"


class AlreadyRunning(RuntimeError):
    """Another process runs the cluster of this state directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings:
    """What is to run."""

    with_controller: bool = True
    object_store: StoreKind = StoreKind.MINISTACK
    kubelet: KubeletSettings = field(default_factory=KubeletSettings)
    bucket: str = "mend"


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where everything lies below the state directory."""

    root: Path

    @property
    def api(self) -> Path:
        """State of the API server."""
        return self.root / "api"

    @property
    def pods(self) -> Path:
        """A directory per pod, named by its uid."""
        return self.root / "pods"

    @property
    def system(self) -> Path:
        """Logs and data of what runs beside the pods."""
        return self.root / "system"

    @property
    def controller_data(self) -> Path:
        """Journals, curves, and the token of the controller's metrics."""
        return self.system / "controller-data"

    @property
    def kubeconfig(self) -> Path:
        """For users."""
        return self.root / "kubeconfig"

    @property
    def controller_kubeconfig(self) -> Path:
        """For the controller, with no more rights than it needs."""
        return self.root / "controller.kubeconfig"


def hold(places: Places) -> IO[str]:
    """Take the state directory for this process, until the file is closed. Raises `AlreadyRunning`."""
    places.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = (places.root / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise AlreadyRunning(
            f"a local cluster already runs with the state directory {places.root}: end it with `mend local down`, "
            "or choose another with --state-dir"
        ) from error
    return lock


def cluster_id(places: Places) -> str:
    """The cluster's name in owner marks, chosen once per state directory."""
    return str(_remembered(places)["id"])


def api_port(places: Places) -> int:
    """The port of the API server; 0 before its first life."""
    return int(_remembered(places)["api_port"])


def _remembered(places: Places) -> dict[str, str | int]:
    file = places.root / _CLUSTER_FILE
    with contextlib.suppress(OSError, ValueError):
        known: dict[str, str | int] = json.loads(file.read_text())
        return known
    fresh: dict[str, str | int] = {"id": secrets.token_hex(6), "api_port": 0}
    _remember(places, fresh)
    return fresh


def _remember(places: Places, facts: dict[str, str | int]) -> None:
    places.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = places.root / f"{_CLUSTER_FILE}.tmp"
    temporary.write_text(json.dumps(facts))
    temporary.replace(places.root / _CLUSTER_FILE)


def controller_command(kubeconfig: Path, data_dir: Path) -> list[str]:
    """How the controller is started; the token that guards its metrics is in `data_dir`."""
    program = Path(sys.executable).parent / "mend"
    where = ["--kubeconfig", str(kubeconfig), "--data-dir", str(data_dir)]
    return [str(program), "controller", *where, "--token-file", str(data_dir / METRICS_TOKEN_FILE)]


class LocalCluster:
    """A cluster whose state is in `state_dir`; an async context manager. One process at a time may hold it.

    `tell` hears in sentences what is being done.
    """

    def __init__(
        self, state_dir: Path, settings: ClusterSettings | None = None, tell: Callable[[str], None] = log.info
    ) -> None:
        self.places = Places(root=state_dir.resolve())
        self.settings = settings or ClusterSettings()
        self.ended_at_start = 0  # processes that an earlier life had left
        self.controller: Service | None = None
        self.store: ObjectStore | None = None
        self._tell = tell
        self._lock: IO[str] | None = None
        self._parts = contextlib.AsyncExitStack()
        self._server: ApiServer | None = None
        self._kubelet: Kubelet | None = None
        self._api: Api | None = None

    # ------------------------------------------------------------ what runs
    @property
    def kubeconfig(self) -> Path:
        """A kubeconfig of the admin."""
        return self.places.kubeconfig

    @property
    def server(self) -> ApiServer:
        """The API server; another one after `restart_api_server`."""
        assert self._server is not None, "the cluster is not up"
        return self._server

    @property
    def url(self) -> str:
        """Where the API server listens."""
        return self.server.url

    @property
    def api(self) -> Api:
        """A client of the admin."""
        assert self._api is not None, "the cluster is not up"
        return self._api

    @property
    def kubelet(self) -> Kubelet:
        """Runs the pods, and knows how to misbehave."""
        assert self._kubelet is not None, "the cluster is not up"
        return self._kubelet

    @property
    def s3(self) -> S3Access | None:
        """The object store's endpoint, bucket and credentials."""
        return self.store.access if self.store else None

    # ------------------------------------------------------------ life
    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """End everything; the state stays."""
        await self._parts.aclose()
        if self._lock is not None:  # else the cluster of this directory is another's, and its processes are too
            await asyncio.to_thread(end_earlier_life, self.places.pods, cluster_id(self.places))
            self._lock.close()
            self._lock = None

    async def _start(self) -> None:
        self._lock = hold(self.places)
        identity = cluster_id(self.places)
        self.ended_at_start = await asyncio.to_thread(end_earlier_life, self.places.pods, identity)
        if self.ended_at_start:
            self._tell(f"ended {self.ended_at_start} processes that an earlier life of this cluster had left")
        await asyncio.gather(self._start_api(), self._start_store(identity))
        account = await self._bootstrap()
        self._kubelet = Kubelet(self.api, self.places.pods, identity, self.settings.kubelet)
        self._parts.push_async_callback(self._kubelet.stop)
        await self._kubelet.start()
        self._tell(f"nodes {', '.join(self._kubelet.node_names)}: pods run as processes of this machine")
        if self.settings.with_controller:
            await self._start_controller(identity, account)

    async def _start_api(self) -> None:
        facts = _remembered(self.places)
        server = self._new_server(int(facts["api_port"]))
        try:
            await server.start()
        except OSError:  # somebody else has taken the port meanwhile
            server.port = 0
            await server.start()
        self._server = server
        self._parts.push_async_callback(self._stop_api)
        _remember(self.places, facts | {"api_port": server.port})
        server.write_kubeconfig(self.kubeconfig)
        self._api = Api(server.url, server.admin_token, server.credentials.client_context())
        await self._parts.enter_async_context(self._api)
        self._tell(f"API server at {server.url}")

    def _new_server(self, port: int) -> ApiServer:
        return ApiServer(self.places.api, port=port, logs=_Logs(self), kill=self._kill_api)

    async def _stop_api(self) -> None:
        await self.server.stop()

    async def _start_store(self, identity: str) -> None:
        if self.settings.object_store is StoreKind.NONE:
            return
        root, owner = self.places.system / self.settings.object_store, f"{identity}/{SYSTEM}/object-store"
        self.store = ObjectStore(self.settings.object_store, root, owner, self.settings.bucket)
        self._parts.push_async_callback(self.store.stop)
        await self.store.start()
        self._tell(f"object store ({self.settings.object_store}) at {self.store.access.endpoint}")

    async def _bootstrap(self) -> bootstrap.Account | None:
        names = await bootstrap.install_definitions(self.api)
        account = await bootstrap.install_permissions(self.api)
        self._tell(f"API of mend installed: {', '.join(names)}")
        if self.s3 is not None:
            await bootstrap.put_s3_secret(self.api, self.s3)
        return account

    async def _start_controller(self, identity: str, account: bootstrap.Account | None) -> None:
        token = await bootstrap.account_token(self.api, account) if account else self.server.admin_token
        write_kubeconfig(
            self.places.controller_kubeconfig, server=self.url, ca_pem=self.server.credentials.ca_pem, token=token
        )
        data_dir = self.places.controller_data
        data_dir.mkdir(parents=True, exist_ok=True)
        guard = data_dir / METRICS_TOKEN_FILE
        if not guard.exists():
            guard.touch(mode=0o600)
            guard.write_text(secrets.token_urlsafe(32))
        self.controller = Service(
            "controller",
            lambda: controller_command(self.places.controller_kubeconfig, data_dir),
            env=image_env(),
            root=self.places.system,
            owner=f"{identity}/{SYSTEM}/controller",
        )
        self._parts.push_async_callback(self.controller.stop)
        self.controller.start()
        whom = f"service account {account.namespace}/{account.name}" if account else "admin (no RBAC manifests found)"
        self._tell(f"controller runs as {whom}; its log: {self.controller.log}")

    # ------------------------------------------------------------ faults, on command
    async def restart_api_server(self, down_seconds: float = 0.0) -> None:
        """End the API server and start it again at the same port; kubelet, pods and controller live on."""
        await self.server.stop()
        await asyncio.sleep(down_seconds)
        self._server = self._new_server(self.server.port)
        await self._server.start()

    def _kill_api(self) -> None:
        """The API server's fault `kill`: here it does not take the kubelet with it."""
        self._restart = asyncio.get_running_loop().create_task(self.restart_api_server())


class _Logs:
    """Reads logs from whichever kubelet the cluster has now."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster

    def read(
        self,
        namespace: str,
        name: str,
        container: str,
        *,
        follow: bool,
        tail_lines: int | None,
        limit_bytes: int | None,
        previous: bool = False,
    ) -> AsyncIterator[bytes]:
        query = LogQuery(tail_lines=tail_lines, limit_bytes=limit_bytes)
        return self._cluster.kubelet.read_log(namespace, name, container, query, follow=follow, of_previous=previous)
