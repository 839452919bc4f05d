"""Pure: what to do about a run, now. The heart of mend.

`decide` is level-triggered: it looks at what is, never at what just happened, and may be asked any number of times.
Whoever carries a decision out writes its status first; a new attempt is thus known before anything acts on it.

The rules are asked in turn, and the first that has something to say decides:

    rule            says something when                              and then
    after_the_end   the run has succeeded or failed                  ends what is left of it
    expired         spec.activeDeadlineSeconds are over              fails
    suspended       spec.suspend is true                             removes the pods, which save as they go
    begin           there is no attempt, or a suspension is over     begins one
    completed       every rank has exited with 0                     succeeds
    overtaken       an agent knows a higher attempt than the status  begins one above it
    resizing        the ranks were asked to save for another gang    waits for them, then begins an attempt
    recovering      something is wrong                               gathers evidence, then recovers or gives up
    assembling      the gang is not complete                         makes pods, launches
    training        otherwise                                        reports, prunes, looks for another size
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from msgspec.structs import replace

from mend.actions import Decision, EmitEvent
from mend.assembling import assembling, overtaken
from mend.conditions import with_condition
from mend.lifecycle import after_the_end, begin, completed, expired, seconds_until_deadline, suspended, why_not_ours
from mend.noted import noted
from mend.observation import Observation
from mend.recovering import recovering
from mend.spec import Spec
from mend.training import resizing, training

Rule = Callable[[Spec, Observation, float], Decision | None]
RULES: tuple[Rule, ...] = (
    after_the_end,
    expired,
    suspended,
    begin,
    completed,
    overtaken,
    resizing,
    recovering,
    assembling,
    training,
)


def decide(spec: Spec, seen: Observation, now: float) -> Decision:
    """The status to write, then the actions to do, with the reason; see `RULES` for the order of thought."""
    if reason := why_not_ours(spec, seen):
        return Decision(status=seen.status, reason=reason)
    before, seen = seen, replace(seen, status=noted(spec, seen, now))
    decision = next(said for rule in RULES if (said := rule(spec, seen, now)) is not None)
    if decision.status.conditions != before.status.conditions:
        decision = replace(decision, actions=(*_complaints(before, decision), *decision.actions))
    waits = (decision.wake_after, seconds_until_deadline(spec, replace(seen, status=decision.status), now))
    return replace(decision, wake_after=min((max(0.0, wait) for wait in waits if wait is not None), default=None))


def _complaints(before: Observation, decision: Decision) -> tuple[EmitEvent, ...]:
    """An event, once, about a spec that is not used, and about pods that are too small."""
    known = {(each.type, each.message) for each in before.status.conditions}
    return tuple(
        EmitEvent(type="Warning", reason=each.reason, message=each.message)
        for each in decision.status.conditions
        if each.type in ("Accepted", "MemoryFits") and each.status == "False" and (each.type, each.message) not in known
    )


def reject(problems: Iterable[str], seen: Observation, now: float) -> Decision:
    """A first spec that cannot be run: say so, touch nothing. For a later one see `noted.accepted_spec`."""
    message = "; ".join(problems)
    status = with_condition(seen.status, "Accepted", False, "InvalidSpec", message, now)
    status = replace(status, observed_generation=seen.generation)
    event = EmitEvent(type="Warning", reason="InvalidSpec", message=message)
    return Decision(status=status, actions=(event,) if status != seen.status else (), reason="the spec is invalid")
