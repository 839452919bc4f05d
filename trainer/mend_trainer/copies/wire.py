"""What savers say to each other over HTTPS, and how much of it at most.

    GET  /v1/snapshots                      `Held` of all that lies whole here, as a JSON array
    GET  /v1/snapshots/SAVE-ID/RANK         its sheet: header and digests, sealed; 404
    GET  /v1/snapshots/SAVE-ID/RANK/bytes   with `Range: bytes=FIRST-LAST`: 206, raw; 404; 410 once it is overwritten
    POST /v1/copies                         offers a sheet: 202, send the bytes; 208, it is here already;
                                            409, 422 or 507, why not; 503, ask again
    PUT  /v1/copies                         the bytes of what was offered on this connection: 201; 422 and what is wrong

Each request carries the token for snapshots (`tls.snapshot_token`); each refusal is a sentence.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Final

SNAPSHOTS_PATH: Final = "/v1/snapshots"
COPIES_PATH: Final = "/v1/copies"
BYTES_NAME: Final = "bytes"

SHEET_BYTES: Final = 32 << 20  # a sheet names each tensor; this is some hundred thousand of them
LISTING_BYTES: Final = 4 << 20
RANGE_BYTES: Final = 1 << 30
BESIDE_HEADER: Final = "Mend-Beside"  # of an offer: a save whose snapshot the sender has beside it; its copy stays
PIECE_BYTES: Final = 256 << 10  # what is sent, and waited for, at a time

CONNECT_SECONDS: Final = 5.0
IDLE_SECONDS: Final = 2.0  # a connection that was not used for so long is not used again
SILENCE_SECONDS: Final = 5.0  # without a byte coming or going, the other end is taken for gone


class Refused(Exception):
    """The other end was told no, and why; `status` is the HTTP status that says so."""

    def __init__(self, reason: str, status: HTTPStatus = HTTPStatus.CONFLICT) -> None:
        super().__init__(reason)
        self.status = status


def snapshot_path(save_id: str, rank: int, name: str = "") -> str:
    """Path of a snapshot, or of what lies below it."""
    return f"{SNAPSHOTS_PATH}/{save_id}/{rank}" + (f"/{name}" if name else "")


def authorization(token: str) -> str:
    """The header's value."""
    return f"Bearer {token}"
