"""What was found in the store under a run's prefix."""

from __future__ import annotations

from mend.facts import Fact
from mend.states import Ancestor, CheckpointRef


class StoredCheckpoint(Fact, frozen=True, kw_only=True):
    """A committed checkpoint as the store's listing and its manifest tell; snapshots in memory are told of alike."""

    ref: CheckpointRef
    run_uid: str = ""  # of the run that made it: the present one, or one that had the prefix before
    lineage: tuple[Ancestor, ...] = ()
    world_size: int = 0
    tokens: int = 0
    committed_at: float = 0.0
    bytes: int = 0
    quarantined: bool = False
    verified: bool = False
    pinned: bool = False  # retention leaves it alone


class StoredSave(Fact, frozen=True, kw_only=True):
    """A save's folder, committed or not, as a listing shows it; times are the store's own."""

    uri: str
    attempt: int
    modified_at: float  # of its newest object
    committed: bool = False
    quarantined_at: float | None = None
    pinned: bool = False


class StoreView(Fact, frozen=True, kw_only=True):
    """What is known of the run's prefix in the store. `listed` is false until the first listing has worked.

    `listed_for` and `listed_beside` say how fresh the listing is: the attempt that was the present one when it began,
    and the pods that were to be replaced and not yet gone then. What these committed later is not in it.
    """

    listed: bool = False
    listed_for: int = -1
    listed_beside: tuple[str, ...] = ()
    checkpoints: tuple[StoredCheckpoint, ...] = ()
    partial: bool = False  # there may be older ones: they are still being listed
    problem: str = ""  # shown as a condition; "" when all is well
    problem_reason: str = "Ready"  # CamelCase: Unreachable, Forbidden, NoSuchBucket, PrefixOwned, BadCredentials
    caution: str = ""  # what the store does not do, although one can train on it
    passed_over: str = ""  # checkpoints that the signing key does not vouch for; "" if there are none, or no key
    evidence_problem: str = ""  # why the last dossier could not be kept; "" when it was
