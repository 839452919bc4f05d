"""How to reach one agent: its stream and its orders over HTTP, with bounded waits, bounded sizes and named errors."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final

import aiohttp
import msgspec

from mend.evidence import Evidence, decode_evidence
from mend.orders import Ack, Check, Checked, Gather, Order, decode_ack, decode_checked
from mend.protocol import ORDERS_PATH, STREAM_PATH, agent_url, encode

CONNECT_SECONDS: Final = 2.0
HEADERS_SECONDS: Final = 3.0
REPLY_LIMIT_BYTES: Final = 32 << 20  # stacks of 8 ranks
UNDECODABLE: Final = (msgspec.DecodeError, RecursionError)  # msgspec raises the latter for deep nesting


class AgentError(Exception):
    """An order did not come through; the message names worker and reason."""


class AgentUnreachable(AgentError):
    """No answer: no such agent, refused, reset or timed out. Whether the order took effect is not known."""


class OrderRefused(AgentError):
    """The agent said no, or something that is not an answer. `ack` is what it said, if it did."""

    def __init__(self, message: str, ack: Ack | None = None) -> None:
        super().__init__(message)
        self.ack = ack


class Unauthorized(AgentError):
    """The agent knows another token: it is not of this run."""


@dataclass(frozen=True, slots=True)
class Target:
    """An agent that there should be. `started`: its container runs, so it will answer any moment."""

    worker: int
    pod_uid: str
    ip: str
    port: int
    token: str = field(repr=False)
    started: bool = True

    def url(self, path: str) -> str:
        """Where to reach it."""
        return agent_url(self.ip, self.port) + path

    @property
    def headers(self) -> dict[str, str]:
        """What lets the controller in."""
        return {"Authorization": f"Bearer {self.token}"}


class Dialer:
    """Dials agents. Make and use it inside one event loop.

    Each order takes a connection of its own: one kept from before may lead to a process that is gone, and would
    make an agent that came back look unreachable.
    """

    def __init__(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True, socket_factory=_socket),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            trust_env=False,  # pods are reached directly, never through a proxy
            auto_decompress=False,
        )

    async def close(self) -> None:
        """Closes all connections."""
        await self._session.close()

    async def stream(self, target: Target) -> AsyncGenerator[bytes, None]:
        """The stream in chunks; the first one is empty and says that the agent has let us in.

        Raises `AgentUnreachable`, also when the stream breaks later, or `Unauthorized`.
        """
        try:
            async with asyncio.timeout(HEADERS_SECONDS):
                response = await self._session.get(target.url(STREAM_PATH), headers=target.headers)
            async with response:
                if response.status == HTTPStatus.UNAUTHORIZED:
                    raise Unauthorized("unauthorized: the agent does not know the token of this run")
                response.raise_for_status()
                yield b""
                async for chunk in response.content.iter_any():
                    yield chunk
        except (aiohttp.ClientError, OSError) as error:
            raise AgentUnreachable(_problem(error)) from error

    async def order(self, target: Target, order: Order, who: str, timeout_seconds: float) -> Ack | Evidence | Checked:
        """Gives one order; `who` names the agent in errors. Raises `AgentError`s."""
        status, body = await self._post(target, order, who, timeout_seconds)
        if status == HTTPStatus.UNAUTHORIZED:
            raise Unauthorized(f"{who}: the agent at {target.ip} does not know the token of this run")
        try:
            if isinstance(order, Gather) and status == HTTPStatus.OK:
                return decode_evidence(body)
            if isinstance(order, Check) and status == HTTPStatus.OK and b'"checked"' in body:
                return decode_checked(body)
            ack = decode_ack(body)
        except UNDECODABLE as error:
            raise OrderRefused(f"{who}: answered {status} with {body[:200]!r}, which is no answer") from error
        if status != HTTPStatus.OK or not ack.accepted:
            raise OrderRefused(f"{who}: refused, being at attempt {ack.attempt}: {ack.reason or status}", ack)
        return ack

    async def _post(self, target: Target, order: Order, who: str, timeout_seconds: float) -> tuple[int, bytes]:
        seconds = timeout_seconds + (order.seconds if isinstance(order, Gather | Check) else 0.0)
        try:
            async with (
                asyncio.timeout(seconds),
                self._session.post(target.url(ORDERS_PATH), data=encode(order), headers=target.headers) as response,
            ):
                body = bytearray()
                async for chunk in response.content.iter_any():
                    body += chunk
                    if len(body) > REPLY_LIMIT_BYTES:
                        raise OrderRefused(f"{who}: answered with more than {REPLY_LIMIT_BYTES} bytes")
                return response.status, bytes(body)
        except TimeoutError as error:
            raise AgentUnreachable(f"{who}: no answer within {seconds:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise AgentUnreachable(f"{who}: {_problem(error)}") from error


def _problem(error: Exception) -> str:
    """In one stable phrase why there is no connection."""
    cause = error.os_error if isinstance(error, aiohttp.ClientOSError) and hasattr(error, "os_error") else error
    match cause:
        case ConnectionRefusedError():
            return "refused"
        case ConnectionResetError() | aiohttp.ServerDisconnectedError() | aiohttp.ClientPayloadError():
            return "the connection broke"
        case TimeoutError():
            return "timed out"
        case aiohttp.ClientResponseError():
            return f"answered {cause.status}"
        case _:
            return str(cause) or type(cause).__name__


def _socket(address: Any) -> socket.socket:
    """A socket whose kernel notices a dead node within 5 s, however quiet; a stopped process stays connected."""
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option, value in (("TCP_KEEPIDLE", 2), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 5000)):
        if hasattr(socket, option):  # not on every system a controller is tried on
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    made.setblocking(False)
    return made
