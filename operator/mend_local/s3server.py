"""The object store's process: ministack's S3 behind a check of signatures and a reader of large bodies.

ministack takes any credentials, and joins the body of a request chunk by chunk, which takes 40 s for 100 MB; both are
put right here, before it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final
from xml.sax.saxutils import escape

from mend_local.sigv4 import Keys, Request, refusal

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEALTH_PATH: Final = "/_ministack/health"


def guarded(app: App, keys: Keys) -> App:
    """`app`, but for those who sign with `keys`, and with each body handed over in one piece."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        request = _request(scope)
        is_health = (request.method, request.path) == ("GET", HEALTH_PATH)
        # What is signed in the query (a presigned URL) is checked by ministack, against the same secret.
        refused = None if is_health or "X-Amz-Signature=" in request.query else refusal(request, keys)
        body = await _whole_body(receive)
        if refused is None and (is_health or not request.path.startswith("/_")):
            await app(scope, _handing_over(body, receive), send)
        else:
            await _refuse(send, *(refused or ("AccessDenied", "Access Denied")))

    return answer


def _request(scope: Scope) -> Request:
    headers: dict[str, str] = {}
    for name, value in scope["headers"]:
        key = name.decode("latin-1").lower()
        headers[key] = f"{headers[key]},{value.decode('latin-1')}" if key in headers else value.decode("latin-1")
    path = scope.get("raw_path") or scope["path"].encode()
    return Request(
        method=scope["method"],
        path=path.decode("latin-1").partition("?")[0],
        query=scope["query_string"].decode("latin-1"),
        headers=headers,
    )


async def _whole_body(receive: Receive) -> bytes:
    parts: list[bytes] = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body"):
            return b"".join(parts)


def _handing_over(body: bytes, receive: Receive) -> Receive:
    remaining = [body]

    async def hand_over() -> MutableMapping[str, Any]:
        if remaining:
            return {"type": "http.request", "body": remaining.pop(), "more_body": False}
        return await receive()  # tells when the client hangs up

    return hand_over


async def _refuse(send: Send, code: str, message: str) -> None:
    text = (
        f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{escape(message)}</Message></Error>"
    )
    headers = [(b"content-type", b"application/xml"), (b"content-length", str(len(text)).encode())]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


def main() -> None:
    """Serve on the listening socket that is inherited as `--fd`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="listening socket, inherited")
    options = parser.parse_args()

    from hypercorn.asyncio import serve
    from hypercorn.config import Config
    from ministack.app import app  # reads its environment when it is imported

    config = Config()
    config.bind = [f"fd://{options.fd}"]
    config.loglevel = "WARNING"
    config.keep_alive_timeout = 75
    keys = Keys(access_key_id=os.environ["AWS_ACCESS_KEY_ID"], secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"])
    served: Any = guarded(app, keys)  # hypercorn types its messages one by one
    asyncio.run(serve(served, config))


if __name__ == "__main__":
    main()
