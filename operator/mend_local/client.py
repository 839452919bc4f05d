"""A small client of the Kubernetes API, for the kubelet and for setting a cluster up: JSON over HTTP, and a watch."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

import aiohttp

Json = dict[str, Any]
log = logging.getLogger(__name__)

MERGE_PATCH: Final = "application/merge-patch+json"
_MAX_LINE_BYTES: Final = 8 * 2**20
_REQUEST_SECONDS: Final = 10.0


class ApiError(RuntimeError):
    """The API server refused; `code` and `reason` are those of its Status."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason


class ApiUnreachable(ConnectionError):
    """There was no answer: nobody knows whether the request was carried out."""


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """One line of a watch; of a bookmark, `object` holds no more than a resourceVersion."""

    type: str
    object: Json


class Api:
    """Speaks to one API server with one token. An async context manager."""

    def __init__(self, url: str, token: str, tls: ssl.SSLContext | None = None) -> None:
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"}
        self._ssl: ssl.SSLContext | bool = tls or True
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            connector=aiohttp.TCPConnector(ssl=self._ssl, limit=0),
            read_bufsize=_MAX_LINE_BYTES,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def get(self, path: str) -> Json:
        """Read an object or a list."""
        return await self._call("GET", path)

    async def create(self, path: str, body: Json) -> Json:
        """POST `body` to a collection or subresource."""
        return await self._call("POST", path, body)

    async def replace(self, path: str, body: Json) -> Json:
        """PUT an object."""
        return await self._call("PUT", path, body)

    async def merge(self, path: str, patch: Json) -> Json:
        """Change an object, or its status, by a merge patch."""
        return await self._call("PATCH", path, patch, content_type=MERGE_PATCH)

    async def delete(self, path: str, options: Json | None = None) -> Json:
        """Delete an object; `options` is a DeleteOptions."""
        return await self._call("DELETE", path, options)

    async def list(self, path: str) -> tuple[list[Json], str]:
        """All objects of a collection, page after page, and the resourceVersion they are from."""
        items: list[Json] = []
        proceed = ""
        while True:
            page = await self._call("GET", path, params={"limit": "500"} | ({"continue": proceed} if proceed else {}))
            items += page.get("items") or []
            proceed = page["metadata"].get("continue") or ""
            if not proceed:
                return items, page["metadata"]["resourceVersion"]

    async def watch(self, path: str, since: str) -> AsyncIterator[WatchEvent]:
        """What happens to a collection after the resourceVersion `since`; ends when the server ends it.

        Raises `ApiError` with code 410 when `since` is too old.
        """
        params = {"watch": "1", "resourceVersion": since, "allowWatchBookmarks": "true"}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_REQUEST_SECONDS)
        try:
            async with self._sessions.get(self._url + path, params=params, timeout=timeout) as answer:
                if answer.status >= 400:
                    raise _refusal(answer.status, await answer.read())
                async for line in answer.content:
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        raise _refusal(event["object"].get("code", 500), json.dumps(event["object"]).encode())
                    yield WatchEvent(event["type"], event["object"])
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise ApiUnreachable(f"the watch of {path} broke: {error!r}") from error

    async def apply(self, collection: str, wanted: Json) -> Json:
        """Create an object, or bring the one of that name to `wanted` (its status and unnamed fields stay)."""
        name = wanted["metadata"]["name"]
        try:
            return await self.create(collection, wanted)
        except ApiError as error:
            if error.code != 409:
                raise
        return await self.merge(f"{collection}/{name}", wanted)

    async def put(self, collection: str, wanted: Json) -> Json:
        """Create an object, or replace the one of that name by exactly `wanted` (its status stays)."""
        path = f"{collection}/{wanted['metadata']['name']}"
        try:
            return await self.create(collection, wanted)
        except ApiError as error:
            if error.code != 409:
                raise
        version = (await self.get(path))["metadata"]["resourceVersion"]
        return await self.replace(path, wanted | {"metadata": wanted["metadata"] | {"resourceVersion": version}})

    @property
    def _sessions(self) -> aiohttp.ClientSession:
        assert self._session is not None, "use it as an async context manager"
        return self._session

    async def _call(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        *,
        params: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> Json:
        data = None if body is None else json.dumps(body).encode()
        try:
            async with self._sessions.request(
                method,
                self._url + path,
                params=params,
                data=data,
                headers={"Content-Type": content_type} if data else None,
                timeout=aiohttp.ClientTimeout(total=_REQUEST_SECONDS),
            ) as answer:
                raw = await answer.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ApiUnreachable(f"{method} {path}: {error!r}") from error
        if answer.status >= 400:
            raise _refusal(answer.status, raw)
        try:
            result: Json = json.loads(raw)
        except ValueError as error:
            raise ApiUnreachable(f"{method} {path}: the answer is no JSON: {raw[:100]!r}") from error
        return result


def _refusal(code: int, raw: bytes) -> ApiError:
    try:
        status = json.loads(raw)
        return ApiError(code, str(status.get("reason", "")), str(status.get("message", "")))
    except (ValueError, AttributeError):
        return ApiError(code, "", raw.decode(errors="replace")[:300])


async def insist(work: Callable[[], Awaitable[object]], is_moot: Callable[[], bool]) -> None:
    """Do `work` again and again until it is accepted, its object is gone, or it no longer matters."""
    for failures in itertools.count(1):
        if is_moot():
            return
        try:
            await work()
            return
        except ApiUnreachable as error:
            log.debug("%s", error)
        except ApiError as error:
            if error.code == 404:
                return
            log.debug("refused: %s", error)
        await sleep_backed_off(failures)


async def sleep_backed_off(failures: int) -> None:
    """Wait before trying the server again: 50 ms doubling to 2 s."""
    await asyncio.sleep(min(2.0, 0.05 * 2 ** min(failures, 10)))
