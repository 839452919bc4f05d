"""The API server of the laptop-sized Kubernetes: HTTP over the objects, on loopback, with TLS and bearer tokens.

It speaks what mend, the official client and kubectl's daily verbs need, and nothing more. That something works here
does not show that it works on Kubernetes. How to make it misbehave for tests: see `mend_local.faults`.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from mend_local import certificates, discovery, failures, faults, openapi, rbac, requests
from mend_local.changelog import ChangeLog
from mend_local.failures import ApiFailure
from mend_local.faults import Misbehaviour
from mend_local.housekeeping import Housekeeping
from mend_local.identity import Identity, Tokens
from mend_local.logs import LogSource, NoLogs
from mend_local.objects import Objects
from mend_local.resources import Registry
from mend_local.storage import Storage
from mend_local.targets import Target, parse

log = logging.getLogger(__name__)

_OPEN = ("/healthz", "/livez", "/readyz", "/version")
_MAX_BODY_BYTES = 3 << 20  # as the real one
_STATE_FILE = "objects.jsonl"


class ApiServer:
    """Serves a cluster whose state is in `state_dir`: objects, certificate and admin token survive a restart.

    Use it as an async context manager, or `start` and `stop` it. Port 0 takes a free one. `kill` is what the fault
    of that name does; by default this process gets SIGKILL.
    """

    def __init__(
        self,
        state_dir: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        logs: LogSource | None = None,
        kill: Callable[[], None] | None = None,
    ) -> None:
        self.state_dir = state_dir
        self.host = host
        self.port = port
        self.credentials = certificates.credentials(state_dir, host)
        self.misbehaviour = Misbehaviour()
        self._kill = kill or _kill_this_process
        self._log = ChangeLog(state_dir / _STATE_FILE)
        self.storage = Storage(self._log)
        self.objects = Objects(self.storage, Registry())
        self._tokens = Tokens(
            self.credentials.admin_token, lambda namespace, name: self.storage.get("serviceaccounts", (namespace, name))
        )
        self._housekeeping = Housekeeping(self.objects)
        self._requests = requests.Requests(self.objects, self.misbehaviour, self._tokens, logs or NoLogs())
        self._runner: web.AppRunner | None = None

    # ---------------------------------------------------------------- life
    async def start(self) -> None:
        """Begin to listen; `url` is known afterwards. Raises OSError if the port is taken."""
        listener = _listen(self.host, self.port)
        self.port = listener.getsockname()[1]
        application = web.Application(client_max_size=_MAX_BODY_BYTES)
        application.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(
            application, access_log=None, handler_cancellation=True, shutdown_timeout=1.0, keepalive_timeout=300
        )
        await self._runner.setup()
        await web.SockSite(self._runner, listener, ssl_context=self.credentials.server_context()).start()
        self._housekeeping.start()
        log.info("API server listens on %s, %d objects", self.url, sum(1 for _ in self.storage.everything()))

    async def stop(self) -> None:
        """End all watches and requests, and let go of port and files."""
        await self._housekeeping.stop()
        self._requests.drop_watches()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        self.storage.close()

    async def __aenter__(self) -> ApiServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    # ---------------------------------------------------------------- for those who talk to it
    @property
    def url(self) -> str:
        """Where it listens."""
        return f"https://{self.host}:{self.port}"

    @property
    def admin_token(self) -> str:
        """The bearer token that may do everything."""
        return self.credentials.admin_token

    def write_kubeconfig(self, path: Path) -> Path:
        """Write a kubeconfig for the admin."""
        certificates.write_kubeconfig(path, server=self.url, ca_pem=self.credentials.ca_pem, token=self.admin_token)
        return path

    # ---------------------------------------------------------------- answering
    async def _answer(self, request: web.Request) -> web.StreamResponse:
        target = parse(request.method, request.path, request.query)
        try:
            if target.path in _OPEN:
                await self.misbehaviour.before(target.verb, "", "")
                return self._plain(target)
            who = self._tokens.identify(request.headers.get("Authorization", ""))
            if who is None:
                raise failures.unauthorized()
            if target.path == faults.PATH:
                return await self._faults(request, who, target)
            await self.misbehaviour.before(target.verb, target.plural, target.name)
            if not rbac.is_allowed(self.storage, who, target):
                raise rbac.denial(who, target)
            if target.is_resource:
                return await self._requests.answer(request, target, who)
            return self._document(request, target)
        except web.HTTPRequestEntityTooLarge:
            message = f"Request entity too large: limit is {_MAX_BODY_BYTES}"
            return requests.as_json(ApiFailure(413, "RequestEntityTooLarge", message).body, 413)
        except ApiFailure as failure:
            return requests.as_json(failure.body, failure.code, failure.headers)

    def _plain(self, target: Target) -> web.Response:
        if target.path == "/version":
            return requests.as_json(discovery.VERSION)
        return web.Response(text="ok")

    def _document(self, request: web.Request, target: Target) -> web.Response:
        registry = self.objects.registry
        if target.verb not in ("get", "head"):
            raise failures.not_allowed(target.verb)
        found: Any
        match target.path.rstrip("/"):
            case "/openapi/v2" if openapi.PROTOBUF_V2 in request.headers.get("Accept", ""):
                return web.Response(body=openapi.version_2_protobuf(), content_type=openapi.PROTOBUF_V2_ANSWER)
            case "/openapi/v2":
                found = openapi.version_2()
            case "/openapi/v3":
                found = openapi.index(registry)
            case path if path.startswith("/openapi/v3/"):
                found = openapi.version_3(registry, path.removeprefix("/openapi/v3/"))
            case path:
                found = discovery.document(registry, path)
        if found is None:
            raise failures.no_such_path()
        return requests.as_json(found)

    async def _faults(self, request: web.Request, who: Identity, target: Target) -> web.Response:
        if not who.is_admin:
            raise rbac.denial(who, target)
        if request.method in ("PUT", "DELETE"):
            asked = self.misbehaviour.impose(await request.read() if request.method == "PUT" else b"")
            self._log.discarding = asked.discard_writes
            if asked.forget_history:
                self.storage.forget_history()
            if asked.drop_watches:
                self._requests.drop_watches()
            if asked.kill:
                self._kill()
        return requests.as_json(self.misbehaviour.shown)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener


def _kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
