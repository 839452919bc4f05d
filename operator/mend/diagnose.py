"""Pure: which incident is visible now, who is the culprit and how sure we are.

Looks at one attempt only, the one in the status; what older attempts still say is not heard.
"""

from __future__ import annotations

import re

from msgspec.structs import replace

from mend import culprit
from mend.evidence import Evidence, RankEvidence
from mend.exitcodes import FATAL_EXIT_CODES, STORE_EXIT_CODES, ExitCode
from mend.heartbeats import Phase, RankReport
from mend.incidents import FailureClass, Incident, IncidentKind, Verdict
from mend.observation import Observation
from mend.presence import (
    gone,
    has_finished,
    is_going,
    is_silent,
    node_fault,
    rank_has_failed,
    rank_has_finished,
    ranks_of,
    suspects,
    workers_of,
    world_size,
)
from mend.shortage import shortage
from mend.spec import FirstTier, Limits, Spec
from mend.status import RunPhase
from mend.watchdog import learnt_pause, pause_in_force, until_bounds

SETTLE_SECONDS = 0.5  # a killed rank's own exit may come after its peers' complaints
CHORUS_SECONDS = 0.1  # a mistake of the training code is often raised by every rank, one after the other
MEETING_SECONDS = 30.0  # for ranks that rejoin, from the order until all have met
READING_SECONDS = 120.0  # between two parts of a checkpoint that they read
QUIET_HEARTBEATS = 2  # a worker that has missed one may be the one that the others complain about
IDLE_SHARE = 0.02  # of a CPU, between two looks
OVERDUE_LOOK_SECONDS = 0.02  # a gang may be overdue by what was heard; the heartbeat that says so is due any moment
OF_STORAGE = (Phase.STARTING, Phase.LOADING, Phase.DATA, Phase.SAVING)  # in which a rank waits for what others serve
HARDWARE = re.compile(r"\b(cuda error|cudnn|cublas|ecc|xid|nvlink|hardware)\b")
VARYING = re.compile(r"0x[0-9a-fA-F]+|\b[0-9a-fA-F]{8,}\b|\d+")  # addresses, digests and counts differ each time
# Of those, the ones that no program can bring about by itself.
BROKEN = re.compile(
    r"\b(uncorrectable|double[- ]bit|ecc error|fallen off the bus|nvlink error|hardware error)\b"
    r"|\bxid( \(pci:[0-9a-f:.]+\))?:? (48|63|64|74|79|92|94|95)\b"
)
DEVICE_ASSERT = "device-side assert"  # a CUDA error, but of the user's: an index out of bounds


def diagnose(spec: Spec, seen: Observation) -> Incident | None:
    """The incident of the current attempt that is visible now; None if all is well as far as one can tell.

    In order of certainty: workers that are gone, ranks that ended, a loss that is no number or has gone up, a gang that
    stands still.
    """
    incidents = (gone, _crashed, _diverged, _spiked, _hung)
    return next((found for look in incidents if (found := look(spec, seen)) is not None), None)


def seconds_until_diagnosis(spec: Spec, seen: Observation) -> float:
    """When to look again if nothing is heard meanwhile: the next limit that could run out, in seconds."""
    beat = spec.health.heartbeat_seconds
    silent = any(is_silent(spec, agent) for agent in seen.agents)
    waits = [spec.health.lost_after_seconds]
    left = until_bounds(seen.ranks, seen.step_times, limits_now(spec, seen))
    if left is not None:
        waits.append(left.limit if left.limit > 0 else beat if silent else OVERDUE_LOOK_SECONDS)
    if silent or any(map(rank_has_failed, seen.ranks)):
        waits.append(min(beat, CHORUS_SECONDS))
    return max(0.02, min(waits))


def limits_now(spec: Spec, seen: Observation, verdict: Verdict | None = None, *, idle: bool = False) -> Limits:
    """The spec's limits, with the pause that is borne now; ranks that were kept have little to do until they meet.

    Without a verdict it is presumed that one rank will be to blame; with one that blames nobody, all have to restart.
    `idle`: who is to blame does nothing at all.

    Once all load they may have to read a checkpoint after all: each part of it that was read is a mark.
    """
    status, limits = seen.status, spec.health.limits
    began, window = status.attempt_started_at or 0.0, spec.recovery.budgets.window_seconds
    hangs = len(status.spent_within(FailureClass.HANG, window, began))
    stay = tuple(rank for rank in seen.ranks if verdict is None or rank.rank not in verdict.ranks)
    may_rejoin = spec.recovery.first_tier is FirstTier.REJOIN and all(rank.can_rejoin for rank in stay)
    may_rejoin = may_rejoin and (verdict is None or verdict.is_known)
    pause = pause_in_force(
        limits.pause_seconds,
        may_rejoin=may_rejoin,
        ranks=len(seen.ranks),
        learnt_seconds=learnt_pause(seen.step_times, limits, idle=idle),
        hangs=hangs,
    )
    limits = replace(limits, pause_seconds=pause)
    if not seen.status.keep or seen.status.phase is RunPhase.RUNNING:
        return limits
    is_meeting = any(rank.phase is Phase.STARTING for rank in seen.ranks)
    return replace(limits, start_seconds=min(limits.start_seconds, MEETING_SECONDS if is_meeting else READING_SECONDS))


# ---------------------------------------------------------------- ranks that ended
def _crashed(spec: Spec, seen: Observation) -> Incident | None:
    leaving = {n for worker in seen.status.participants if is_going(seen, worker) for n in ranks_of(spec, seen, worker)}
    ended = [rank for rank in seen.ranks if rank_has_failed(rank) and rank.rank not in leaving]
    if not ended:
        return None
    verdict = culprit.of_crash(ended)
    asked = valid_evidence(seen)
    cause = next((rank for rank in ended if rank.rank in verdict.ranks), min(ended, key=culprit.is_symptom))
    code = cause.exit.code if cause.exit else None
    is_open = not verdict.is_known and code not in STORE_EXIT_CODES
    if is_open:
        if leaving or _may_be_settled_soon(spec, seen, ended):
            return None
        verdict = _culprit_among_the_living(spec, seen, ended) if asked else verdict
    elif _may_more_raise(spec, seen, ended):
        return None
    failure = _failure_class(cause)
    return Incident(
        kind=IncidentKind.CORRUPT if code == ExitCode.STORAGE else IncidentKind.CRASHED,
        failure=failure,
        attempt=seen.status.attempt,
        ranks=tuple(rank.rank for rank in ended),
        workers=(),
        age_seconds=max(map(culprit.ended_age, ended)),
        verdict=verdict,
        summary=verdict.reasons[0]
        if is_open and verdict.is_known
        else f"rank {cause.rank} {culprit.how_it_ended(cause)}",
        fatal=(code in FATAL_EXIT_CODES) or (cause.error is not None and cause.error.fatal),
        needs_evidence=is_open and not asked and any(rank not in ended for rank in seen.ranks),
        fingerprint=_fingerprint(cause) if failure is FailureClass.USER else "",
        of_the_store=code in STORE_EXIT_CODES,
        before_stepping=cause.steps_done == 0,
        machine_faults=_broken_machines(spec, seen, [rank for rank in ended if rank.rank in verdict.ranks]),
    )


def _broken_machines(spec: Spec, seen: Observation, guilty: list[RankReport]) -> dict[int, str]:
    """The workers whose ranks name a fault of the hardware with their last words, or whose node is known to be ill."""
    found = {}
    for rank in guilty:
        for worker in workers_of(spec, seen, (rank.rank,)):
            said = rank.error is not None and BROKEN.search(f"{rank.error.type} {rank.error.message}".lower())
            pod = seen.pod_of(worker)
            if said or (pod is not None and _failure_class(rank) is FailureClass.INFRASTRUCTURE and node_fault(pod)):
                words = culprit.how_it_ended(rank) if said or pod is None else f"ended, and {node_fault(pod)}"
                found[worker] = f"rank {rank.rank} {words}"
    return found


def _may_be_settled_soon(spec: Spec, seen: Observation, ended: list[RankReport]) -> bool:
    """All that ended were cut off by a peer; whose fault it was may become clear without asking anybody."""
    if len(ended) == world_size(spec, seen):
        return False
    if max(map(culprit.ended_age, ended)) < SETTLE_SECONDS:
        return True
    quiet = QUIET_HEARTBEATS * spec.health.heartbeat_seconds
    working = [worker for worker in seen.status.participants if not has_finished(spec, seen, worker)]
    views = [seen.agent_of(worker) for worker in working]
    if any(view is not None and view.silent_seconds > quiet for view in views):
        return True
    return any(seen.heartbeat_of(worker) is None for worker in working)  # to a new controller, all come one by one


def _may_more_raise(spec: Spec, seen: Observation, ended: list[RankReport]) -> bool:
    """Whether the others may yet say the same: an exception by one rank is its own fault, by all it is the code's.

    A signal to a rank that has stepped is no matter of the code, and is acted on at once.
    """
    by_signal = any(rank.exit is not None and rank.exit.signal is not None and rank.steps_done for rank in ended)
    complete = len(ended) == world_size(spec, seen)
    return not by_signal and not complete and max(map(culprit.ended_age, ended)) < CHORUS_SECONDS


def _culprit_among_the_living(spec: Spec, seen: Observation, ended: list[RankReport]) -> Verdict:
    cut_off = {rank.rank for rank in ended}
    living = [rank for rank in valid_evidence(seen) if rank.rank not in cut_off]
    return culprit.of_abandonment(living, world_size(spec, seen) - len(cut_off), spec.workers.ranks_per_worker)


def _failure_class(rank: RankReport) -> FailureClass:
    if rank.exit and rank.exit.oom_killed:
        return FailureClass.USER  # the same step would need the same memory again
    if culprit.is_symptom(rank) or (rank.exit and rank.exit.code in STORE_EXIT_CODES):
        return FailureClass.INFRASTRUCTURE
    if rank.error is None:
        killed = rank.exit is not None and rank.exit.signal is not None
        return FailureClass.INFRASTRUCTURE if killed else FailureClass.USER
    text = f"{rank.error.type} {rank.error.message}".lower()
    is_hardware = HARDWARE.search(text) is not None and DEVICE_ASSERT not in text
    return FailureClass.INFRASTRUCTURE if is_hardware else FailureClass.USER


def _fingerprint(rank: RankReport) -> str:
    """Equal when the same rank code fails in the same way at the same step."""
    how = (
        culprit.how_it_ended(rank).removeprefix("raised ")
        if rank.error
        else f"exit {rank.exit.code if rank.exit else None}"
    )
    return f"{VARYING.sub('#', how)} " + (f"after step {rank.step}" if rank.steps_done else "before its first step")


# ---------------------------------------------------------------- a loss that is no number
def _diverged(spec: Spec, seen: Observation) -> Incident | None:
    if not spec.recovery.roll_back_on_divergence:
        return None
    broken = [rank for rank in seen.ranks if rank.nonfinite]
    if not broken:
        return None
    return Incident(
        kind=IncidentKind.DIVERGED,
        failure=FailureClass.USER,
        attempt=seen.status.attempt,
        ranks=tuple(rank.rank for rank in broken),
        workers=(),
        age_seconds=min(rank.progress_seconds for rank in broken),
        verdict=Verdict(reasons=("the loss is NaN or infinite",)),
        summary=f"the loss is NaN or infinite after step {broken[0].step}",
        fingerprint=f"diverged after step {broken[0].step}",
    )


def _spiked(spec: Spec, seen: Observation) -> Incident | None:
    """The states before the first high loss count as sound: that loss is of the weights that its step began with."""
    rule, losses = spec.health.loss_spike, seen.losses
    if not rule.roll_back or losses is None or losses.above_since_step is None or losses.above < rule.points:
        return None
    since = losses.above_since_step
    how_far = f"{losses.deviations:.0f} deviations" if losses.deviations else "far"
    return Incident(
        kind=IncidentKind.DIVERGED,
        failure=FailureClass.USER,
        attempt=seen.status.attempt,
        ranks=tuple(rank.rank for rank in seen.ranks),
        workers=(),
        age_seconds=losses.above_seconds,
        verdict=Verdict(
            reasons=(
                f"{losses.above} losses in a row lie above {losses.bound:.4g}: {rule.deviations} deviations, and at "
                f"least {rule.rise_percent}%, above the median of the {rule.window} before them, {losses.median:.4g}",
                f"the newest, of step {losses.step}, is {losses.loss:.4g}: {how_far} above it",
            )
        ),
        summary=f"the loss went up at step {since} and stayed: {losses.loss:.4g} after {losses.median:.4g}",
        fingerprint=f"loss spike at step {since}",
        sound_before=since - 1,
    )


# ---------------------------------------------------------------- a gang that stands still
def _hung(spec: Spec, seen: Observation) -> Incident | None:
    present = seen.status.participants
    if any(seen.heartbeat_of(worker) is None for worker in present) or suspects(spec, seen):
        return None  # some ranks are not known, or only by old news: this is for `gone` to judge
    # The ages as they were heard, not carried on to now: a rank may have marked since its agent's last heartbeat.
    beats = filter(None, map(seen.heartbeat_of, present))
    heard = tuple(rank for beat in beats for rank in beat.ranks if not rank_has_finished(rank))
    left = until_bounds(heard, seen.step_times, limits_now(spec, seen))
    if left is None or left.limit > 0:
        return None
    ranks = tuple(rank for rank in seen.ranks if not rank_has_finished(rank))
    evidence = valid_evidence(seen)
    verdict = _culprit_of_hang(spec, seen, evidence)
    stands = min(rank.progress_seconds for rank in ranks)
    short = shortage(_asked_since(seen))
    if short is not None and short.rank in verdict.ranks:
        verdict = replace(verdict, reasons=(*verdict.reasons, short.words))
    proven = any(map(_cannot_go_on, evidence))
    awaited = short if short is not None and short.until_seconds > stands and not proven else None
    guilty = [each for each in evidence if each.rank in verdict.ranks]
    idle = bool(guilty) and all(map(_does_nothing, guilty))
    limits = limits_now(spec, seen, verdict, idle=idle)
    left = until_bounds(heard, seen.step_times, limits, idle=idle) or left
    patience = max(0.0, left.patience, awaited.until_seconds - stands if awaited is not None else 0.0)
    return Incident(
        kind=IncidentKind.HUNG,
        failure=FailureClass.HANG,
        attempt=seen.status.attempt,
        ranks=tuple(rank.rank for rank in ranks),
        workers=(),
        age_seconds=stands,
        verdict=verdict,
        summary=verdict.reasons[0] if verdict.is_known else f"no rank has progressed for {stands:.1f} s",
        needs_evidence={rank.rank for rank in evidence} != {rank.rank for rank in seen.ranks},
        patience_seconds=0.0 if proven else patience,
        awaiting=awaited.words if awaited is not None else "",
        before_stepping=verdict.is_known and not any(r.steps_done for r in ranks if r.rank in verdict.ranks),
        machine_faults=_stuck_machines(spec, seen, verdict, evidence),
    )


def _stuck_machines(
    spec: Spec, seen: Observation, verdict: Verdict, evidence: tuple[RankEvidence, ...]
) -> dict[int, str]:
    """The workers whose guilty ranks hang in the kernel by themselves, or whose node is known to be ill.

    A rank that hangs in the kernel together with those of other workers, or in a phase that waits for storage, waits
    for what others serve: that says nothing about its machine.
    """
    found = {}
    held = culprit.held_together(evidence, spec.workers.ranks_per_worker)
    for rank in (each for each in evidence if each.rank in verdict.ranks):
        for worker in workers_of(spec, seen, (rank.rank,)):
            pod = seen.pod_of(worker)
            fault = node_fault(pod) if pod is not None else ""
            is_stuck = rank.process_state in culprit.UNINTERRUPTIBLE and rank.rank not in held
            is_stuck = is_stuck and rank.phase not in OF_STORAGE
            if is_stuck or fault:
                how = "hangs in the kernel" if is_stuck else "hangs"
                found[worker] = f"rank {rank.rank} {how}" + (f", and {fault}" if fault else "")
    return found


def _cannot_go_on(rank: RankEvidence) -> bool:
    """The kernel's own word: its process is stopped or dead. All else may yet turn out to be a long pause."""
    return rank.process_state in culprit.STOPPED | culprit.DEAD


def _does_nothing(rank: RankEvidence) -> bool:
    """All of its threads sleep, and not for a disk; one that computes may yet come to the end of a long step."""
    return rank.process_state in culprit.SLEEPING and not rank.threads_running and rank.cpu_share < IDLE_SHARE


def _culprit_of_hang(spec: Spec, seen: Observation, evidence: tuple[RankEvidence, ...]) -> Verdict:
    early = [rank.rank for rank in seen.ranks if rank_has_finished(rank)]
    waiting = [rank for rank in evidence if rank.rank not in early]
    world = world_size(spec, seen) - len(early)
    if waiting:
        verdict = culprit.of_hang(waiting, world, spec.workers.ranks_per_worker)
    else:
        verdict = Verdict(reasons=("no evidence was gathered",))
    if verdict.is_known or not early:
        return verdict
    reasons = tuple(f"rank {rank} has already finished while the others wait" for rank in early)
    return Verdict(ranks=tuple(early), confidence=0.7, reasons=reasons)


def valid_evidence(seen: Observation) -> tuple[RankEvidence, ...]:
    """What was gathered in this attempt about ranks that have not completed a step since."""
    return tuple(rank for each in _asked_since(seen) for rank in each.ranks)


def _asked_since(seen: Observation) -> tuple[Evidence, ...]:
    """The same by worker."""
    step = {rank.rank: rank.step for rank in seen.ranks}
    return tuple(
        replace(each, ranks=tuple(rank for rank in each.ranks if rank.step == step.get(rank.rank)))
        for each in seen.evidence
        if each.attempt == seen.status.attempt
    )
