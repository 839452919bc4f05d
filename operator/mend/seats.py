"""Pure: which worker sits on which place of the gang, and when a spare takes over another's."""

from __future__ import annotations

from collections.abc import Sequence

from mend import machines
from mend.observation import Observation
from mend.presence import ENDED, is_going, is_ready, is_silent, places
from mend.spec import Spec


def seats(spec: Spec, seen: Observation, now: float) -> tuple[int, ...]:
    """The worker for each place of the next gang: that which has it, unless it is gone and a spare is ready to take it.

    So the others keep their ranks. What is taken over is decided at the launch only: until then there may be no spare,
    and the one that was gone be back.
    """
    held = places(spec, seen.status)
    spares = ready_spares(spec, seen, held, now)
    taken = []
    for worker in held:
        takes_over = spares and (is_vacant(spec, seen, worker) or _is_newer(seen, worker, spares[0]))
        taken.append(spares.pop(0) if takes_over else worker)
    return tuple(taken)


def _is_newer(seen: Observation, worker: int, spare: int) -> bool:
    """Whether a worker has just got a new pod, while the spare's has had the time to become warm."""
    made, older = seen.pod_of(worker), seen.pod_of(spare)
    return made is not None and older is not None and older.attempt < made.attempt == seen.status.attempt


def is_vacant(spec: Spec, seen: Observation, worker: int) -> bool:
    """Whether a worker that has a place is not there to take it: no pod, on its way out, or silent."""
    pod = seen.pod_of(worker)
    if pod is None or pod.phase in ENDED or is_going(seen, worker):
        return True
    return is_silent(spec, seen.agent_of(worker))


def ready_spares(spec: Spec, seen: Observation, held: Sequence[int], now: float) -> list[int]:
    """The workers without a place that could take one at once, the warmest first; not on a node that is excluded."""
    shunned = machines.excluded(spec, seen, now)
    free = [worker for worker in range(spec.workers.pods) if worker not in held and is_ready(spec, seen, worker)]
    fit = [worker for worker in free if not _is_on(seen, worker, shunned)]
    return sorted(fit, key=lambda worker: (-_warmth(seen, worker), worker))


def _is_on(seen: Observation, worker: int, shunned: Sequence[str]) -> bool:
    pod = seen.pod_of(worker)
    return pod is not None and (pod.node in shunned or not pod.node_ready or bool(pod.node_problems))


def _warmth(seen: Observation, worker: int) -> int:
    agent = seen.agent_of(worker)
    return agent.heartbeat.standbys_ready if agent is not None and agent.heartbeat is not None else 0
