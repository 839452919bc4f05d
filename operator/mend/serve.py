"""The controller's HTTP endpoint: metrics and pages behind a bearer token, and two open health checks.

Without a token nothing but the health checks is served: an endpoint that is forgotten to be locked stays shut.
"""

from __future__ import annotations

import asyncio
import hmac
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Middleware
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

HEALTHY_PATH: Final = "/healthz"
READY_PATH: Final = "/readyz"
METRICS_PATH: Final = "/metrics"
OPEN_PATHS: Final = frozenset({HEALTHY_PATH, READY_PATH})

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
ReadToken = Callable[[], str]
Trouble = Callable[[], str]


def token_file(path: Path) -> ReadToken:
    """Reads the token anew each time, since a mounted Secret changes under the process; "" if there is none."""

    def read() -> str:
        try:
            return path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            return ""

    return read


def application(
    registry: CollectorRegistry,
    token: ReadToken,
    *,
    unready: Trouble = lambda: "",
    routes: Iterable[web.AbstractRouteDef] = (),
) -> web.Application:
    """The endpoint; `unready` says what is wrong, "" if nothing. `routes` are behind the token too.

    That it answers at all is the health: a restart mends a loop that no longer turns, and nothing else.
    """

    async def metrics(request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        # In a thread: thousands of ranks take a quarter of a second, in which a crash must still be heard of.
        return web.Response(body=await asyncio.to_thread(encode, registry), headers={"Content-Type": content_type})

    app = web.Application(middlewares=[_behind(token)])
    app.router.add_get(HEALTHY_PATH, _answer(lambda: ""))
    app.router.add_get(READY_PATH, _answer(unready))
    app.router.add_get(METRICS_PATH, metrics)
    app.router.add_routes(routes)
    return app


def _answer(trouble: Trouble) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        said = trouble()
        return web.Response(text=f"{said or 'ok'}\n", status=503 if said else 200)

    return handler


def _behind(token: ReadToken) -> Middleware:
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path in OPEN_PATHS:
            return await handler(request)
        expected = token()
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if not expected or not hmac.compare_digest(given, f"Bearer {expected}".encode()):
            hint = (
                "the token of this controller" if expected else "a token, and this controller was started without one"
            )
            raise web.HTTPUnauthorized(
                text=f"this path wants Authorization: Bearer with {hint}\n", headers={"WWW-Authenticate": "Bearer"}
            )
        return await handler(request)

    return middleware


@asynccontextmanager
async def serving(
    app: web.Application, host: str, port: int, tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[str, int]]:
    """Serve while the block runs; gives the address bound, so that port 0 can be asked for."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, ssl_context=tls).start()
        bound = runner.addresses[0]
        yield bound[0], bound[1]
    finally:
        await runner.cleanup()
