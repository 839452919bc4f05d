"""The agent's HTTP side: streams of heartbeats to whichever controllers ask, and orders from them."""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
import time
from typing import Final

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from mend.evidence import Evidence
from mend.heartbeats import Points
from mend.orders import Ack, Checked, decode_order
from mend.protocol import BULK_PATH, ORDERS_PATH, STREAM_PATH, encode
from mend_trainer.bulk import send_bulk
from mend_trainer.supervisor import Supervisor

log = logging.getLogger(__name__)

_POINTS_PER_LINE: Final = 500
_LINES_AT_ONCE: Final = 20
_LONGER: Final = 1.125  # a silence that is an eighth longer than the one told last is worth a heartbeat
_LEAST_SHARE: Final = 1 / 12  # of the usual interval, between two heartbeats of ranks that stand still
_BIND_TRIES: Final = 50
_BIND_PAUSE_SECONDS: Final = 0.1


def make_app(supervisor: Supervisor, token: str, heartbeat_seconds: float) -> web.Application:
    """The routes of the wire contract (see `mend.protocol`)."""
    expected = f"Bearer {token}".encode()

    @web.middleware
    async def with_token(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode(errors="replace")
        if not hmac.compare_digest(given, expected):
            raise web.HTTPUnauthorized(text="the run's token is missing or wrong\n")
        return await handler(request)

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson", "Cache-Control": "no-store"})
        await response.prepare(request)
        ear = supervisor.bell.listen()
        positions: dict[int, int] = {}
        try:
            while True:
                ear.clear()
                over = supervisor.is_over
                await response.write(_lines(supervisor, positions))  # waits while this controller does not read
                if over:
                    return response
                await _until_due(ear, supervisor, heartbeat_seconds)
        except ConnectionError:
            return response
        finally:
            supervisor.bell.leave(ear)

    async def orders(request: web.Request) -> web.Response:
        try:
            order = decode_order(await request.read())
        except msgspec.MsgspecError as error:
            answer = Ack(accepted=False, attempt=supervisor.attempt, reason=f"no order of this protocol: {error}")
            return _json(answer, status=400)
        if order.attempt < supervisor.attempt:
            reason = f"order of attempt {order.attempt}, but this agent is at attempt {supervisor.attempt}"
            return _json(Ack(accepted=False, attempt=supervisor.attempt, reason=reason), status=409)
        return _json(await supervisor.obey(order))

    async def bulk(request: web.Request) -> web.StreamResponse:
        return await send_bulk(request, supervisor)

    app = web.Application(middlewares=[with_token])
    app.router.add_get(STREAM_PATH, stream)
    app.router.add_post(ORDERS_PATH, orders)
    app.router.add_get(BULK_PATH, bulk)
    return app


def _lines(supervisor: Supervisor, positions: dict[int, int]) -> bytes:
    """The points that this stream has not had yet, then a heartbeat: who hears of an end has the whole curve."""
    beat = encode(supervisor.heartbeat())
    most = None if supervisor.is_over else _LINES_AT_ONCE
    lines: list[bytes] = []
    for attempt, curve in supervisor.curves.items():
        while most is None or len(lines) < most:
            points, positions[attempt] = curve.after(positions.get(attempt, 0), _POINTS_PER_LINE)
            if not points:
                break
            lines.append(encode(Points(attempt=attempt, points=points)))
    return b"\n".join([*lines, beat]) + b"\n"


async def _until_due(ear: asyncio.Event, supervisor: Supervisor, usual_seconds: float) -> None:
    """Until there is news, the usual interval is over, or no rank has marked for as long as its last step took.

    Such ranks perhaps hang, which is noticed by a heartbeat that says so. Each of these tells a silence that is longer
    by a share than the one told before: a long one soon needs no more heartbeats than the usual.
    """
    least = usual_seconds * _LEAST_SHARE
    due = time.monotonic() + usual_seconds
    told = supervisor.stands_for
    while (left := due - time.monotonic()) > 0:
        stands = supervisor.stands_for
        told = min(told, stands)  # less: there were marks since
        worth_telling = max(supervisor.step_seconds, told * _LONGER, told + least)
        if await _is_heard(ear, min(left, max(worth_telling - stands, least))):
            return
        if supervisor.stands_for >= worth_telling:
            return


async def _is_heard(ear: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            return await ear.wait()
    except TimeoutError:
        return False


def _json(message: Ack | Evidence | Checked, status: int = 200) -> web.Response:
    return web.Response(body=encode(message), status=status, content_type="application/json")


async def serve(app: web.Application, host: str, port: int) -> web.AppRunner:
    """Listen; waits a little for an address that an agent just gone may still hold. Raises `OSError`."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    for left in reversed(range(_BIND_TRIES)):
        try:
            await web.TCPSite(runner, host, port).start()
            return runner
        except OSError as error:
            if left == 0 or isinstance(error, socket.gaierror):
                raise
            await asyncio.sleep(_BIND_PAUSE_SECONDS)
    raise AssertionError("the last try returns or raises")
