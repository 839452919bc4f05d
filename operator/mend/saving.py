"""Pure: saves that ranks do not begin by themselves: a person asks for one, or the interval that mend chose is over.

A wish is open until a checkpoint of its step or a later one is committed. The order is given to one worker (its wish is
granted by all ranks at one step), and again if nothing comes of it; after three times it is given up, and said so.
"""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from mend.actions import AnyAction, EmitEvent, SendSaveNow
from mend.heartbeats import SaveReport
from mend.observation import Observation
from mend.presence import gang_step
from mend.spec import Checkpointing
from mend.status import RunStatus, SaveWish, WishState

TIMES: Final = 3
AGAIN_SECONDS: Final = 30.0  # beyond what the last save took
COMMIT_SECONDS: Final = 900.0  # for a save that was begun, and of which no failure is known: savers give up after that


def saving(rules: Checkpointing, seen: Observation, status: RunStatus, now: float) -> tuple[RunStatus, list[AnyAction]]:
    """The status with the wish as it stands, and the order to give."""
    wish = _wished(rules, seen, _heeded(status), now)
    if wish is None or wish.state is not WishState.OPEN:
        return replace(status, wish=wish), []
    is_told = wish.attempt == status.attempt and wish.times > 0
    if is_told and now - wish.told_at < _patience(seen, wish):
        return replace(status, wish=wish), []
    if is_told and wish.times >= TIMES:
        return _given_up(status, wish)
    target = _worker_of_rank_0(seen)
    if target is None:
        return replace(status, wish=wish), []
    if not is_told:  # perhaps an attempt further back than the one in which it was asked for
        wish = replace(wish, step=gang_step(seen), attempt=status.attempt, times=0)
    wish = replace(wish, told_at=now, times=wish.times + 1)
    worker, pod_uid = target
    return replace(status, wish=wish), [SendSaveNow(worker=worker, pod_uid=pod_uid, attempt=status.attempt)]


def _heeded(status: RunStatus) -> SaveWish | None:
    """The wish, answered if what it asked for has come true."""
    wish, newest = status.wish, status.checkpoint
    if wish is None or wish.state is not WishState.OPEN or newest is None or newest.step < wish.step:
        return wish
    return replace(wish, state=WishState.ANSWERED)


def _wished(rules: Checkpointing, seen: Observation, wish: SaveWish | None, now: float) -> SaveWish | None:
    """A new wish, if there is one, or the one that is known. A person's goes before the clock's."""
    step = gang_step(seen)
    if seen.save_now and (wish is None or wish.id != seen.save_now):
        return _known_already(SaveWish(id=seen.save_now, step=step, asked_at=now), seen)
    if wish is not None and wish.state is WishState.OPEN:
        return wish
    if rules.interval_auto and _is_due(rules, seen, wish, now):
        return SaveWish(id=wish.id if wish else "", step=step, asked_at=now, by_interval=True)
    return wish


def _known_already(wish: SaveWish, seen: Observation) -> SaveWish:
    """A step that is saved already is not saved again."""
    newest = seen.status.checkpoint
    saved = newest is not None and newest.step >= wish.step
    return replace(wish, state=WishState.ANSWERED) if saved else wish


def _is_due(rules: Checkpointing, seen: Observation, wish: SaveWish | None, now: float) -> bool:
    """Whether the interval has gone by since the last save, the last order for one, and the start of the attempt."""
    status = seen.status
    ordered = max(wish.asked_at, wish.told_at) if wish else 0.0
    chosen = status.interval.seconds if status.interval else rules.min_interval_seconds
    saved = status.checkpoint.committed_at if status.checkpoint else 0.0
    since = max(saved, ordered, status.attempt_started_at or 0.0)
    return now - since >= chosen


def _patience(seen: Observation, wish: SaveWish) -> float:
    """How long an order may bear nothing: another one, while a large state is on its way, would only stop the loop."""
    save, interval = save_report(seen), seen.status.interval
    if save is not None and save.begun_step >= wish.step and not save.failures:
        return COMMIT_SECONDS
    known = save.commit_seconds if save is not None and save.committed is not None else None
    if known is None and interval is not None:
        known = interval.commit_seconds  # of the attempt before
    return AGAIN_SECONDS + 2 * (known or 0.0)


def save_report(seen: Observation) -> SaveReport | None:
    """How saving goes in this attempt; only rank 0's agent knows."""
    beats = [seen.heartbeat_of(worker) for worker in seen.status.participants]
    return next((beat.save for beat in beats if beat is not None and beat.save is not None), None)


def _given_up(status: RunStatus, wish: SaveWish) -> tuple[RunStatus, list[AnyAction]]:
    asked = "since the interval is over" if wish.by_interval else "by mend.dev/save-now"
    message = f"a save was asked for {asked} at step {wish.step}, {wish.times} times, and none was committed"
    event = EmitEvent(type="Warning", reason="SaveNotMade", message=message)
    return replace(status, wish=replace(wish, state=WishState.GIVEN_UP)), [event]


def _worker_of_rank_0(seen: Observation) -> tuple[int, str] | None:
    for worker in seen.status.participants:
        agent, beat = seen.agent_of(worker), seen.heartbeat_of(worker)
        if agent is not None and agent.connected and beat and any(r.rank == 0 and r.exit is None for r in beat.ranks):
            return worker, agent.pod_uid
    return None
