"""The checkpointer of a rank: copies the state aside, commits it in the background, restores what is proven."""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import torch.distributed as dist

from mend.protocol import (
    SAVE_GROUP,
    Ancestor,
    CheckpointPlan,
    CheckpointRef,
    Committed,
    Report,
    SaveFailed,
    checkpoint_key,
)
from mend.store import Store, open_store
from mend_trainer.checkpoint.arena import Arena
from mend_trainer.checkpoint.commit import Origin
from mend_trainer.checkpoint.gang import make_gang
from mend_trainer.checkpoint.layout import Block, assign, blocks_of, leaves, local_tensors, signature
from mend_trainer.checkpoint.outcome import RestoredState
from mend_trainer.checkpoint.restorer import restore
from mend_trainer.checkpoint.saver import Begun, SaveAborted, finish

_log = logging.getLogger(__name__)


class Checkpointer:
    """Saves and restores the state of one attempt; every rank of the gang has one and calls it at the same steps.

    The state is a nested dict whose leaves are tensors or DTensors (nothing else: the rest belongs in `values`).
    What belongs to one rank alone, such as its RNG states, lies at `state["ranks"][str(rank)]`: at another world size
    such tensors may be absent or surplus, anything else that differs is a misfit. `values` is plain JSON (finite
    numbers, string keys) and the same for the whole run: rank 0's are kept.

    Rank 0 reports `Committed`, `SaveFailed` and `Quarantined`; `Restored` is the caller's to report. A store given by
    the caller is used instead of opening `plan.uri`. `timeout_seconds` bounds how long a save waits for its peers.

    Making one is a collective of `process_group` (default: the whole world): it makes two gloo groups of its own,
    described as `mend:agree` and `mend:save` (`SAVE_GROUP`). Without torch.distributed it is a world of one.
    """

    def __init__(
        self,
        plan: CheckpointPlan,
        *,
        run: str,
        run_uid: str,
        attempt: int,
        report: Callable[[Report], None],
        mark: Callable[[], None] = lambda: None,
        config_digest: str = "",
        process_group: dist.ProcessGroup | None = None,
        store: Store | None = None,
        timeout_seconds: float = 900.0,
    ) -> None:
        self._run = run
        self._run_uid = run_uid
        self._attempt = attempt
        self._report = report
        self._mark = mark
        self._config_digest = config_digest
        self.store = store or open_store(plan.uri, plan.endpoint)
        # Two groups, since the main thread and the saving thread may both be in a collective.
        self.agreeing = make_gang(process_group, "mend:agree", timeout_seconds)
        self._saving = make_gang(process_group, SAVE_GROUP, timeout_seconds)
        self.lineage: tuple[Ancestor, ...] = ()  # what saves carry; a restore sets it
        self._signature: tuple[Any, ...] = ()
        self._arena: Arena | None = None
        self._idle = threading.Event()
        self._idle.set()
        self._last_failed = False
        self._abandoned = False
        self._committed_step = -1
        self._stall_seconds = 0.0

    @property
    def committed_step(self) -> int:
        """Step of the newest checkpoint that this attempt committed and this rank knows of; -1 before the first."""
        return self._committed_step

    @property
    def in_flight(self) -> bool:
        """Whether a save is still being written in the background."""
        return not self._idle.is_set()

    @property
    def stall_seconds(self) -> float:
        """How long the last `save` stopped its caller."""
        return self._stall_seconds

    def save(self, step: int, tokens: int, state: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
        """Copy the state aside and commit it in the background; False if the save before is still in flight.

        A small collective: all ranks start the save, or none. Only the copy stops the caller. Failures of storage
        are reported as `SaveFailed` and never raised; a state that cannot be saved (a leaf that is no tensor, a value
        that is no JSON) raises TypeError or ValueError naming it.
        """
        began = time.monotonic()
        plain = json.loads(json.dumps(values, allow_nan=False))
        save_id = self._agree_to_start(step, state)
        if not save_id:
            return False
        assert self._arena is not None
        self._arena.fill(local_tensors(state))
        self._stall_seconds = time.monotonic() - began
        origin = Origin(
            run=self._run,
            run_uid=self._run_uid,
            attempt=self._attempt,
            lineage=self.lineage,
            config_digest=self._config_digest,
            step=step,
            tokens=tokens,
            values=plain,
        )
        begun = Begun(folder=checkpoint_key(step, self._attempt, save_id), origin=origin, arena=self._arena)
        self._idle.clear()
        # A daemon: a peer that died in the middle must not hold up the end of this process.
        threading.Thread(target=self._finish, args=(begun, began), name="mend-save", daemon=True).start()
        return True

    def wait(self, seconds: float) -> bool:
        """Wait for the save in flight; True if none is left and the last one was committed (or none was begun)."""
        return self._idle.wait(seconds) and not self._last_failed

    def restore(self, candidates: Sequence[CheckpointRef], state: Mapping[str, Any]) -> RestoredState | None:
        """Load the first candidate that proves intact into the tensors of `state`, in place; None if there are none.

        A collective: all ranks restore the same candidate. One that fails verification on any rank is marked with
        `quarantine.json`, reported, and left. Saves that follow carry the restored checkpoint in their lineage.

        Raises `MisfitError` for a checkpoint of another model, `CheckpointsUnreadable` when no candidate is left, and
        the `mend.store.StoreError` of a store that cannot be read just now; then nothing is quarantined.
        """
        if not candidates:
            return None
        restored = restore(self.agreeing, self.store, candidates, state, self._report, self._mark)
        self.lineage = restored.lineage
        return restored

    def close(self, seconds: float = 0.0) -> None:
        """Wait that long for the save in flight; afterwards nothing of it can hold up the end of the process."""
        self._idle.wait(seconds)

    def abandon(self, seconds: float) -> None:
        """The ranks lost each other: let a save in flight fail, which is nobody's fault, and wait that long for it."""
        self._abandoned = True
        self._idle.wait(seconds)

    def _agree_to_start(self, step: int, state: Mapping[str, Any]) -> str:
        """The name of the new save, "" if any rank is busy; lays the save out anew if any rank's state changed."""
        seen = signature(state)
        drawn = secrets.randbits(62) if self.agreeing.rank == 0 else 0
        mine = [self.in_flight, seen != self._signature, drawn, step, -step]
        busy, changed, number, highest, lowest = self.agreeing.maximum(mine)
        if highest != -lowest:
            raise RuntimeError(f"save() was called at step {-lowest} on one rank and at step {highest} on another")
        if busy:
            return ""
        if changed:
            self._arena = None  # there is room for one, not for two
            self._arena = Arena(self._own_blocks(state), pinned=any(leaf.is_cuda for _, leaf in leaves(state)))
            self._signature = seen
        return f"{number:016x}"

    def _own_blocks(self, state: Mapping[str, Any]) -> Sequence[Block]:
        said = self.agreeing.gather(msgspec.json.encode(blocks_of(state)))
        held = [msgspec.json.decode(each, type=list[Block]) for each in said]
        return assign(held)[self.agreeing.rank]

    def _finish(self, begun: Begun, began: float) -> None:
        self._last_failed = True
        try:
            stored_bytes = finish(self._saving, self.store, begun)
            self._committed_step = begun.origin.step
            self._last_failed = False
            self._tell(self._committed(begun, began, stored_bytes))
        except SaveAborted as error:
            if self._abandoned:
                _log.info("the save at step %d was broken off", begun.origin.step)
            else:
                _log.error("the save at step %d failed: %s", begun.origin.step, error)
                self._tell(SaveFailed(step=begun.origin.step, error=str(error)))
        finally:
            self._idle.set()

    def _committed(self, begun: Begun, began: float, stored_bytes: int) -> Committed:
        uri = f"{self.store.uri}/{begun.folder}"
        return Committed(
            checkpoint=CheckpointRef(uri=uri, step=begun.origin.step, attempt=self._attempt),
            stall_seconds=self._stall_seconds,
            commit_seconds=time.monotonic() - began,
            bytes=stored_bytes,
        )

    def _tell(self, report: Report) -> None:
        if self._saving.rank == 0:
            self._report(report)
