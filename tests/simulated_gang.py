"""Simulated ranks: gangs that step in lock-step, the checkpoints they make, and what agents can see of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec.structs import replace

from mend.evidence import GroupProgress, RankEvidence
from mend.exitcodes import ExitCode
from mend.heartbeats import Phase, Point, RankError, RankExit, RankReport
from mend.listing import StoredCheckpoint
from mend.orders import Launch
from mend.restore import is_on_lineage
from mend.states import Ancestor, CheckpointRef
from simulated_faults import ENDS, HEALTHY, STUCK
from simulated_memory import Arena, Snapshot, a_state

if TYPE_CHECKING:
    from simulated_pod import Agent

MEETING_SECONDS = 0.4
LOADING_SECONDS = 0.3
STEP_SECONDS = 0.5
COMMIT_SECONDS = 0.3
SYMPTOM_SECONDS = 0.1
LAST_WORDS_SECONDS = 20.0  # between a leaving rank's goodbye to its peers and its own end
STORAGE_PATIENCE_SECONDS = 3.0  # of ranks that cannot read a checkpoint
SILENCE_SECONDS = 5.0  # for which ranks wait for a saver that does not answer
ORDER_SECONDS = 60.0  # for which a rank that was cut off waits for an order
PREFIX = "s3://bucket/clio"


@dataclass(eq=False)
class Rank:
    """One trainer process. A `fault`, one of `simulated_faults.STUCK`, keeps it from its next step."""

    number: int
    started_at: float
    fault: str = ""
    fault_at: float = 0.0
    exit: RankExit | None = None
    error: RankError | None = None
    ended_at: float = 0.0
    carried: CheckpointRef | None = None  # the state that it has kept from the attempt it was of
    lineage: tuple[Ancestor, ...] = ()  # of that attempt
    worker: int = 0
    launch: Launch | None = None  # as its agent has it
    arena: Arena = field(default_factory=Arena)  # of its agent

    @property
    def alive(self) -> bool:
        """Its process runs or is stopped."""
        return self.exit is None

    def end(self, now: float, exit: RankExit, error: RankError | None = None) -> None:
        """The process is gone."""
        if self.alive:
            self.exit, self.error, self.ended_at = exit, error, now


@dataclass
class Bucket:
    """The object store: what is committed there, what is spoilt, and whether it answers."""

    checkpoints: dict[str, StoredCheckpoint] = field(default_factory=dict)
    corrupt: set[str] = field(default_factory=set)
    available: bool = True

    def commit(self, checkpoint: StoredCheckpoint) -> None:
        """A manifest was written."""
        self.checkpoints[checkpoint.ref.uri] = checkpoint

    def quarantine(self, uri: str) -> None:
        """A rank found it spoilt."""
        known = self.checkpoints[uri]
        self.checkpoints[uri] = replace(known, quarantined=True)

    def newest(self) -> StoredCheckpoint | None:
        """The newest that nobody has found spoilt."""
        sound = [each for each in self.checkpoints.values() if not each.quarantined]
        return max(sound, key=lambda each: (each.ref.attempt, each.ref.step), default=None)


@dataclass(eq=False)
class Gang:
    """All ranks of one attempt, wherever they are. It steps only while every rank is there and unobstructed."""

    launch: Launch
    bucket: Bucket
    last_step: int
    save_every: int
    ranks: dict[int, Rank] = field(default_factory=dict)
    met_at: float | None = None
    loaded_at: float | None = None
    restored: CheckpointRef | None = None
    lineage: tuple[Ancestor, ...] = ()
    quarantined: tuple[str, ...] = ()
    step: int = -1
    steps_done: int = 0
    progress_at: float = 0.0
    network_down: bool = False
    behind: frozenset[int] = frozenset()  # ranks that a broken ring stopped one collective before the others
    save_wanted: bool = False
    in_flight: list[tuple[int, float]] = field(default_factory=list)
    committed: CheckpointRef | None = None
    committed_at: float = 0.0
    failures: int = 0
    nonfinite: bool = False
    spiked_at: int | None = None  # from this step on the loss is high
    points: list[Point] = field(default_factory=list)
    rejoins: bool = False  # its ranks keep their processes when a peer is lost
    memory_every: int = 0  # steps between snapshots; 0: there is no saver, and none are taken
    fetch: Callable[[str], Arena | None] = lambda _: None  # what the saver at a url serves
    is_silent: Callable[[str], bool] = lambda _: False  # there is no saver now, but an agent that starts another
    began_from: StoredCheckpoint | None = None

    @property
    def attempt(self) -> int:
        """Of which attempt."""
        return self.launch.attempt

    @property
    def complete(self) -> bool:
        """Every rank is there and alive."""
        return len(self.ranks) == self.launch.world_size and all(rank.alive for rank in self.ranks.values())

    @property
    def obstructed(self) -> bool:
        """Something keeps it from its next step."""
        return self.network_down or not self.complete or any(rank.fault for rank in self.ranks.values())

    @property
    def finished(self) -> bool:
        """All steps are done."""
        return self.step >= self.last_step

    def may_need(self) -> frozenset[str]:
        """What it may start from until it has; afterwards its parent, all that its line has until it saves."""
        if self.loaded_at is None:
            return frozenset(ref.uri for ref in self.launch.restore)
        return frozenset({self.restored.uri} if self.restored is not None and self.restored.uri else ())

    def advance(self, now: float) -> bool:
        """Lets time pass; whether a step was completed."""
        self._land_saves(now)
        if self._breaks_apart(now) or self.obstructed:
            return False
        if self.met_at is None:
            if now - max(rank.started_at for rank in self.ranks.values()) >= MEETING_SECONDS:
                self.met_at = self.progress_at = now
        elif self.loaded_at is None:
            if now - self.met_at >= LOADING_SECONDS:
                self._load(now)
        elif now - self.progress_at >= STEP_SECONDS - 1e-9 and not self.finished:
            self._complete_step(now)
            return True
        elif self.finished and not self.in_flight:
            for rank in self.ranks.values():
                rank.end(now, RankExit(code=0))
        return False

    def _breaks_apart(self, now: float) -> bool:
        """Ranks that wait for a dead one are cut off, and say so; a stopped or stuck one notices nothing."""
        for rank in self.ranks.values():
            if rank.alive and rank.fault == "leaving" and now - rank.fault_at >= LAST_WORDS_SECONDS:
                rank.end(now, *ENDS["raise"])
        dead = [rank for rank in self.ranks.values() if not rank.alive and rank.exit != RankExit(code=0)]
        dead += [rank for rank in self.ranks.values() if rank.alive and rank.fault == "leaving"]
        if not dead or self.met_at is None:
            return bool(dead)
        if now - min(rank.ended_at or rank.fault_at for rank in dead) >= SYMPTOM_SECONDS:
            for rank in self.ranks.values():
                if rank.alive and not rank.fault:
                    self._cut_off(rank, now)
        return True

    def _cut_off(self, rank: Rank, now: float) -> None:
        """It says so, and ends; or waits for an order, if it could be told to rejoin."""
        cut_off = RankError(type="DistNetworkError", message="Connection closed by peer")
        if not self.offers_to_rejoin:
            rank.end(now, RankExit(code=1), cut_off)
        elif rank.error is None:
            rank.error, rank.ended_at = cut_off, now
        elif now - rank.ended_at > ORDER_SECONDS:
            rank.end(now, RankExit(code=1), cut_off)

    @property
    def offers_to_rejoin(self) -> bool:
        """Whether its ranks are in their loops, and such as could go on in another attempt."""
        return self.rejoins and self.loaded_at is not None

    def release(self, launch: Launch, ranks: Sequence[Rank]) -> list[Rank]:
        """Those of its ranks that go on in another attempt, with the state that they have."""
        mine = (self.attempt, self.launch.world_size)
        if not self.offers_to_rejoin or mine != (launch.follows, launch.world_size):
            return []
        kept = [rank for rank in ranks if rank.number in launch.keep and rank.alive and not rank.fault]
        for rank in kept:
            del self.ranks[rank.number]
            rank.carried = CheckpointRef(uri="", step=self.step, attempt=self.attempt) if self.step >= 0 else None
            rank.lineage, rank.error = self.lineage, None
        return kept

    def _load(self, now: float) -> None:
        """Restores the first candidate that can be read, putting spoilt ones into quarantine."""
        assert self.met_at is not None
        if (carrier := next((rank for rank in self.ranks.values() if rank.carried is not None), None)) is not None:
            self._start_from_memory(carrier, now)
            return
        for ref in self.launch.restore:
            if ref.save_in_memory:
                if (state := self._gathered(ref)) is not None:
                    self._start_from(state, now)
                    return
                if now - self.met_at < SILENCE_SECONDS and self._may_yet_be_had(ref):
                    return
                continue
            if not self.bucket.available:
                if now - self.met_at > STORAGE_PATIENCE_SECONDS:
                    self._exit_all(now, ExitCode.STORAGE)
                return
            known = self.bucket.checkpoints.get(ref.uri)
            if known is None or known.quarantined:
                continue
            if ref.uri in self.bucket.corrupt:
                self.bucket.quarantine(ref.uri)
                self.quarantined += (ref.uri,)
                continue
            self._start_from(known, now)
            return
        if self.launch.restore:
            self._exit_all(now, ExitCode.STORAGE)
        else:
            self._start_from(None, now)

    def _gathered(self, ref: CheckpointRef) -> StoredCheckpoint | None:
        """The state that snapshots make up, if every rank can get all of them and no digest is wrong."""
        if ref.uri in self.quarantined:
            return None
        for rank in self.ranks.values():
            found = self._found_by(rank, ref.save_in_memory)
            if not found or len(found) < next(iter(found.values())).state.world_size:
                return None
        if ref.uri in self.bucket.corrupt:
            self.quarantined += (ref.uri,)
            return None
        return next(iter(found.values())).state

    def _may_yet_be_had(self, ref: CheckpointRef) -> bool:
        asked = (each for rank in self.ranks.values() if rank.launch for each in rank.launch.holders)
        return any(each.save_id == ref.save_in_memory and self.is_silent(each.url) for each in asked)

    def _found_by(self, rank: Rank, save_id: str) -> dict[int, Snapshot]:
        assert rank.launch is not None
        found: dict[int, Snapshot] = {}
        for holder in rank.launch.holders:
            arena = rank.arena if holder.worker == rank.worker else self.fetch(holder.url)
            snapshot = arena.find(save_id, holder.rank) if arena is not None and holder.save_id == save_id else None
            if snapshot is not None:
                found.setdefault(holder.rank, snapshot)
        return found

    def _start_from(self, checkpoint: StoredCheckpoint | None, now: float) -> None:
        self.loaded_at = self.progress_at = now
        self.began_from = checkpoint
        if checkpoint is None:
            self.restored = CheckpointRef(uri="", step=-1, attempt=self.attempt)
            return
        self.restored = checkpoint.ref
        self.step = checkpoint.ref.step
        self.lineage = (
            *checkpoint.lineage,
            Ancestor(attempt=checkpoint.ref.attempt, step=checkpoint.ref.step, uid=checkpoint.run_uid),
        )

    def _start_from_memory(self, carrier: Rank, now: float) -> None:
        assert carrier.carried is not None
        state = carrier.carried
        self.loaded_at = self.progress_at = now
        self.restored, self.step = state, state.step
        link = Ancestor(attempt=state.attempt, step=state.step, uid=self.launch.run_uid)
        self.lineage = (*carrier.lineage, link)

    def _exit_all(self, now: float, code: ExitCode) -> None:
        for rank in self.ranks.values():
            rank.end(now, RankExit(code=int(code)))

    def _complete_step(self, now: float) -> None:
        self.step += 1
        self.steps_done += 1
        self.progress_at = now
        self.points.append(Point(step=self.step, loss=self.loss, tokens=100, seconds=STEP_SECONDS))
        saves = self.save_wanted or (self.step + 1) % self.save_every == 0 or self.finished
        if self.memory_every and (saves or (self.step + 1) % self.memory_every == 0):
            self._take_snapshots(now)
        if saves:
            self.save_wanted = False
            self.in_flight.append((self.step, now + COMMIT_SECONDS))

    @property
    def loss(self) -> float:
        """At its step: it falls, unless something has gone wrong."""
        return 9.0 if self.spiked_at is not None and self.step >= self.spiked_at else 1.0 / (self.step + 2)

    def _take_snapshots(self, now: float) -> None:
        save_id = f"{self.step}-{self.attempt}-{self.launch.master_port}"
        size, uid = self.launch.world_size, self.launch.run_uid
        state = a_state(save_id, uid, self.attempt, self.step, size, self.lineage)
        for rank in self.ranks.values():
            assert rank.launch is not None
            rank.arena.places[rank.number - rank.launch.first_rank].append(Snapshot(save_id, rank.number, state, now))

    def _land_saves(self, now: float) -> None:
        """Commits what is due, as long as rank 0 lives to write the manifest."""
        writer = self.ranks.get(0)
        for step, due in [save for save in self.in_flight if save[1] <= now]:
            self.in_flight.remove((step, due))
            if writer is None or not writer.alive or writer.fault == "stopped":
                continue
            if not self.bucket.available:
                self.failures += 1
                continue
            uri = f"{PREFIX}/step-{step:012d}/{self.attempt:06d}-x"
            self.committed, self.committed_at, self.failures = (
                CheckpointRef(uri=uri, step=step, attempt=self.attempt),
                now,
                0,
            )
            self.bucket.commit(
                StoredCheckpoint(
                    ref=self.committed, run_uid=self.launch.run_uid, lineage=self.lineage, committed_at=now
                )
            )

    # ------------------------------------------------------------ what can be seen of it
    def report(self, rank: Rank, now: float) -> RankReport:
        """The rank as its agent tells it."""
        done = self.loaded_at is not None
        ended = rank.exit and RankExit(
            code=rank.exit.code,
            signal=rank.exit.signal,
            oom_killed=rank.exit.oom_killed,
            age_seconds=now - rank.ended_at,
            log_tail=(f"last words of rank {rank.number}",),
        )
        return RankReport(
            rank=rank.number,
            pid=1000 * self.attempt + rank.number,
            phase=self._phase(rank),
            progress_seconds=now - (self.progress_at if done else rank.started_at),
            step=self.step,
            step_seconds=STEP_SECONDS if self.steps_done else 0.0,
            steps_done=self.steps_done,
            loss=self.loss if self.steps_done else None,
            nonfinite=self.nonfinite,
            tokens=100 * (self.step + 1),
            can_rejoin=self.offers_to_rejoin and rank.alive,
            exit=ended,
            error=rank.error,
        )

    def _phase(self, rank: Rank) -> Phase:
        if self.met_at is None:
            return Phase.STARTING
        if self.loaded_at is None:
            return Phase.LOADING
        return STUCK[rank.fault].phase

    def evidence(self, rank: Rank, now: float) -> RankEvidence:
        """What an agent finds out about a rank of a gang that stands still."""
        sight = STUCK[rank.fault]
        answers = rank.alive and sight.answers
        waits = self.loaded_at is not None and self.obstructed
        done = self.step + 1 - (rank.number in self.behind)
        usual = HEALTHY.collective
        entered = sight.collective if waits and sight.is_in else usual
        group = GroupProgress(
            name="default_pg",
            ranks=tuple(range(self.launch.world_size)),
            last_enqueued=done + (waits and sight.is_in),
            last_completed=done,
            last_enqueued_name=entered,
            recent_names=(*[usual] * min(done, 8), entered),
        )
        return RankEvidence(
            rank=rank.number,
            process_state=sight.state if rank.alive else "X",
            groups=(group,) if answers else (),
            recorder_answered=answers,
            python_answers=sight.python_answers if answers else None,
            cpu_share=sight.cpu_share if answers else 0.0,
            stack=sight.stack if answers else "",
            phase=self._phase(rank),
            progress_seconds=now - self.progress_at,
            step=self.step,
        )


def line_holds(state: StoredCheckpoint, gang: Gang) -> bool:
    """Whether this is a state that a gang, or an ancestor of its line, has really been in."""
    return is_on_lineage(state, gang.launch.run_uid, gang.attempt, gang.lineage)


def ranks_of_agent(gang: Gang, agent: Agent) -> Sequence[Rank]:
    """The ranks that this agent started."""
    return [rank for rank in gang.ranks.values() if rank in agent.ranks]
