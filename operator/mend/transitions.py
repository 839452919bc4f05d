"""Pure: the moves of a run from one attempt to the next, and to its end."""

from __future__ import annotations

from msgspec.structs import replace

from mend.actions import AnyAction, Decision, EmitEvent
from mend.conditions import with_condition
from mend.goodput import account
from mend.observation import Observation
from mend.restore import latest_attempt
from mend.status import RunPhase, RunStatus


def next_attempt(seen: Observation, now: float, phase: RunPhase) -> RunStatus:
    """The status of an attempt above all that were ever heard of, with nothing launched yet.

    Its lineage is settled at its launch: until then a rank of the attempt before may commit with its last breath.
    """
    status = account(seen.status, now)
    known = max(attempt_heard(seen), latest_attempt(seen.store.checkpoints), *(pod.attempt for pod in seen.pods), 0)
    return replace(
        status,
        attempt=max(status.attempt, known) + 1,
        attempt_started_at=now,
        phase=phase,
        follows=status.attempt_of_line,
        participants=(),
        restore=(),
        keep=(),
        restored_step=None,
        origins=(),
        origin=None,
        saving_until=None,
        stragglers=(),
    )


def attempt_heard(seen: Observation) -> int:
    """The highest attempt that any agent of the run speaks of."""
    return max((agent.heartbeat.attempt for agent in seen.agents if agent.heartbeat), default=0)


def attempt_of_predecessors(seen: Observation) -> int:
    """The highest attempt under which runs that had the prefix before have committed."""
    return latest_attempt([each for each in seen.store.checkpoints if each.run_uid != seen.uid])


def failed(seen: Observation, reason: str, message: str, now: float) -> Decision:
    """The end of a run that cannot go on; what is left of it is ended by the rules for after the end."""
    status = replace(account(seen.status, now), phase=RunPhase.FAILED, finished_at=now, reported_at=now)
    status = with_condition(status, "Failed", True, reason, message, now)
    event = EmitEvent(type="Warning", reason=reason, message=message)
    return Decision(status=status, actions=(event,), reason=message, wake_after=0.0)


def with_actions(decision: Decision, *more: AnyAction) -> Decision:
    """The decision with these actions after its own."""
    return replace(decision, actions=(*decision.actions, *more))
