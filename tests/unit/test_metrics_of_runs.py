"""What Prometheus is told about runs: counted from changes, aged when asked, gone with the run."""

from __future__ import annotations

import itertools

import msgspec
from prometheus_client import CollectorRegistry

from mend.heartbeats import AgentState, Heartbeat, Phase, RankReport, SaveReport
from mend.incidents import FailureClass, IncidentKind, IncidentRecord, Tier
from mend.learnt import LossStanding, StepTimes
from mend.listing import StoreView
from mend.metrics import Metrics
from mend.observation import AgentView, Observation
from mend.status import CheckpointStatus, Ledger, LimitInForce, MemoryStatus, RunPhase, RunStatus, Straggler

CLIO = {"namespace": "ml", "run": "clio"}
START = 1_000_000.0


class Clock:
    """Time that moves when told to."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


class Told:
    """A metrics object with a clock, and short questions about what it exports."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry, self.clock)

    def record(self, before: RunStatus, after: RunStatus, *agents: AgentView, store: StoreView | None = None) -> None:
        seen = Observation(
            name="clio",
            namespace="ml",
            uid="u1",
            generation=1,
            created_at=START,
            status=before,
            agents=agents,
            store=store or StoreView(),
            step_times=StepTimes(seconds=(0.4, 0.5)),
            losses=LossStanding(step=9, loss=3.3, median=3.0, bound=3.6, deviations=2.5),
        )
        self.metrics.record(seen, after, self.clock.now)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, CLIO | labels)

    def named(self, name: str) -> int:
        """How many samples have this name."""
        return sum(sample.name == name for family in self.registry.collect() for sample in family.samples)


RUNNING = RunStatus(phase=RunPhase.RUNNING, attempt=3, step=99, tokens=1000, loss=2.5, started_at=START - 100)


def an_incident(**changes: object) -> IncidentRecord:
    """A hang that was noticed after two seconds, nothing done yet."""
    hang = IncidentRecord(
        id=1,
        kind=IncidentKind.HUNG,
        failure=FailureClass.HANG,
        attempt=3,
        step=99,
        began_at=START - 2,
        detected_at=START,
    )
    return msgspec.structs.replace(hang, **changes)


def an_agent(worker: int = 0, attempt: int = 3, silent_seconds: float = 0.0) -> AgentView:
    """An agent with one rank that marked progress a tenth of a second before its last heartbeat."""
    rank = RankReport(rank=worker, pid=7, phase=Phase.STEP, progress_seconds=0.1, step=99)
    heartbeat = Heartbeat(
        attempt=attempt,
        worker=worker,
        agent_id="a",
        state=AgentState.RUNNING,
        sequence=1,
        ranks=(rank,),
        save=SaveReport(stall_seconds=0.05, commit_seconds=4.0, bytes=1024, failures=2) if worker == 0 else None,
    )
    return AgentView(
        worker=worker, pod_uid=f"p{worker}", connected=True, silent_seconds=silent_seconds, heartbeat=heartbeat
    )


def test_the_phase_of_a_run_is_one_of_all_phases() -> None:
    """`sum by (phase) (mend_run_phase)` counts the runs by phase."""
    told = Told()
    told.record(RUNNING, RUNNING)
    assert told.value("mend_run_phase", phase="Running") == 1
    assert told.value("mend_run_phase", phase="Failed") == 0
    assert told.named("mend_run_phase") == len(RunPhase)


def test_an_incident_is_counted_when_noticed_recovered_and_paid_for() -> None:
    """Noticing, each tier tried, and coming back are counted once each, whatever number of looks lies between."""
    told = Told()
    noticed = msgspec.structs.replace(RUNNING, incidents=(an_incident(),))
    restarting = msgspec.structs.replace(RUNNING, attempt=4, incidents=(an_incident(tier=Tier.RESTART_RANKS),))
    replacing = msgspec.structs.replace(RUNNING, attempt=5, incidents=(an_incident(tier=Tier.REPLACE_WORKER),))
    back = an_incident(tier=Tier.REPLACE_WORKER, recovered_at=START + 8, steps_lost=12)
    recovered = msgspec.structs.replace(RUNNING, attempt=5, incidents=(back,))
    looks = [RUNNING, noticed, noticed, restarting, replacing, replacing, recovered, recovered]
    for before, after in itertools.pairwise(looks):
        told.record(before, after)
    assert told.value("mend_incidents_total", kind="hung") == 1
    assert told.value("mend_recoveries_total", kind="hung", tier="restart-ranks") == 1
    assert told.value("mend_recoveries_total", kind="hung", tier="replace-worker") == 1
    assert told.value("mend_attempts_total") == 2
    assert told.value("mend_steps_lost_total") == 12
    by_kind = {"namespace": "ml", "kind": "hung"}
    assert told.registry.get_sample_value("mend_detection_seconds_sum", by_kind) == 2
    assert told.registry.get_sample_value("mend_detection_seconds_count", by_kind) == 1
    by_tier = by_kind | {"tier": "replace-worker"}
    assert told.registry.get_sample_value("mend_recovery_seconds_sum", by_tier) == 10
    assert told.registry.get_sample_value("mend_recovery_seconds_bucket", by_tier | {"le": "10.0"}) == 1


def test_a_new_leader_does_not_count_again_what_is_in_the_status() -> None:
    """Incidents that the status already held when this process first saw the run are history."""
    told = Told()
    old = msgspec.structs.replace(RUNNING, incidents=(an_incident(tier=Tier.RESTART_RANKS, recovered_at=START),))
    told.record(old, old)
    assert told.value("mend_incidents_total", kind="hung") is None
    assert told.value("mend_attempts_total") is None


def test_ages_grow_while_nothing_is_heard() -> None:
    """Between two looks the ages of ranks, checkpoints and open incidents grow with the clock, silence included."""
    told = Told()
    saved = CheckpointStatus(step=90, attempt=3, uri="s3://b/x", committed_at=START - 30)
    status = msgspec.structs.replace(RUNNING, checkpoint=saved, incidents=(an_incident(),))
    told.record(status, status, an_agent(0), an_agent(1, silent_seconds=1.0))
    told.clock.now += 5
    assert told.value("mend_rank_progress_age_seconds", worker="0", rank="0") == 5.1
    assert told.value("mend_rank_progress_age_seconds", worker="1", rank="1") == 6.1
    assert told.value("mend_checkpoint_age_seconds") == 35
    assert told.value("mend_run_unsaved_seconds") == 35
    assert told.value("mend_run_incident_open_seconds") == 7
    assert told.value("mend_checkpoint_step") == 90


def test_ranks_of_an_older_attempt_are_not_shown() -> None:
    """A rank that belongs to the past would look stuck for ever."""
    told = Told()
    told.record(RUNNING, RUNNING, an_agent(0, attempt=2))
    assert told.named("mend_rank_progress_age_seconds") == 0


def test_a_finished_run_has_no_ages_that_alarm() -> None:
    """After the end nothing is stuck, unsaved or open, but step, goodput and ledger stay to be read."""
    told = Told()
    done = msgspec.structs.replace(
        RUNNING, phase=RunPhase.SUCCEEDED, incidents=(an_incident(),), ledger=Ledger(productive=90.0, goodput=0.9)
    )
    told.record(done, done, an_agent(0))
    told.clock.now += 1000
    for name in ("mend_rank_progress_age_seconds", "mend_run_unsaved_seconds", "mend_run_incident_open_seconds"):
        assert told.named(name) == 0
    assert told.value("mend_run_goodput_ratio") == 0.9
    assert told.value("mend_run_ledger_seconds", spent_on="productive") == 90
    assert told.value("mend_run_step") == 99


def test_speed_and_saves_come_from_the_agents() -> None:
    """Step time and tokens per second are those of the last step; saving is as rank 0 reports it."""
    told = Told()
    told.record(RUNNING, RUNNING, an_agent(1), an_agent(0))
    assert told.value("mend_run_step_seconds") == 0.5
    assert told.value("mend_run_tokens_per_second") == 20  # 10 tokens a step, half a second each
    assert told.value("mend_checkpoint_stall_seconds") == 0.05
    assert told.value("mend_checkpoint_save_failures") == 2
    assert told.value("mend_run_agents_connected") == 2


def test_a_store_in_trouble_is_shown_with_its_reason_until_it_is_well() -> None:
    """The reason is the one of the condition; the series ends with the trouble."""
    told = Told()
    told.record(RUNNING, RUNNING, store=StoreView(problem="403 from bucket", problem_reason="Forbidden"))
    assert told.value("mend_run_store_problem", reason="Forbidden") == 1
    told.record(RUNNING, RUNNING)
    assert told.named("mend_run_store_problem") == 0


def test_a_deleted_run_leaves_no_series() -> None:
    """Nothing that carries the run's name survives it; the histograms of its namespace do."""
    told = Told()
    noticed = msgspec.structs.replace(RUNNING, attempt=4, incidents=(an_incident(tier=Tier.RESTART_RANKS),))
    told.record(RUNNING, noticed, an_agent(0))
    told.metrics.forget("ml", "clio")
    told.metrics.forget("ml", "never-seen")
    left = [sample for family in told.registry.collect() for sample in family.samples if "run" in sample.labels]
    assert left == []
    assert told.named("mend_detection_seconds_count") == 1


def test_a_replica_that_no_longer_leads_shows_no_runs() -> None:
    """What a former leader knew is stale; two replicas never export the same run."""
    told = Told()
    told.metrics.leads(True)
    told.record(RUNNING, RUNNING)
    told.metrics.leads(False)
    assert told.named("mend_run_phase") == 0
    assert told.registry.get_sample_value("mend_leader") == 0


def test_limits_and_stragglers_are_shown_while_the_run_may_train() -> None:
    """Both bounds by phase, and a series for a slow rank only; a run that is over has neither."""
    told = Told()
    limit = LimitInForce(phase=Phase.STEP, limit_seconds=1.0, patience_seconds=6.0, samples=64)
    slow = Straggler(rank=3, worker=1, factor=1.5, work_seconds=0.3, began_at=START)
    shown = msgspec.structs.replace(RUNNING, limits=(limit,), stragglers=(slow,))
    told.record(RUNNING, shown)
    assert told.value("mend_run_limit_seconds", phase="step", bound="limit") == 1.0
    assert told.value("mend_run_limit_seconds", phase="step", bound="patience") == 6.0
    assert told.value("mend_rank_slow_factor", worker="1", rank="3") == 1.5
    assert told.value("mend_run_loss_deviations") == 2.5
    told.record(shown, msgspec.structs.replace(shown, phase=RunPhase.SUCCEEDED))
    assert told.named("mend_run_limit_seconds") == told.named("mend_rank_slow_factor") == 0


def test_snapshots_and_what_goes_to_the_store_are_shown() -> None:
    """The newest whole save in memory with its age, what it costs, and bytes and requests of each worker."""
    told = Told()
    memory = MemoryStatus(step=98, attempt=3, seen_at=START - 2, workers=2, copied=True, needed_bytes=4096)
    agents = [
        AgentView(
            worker=worker,
            pod_uid=f"p{worker}",
            connected=True,
            silent_seconds=0.0,
            heartbeat=Heartbeat(
                attempt=attempt,
                worker=worker,
                agent_id="a",
                state=AgentState.RUNNING,
                sequence=1,
                save=SaveReport(skipped=2) if worker == 0 else None,  # only rank 0 tells of saves
                store_requests=10 + worker,
                stored_bytes=1000 + worker,
            ),
        )
        for worker, attempt in ((0, 3), (1, 3), (2, 2))
    ]
    told.record(RUNNING, msgspec.structs.replace(RUNNING, memory=memory), *agents)
    told.clock.now += 5
    assert told.value("mend_snapshot_step") == 98
    assert told.value("mend_snapshot_age_seconds") == 7
    assert told.value("mend_snapshot_copied") == 1
    assert (told.value("mend_memory_needed_bytes"), told.named("mend_memory_limit_bytes")) == (4096, 0)
    assert told.value("mend_checkpoint_skipped_saves") == 2
    assert told.value("mend_checkpoint_stored_bytes", worker="1") == 1001
    assert told.value("mend_checkpoint_requests", worker="0") == 10
    assert told.named("mend_checkpoint_requests") == 2
    told.record(RUNNING, msgspec.structs.replace(RUNNING, memory=MemoryStatus(limit_bytes=8192)))
    assert told.named("mend_snapshot_step") == told.named("mend_snapshot_age_seconds") == 0
    assert told.value("mend_memory_limit_bytes") == 8192
