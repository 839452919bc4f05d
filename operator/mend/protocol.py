"""The wire contract: how the controller talks with the agents, over which paths and in messages of which form.

The controller dials the agent of each worker (port `AGENT_PORT`, bearer token from the run's Secret) and uses:

- `GET /v1/stream` answers newline-delimited JSON: `Heartbeat`s (whole snapshots, so that a lost line loses nothing)
  at every interval and at once when a fact changes, and `Points` of the loss curve.
- `POST /v1/orders` takes one `Order`, answers `Ack` (200), `Evidence` for a `Gather`, or `Checked` for a `Check`; 409
  with an `Ack` for an order of an older attempt than the agent's own, 401 without the token.

Every message carries the attempt, the fencing token of a run: receivers drop what is older than what they know.
Times on the wire are ages in seconds, never wall-clock times, so that skewed clocks do no harm.
The messages are in `heartbeats`, `orders`, `evidence` and, of a rank to its agent, `reports`.
"""

from __future__ import annotations

from typing import Final

import msgspec

AGENT_PORT: Final = 7117
STREAM_PATH: Final = "/v1/stream"
ORDERS_PATH: Final = "/v1/orders"
BULK_PATH: Final = "/v1/bulk"  # zeros, for another agent of the run to measure the way
BULK_BYTES: Final = 32 << 20


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of everything on the wire: immutable, keyword-only, defaults left out."""


def encode(message: Message) -> bytes:
    """One message as compact JSON, without a newline."""
    return msgspec.json.encode(message)


def agent_url(ip: str, port: int = AGENT_PORT) -> str:
    """Where an agent is reached, without a path."""
    return f"http://{_host(ip)}:{port}"


def saver_url(ip: str, port: int) -> str:
    """Where a saver is reached, without a path."""
    return f"https://{_host(ip)}:{port}"


def _host(ip: str) -> str:
    """As URLs have it: an IPv6 address is told from the port by brackets."""
    return f"[{ip}]" if ":" in ip else ip
