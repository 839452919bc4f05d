"""What a rank reports to its agent, one line each on their pipe."""

from __future__ import annotations

import msgspec

from mend.heartbeats import Point, RankError
from mend.protocol import Message
from mend.states import CheckpointRef


class Committed(Message, frozen=True, kw_only=True, tag_field="type", tag="committed"):
    """Rank 0 committed a checkpoint."""

    checkpoint: CheckpointRef
    stall_seconds: float
    commit_seconds: float
    bytes: int


class SaveFailed(Message, frozen=True, kw_only=True, tag_field="type", tag="save-failed"):
    """A save failed; training goes on."""

    step: int
    error: str


class Restored(Message, frozen=True, kw_only=True, tag_field="type", tag="restored"):
    """Rank 0 starts from this."""

    checkpoint: CheckpointRef


class Quarantined(Message, frozen=True, kw_only=True, tag_field="type", tag="quarantined"):
    """A checkpoint failed verification and was marked so in the store."""

    uri: str
    reason: str


class Raised(Message, frozen=True, kw_only=True, tag_field="type", tag="raised"):
    """The rank is ending with this exception."""

    error: RankError


class Measured(Message, frozen=True, kw_only=True, tag_field="type", tag="measured"):
    """A point of the loss curve or of an evaluation."""

    point: Point


class Rejoined(Message, frozen=True, kw_only=True, tag_field="type", tag="rejoined"):
    """The rank has left the attempt before and goes on in this one: what it reports from now on belongs to it."""

    attempt: int


class Stepped(Message, frozen=True, kw_only=True, tag_field="type", tag="stepped"):
    """The rank has completed its first step of this attempt: a recovery is over by it, so it is told at once."""


class Staged(Message, frozen=True, kw_only=True, tag_field="type", tag="staged"):
    """This rank has published a snapshot in its arena."""

    save_id: str
    step: int
    owed: bool  # it is to be saved; else it only stays in memory


class Skipped(Message, frozen=True, kw_only=True, tag_field="type", tag="skipped"):
    """A save was due and could not begin: the ones before are still being written."""

    step: int


Report = Staged | Skipped | Committed | SaveFailed | Restored | Quarantined | Raised | Measured | Rejoined | Stepped

decode_report = msgspec.json.Decoder(Report).decode
