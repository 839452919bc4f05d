"""Raw JSON to and from the Kubernetes API: the official client's credentials and transport, none of its models.

Typed models cost 3-5 times the CPU and memory, and one field that they cannot decode fails a whole list.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote, urlencode, urlsplit

import aiohttp
import msgspec
import tenacity
import yaml
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config import ConfigException, load_kube_config
from kubernetes.aio.config.incluster_config import (
    SERVICE_CERT_FILENAME,
    SERVICE_HOST_ENV_NAME,
    SERVICE_TOKEN_FILENAME,
    InClusterConfigLoader,
)

from mend.kube import errors
from mend.lines import LineSplitter, LineTooLong

Json = dict[str, Any]
LoadCredentials = Callable[[Any], Awaitable[None]]

CONNECT_SECONDS: Final = 5.0
REQUEST_SECONDS: Final = 15.0
WATCH_GRACE_SECONDS: Final = 5.0  # what a server may take to end a watch after its `timeoutSeconds`
ATTEMPTS: Final = 4
PAGE_SIZE: Final = 500
LINE_LIMIT_BYTES: Final = 8 << 20  # etcd holds objects of up to 1.5 MiB
MERGE_PATCH: Final = "application/merge-patch+json"
USER_AGENT: Final = "mend"
# What the official loader raises for a file that is missing, broken, empty or of another shape.
_UNUSABLE: Final = (ConfigException, OSError, yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError)


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind of object by its place in the API: group ("" for core), version and plural."""

    group: str
    version: str
    plural: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        """As in the `apiVersion` of an object."""
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str | None = None, name: str = "", subresource: str = "") -> str:
        """The URL's path; without a namespace it spans all of them."""
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        scope = ["namespaces", namespace] if namespace and self.namespaced else []
        parts = [*scope, self.plural, *filter(None, (name, subresource))]
        return "/".join([root, *(quote(part, safe="") for part in parts)])


PODS: Final = Resource("", "v1", "pods")
SERVICES: Final = Resource("", "v1", "services")
SECRETS: Final = Resource("", "v1", "secrets")
CONFIG_MAPS: Final = Resource("", "v1", "configmaps")
EVENTS: Final = Resource("", "v1", "events")
NODES: Final = Resource("", "v1", "nodes", namespaced=False)
LEASES: Final = Resource("coordination.k8s.io", "v1", "leases")


@dataclass(frozen=True, slots=True)
class Page:
    """Objects of a list, and the version of the collection that they show."""

    items: tuple[Json, ...]
    resource_version: str


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """One change: `ADDED`, `MODIFIED`, `DELETED` or `BOOKMARK`. Errors are raised instead."""

    type: str
    object: Json


class KubeClient:
    """One connection pool to one cluster. Every method raises only `mend.kube.errors.ApiError`s.

    Reads are repeated after refusals, 5xx and lost connections; writes only if they certainly did not take place.
    A 401 makes it load its credentials anew, once for each request: tokens in files rotate.
    """

    def __init__(self, configuration: Any, load_credentials: LoadCredentials) -> None:
        configuration.disable_strict_ssl_verification = True  # as kubectl: many cluster CAs lack optional extensions
        self._load_credentials = load_credentials
        self._api = ApiClient(configuration)
        self._api.user_agent = USER_AGENT
        is_local = urlsplit(configuration.host).hostname in ("localhost", "127.0.0.1", "::1")
        self._api.rest_client.pool_manager = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._api.rest_client.ssl_context, socket_factory=_socket),
            trust_env=not is_local,  # as kubectl: no proxy for loopback
            read_bufsize=1 << 21,
        )

    @classmethod
    async def from_kubeconfig(cls, path: str | None = None, context: str | None = None) -> KubeClient:
        """Credentials as kubectl takes them: `path`, else $KUBECONFIG, else ~/.kube/config."""

        async def load(configuration: Any) -> None:
            await load_kube_config(
                config_file=path, context=context, client_configuration=configuration, persist_config=False
            )

        return await cls._open(load)

    @classmethod
    async def in_cluster(
        cls, token_file: str = SERVICE_TOKEN_FILENAME, ca_file: str = SERVICE_CERT_FILENAME
    ) -> KubeClient:
        """Credentials of the pod's service account, read again whenever they rotate."""

        async def load(configuration: Any) -> None:
            InClusterConfigLoader(token_file, ca_file).load_and_set(configuration)

        return await cls._open(load)

    @classmethod
    async def discover(cls, kubeconfig: str | None = None) -> KubeClient:
        """`kubeconfig` if given, else the pod's service account inside a cluster, else kubectl's own configuration."""
        if kubeconfig is None and os.environ.get(SERVICE_HOST_ENV_NAME):
            return await cls.in_cluster()
        return await cls.from_kubeconfig(kubeconfig)

    @classmethod
    async def _open(cls, load: LoadCredentials) -> KubeClient:
        configuration = Configuration()
        try:
            await load(configuration)
        except _UNUSABLE as error:
            raise errors.Unauthorized("cluster credentials", message=f"unusable: {error}") from error
        return cls(configuration, load)

    @property
    def server(self) -> str:
        """The URL of the API server."""
        return str(self._api.configuration.host)

    async def close(self) -> None:
        """Closes all connections."""
        await self._api.close()

    # ------------------------------------------------------------ reads
    async def get(self, resource: Resource, namespace: str | None, name: str, subresource: str = "") -> Json:
        """One object."""
        return await self._json("GET", resource.path(namespace, name, subresource))

    async def list_pages(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
        page_size: int = PAGE_SIZE,
        attempts: int = ATTEMPTS,
    ) -> AsyncGenerator[Page, None]:
        """All objects, page by page. Raises `Gone` when the list expires on the way: begin again."""
        query = {"labelSelector": label_selector, "fieldSelector": field_selector, "limit": str(page_size or "")}
        token = ""
        while True:
            answer = await self._json(
                "GET", resource.path(namespace), query={**query, "continue": token}, attempts=attempts
            )
            meta = answer.get("metadata") or {}
            yield Page(tuple(answer.get("items") or ()), str(meta.get("resourceVersion") or ""))
            token = str(meta.get("continue") or "")
            if not token:
                return

    async def list_all(
        self, resource: Resource, namespace: str | None = None, *, label_selector: str = "", field_selector: str = ""
    ) -> Page:
        """All objects at once."""
        pages = [
            page
            async for page in self.list_pages(
                resource, namespace, label_selector=label_selector, field_selector=field_selector
            )
        ]
        return Page(tuple(item for page in pages for item in page.items), pages[-1].resource_version)

    async def watch(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        resource_version: str,
        label_selector: str = "",
        field_selector: str = "",
        timeout_seconds: float = 60.0,
    ) -> AsyncGenerator[WatchEvent, None]:
        """Changes after `resource_version` until the server ends the watch. One try; raises `Gone`, `Unreachable`, ...

        A connection that died unnoticed ends with `Unreachable` a little after `timeout_seconds`.
        """
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "labelSelector": label_selector,
            "fieldSelector": field_selector,
            "timeoutSeconds": str(max(int(timeout_seconds), 1)),
        }
        asked = f"WATCH {resource.path(namespace)}"
        timeout = aiohttp.ClientTimeout(total=timeout_seconds + WATCH_GRACE_SECONDS, sock_connect=CONNECT_SECONDS)
        try:
            response = await self._send("GET", resource.path(namespace), query=query, timeout=timeout, asked=asked)
            lines = LineSplitter(LINE_LIMIT_BYTES)
            async with response:
                async for chunk in response.content.iter_any():
                    for line in lines.feed(chunk):
                        yield _watch_event(asked, line)
        except (aiohttp.ClientError, OSError, TimeoutError, LineTooLong) as error:
            raise errors.unreachable(asked, error, was_sent=True) from error

    async def log_tail(
        self, namespace: str, pod: str, *, container: str, lines: int = 20, previous: bool = False
    ) -> str:
        """The last lines that a container printed."""
        query = {"container": container, "tailLines": str(lines), "previous": "true" if previous else ""}
        body = await self._repeat("GET", PODS.path(namespace, pod, "log"), query=query)
        return body.decode(errors="replace")

    # ------------------------------------------------------------ writes
    async def create(self, resource: Resource, namespace: str | None, body: Mapping[str, Any]) -> Json:
        """Raises `AlreadyExists` if the name is taken."""
        return await self._json("POST", resource.path(namespace), body=body)

    async def replace(self, resource: Resource, body: Mapping[str, Any], subresource: str = "") -> Json:
        """Puts the whole object. Raises `Conflict` if its `metadata.resourceVersion` is no longer current."""
        meta = body["metadata"]
        return await self._json("PUT", resource.path(meta.get("namespace"), meta["name"], subresource), body=body)

    async def merge_patch(
        self, resource: Resource, namespace: str | None, name: str, patch: Mapping[str, Any], subresource: str = ""
    ) -> Json:
        """RFC 7386: objects are merged, lists replaced, null removes."""
        path = resource.path(namespace, name, subresource)
        return await self._json("PATCH", path, body=patch, content_type=MERGE_PATCH)

    async def delete(
        self,
        resource: Resource,
        namespace: str | None,
        name: str,
        *,
        uid: str | None = None,
        resource_version: str | None = None,
        grace_seconds: int | None = None,
        propagation: str | None = None,
    ) -> Json:
        """Asks for deletion; with `uid` or `resource_version` only of that very object, else it raises `Conflict`."""
        preconditions = {"uid": uid, "resourceVersion": resource_version}
        options: Json = {
            "preconditions": {key: value for key, value in preconditions.items() if value} or None,
            "gracePeriodSeconds": grace_seconds,
            "propagationPolicy": propagation,
        }
        body = {"kind": "DeleteOptions", "apiVersion": "v1"} | {k: v for k, v in options.items() if v is not None}
        return await self._json("DELETE", resource.path(namespace, name), body=body)

    # ------------------------------------------------------------ transport
    async def _json(self, method: str, path: str, **how: Any) -> Json:
        body = await self._repeat(method, path, **how)
        try:
            answer = msgspec.json.decode(body)
        except msgspec.DecodeError as error:
            raise errors.ServerError(f"{method} {path}", message=f"the answer is no JSON: {body[:100]!r}") from error
        return answer if isinstance(answer, dict) else {}

    async def _repeat(self, method: str, path: str, attempts: int = ATTEMPTS, **how: Any) -> bytes:
        """The body of the answer, after as many tries as can help."""
        is_read = method == "GET"
        async for attempt in tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(lambda error: errors.is_worth_repeating(error, is_read=is_read)),
            stop=tenacity.stop_after_attempt(attempts),
            wait=_wait,
            reraise=True,
        ):
            with attempt:
                return await self._once(method, path, **how)
        raise AssertionError("tenacity ends with a result or an error")

    async def _once(self, method: str, path: str, **how: Any) -> bytes:
        asked = f"{method} {path}"
        timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS, sock_connect=CONNECT_SECONDS)
        response = await self._send(method, path, timeout=timeout, asked=asked, **how)
        try:
            async with response:
                return await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise errors.unreachable(asked, error, was_sent=True) from error

    async def _send(self, method: str, path: str, **how: Any) -> aiohttp.ClientResponse:
        try:
            return await self._send_as_is(method, path, **how)
        except errors.Unauthorized as error:
            await self._reload(error)
            return await self._send_as_is(method, path, **how)

    async def _reload(self, refused: errors.Unauthorized) -> None:
        """Credentials as they are now, after the server has refused those of before."""
        try:
            await self._load_credentials(self._api.configuration)
        except _UNUSABLE as error:
            raise errors.Unauthorized(refused.asked, message=f"{refused.message}; {error}") from error

    async def _send_as_is(
        self,
        method: str,
        path: str,
        *,
        asked: str,
        timeout: aiohttp.ClientTimeout,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
    ) -> aiohttp.ClientResponse:
        """The answer with its body still to be read; anything but 2xx is raised."""
        headers = {"Accept": "application/json", "Content-Type": content_type, "User-Agent": USER_AGENT}
        given = {key: value for key, value in (query or {}).items() if value}
        url = self.server + path + (f"?{urlencode(given)}" if given else "")
        try:
            await self._api.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
            if "authorization" in headers:
                headers["authorization"] = headers["authorization"].strip()  # token files may end with a newline
            answer = await self._api.rest_client.request(
                method, url, headers=headers, body=body, _request_timeout=timeout
            )
            response: aiohttp.ClientResponse = answer.response
            if response.ok:
                return response
            async with response:
                raise errors.from_status(
                    asked, response.status, _lenient(await response.read()), response.headers.get("Retry-After")
                )
        except aiohttp.ClientConnectorError as error:
            raise errors.unreachable(asked, error, was_sent=False) from error
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise errors.unreachable(asked, error, was_sent=True) from error
        except ConfigException as error:
            raise errors.Unauthorized(asked, message=str(error)) from error


def _wait(state: tenacity.RetryCallState) -> float:
    """Jittered and exponential, but never sooner than the server asked for."""
    error = state.outcome.exception() if state.outcome else None
    asked_for = error.retry_after if isinstance(error, errors.TooManyRequests) else 0.0
    return max(asked_for, _JITTERED(state))


_JITTERED: Final = tenacity.wait_random_exponential(multiplier=0.1, max=2.0)


def _watch_event(asked: str, line: bytes) -> WatchEvent:
    raw = _lenient(line)
    if not isinstance(raw, dict) or not isinstance(raw.get("object"), dict):
        raise errors.ServerError(asked, message=f"not a watch event: {line[:100]!r}")
    if raw.get("type") == "ERROR":
        raise errors.from_status(asked, int(raw["object"].get("code") or 500), raw["object"])
    return WatchEvent(str(raw.get("type")), raw["object"])


def _lenient(body: bytes) -> Any:
    """JSON if it is some; proxies answer with HTML."""
    try:
        return msgspec.json.decode(body)
    except msgspec.DecodeError:
        return {"message": body[:200].decode(errors="replace")}


def _socket(address: Any) -> socket.socket:
    """A socket whose kernel notices a dead peer within 25 s: a watch may be silent for minutes."""
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):  # not on every system a controller is tried on
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    made.setblocking(False)
    return made
