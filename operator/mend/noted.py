"""Pure: what a run's status learns from an observation, whatever is decided then."""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from mend.actions import EmitEvent
from mend.conditions import with_condition, without_condition
from mend.diagnose import limits_now
from mend.heartbeats import Heartbeat
from mend.incidents import Origin, Strike
from mend.observation import Observation
from mend.presence import gang_step, is_ready, is_silent, places, suspects
from mend.restore import lineage_cut_at, on_lineage
from mend.snapshots import with_memory_limit
from mend.spec import Spec
from mend.states import CheckpointRef
from mend.status import MAX_STRIKES, CheckpointStatus, RunStatus, WorkerCounts
from mend.stragglers import stragglers
from mend.strikes import kept, lifted
from mend.watchdog import in_force

SUSPECT_HOLD_SECONDS = 10.0  # a stammering network must not become a stream of status writes


def noted(spec: Spec, seen: Observation, now: float) -> RunStatus:
    """The status with what is news about the spec, the clock and the checkpoints."""
    status = _with_spec(spec, seen, now)
    status = _by_this_clock(replace(status, observed_generation=seen.generation), now)
    status = _with_passed_over(_with_evidence(status, seen, now), seen, now)
    status = replace(status, strikes=_as_in_book(seen, kept(status.strikes, now, MAX_STRIKES)))
    beats = _beats(seen)
    status = with_memory_limit(spec, status, beats, now)
    return _with_commit(_with_restore(status, seen, beats), beats, now)


def _with_spec(spec: Spec, seen: Observation, now: float) -> RunStatus:
    """The spec that is decided on is kept: if a later one is spoilt, the run is looked after by this one."""
    if seen.spec_problems:
        message = "the spec before stays in force: " + "; ".join(seen.spec_problems)
        return with_condition(seen.status, "Accepted", False, "InvalidSpec", message, now)
    kept = msgspec.json.encode(spec, order="deterministic").decode()
    return with_condition(
        replace(seen.status, accepted_spec=kept), "Accepted", True, "Valid", "the spec can be run", now
    )


def accepted_spec(status: RunStatus) -> Spec | None:
    """The last spec that could be run; None if there was none, or if it was kept by a mend that saw specs otherwise."""
    try:
        return msgspec.json.decode(status.accepted_spec, type=Spec) if status.accepted_spec else None
    except msgspec.MsgspecError:
        return None


def _by_this_clock(status: RunStatus, now: float) -> RunStatus:
    """A clock that was set back would make mend wait for it to catch up: what seems to be to come, was just now."""

    def past(at: float | None) -> float | None:
        return at if at is None else min(at, now)

    wish = status.wish
    return replace(
        status,
        attempt_started_at=past(status.attempt_started_at),
        accounted_at=past(status.accounted_at),
        finished_at=past(status.finished_at),
        reported_at=min(status.reported_at, now),
        swept_at=past(status.swept_at),
        wish=replace(wish, asked_at=min(wish.asked_at, now), told_at=min(wish.told_at, now)) if wish else None,
    )


def _with_evidence(status: RunStatus, seen: Observation, now: float) -> RunStatus:
    """That an incident's dossier could not be kept is said; it holds up nothing."""
    if seen.store.evidence_problem:
        return with_condition(status, "EvidenceKept", False, "WriteFailed", seen.store.evidence_problem, now)
    return without_condition(status, "EvidenceKept")


def _with_passed_over(status: RunStatus, seen: Observation, now: float) -> RunStatus:
    """Checkpoints that the signing key does not vouch for are not restored; somebody should know why they are there."""
    if seen.store.passed_over:
        return with_condition(status, "CheckpointsSigned", False, "NotSigned", seen.store.passed_over, now)
    return without_condition(status, "CheckpointsSigned")


def _as_in_book(seen: Observation, mine: tuple[Strike, ...]) -> tuple[Strike, ...]:
    """This run's strikes, those lifted that any run has lifted."""
    done = {each.id for each in seen.strikes if each.lifted}
    return lifted(mine, tuple(each.id for each in mine if each.id in done))


def _beats(seen: Observation) -> list[Heartbeat]:
    """The snapshots about the current attempt, also of workers that take no part any more."""
    beats = [agent.heartbeat for agent in seen.agents if agent.heartbeat is not None]
    return [beat for beat in beats if beat.attempt == seen.status.attempt]


def _with_restore(status: RunStatus, seen: Observation, beats: list[Heartbeat]) -> RunStatus:
    """What the ranks really restored: it may be older than the first candidate, if that was spoilt."""
    restored = next((beat.restored for beat in beats if beat.restored is not None), None)
    if restored is None or status.restored_step is not None or status.follows is not None:
        return status
    if restored.is_of_peers:
        lineage = lineage_cut_at(restored, status.lineage, seen.uid)
        origin = Origin.RANKS
        return replace(status, restored_step=restored.step, origin=origin, lineage=lineage, roll_back_before=None)
    lineage = lineage_cut_at(restored, status.lineage) if restored.uri else ()
    status = replace(status, restored_step=restored.step, lineage=lineage, roll_back_before=None)
    if not restored.uri:
        return replace(status, restored_step=-1)
    status = replace(status, origin=_origin(status, restored))
    if restored.save_in_memory:
        return _without_future(status, seen, restored)
    return replace(status, checkpoint=_shown(restored, _committed_at(status, seen, restored), verified=True))


def _without_future(status: RunStatus, seen: Observation, restored: CheckpointRef) -> RunStatus:
    """A checkpoint that was passed over for an older state in memory is off the line: the one before it is shown."""
    shown = status.checkpoint
    if shown is None or shown.step <= restored.step:
        return status
    line = on_lineage(seen.uid, status, seen.store.checkpoints)
    known = next((each for each in line if each.ref.step <= restored.step), None)
    before = _shown(known.ref, known.committed_at, verified=known.verified) if known is not None else None
    return replace(status, checkpoint=before)


def _origin(status: RunStatus, ref: CheckpointRef) -> Origin:
    lay = dict(zip((each.uri for each in status.restore), status.origins, strict=False))  # an older mend told of none
    return lay.get(ref.uri, Origin.MEMORY if ref.save_in_memory else Origin.STORE)


def _committed_at(status: RunStatus, seen: Observation, ref: CheckpointRef) -> float:
    if status.checkpoint is not None and status.checkpoint.uri == ref.uri:
        return status.checkpoint.committed_at
    return next((each.committed_at for each in seen.store.checkpoints if each.ref.uri == ref.uri), 0.0)


def _with_commit(status: RunStatus, beats: list[Heartbeat], now: float) -> RunStatus:
    """The newest checkpoint of this attempt, and whether saving works."""
    for save in (beat.save for beat in beats if beat.save is not None):
        shown = status.checkpoint
        if save.committed is not None and (shown is None or shown.uri != save.committed.uri):
            at = now - save.committed_age_seconds
            status = replace(status, checkpoint=_shown(save.committed, at, verified=False))
        if save.failures:
            message = f"{save.failures} saves have failed, the run goes on: {save.error}"
            status = with_condition(status, "StorageReady", False, "SaveFailed", message, now)
        elif save.committed is not None:
            status = with_condition(status, "StorageReady", True, "Ready", "checkpoints are committed", now)
    return status


def _shown(ref: CheckpointRef, committed_at: float, *, verified: bool) -> CheckpointStatus:
    return CheckpointStatus(
        step=ref.step, attempt=ref.attempt, uri=ref.uri, committed_at=committed_at, verified=verified
    )


def with_progress(status: RunStatus, seen: Observation) -> RunStatus:
    """Step, loss and tokens as the ranks report them."""
    step = gang_step(seen)
    loss = next((rank.loss for rank in seen.ranks if rank.step == step and rank.loss is not None), status.loss)
    tokens = max((rank.tokens for rank in seen.ranks if rank.step == step), default=status.tokens)
    return replace(status, step=step, loss=loss, tokens=tokens)


def with_health(spec: Spec, status: RunStatus, seen: Observation, now: float) -> RunStatus:
    """The limits in force, and who is slow."""
    slow = spec.health.slow_percent / 100
    return replace(
        status,
        limits=in_force(seen.step_times, limits_now(spec, seen)),
        stragglers=stragglers(seen.paces, slow, status.stragglers, now),
    )


def newly_slow(before: RunStatus, after: RunStatus) -> tuple[EmitEvent, ...]:
    """An event for each rank that was not slow before."""
    known = {each.rank for each in before.stragglers}
    return tuple(
        EmitEvent(
            type="Warning",
            reason="RankSlow",
            message=f"rank {each.rank} on worker {each.worker} works {each.factor:.2f} times as long on a step as the "
            f"others ({each.work_seconds:.3f} s), who wait for it; attempt {after.attempt}",
        )
        for each in after.stragglers
        if each.rank not in known
    )


def with_workers(spec: Spec, status: RunStatus, seen: Observation, now: float) -> RunStatus:
    """How many workers there are, and what keeps the others."""
    wanted, held = spec.workers, places(spec, status)
    missing = [worker for worker in held if not _is_there(spec, seen, worker)]
    ready = wanted.replicas - len(missing)
    spares = sum(is_ready(spec, seen, worker) for worker in range(wanted.pods) if worker not in held)
    counts = WorkerCounts(desired=wanted.replicas, ready=ready, participating=len(status.participants), spares=spares)
    parts = [f"{ready} of {wanted.replicas} workers are ready"]
    parts += [f"{spares} of {wanted.spares} spares are"] if wanted.spares else []
    parts += [f"worker {worker}: {_what_keeps(seen, worker)}" for worker in missing[:8]]
    reason = "Waiting" if missing else "AllReady"
    return with_condition(replace(status, workers=counts), "WorkersReady", not missing, reason, "; ".join(parts), now)


def _is_there(spec: Spec, seen: Observation, worker: int) -> bool:
    """Ready, or at work and merely redialled: a broken connection is no news before it is a silence."""
    agent = seen.agent_of(worker)
    at_work = worker in seen.status.participants and agent is not None and agent.heartbeat is not None
    return is_ready(spec, seen, worker) or (at_work and not is_silent(spec, agent))


def _what_keeps(seen: Observation, worker: int) -> str:
    pod, agent = seen.pod_of(worker), seen.agent_of(worker)
    if pod is None:
        return "no pod yet"
    if agent is not None and agent.problem:
        return f"{pod.reason or pod.phase}, its agent: {agent.problem}"
    return pod.reason or str(pod.phase)


def with_suspects(spec: Spec, status: RunStatus, seen: Observation, now: float) -> RunStatus:
    """Condition `Suspect` while workers are silent, and for a while after."""
    silent = suspects(spec, seen)
    if silent:
        message = "no heartbeat from worker " + ", ".join(str(worker) for worker in silent)
        return with_condition(status, "Suspect", True, "Silent", message, now)
    since = next((each.since for each in status.conditions if each.type == "Suspect"), None)
    if since is None or 0 <= now - since < SUSPECT_HOLD_SECONDS:
        return status
    return without_condition(status, "Suspect")
