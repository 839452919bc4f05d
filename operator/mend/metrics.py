"""Every Prometheus metric of the controller: all names are here and nowhere else.

What a run *is* (phase, step, ages) is computed when Prometheus asks, from the last facts recorded, so that ages grow
between two looks at a run. What *happens* (incidents, recoveries, attempts) is counted from the difference between the
status before and after a decision, so that a new leader counts nothing twice. Series of a deleted run disappear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from mend.heartbeats import RankReport, SaveReport
from mend.incidents import IncidentRecord
from mend.observation import AgentView, Observation
from mend.status import RunPhase, RunStatus

# From a crash pushed by pidfd (tens of ms) to a node that comes back after minutes.
SECONDS_BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
RECONCILE_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 30)
RUN_LABELS: Final = ("namespace", "run")
MAY_TRAIN: Final = (RunPhase.PENDING, RunPhase.RUNNING, RunPhase.RECOVERING)

Samples = Iterable[tuple[tuple[str, ...], float]]


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What was known of a run at `at`, and how many seconds ago that was."""

    seen: Observation
    status: RunStatus
    at: float
    elapsed: float = 0.0

    def reports(self) -> Iterator[tuple[AgentView, RankReport]]:
        """The ranks that are to make progress now, as their agents told last."""
        if self.status.phase not in MAY_TRAIN:
            return
        for agent in self.seen.agents:
            if agent.heartbeat is not None and agent.heartbeat.attempt == self.status.attempt:
                yield from ((agent, rank) for rank in agent.heartbeat.ranks if rank.exit is None)

    def saves(self) -> SaveReport | None:
        """How saving goes; only rank 0's agent knows."""
        told = (agent.heartbeat.save for agent in self.seen.agents if agent.heartbeat is not None)
        return next((save for save in told if save is not None), None)


@dataclass(frozen=True, slots=True)
class RunGauge:
    """One metric that is read off the facts of a run."""

    name: str
    help: str
    read: Callable[[RunFacts], Samples]
    labels: tuple[str, ...] = ()


def _one(value: float | None) -> Samples:
    return () if value is None else (((), float(value)),)


def _phase(facts: RunFacts) -> Samples:
    return [((phase.value,), float(facts.status.phase is phase)) for phase in RunPhase]


def _workers(facts: RunFacts) -> Samples:
    counts = facts.status.workers
    states = ("desired", "ready", "participating", "spares")
    return [((state,), float(getattr(counts, state))) for state in states]


def _ledger(facts: RunFacts) -> Samples:
    ledger = facts.status.ledger
    spent_on = ("pending", "starting", "productive", "lost", "detecting", "recovering", "suspended")
    return [((name,), float(getattr(ledger, name))) for name in spent_on]


def _goodput(facts: RunFacts) -> Samples:
    return _one(facts.status.ledger.goodput if facts.status.started_at is not None else None)


def _open_incident_age(facts: RunFacts) -> Samples:
    incident = facts.status.open_incident if facts.status.phase in MAY_TRAIN else None
    return _one(None if incident is None else max(facts.at - incident.began_at, 0.0) + facts.elapsed)


def _checkpoint_age(facts: RunFacts) -> Samples:
    saved = facts.status.checkpoint
    return _one(None if saved is None else max(facts.at - saved.committed_at, 0.0) + facts.elapsed)


def _unsaved_age(facts: RunFacts) -> Samples:
    """Seconds of training that a crash now would cost at most: since the last checkpoint, or since the start."""
    if facts.status.phase not in MAY_TRAIN or facts.status.started_at is None:
        return ()
    saved = facts.status.checkpoint
    since = max(facts.status.started_at, saved.committed_at if saved else 0.0)
    return _one(max(facts.at - since, 0.0) + facts.elapsed)


def _progress_age(facts: RunFacts) -> Samples:
    for agent, rank in facts.reports():
        age = rank.progress_seconds + agent.silent_seconds + facts.elapsed
        yield (str(agent.worker), str(rank.rank)), age


def _step_seconds(facts: RunFacts) -> Samples:
    times = facts.seen.step_times.seconds
    return _one(times[-1] if times and facts.status.phase in MAY_TRAIN else None)


def _limits(facts: RunFacts) -> Samples:
    for each in facts.status.limits if facts.status.phase in MAY_TRAIN else ():
        yield (each.phase.value, "limit"), each.limit_seconds
        yield (each.phase.value, "patience"), each.patience_seconds


def _slow_factor(facts: RunFacts) -> Samples:
    for each in facts.status.stragglers if facts.status.phase in MAY_TRAIN else ():
        yield (str(each.worker), str(each.rank)), each.factor


def _tokens_per_second(facts: RunFacts) -> Samples:
    """Tokens per step so far (the global batch is constant) by the length of the last step."""
    times, status = facts.seen.step_times.seconds, facts.status
    if not times or times[-1] <= 0 or status.step < 0 or status.phase not in MAY_TRAIN:
        return ()
    return _one(status.tokens / (status.step + 1) / times[-1])


def _snapshot_age(facts: RunFacts) -> Samples:
    memory = facts.status.memory
    return _one(None if memory is None or memory.seen_at is None else max(facts.at - memory.seen_at, 0) + facts.elapsed)


def _memory(field: str) -> Callable[[RunFacts], Samples]:
    """A figure of the memory tier; what is 0 is not known."""
    return lambda facts: _one((facts.status.memory and getattr(facts.status.memory, field)) or None)


def _to_the_store(field: str) -> Callable[[RunFacts], Samples]:
    """What each worker's saver has sent there."""

    def read(facts: RunFacts) -> Samples:
        for agent in facts.seen.agents:
            beat = agent.heartbeat
            if beat is not None and beat.attempt == facts.status.attempt:
                yield (str(agent.worker),), float(getattr(beat, field))

    return read


def _save(field: str) -> Callable[[RunFacts], Samples]:
    return lambda facts: _one(None if (save := facts.saves()) is None else float(getattr(save, field)))


RUN_GAUGES: Final = (
    RunGauge("mend_run_phase", "1 for the phase that the run is in, 0 for the others.", _phase, ("phase",)),
    RunGauge("mend_run_attempt", "The number of the current attempt.", lambda f: _one(f.status.attempt)),
    RunGauge("mend_run_recoveries", "Recoveries of the run in its whole life.", lambda f: _one(f.status.recoveries)),
    RunGauge(
        "mend_run_step",
        "The last step that all ranks completed.",
        lambda f: _one(f.status.step if f.status.step >= 0 else None),
    ),
    RunGauge("mend_run_loss", "The loss at the last step.", lambda f: _one(f.status.loss)),
    RunGauge(
        "mend_run_loss_deviations",
        "How far the loss lies above the median of the points before it, in deviations of theirs.",
        lambda f: _one(f.seen.losses.deviations if f.seen.losses and f.status.phase in MAY_TRAIN else None),
    ),
    RunGauge("mend_run_tokens", "Tokens consumed up to the last step.", lambda f: _one(f.status.tokens)),
    RunGauge("mend_run_tokens_per_second", "Tokens per second of the last step.", _tokens_per_second),
    RunGauge("mend_run_step_seconds", "Length of the last step.", _step_seconds),
    RunGauge(
        "mend_run_limit_seconds",
        "How long no rank may mark in this phase: the limit (evidence is gathered) and patience (ranks are killed).",
        _limits,
        ("phase", "bound"),
    ),
    RunGauge("mend_run_goodput_ratio", "Share of the run's life spent on steps that were kept.", _goodput),
    RunGauge("mend_run_ledger_seconds", "The run's life by what it was spent on.", _ledger, ("spent_on",)),
    RunGauge("mend_run_workers", "Workers wanted, connected, taking part, and spare.", _workers, ("state",)),
    RunGauge(
        "mend_run_agents_connected",
        "Agents whose stream is open.",
        lambda f: _one(sum(agent.connected for agent in f.seen.agents)),
    ),
    RunGauge(
        "mend_run_incident_open_seconds", "Age of the incident that the run is not back from.", _open_incident_age
    ),
    RunGauge("mend_run_unsaved_seconds", "Training that would be lost if the run crashed now.", _unsaved_age),
    RunGauge(
        "mend_run_store_problem",
        "1 while the store of the run's checkpoints cannot be used; the reason is as in the condition.",
        lambda f: [((f.seen.store.problem_reason,), 1.0)] if f.seen.store.problem else [],
        ("reason",),
    ),
    RunGauge(
        "mend_checkpoint_step",
        "Step of the newest committed checkpoint.",
        lambda f: _one(f.status.checkpoint.step if f.status.checkpoint else None),
    ),
    RunGauge("mend_checkpoint_age_seconds", "Age of the newest committed checkpoint.", _checkpoint_age),
    RunGauge(
        "mend_checkpoint_interval_seconds",
        "How often the run saves, where that is left to mend.",
        lambda f: _one(f.status.interval.seconds if f.status.interval else None),
    ),
    RunGauge(
        "mend_checkpoint_verified_step",
        "Step of the newest checkpoint that was read back or restored from.",
        lambda f: _one(max((each.ref.step for each in f.seen.store.checkpoints if each.verified), default=None)),
    ),
    RunGauge("mend_checkpoint_stall_seconds", "How long the last save stopped the loop.", _save("stall_seconds")),
    RunGauge("mend_checkpoint_commit_seconds", "From the copy to the manifest, last save.", _save("commit_seconds")),
    RunGauge("mend_checkpoint_size_bytes", "Size of the last save.", _save("bytes")),
    RunGauge("mend_checkpoint_save_failures", "Saves that failed since the last that worked.", _save("failures")),
    RunGauge("mend_checkpoint_skipped_saves", "Saves that were due while others were being written.", _save("skipped")),
    RunGauge(
        "mend_checkpoint_stored_bytes",
        "Sent to the store by a worker's saver since it began.",
        _to_the_store("stored_bytes"),
        ("worker",),
    ),
    RunGauge(
        "mend_checkpoint_requests",
        "Requests to the store by a worker's saver since it began.",
        _to_the_store("store_requests"),
        ("worker",),
    ),
    RunGauge(
        "mend_snapshot_step",
        "Step of the newest save that lies whole in the memory of workers.",
        lambda f: _one(f.status.memory.step if f.status.memory and f.status.memory.step >= 0 else None),
    ),
    RunGauge("mend_snapshot_age_seconds", "Since that save was first seen to be whole.", _snapshot_age),
    RunGauge(
        "mend_snapshot_copied",
        "1 if it, or one before it, would survive the loss of a worker, 0 if not.",
        lambda f: _one(f.status.memory.copied if f.status.memory else None),
    ),
    RunGauge("mend_memory_needed_bytes", "What snapshots and copies need in each worker.", _memory("needed_bytes")),
    RunGauge("mend_memory_limit_bytes", "The memory limit of the run's pods.", _memory("limit_bytes")),
    RunGauge(
        "mend_rank_progress_age_seconds",
        "Since the rank's last mark of any kind; grows while an agent is silent.",
        _progress_age,
        ("worker", "rank"),
    ),
    RunGauge(
        "mend_rank_step",
        "The last step that the rank completed.",
        lambda f: [((str(agent.worker), str(rank.rank)), float(rank.step)) for agent, rank in f.reports()],
        ("worker", "rank"),
    ),
    RunGauge(
        "mend_rank_slow_factor",
        "Of a straggler: its own work on a step, in medians of the others'.",
        _slow_factor,
        ("worker", "rank"),
    ),
)


@dataclass(frozen=True, slots=True)
class WatchFigures:
    """How well one watch is kept, as its reflector tells."""

    silent_seconds: float
    relists: int
    errors: int


class Metrics:
    """What the controller tells of its runs and of itself; `clock` gives seconds since the epoch."""

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._runs: dict[tuple[str, str], RunFacts] = {}
        self._watches: dict[str, Callable[[], WatchFigures]] = {}
        self._strikes: Callable[[], Mapping[str, int]] = dict
        registry.register(self)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str, buckets: tuple[float, ...] = SECONDS_BUCKETS) -> Histogram:
            return Histogram(name, text, labels, registry=registry, buckets=buckets)

        self._attempts = counter("mend_attempts_total", "Attempts begun.", *RUN_LABELS)
        self._incidents = counter("mend_incidents_total", "Incidents noticed.", *RUN_LABELS, "kind")
        self._recoveries = counter("mend_recoveries_total", "Recoveries begun, by tier.", *RUN_LABELS, "kind", "tier")
        self._steps_lost = counter("mend_steps_lost_total", "Steps that had to be done again.", *RUN_LABELS)
        # By namespace and not by run: how well mend does outlives the runs it did it for.
        self._detection = histogram("mend_detection_seconds", "From a fault until noticed.", "namespace", "kind")
        self._recovery = histogram(
            "mend_recovery_seconds", "From a fault to the first new step of all ranks.", "namespace", "kind", "tier"
        )
        self._queue_depth = Gauge("mend_queue_depth", "Runs that wait for a look.", registry=registry)
        self._queue_latency = histogram(
            "mend_queue_latency_seconds", "From due until looked at.", buckets=RECONCILE_BUCKETS
        )
        self._reconcile = histogram("mend_reconcile_seconds", "Length of one look.", buckets=RECONCILE_BUCKETS)
        self._reconcile_errors = counter("mend_reconcile_errors_total", "Looks that failed, by error.", "error")
        self._leader = Gauge("mend_leader", "1 on the replica that leads, 0 on the others.", registry=registry)

    # ------------------------------------------------------------ runs
    def record(self, seen: Observation, after: RunStatus, now: float) -> None:
        """A decision about a run was written: count what it changed and remember what now is."""
        names = (seen.namespace, seen.name)
        self._runs[names] = RunFacts(seen=seen, status=after, at=now)
        if (begun := after.attempt - seen.status.attempt) > 0:
            self._attempts.labels(*names).inc(begun)
        known = {incident.id: incident for incident in seen.status.incidents}
        for incident in after.incidents:
            self._count(names, known.get(incident.id), incident)

    def _count(self, names: tuple[str, str], was: IncidentRecord | None, incident: IncidentRecord) -> None:
        namespace, kind = names[0], incident.kind.value
        if was is None:
            self._incidents.labels(*names, kind).inc()
            self._detection.labels(namespace, kind).observe(max(incident.detected_at - incident.began_at, 0.0))
        if incident.tier is not None and (was is None or was.tier is not incident.tier):
            self._recoveries.labels(*names, kind, incident.tier.value).inc()
        if incident.recovered_at is not None and (was is None or was.is_open):
            tier = incident.tier.value if incident.tier else "none"
            self._recovery.labels(namespace, kind, tier).observe(max(incident.recovered_at - incident.began_at, 0.0))
            self._steps_lost.labels(*names).inc(max(incident.steps_lost or 0, 0))

    def forget(self, namespace: str, run: str) -> None:
        """The run is gone, and with it all its series."""
        self._runs.pop((namespace, run), None)
        for metric in (self._attempts, self._incidents, self._recoveries, self._steps_lost):
            metric.remove_by_labels(dict(zip(RUN_LABELS, (namespace, run), strict=True)))

    # ------------------------------------------------------------ the controller itself
    def looked(self, seconds: float, waited_seconds: float, error: Exception | None = None) -> None:
        """One look at a run ended, after waiting in the queue; `error` is what it failed with."""
        self._reconcile.observe(seconds)
        self._queue_latency.observe(waited_seconds)
        if error is not None:
            self._reconcile_errors.labels(type(error).__name__).inc()

    def leads(self, is_leader: bool) -> None:
        """Whether this replica leads now. One that no longer does knows nothing of any run."""
        self._leader.set(is_leader)
        if not is_leader:
            self._runs.clear()

    def follow_queue(self, depth: Callable[[], int]) -> None:
        """Ask this for the number of runs that are due, whenever Prometheus asks."""
        self._queue_depth.set_function(depth)

    def follow_watch(self, resource: str, figures: Callable[[], WatchFigures]) -> None:
        """Ask this for the health of a watch, whenever Prometheus asks."""
        self._watches[resource] = figures

    def follow_strikes(self, by_node: Callable[[], Mapping[str, int]]) -> None:
        """Ask this for the strikes that count against each node, whenever Prometheus asks."""
        self._strikes = by_node

    # ------------------------------------------------------------ for the registry
    def collect(self) -> Iterator[Metric]:
        """The metrics that are computed when asked for, in whichever thread: facts are frozen, the lists are copies."""
        now = self._clock()
        facts = [_aged(each, now) for each in list(self._runs.values())]
        for gauge in RUN_GAUGES:
            family = GaugeMetricFamily(gauge.name, gauge.help, labels=(*RUN_LABELS, *gauge.labels))
            for each in facts:
                for labels, value in gauge.read(each):
                    family.add_metric((each.seen.namespace, each.seen.name, *labels), value)
            yield family
        yield from _watch_families({name: read() for name, read in list(self._watches.items())})
        struck = GaugeMetricFamily("mend_node_strikes", "Strikes that count against the node.", labels=("node",))
        for node, count in self._strikes().items():
            struck.add_metric((node,), count)
        yield struck


def _aged(facts: RunFacts, now: float) -> RunFacts:
    return RunFacts(seen=facts.seen, status=facts.status, at=facts.at, elapsed=max(now - facts.at, 0.0))


def _watch_families(watches: Mapping[str, WatchFigures]) -> Iterator[Metric]:
    age = GaugeMetricFamily("mend_watch_age_seconds", "Since the last word from the API server.", labels=("resource",))
    relists = CounterMetricFamily("mend_watch_relists_total", "Lists after the first.", labels=("resource",))
    errors = CounterMetricFamily("mend_watch_errors_total", "Lists and watches that failed.", labels=("resource",))
    for resource, figures in watches.items():
        age.add_metric((resource,), figures.silent_seconds)
        relists.add_metric((resource,), figures.relists)
        errors.add_metric((resource,), figures.errors)
    yield from (age, relists, errors)
