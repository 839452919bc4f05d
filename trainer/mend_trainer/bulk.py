"""What agents of a run send each other to measure the way between them: zeros, to whoever has the run's token."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from mend.protocol import BULK_BYTES
from mend_trainer.supervisor import Supervisor

_CHUNK: Final = bytes(1 << 20)


async def send_bulk(request: web.Request, supervisor: Supervisor) -> web.StreamResponse:
    """`BULK_BYTES` zeros; 409 while ranks run here, whose share of the network it is."""
    if supervisor.has_ranks:
        raise web.HTTPConflict(text="ranks are running here\n")
    response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
    response.content_length = BULK_BYTES
    await response.prepare(request)
    for _ in range(BULK_BYTES // len(_CHUNK)):
        await response.write(_CHUNK)
    return response
