"""One stream to the agent of every worker, dialled by the controller; orders go out beside it.

The pool is told which agents there should be and keeps a stream to each, however often they vanish and come back.
What they say is kept as the newest facts; whoever uses the pool is only woken for noteworthy changes. An agent may die,
stall, come back late or lie: it can cost its own stream, never the pool.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final

from mend.dial import AgentUnreachable, Dialer, Target
from mend.evidence import Evidence
from mend.heard import Evaluations, StepSamples, is_news
from mend.heartbeats import Heartbeat, Point, StreamMessage
from mend.learnt import LossStanding, Pace, StepTimes
from mend.link import Link, PoolHealth
from mend.losses import LossWatch
from mend.observation import AgentView
from mend.orders import Ack, Checked, Order
from mend.spec import LossSpike
from mend.status import Evaluation
from mend.stragglers import Paces

RunKey = tuple[str, str]  # namespace, name

ORDER_SECONDS: Final = 3.0


class _Gang:
    """What is known of the agents of one run."""

    def __init__(self) -> None:
        self.links: dict[tuple[int, str], Link] = {}
        self.samples = StepSamples()
        self.paces = Paces()
        self.losses = LossWatch()
        self.loss_rule = LossSpike()
        self.evidence: dict[int, Evidence] = {}
        self.checks: dict[int, Checked] = {}
        self.evaluations = Evaluations()
        self.is_fenced = False

    @property
    def attempt(self) -> int:
        return self.samples.attempt

    def advance(self, attempt: int) -> None:
        """What earlier attempts have shown is void."""
        if attempt > self.attempt:
            self.samples = StepSamples(attempt, self.samples)
            self.paces = Paces(attempt)
            self.evaluations = Evaluations(attempt)
            self.evidence = {worker: told for worker, told in self.evidence.items() if told.attempt >= attempt}
            self.checks = {worker: told for worker, told in self.checks.items() if told.attempt >= attempt}

    def learn(self, heartbeat: Heartbeat) -> None:
        """Takes step times; until the run's attempt is told by a fence, the newest one heard of counts."""
        if not self.is_fenced:
            self.advance(heartbeat.attempt)
        self.samples.add(heartbeat)
        self.paces.add(heartbeat)


class AgentPool:
    """Streams to the agents of all runs. Make and use it inside one event loop.

    `on_news(run)` is called for connects and disconnects, changes of state or attempt, exits, errors, first steps
    and the like, never for mere progress; `on_points(run, attempt, points)` for points of the loss curve. Both must
    return at once.
    """

    def __init__(
        self,
        *,
        on_news: Callable[[RunKey], None] = lambda run: None,
        on_points: Callable[[RunKey, int, tuple[Point, ...]], None] = lambda run, attempt, points: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.health = PoolHealth()
        self._on_news = on_news
        self._on_points = on_points
        self._clock = clock
        self._gangs: dict[RunKey, _Gang] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._dialer = Dialer()

    async def close(self) -> None:
        """Ends all streams."""
        for run in tuple(self._gangs):
            self.forget(run)
        await asyncio.gather(*self._ending, return_exceptions=True)
        await self._dialer.close()

    # ------------------------------------------------------------ what should be
    def update(self, run: RunKey, targets: Iterable[Target]) -> None:
        """These are the agents of `run`, and no others. Repeating it changes nothing."""
        gang = self._gangs.setdefault(run, _Gang())
        wanted = {(target.worker, target.pod_uid): target for target in targets}
        for key in [*gang.links]:
            target = wanted.get(key)
            if target is None or not _is_same_place(target, gang.links[key].target):
                self._hang_up(gang.links.pop(key))
        for key, target in wanted.items():
            link = gang.links.get(key)
            if link is None:
                gang.links[key] = self._link(run, gang, target)
            elif link.target != target:
                link.retarget(target)

    def fence(self, run: RunKey, attempt: int) -> None:
        """From now on points, evidence and step times of attempts before `attempt` are dropped.

        Heartbeats of an earlier attempt are still shown: they say which agents have yet to be told of the new one.
        """
        gang = self._gangs.setdefault(run, _Gang())
        gang.is_fenced = True
        gang.advance(attempt)

    def forget(self, run: RunKey) -> None:
        """The run is gone: end its streams and let go of all that was learnt."""
        gang = self._gangs.pop(run, None)
        if gang is not None:
            for link in gang.links.values():
                self._hang_up(link)

    # ------------------------------------------------------------ what is
    def views(self, run: RunKey) -> tuple[AgentView, ...]:
        """One view for each agent that there should be, by worker."""
        gang = self._gangs.get(run)
        return tuple(gang.links[key].view() for key in sorted(gang.links)) if gang else ()

    def evidence(self, run: RunKey) -> tuple[Evidence, ...]:
        """What was gathered in the current attempt, by worker."""
        gang = self._gangs.get(run)
        return tuple(gang.evidence[worker] for worker in sorted(gang.evidence)) if gang else ()

    def checks(self, run: RunKey) -> tuple[Checked, ...]:
        """What machines were found to be capable of before the current attempt, by worker."""
        gang = self._gangs.get(run)
        return tuple(gang.checks[worker] for worker in sorted(gang.checks)) if gang else ()

    def step_times(self, run: RunKey) -> StepTimes:
        """Lengths of the newest steps of the current attempt."""
        gang = self._gangs.get(run)
        return gang.samples.times() if gang else StepTimes()

    def paces(self, run: RunKey) -> tuple[Pace, ...]:
        """How long each rank of the current attempt works on a step, as far as it is measured."""
        gang = self._gangs.get(run)
        return gang.paces.paces() if gang else ()

    def losses(self, run: RunKey, attempt: int, rule: LossSpike) -> LossStanding | None:
        """How the loss of this attempt lies; points that come from now on are judged by this rule."""
        gang = self._gangs.get(run)
        if gang is None:
            return None
        gang.loss_rule = rule
        return gang.losses.standing(attempt)

    def evaluations(self, run: RunKey, metric: str) -> tuple[Evaluation, ...]:
        """The newest evaluations of this metric in the current attempt."""
        gang = self._gangs.get(run)
        return gang.evaluations.told(metric) if gang else ()

    def connected(self) -> int:
        """How many streams are open."""
        return sum(link.connected for gang in self._gangs.values() for link in gang.links.values())

    # ------------------------------------------------------------ orders
    async def send(
        self, run: RunKey, worker: int, pod_uid: str, order: Order, *, timeout_seconds: float = ORDER_SECONDS
    ) -> Ack | Evidence | Checked:
        """Gives `order` to the agent of this very pod; a `Gather` or `Check` may take its own seconds on top.

        Evidence and checks are also kept for `evidence` and `checks`. Raises `AgentUnreachable`, `OrderRefused` or
        `Unauthorized`.
        """
        gang = self._gangs.get(run)
        link = gang.links.get((worker, pod_uid)) if gang else None
        who = f"worker {worker} of {'/'.join(run)}"
        if gang is None or link is None:
            raise AgentUnreachable(f"{who}: there is no agent in pod {pod_uid}")
        told = await self._dialer.order(link.target, order, who, timeout_seconds)
        if isinstance(told, Evidence) and told.worker == worker and told.attempt >= gang.attempt:
            gang.evidence[worker] = told
        if isinstance(told, Checked) and told.worker == worker and told.attempt >= gang.attempt:
            gang.checks[worker] = told
        return told

    # ------------------------------------------------------------ hearing
    def _link(self, run: RunKey, gang: _Gang, target: Target) -> Link:
        return Link(
            f"worker {target.worker} of {'/'.join(run)}",
            target,
            self._dialer,
            self.health,
            on_message=partial(self._hear, run, gang),
            on_change=partial(self._on_news, run),
            clock=self._clock,
        )

    def _hang_up(self, link: Link) -> None:
        listener = link.hang_up()
        self._ending.add(listener)
        listener.add_done_callback(self._ending.discard)

    def _hear(self, run: RunKey, gang: _Gang, previous: Heartbeat | None, message: StreamMessage) -> None:
        if isinstance(message, Heartbeat):
            gang.learn(message)
            if is_news(previous, message):
                self._on_news(run)
        elif message.attempt < gang.attempt:
            self.health.stale += 1
        else:
            gang.losses.add(message.attempt, message.points, gang.loss_rule)
            if message.attempt == gang.evaluations.attempt and gang.evaluations.add(message.points):
                self._on_news(run)
            self._on_points(run, message.attempt, message.points)


def _is_same_place(one: Target, other: Target) -> bool:
    return (one.ip, one.port, one.token) == (other.ip, other.port, other.token)
