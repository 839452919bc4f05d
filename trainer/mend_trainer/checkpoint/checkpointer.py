"""The checkpointer of a rank: copies the state aside and leaves the rest to the saver; restores what is proven."""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Final

import msgspec
import torch.distributed as dist

from mend.environment import ENV_ARENA
from mend.orders import CheckpointPlan
from mend.reports import Committed, Report, SaveFailed, Skipped, Staged
from mend.states import Ancestor, CheckpointRef, Holder
from mend.store import Store, open_store
from mend_trainer.checkpoint.arena import Arena, Header, Origin, Snapshot
from mend_trainer.checkpoint.gang import make_gang
from mend_trainer.checkpoint.layout import Block, assign, blocks_of, leaves, local_tensors, signature
from mend_trainer.checkpoint.links import AgentsSaver, OwnSaver, SaverLink
from mend_trainer.checkpoint.memory import Connect, Memory, bytes_present
from mend_trainer.checkpoint.outcome import RestoredState
from mend_trainer.checkpoint.restorer import restore
from mend_trainer.checkpoint.signing import key_of

_POLL_SECONDS: Final = 0.01

_log = logging.getLogger(__name__)


class Checkpointer:
    """Saves and restores the state of one attempt; every rank of the gang has one and calls it at the same steps.

    The state is a nested dict whose leaves are tensors or DTensors (nothing else: the rest belongs in `values`).
    What belongs to one rank alone, such as its RNG states, lies at `state["ranks"][str(rank)]`: at another world size
    such tensors may be absent or surplus, anything else that differs is a misfit. `values` is plain JSON (finite
    numbers, string keys) and the same for the whole run: rank 0's are kept.

    Rank 0 reports `Skipped` and `Quarantined`, and `Committed` and `SaveFailed` where no agent hears them from the
    saver; `Restored` is the caller's to report. A store given by the caller is restored from instead of opening
    `plan.uri`; `save_seconds` bounds how long the saver tries. `arena` is the agent's, if it is open already.

    Making one is a collective of `process_group` (default: the whole world): it makes a gloo group of its own,
    described as `mend:agree`. Without torch.distributed it is a world of one.
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
        arena: Arena | None = None,
        saver: Callable[[Arena], SaverLink] | None = None,
        connect: Connect | None = None,
        has_buddy: bool = False,
        may_repeat: bool = False,
        timeout_seconds: float = 900.0,
        save_seconds: float = 900.0,
    ) -> None:
        """`may_repeat`: the weights may be as in the save before; else such a save is refused.

        `connect` reaches the savers of other workers, `saver` the rank's own if it is a special one. `has_buddy`: no
        snapshot for memory alone is taken while any rank's last is still being copied; so there is always one that all
        ranks and all their buddies have.
        """
        self._plan = plan
        self._run = run
        self._run_uid = run_uid
        self._attempt = attempt
        self._report = report
        self._mark = mark
        self._config_digest = config_digest
        self.store = store or open_store(plan.uri, plan.endpoint)
        self.agreeing = make_gang(process_group, "mend:agree", timeout_seconds)
        self.lineage: tuple[Ancestor, ...] = ()  # what saves carry; a restore sets it
        self.save_seconds = save_seconds
        self._may_repeat = may_repeat
        self._connect, self._has_buddy = connect, has_buddy
        self._signature: tuple[Any, ...] = ()
        self._blocks: tuple[Block, ...] = ()
        self.agents_arena = arena or _agents_arena()  # for the checkpointer of the next attempt
        self.arena = self.agents_arena or Arena.create(f"rank-{self.agreeing.rank}")
        self._saver = saver(self.arena) if saver else AgentsSaver(report) if self.agents_arena else OwnSaver(self.arena)
        self._pending: list[Snapshot] = []
        self._last_heard = 0  # sequence of the newest whose outcome is known
        self._last_failed = False  # that one
        self._is_skipping = False
        self._stall_seconds = 0.0

    @property
    def committed_step(self) -> int:
        """Step of the newest checkpoint of this attempt that this rank's saver knows of; -1 before the first."""
        attempt, step = self.arena.words.committed
        return step if attempt == self._attempt else -1

    @property
    def in_flight(self) -> bool:
        """Whether a save is still on its way into the store."""
        self._hear()
        return bool(self._pending)

    @property
    def stall_seconds(self) -> float:
        """How long the last `save` stopped its caller."""
        return self._stall_seconds

    @property
    def bytes_in_memory(self) -> int:
        """What the arenas of this worker take already."""
        return bytes_present(self.arena)

    def save(
        self, step: int, tokens: int, state: Mapping[str, Any], values: Mapping[str, Any], *, owed: bool = True
    ) -> bool:
        """Copy the state aside; False if there is no room, since the saves before are still on their way.

        The saver brings it into the store if it is `owed`; else it stays in memory, until the next but one. A small
        collective: all ranks do, or none. Only the copy stops the caller. Failures of storage are reported as
        `SaveFailed` and never raised; a state that cannot be saved (a leaf that is no tensor, a value that is no JSON)
        raises TypeError or ValueError naming it.
        """
        began = time.monotonic()
        plain = json.loads(json.dumps(values, allow_nan=False))
        self._hear()
        save_id = self._agree_to_start(step, state, may_wait=not owed)
        draft = self.arena.begin(self._blocks) if save_id else None
        self._hear()  # of the snapshot in whose place the draft is: settled while ranks agreed, and gone with the next
        if draft is None:
            if owed and not self._is_skipping:
                self._is_skipping = True  # what is made up for later counts once
                self._tell(Skipped(step=step))
            return False
        self._is_skipping = self._is_skipping and not owed
        draft.fill(local_tensors(state))
        self._stall_seconds = time.monotonic() - began
        header = Header(
            save_id=save_id,
            origin=Origin(
                run=self._run,
                run_uid=self._run_uid,
                attempt=self._attempt,
                lineage=self.lineage,
                config_digest=self._config_digest,
                step=step,
                tokens=tokens,
                values=plain,
                created_unix_seconds=time.time(),
            ),
            rank=self.agreeing.rank,
            world_size=self.agreeing.size,
            blocks=self._blocks,
            uri=self._plan.uri,
            endpoint=self._plan.endpoint,
            verify=self._plan.verify,
            may_repeat=self._may_repeat,
            save_seconds=self.save_seconds,
            stall_seconds=self._stall_seconds,
        )
        snapshot = draft.publish(header, owed=owed)
        if owed:
            self._pending.append(snapshot)
        self._saver.wake(Staged(save_id=save_id, step=step, owed=owed))
        self._stall_seconds = time.monotonic() - began
        return True

    def wait(self, seconds: float) -> bool:
        """Wait for what is on its way; True if nothing is left and the last was committed (or none was begun)."""
        deadline = time.monotonic() + seconds
        while self.in_flight and time.monotonic() < deadline:
            self._saver.revive()
            time.sleep(_POLL_SECONDS)
        return not self.in_flight and not self._last_failed

    def restore(
        self, candidates: Sequence[CheckpointRef], state: Mapping[str, Any], holders: Sequence[Holder] = ()
    ) -> RestoredState | None:
        """Load the first candidate that proves intact into the tensors of `state`, in place; None if there are none.

        A collective: all ranks restore the same candidate. One that fails verification on any rank is marked with
        `quarantine.json`, reported, and left; one in memory that cannot be had is passed over. `holders` have what
        lies in the memory of other workers. Saves that follow carry the restored checkpoint in their lineage.

        Raises `MisfitError` for a checkpoint of another model, `CheckpointsUnreadable` when no candidate is left, and
        the `mend.store.StoreError` of a store that cannot be read just now; then nothing is quarantined.
        """
        if not candidates:
            return None
        with ExitStack() as until_restored:
            others = self._connect(holders) if self._connect and holders else None
            if others is not None:
                until_restored.callback(others.close)
            memory = Memory.of_this_worker(self.arena, holders, others)
            restored = restore(
                self.agreeing, self.store, memory, candidates, state, self._report, self._mark, key_of(self._run)
            )
        if restored is not None:
            self.lineage = restored.lineage
        return restored

    def close(self) -> None:
        """Nothing more will be saved. What is owed still is, without this process."""
        self._saver.close()

    def _agree_to_start(self, step: int, state: Mapping[str, Any], *, may_wait: bool) -> str:
        """The name of the new save, "" if any rank has no room; lays the save out anew if any rank's state changed."""
        seen = signature(state)
        drawn = secrets.randbits(62) if self.agreeing.rank == 0 else 0
        waits = may_wait and self._has_buddy and self.arena.words.is_being_copied
        mine = [waits or not self.arena.has_room, seen != self._signature, drawn, step, -step]
        full, changed, number, highest, lowest = self.agreeing.maximum(mine)
        if highest != -lowest:
            raise RuntimeError(f"save() was called at step {-lowest} on one rank and at step {highest} on another")
        if full:
            return ""
        if changed:
            self._blocks = tuple(self._own_blocks(state))
            self.arena.prepare(self._blocks, pinned=any(leaf.is_cuda for _, leaf in leaves(state)))
            self._signature = seen
        return f"{number:016x}"

    def _own_blocks(self, state: Mapping[str, Any]) -> Sequence[Block]:
        said = self.agreeing.gather(msgspec.json.encode(blocks_of(state)))
        held = [msgspec.json.decode(each, type=list[Block]) for each in said]
        return assign(held)[self.agreeing.rank]

    def _hear(self) -> None:
        """Take in what has come of the saves before; a later one may be done first."""
        waiting = []
        for snapshot in self._pending:
            if (said := snapshot.outcome) is None:
                waiting.append(snapshot)
                continue
            outcome = msgspec.json.decode(said, type=Committed | SaveFailed)
            if snapshot.sequence > self._last_heard:
                self._last_heard, self._last_failed = snapshot.sequence, isinstance(outcome, SaveFailed)
            if not self._saver.tells_agent:
                self._tell(outcome)
        self._pending = waiting

    def _tell(self, report: Report) -> None:
        if self.agreeing.rank == 0:
            self._report(report)


def _agents_arena() -> Arena | None:
    """The arena that the agent has for this rank's place, if there is an agent and it can be reached."""
    path = os.environ.get(ENV_ARENA)
    if not path:
        return None
    try:
        return Arena.attach(path)
    except OSError as error:
        _log.warning("the agent's shared memory cannot be opened (%s): nothing can be restored from it later", error)
        return None
