"""Pure: the snapshots in the memory of a run's workers: who has which, what can be restored, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from msgspec.structs import replace

from mend.buddies import Location, buddies
from mend.conditions import with_condition, without_condition
from mend.fields import parse_bytes
from mend.heartbeats import Heartbeat
from mend.incidents import open_in_a_row
from mend.names import TRAINER_CONTAINER
from mend.observation import Observation
from mend.presence import is_ready
from mend.protocol import saver_url
from mend.restore import MAX_HOLDERS, Candidate, MemorySave, WorkerMemory, holders, planned, saves_in_memory
from mend.spec import Spec
from mend.states import Holder
from mend.status import MemoryStatus, RunStatus

WORD_SECONDS = 1.0  # how long a launch waits at most to hear what workers hold
MEMORY_TRIES = 2  # recoveries in a row that may begin from memory: what breaks them may be what lies there


# ---------------------------------------------------------------- restoring
def memories(spec: Spec, seen: Observation) -> tuple[WorkerMemory, ...]:
    """What each worker holds that is there to be asked, also those that take no part."""
    found = []
    for worker in sorted({*range(spec.workers.pods), *seen.status.participants}):
        pod, agent = seen.pod_of(worker), seen.agent_of(worker)
        if pod is not None and agent is not None and agent.heartbeat is not None and is_ready(spec, seen, worker):
            found.append(WorkerMemory(worker, agent.heartbeat.held, _url(pod.ip, agent.heartbeat)))
    return tuple(found)


def plan(spec: Spec, seen: Observation, takers: Sequence[int]) -> tuple[Candidate, ...]:
    """What a launch on these workers may restore, best first."""
    told = memories(spec, seen) if _is_trusted(seen.status) else ()
    return planned(seen.uid, seen.status, seen.store.checkpoints, told, takers, _spoilt(seen))


def holders_of(spec: Spec, seen: Observation) -> Callable[[int], tuple[Holder, ...]]:
    """For each worker, where it finds the snapshots of the saves that this attempt may restore."""
    wanted = {ref.uri for ref in seen.status.restore if ref.save_in_memory}
    if not wanted:
        return lambda worker: ()
    told = memories(spec, seen)
    saves = [each for each in saves_in_memory(told) if each.state.ref.uri in wanted]
    urls = {each.worker: each.url for each in told}
    return lambda worker: holders(worker, saves, urls)


def is_yet_to_hear(spec: Spec, seen: Observation) -> bool:
    """Whether a controller that has just begun has not heard of all that the launch is to name holders of."""
    first = seen.status.restore[0] if seen.status.restore else None
    agents = [seen.agent_of(worker) for worker in seen.status.participants]
    if first is None or not first.save_in_memory or all(agent and agent.heartbeat for agent in agents):
        return False
    return not any(each.state.ref == first and each.is_whole for each in saves_in_memory(memories(spec, seen)))


def wait_for_word(spec: Spec, seen: Observation, takers: Sequence[int], now: float) -> float:
    """Seconds until the launch that is due should be looked at again; 0: it need not wait.

    Snapshots are no news that a heartbeat is sent for, so what was told last may be older than what a worker holds by
    now, or name one that was overwritten since: where the workers' words do not fit together, each is heard once more.
    And a newer step of which digests are still being taken is waited for as long as that can pay.
    """
    begun = seen.status.attempt_started_at
    agents = [agent for worker in takers if (agent := seen.agent_of(worker)) is not None]
    beats = [agent.heartbeat for agent in agents if agent.heartbeat is not None]
    is_told = any(beat.held or beat.pending for beat in beats)
    if not is_told or seen.status.keep or begun is None or now - begun >= WORD_SECONDS:
        return 0.0
    newest = max(map(_newest, beats))
    unheard = [each.heartbeat for each in agents if each.heartbeat is not None and each.silent_seconds > now - begun]
    step = max(map(_stepped, beats))
    fit = all(_stepped(beat) in (-1, step) and _newest(beat) in (-1, newest) for beat in unheard)
    able = plan(spec, seen, takers)
    best = able[0].state.ref.step if able else -1
    if unheard and not (fit and best >= newest):
        return spec.health.heartbeat_seconds / 2
    left = min(WORD_SECONDS, _worth_seconds(seen.status, beats, unheard, best)) - (now - begun)
    return min(left, spec.health.heartbeat_seconds / 2) if left > 0 else 0.0


def _worth_seconds(status: RunStatus, beats: Sequence[Heartbeat], unheard: Sequence[Heartbeat], best: int) -> float:
    """How long the steps after `best` would take once more that a pending snapshot saves, unless a rank has none.

    Ranks of the `unheard` may have published theirs since.
    """
    if not _is_trusted(status):
        return 0.0
    told = [beat.pending for beat in beats if beat.pending is not None and beat.pending.attempt == status.follows]
    worth = 0.0
    for pending in told:
        same = [each for each in told if each.step == pending.step]
        there = {rank for each in same for rank in each.ranks}
        there |= {rank for beat in beats for held in beat.held if held.step == pending.step for rank in held.ranks}
        there |= {rank.rank for beat in unheard for rank in beat.ranks}
        is_allowed = status.roll_back_before is None or pending.step < status.roll_back_before
        if is_allowed and pending.world_size <= MAX_HOLDERS and there.issuperset(range(pending.world_size)):
            worth = max(worth, (pending.step - best) * pending.step_seconds)
    return worth


def _newest(beat: Heartbeat) -> int:
    return max((held.step for held in beat.held), default=-1)


def _stepped(beat: Heartbeat) -> int:
    return max((rank.step for rank in beat.ranks), default=-1)


def _is_trusted(status: RunStatus) -> bool:
    """Whether the recoveries before have not failed again and again: then only the store is."""
    return open_in_a_row(status.incidents) <= MEMORY_TRIES


def _spoilt(seen: Observation) -> tuple[str, ...]:
    return tuple(uri for each in seen.agents if each.heartbeat is not None for uri in each.heartbeat.quarantined)


def _url(ip: str, beat: Heartbeat) -> str:
    return saver_url(ip, beat.saver_port) if ip and beat.saver_port else ""


# ---------------------------------------------------------------- copies
def buddy_urls(spec: Spec, seen: Observation) -> dict[int, str]:
    """For each participant, the saver that its snapshots are copied to, where that can be reached."""
    if not spec.checkpoint.memory.peers:
        return {}
    pods = {worker: pod for worker in seen.status.participants if (pod := seen.pod_of(worker)) is not None}
    chosen = buddies([Location(worker, pod.node, pod.rack) for worker, pod in pods.items()])
    return {worker: url for worker, buddy in chosen.items() if (url := _served_by(seen, buddy))}


def _served_by(seen: Observation, worker: int) -> str:
    pod, agent = seen.pod_of(worker), seen.agent_of(worker)
    return (
        _url(pod.ip, agent.heartbeat) if pod is not None and agent is not None and agent.heartbeat is not None else ""
    )


# ---------------------------------------------------------------- in view
def with_memory(spec: Spec, status: RunStatus, seen: Observation, now: float) -> RunStatus:
    """The status with the newest save that memory alone would bring back, and what snapshots need."""
    beats = [beat for worker in status.participants if (beat := seen.heartbeat_of(worker)) is not None]
    needed, limit = _cost(spec, beats)
    told = memories(spec, seen)
    if not needed and not any(memory.held for memory in told):
        return replace(status, memory=None)
    able = planned(seen.uid, status, (), told, status.participants, _spoilt(seen))
    memory = MemoryStatus(needed_bytes=needed, limit_bytes=limit)
    if able:
        ref, before, saves = able[0].state.ref, status.memory, saves_in_memory(told)
        (save,) = [each for each in saves if each.state == able[0].state]
        known = before is not None and (before.step, before.attempt) == (ref.step, ref.attempt)
        has_buddies = spec.checkpoint.memory.peers and len(status.participants) > 1
        memory = replace(
            memory,
            step=ref.step,
            attempt=ref.attempt,
            seen_at=before.seen_at if before is not None and known else now,
            workers=len({who for ranks in save.holders for who in ranks}),
            copied=any(_is_copied(each, ref.attempt) for each in saves) if has_buddies else None,
        )
    return replace(status, memory=memory)


def _is_copied(save: MemorySave, attempt: int) -> bool:
    """Whether any one worker may be lost. That of the newest is rarely so: its copies are on their way."""
    return save.state.ref.attempt == attempt and all(len(ranks) > 1 for ranks in save.holders)


def with_memory_limit(spec: Spec, status: RunStatus, beats: Iterable[Heartbeat], now: float) -> RunStatus:
    """Whether the pods' limit leaves room for the snapshots, as soon as an agent knows how large they are."""
    needed, limit = _cost(spec, beats)
    if not needed:
        return status
    if not limit or needed <= limit:
        return without_condition(status, "MemoryFits")
    message = (
        f"snapshots and copies need {in_bytes(needed)} in each worker, beside what training needs, and its memory "
        f"limit is {in_bytes(limit)}: raise resources.limits.memory of container {TRAINER_CONTAINER} in "
        "spec.workers.template, or set spec.checkpoint.memory.peers to false, which halves what is needed"
    )
    return with_condition(status, "MemoryFits", False, "LimitTooSmall", message, now)


def _cost(spec: Spec, beats: Iterable[Heartbeat]) -> tuple[int, int]:
    """Bytes that the worker with the largest snapshots needs, and the least limit; 0 where nobody says."""
    reports = [beat.memory for beat in beats if beat.memory is not None]
    needed = max((each.needed_bytes for each in reports), default=0)
    limits = [each.limit_bytes for each in reports if each.limit_bytes]
    return needed, min(limits, default=_limit_in(spec))


def _limit_in(spec: Spec) -> int:
    """The memory limit in the template; 0 without one, or if it is written in a way that is rare."""
    containers = spec.workers.template.get("spec", {}).get("containers", ())
    trainers = [each for each in containers if each.get("name") == TRAINER_CONTAINER]
    resources = trainers[0].get("resources") if trainers else None
    limits = resources.get("limits") if isinstance(resources, dict) else None
    return parse_bytes(str(limits.get("memory", ""))) or 0 if isinstance(limits, dict) else 0


def in_bytes(size: int) -> str:
    """A size for a person to read."""
    units = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10}
    for unit, one in units.items():
        if size >= one:
            return f"{size / one:.4g} {unit}"
    return f"{size} bytes"
