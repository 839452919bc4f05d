"""What a saver and those who have started it say to each other: one JSON message at a time over a socket."""

from __future__ import annotations

import msgspec

from mend.protocol import Message
from mend.reports import Committed, SaveFailed
from mend.states import Held


class Guide(Message, frozen=True, kw_only=True):
    """Look at the arenas: there may be something new. What a saver is to know besides goes with it, whole each time."""

    buddy: str = ""
    bytes_per_second: int = 0


class Holding(Message, frozen=True, kw_only=True, tag_field="type", tag="holding"):
    """What lies whole and digested in this worker's memory, and what was sent to the store so far."""

    held: tuple[Held, ...] = ()
    settled: int = 0  # snapshots whose save was committed or given up
    requests: int = 0
    stored_bytes: int = 0


class Came(Message, frozen=True, kw_only=True, tag_field="type", tag="came"):
    """What has come of a save, or is coming of it: a failure may be followed by another try."""

    attempt: int
    outcome: Committed | SaveFailed


Said = Holding | Came

MESSAGE_BYTES = 1 << 18
decode_guide = msgspec.json.Decoder(Guide).decode
decode_said = msgspec.json.Decoder(Said).decode
