"""Diagnosis where the simulated cluster is too coarse: who is silent, going or gone, and what an end means."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from mend.diagnose import diagnose, limits_now, seconds_until_diagnosis
from mend.evidence import Evidence, GroupProgress, RankEvidence
from mend.exitcodes import ExitCode
from mend.heartbeats import AgentState, Heartbeat, Phase, RankError, RankExit, RankReport
from mend.incidents import FailureClass, Incident, IncidentKind
from mend.learnt import LossStanding, StepTimes
from mend.observation import AgentView, Observation, PodPhase, WorkerPod
from mend.spec import FirstTier, LossSpike
from mend.status import RunPhase, RunStatus
from world import a_spec

SPEC = a_spec(2, 1)
CUT_OFF = RankError(type="DistNetworkError", message="Connection closed by peer")


RUNC = (
    "failed to create containerd task: OCI runtime create failed: runc create failed: unable to start container process"
)
NO_DRIVER = f"{RUNC}: error running prestart hook #0: nvidia-container-cli: initialization error: driver not loaded"


MIB = 1 << 20


class Scene:
    """An observation of two workers with a rank each that train well, but for what is changed."""

    def __init__(self, *, launched: bool = True, step: int = 20) -> None:
        self.launched = launched
        self.step = step
        self.pods = {n: WorkerPod(index=n, name=f"p{n}", uid=f"u{n}", phase=PodPhase.RUNNING) for n in (0, 1)}
        self.views = {n: AgentView(worker=n, pod_uid=f"u{n}", connected=True, silent_seconds=0.1) for n in (0, 1)}
        self.ranks = {n: RankReport(rank=n, pid=n, phase=Phase.COLLECTIVE, step=20, steps_done=20) for n in (0, 1)}
        self.terminating: set[int] = set()
        self.never_heard: set[int] = set()
        self.evidence: tuple[Evidence, ...] = ()

    def pod(self, worker: int, **changes: object) -> Scene:
        """With a pod that is like this."""
        self.pods[worker] = replace(self.pods[worker], **changes)
        return self

    def no_pod(self, worker: int) -> Scene:
        """Without that pod."""
        del self.pods[worker]
        return self

    def silent(self, worker: int, seconds: float, *, connected: bool = True, problem: str = "") -> Scene:
        """With an agent that was not heard for a while."""
        view = replace(self.views[worker], silent_seconds=seconds, connected=connected, problem=problem)
        self.views[worker] = view
        return self

    def unheard(self, worker: int, seconds: float) -> Scene:
        """With an agent that this controller has never heard."""
        self.never_heard.add(worker)
        return self.silent(worker, seconds, connected=False, problem="timed out")

    def rank(self, number: int, **changes: object) -> Scene:
        """With a rank that is like this."""
        self.ranks[number] = replace(self.ranks[number], **changes)
        return self

    def told_to_go(self, worker: int) -> Scene:
        """With an agent that has got a SIGTERM."""
        self.terminating.add(worker)
        return self

    def asked(self, *evidence: RankEvidence) -> Scene:
        """With evidence, one rank per worker."""
        self.evidence = tuple(Evidence(attempt=3, worker=each.rank, ranks=(each,)) for each in evidence)
        return self

    @property
    def seen(self) -> Observation:
        """As an observation."""
        views = tuple(
            replace(view, heartbeat=None if n in self.never_heard else self._beat(n)) for n, view in self.views.items()
        )
        return Observation(
            name="clio",
            namespace="team",
            uid="u",
            generation=1,
            created_at=0.0,
            status=RunStatus(
                phase=RunPhase.RUNNING if self.launched else RunPhase.PENDING,
                attempt=3,
                participants=(0, 1) if self.launched else (),
                step=self.step,
            ),
            pods=tuple(self.pods.values()),
            agents=views,
            evidence=self.evidence,
            step_times=StepTimes(seconds=(0.5,) * 10),
        )

    def _beat(self, worker: int) -> Heartbeat:
        return Heartbeat(
            attempt=3 if self.launched else 0,
            worker=worker,
            agent_id=f"a{worker}",
            state=AgentState.RUNNING if self.launched else AgentState.IDLE,
            sequence=1,
            ranks=(self.ranks[worker],) if self.launched else (),
            store_port=1,
            terminating=worker in self.terminating,
        )

    @property
    def incident(self) -> Incident | None:
        """What is diagnosed."""
        return diagnose(SPEC, self.seen)


def late(seconds: float = 5.0) -> Scene:
    """Both ranks stand still for longer than a step may take."""
    return Scene().rank(0, progress_seconds=seconds).rank(1, progress_seconds=seconds)


GONE: dict[str, tuple[Scene, IncidentKind, FailureClass, tuple[int, ...]]] = {
    "its pod was deleted": (
        Scene().no_pod(1),
        IncidentKind.PREEMPTED,
        FailureClass.PREEMPTION,
        (1,),
    ),
    "evicted": (
        Scene().pod(0, phase=PodPhase.FAILED, reason="Evicted", message="disk pressure"),
        IncidentKind.PREEMPTED,
        FailureClass.PREEMPTION,
        (0,),
    ),
    "terminated by a node's shutdown that gives no reason": (
        Scene().pod(0, phase=PodPhase.FAILED, exit_code=ExitCode.TERMINATED),
        IncidentKind.PREEMPTED,
        FailureClass.PREEMPTION,
        (0,),
    ),
    "out of memory with its agent": (
        Scene().pod(0, phase=PodPhase.FAILED, exit_code=137, reason="OOMKilled"),
        IncidentKind.LOST,
        FailureClass.USER,
        (0,),
    ),
    "its agent died": (
        Scene().silent(1, 1.1, connected=False, problem="refused"),
        IncidentKind.LOST,
        FailureClass.INFRASTRUCTURE,
        (1,),
    ),
    "its node died": (
        Scene().pod(1, node="n", node_ready=False).silent(1, 1.0),
        IncidentKind.LOST,
        FailureClass.INFRASTRUCTURE,
        (1,),
    ),
    "silent, and the other waits for it": (
        Scene().silent(1, 2.0).rank(0, progress_seconds=2.0),
        IncidentKind.LOST,
        FailureClass.INFRASTRUCTURE,
        (1,),
    ),
    "silent, and the other complains": (
        Scene().silent(1, 1.1).rank(0, error=CUT_OFF),
        IncidentKind.LOST,
        FailureClass.INFRASTRUCTURE,
        (1,),
    ),
    "silent while both load": (
        Scene().silent(1, 6.0).rank(0, steps_done=0, phase=Phase.LOADING),
        IncidentKind.LOST,
        FailureClass.INFRASTRUCTURE,
        (1,),
    ),
    "told to go, its rank has ended": (
        Scene().told_to_go(1).rank(1, exit=RankExit(signal=15)),
        IncidentKind.PREEMPTED,
        FailureClass.PREEMPTION,
        (1,),
    ),
    "told to go, and the other is cut off": (
        Scene().told_to_go(1).rank(0, error=CUT_OFF),
        IncidentKind.PREEMPTED,
        FailureClass.PREEMPTION,
        (1,),
    ),
    "deleted and silent: it will not save any more": (
        Scene().pod(1, deleting=True).silent(1, 1.0),
        IncidentKind.PREEMPTED,
        FailureClass.PREEMPTION,
        (1,),
    ),
    "ended by itself before the first launch: the image, or what it imports, is at fault": (
        Scene(launched=False, step=-1).pod(1, phase=PodPhase.FAILED, exit_code=1),
        IncidentKind.LOST,
        FailureClass.USER,
        (1,),
    ),
    "broke by a signal of its own before the first launch": (
        Scene(launched=False, step=-1).pod(1, phase=PodPhase.FAILED, exit_code=132),
        IncidentKind.LOST,
        FailureClass.USER,
        (1,),
    ),
    "ended by itself in a run that has trained: its image has worked before": (
        Scene(launched=False).pod(1, phase=PodPhase.FAILED, exit_code=1),
        IncidentKind.LOST,
        FailureClass.INFRASTRUCTURE,
        (1,),
    ),
    "killed before the first launch": (
        Scene(launched=False, step=-1).pod(1, phase=PodPhase.FAILED, exit_code=137),
        IncidentKind.LOST,
        FailureClass.INFRASTRUCTURE,
        (1,),
    ),
    "its agent failed before the first launch": (
        Scene(launched=False, step=-1).pod(1, phase=PodPhase.FAILED, exit_code=ExitCode.AGENT_FAILED),
        IncidentKind.LOST,
        FailureClass.INFRASTRUCTURE,
        (1,),
    ),
    "refused by the kubelet before the first launch": (
        Scene(launched=False, step=-1).pod(1, phase=PodPhase.FAILED, reason="UnexpectedAdmissionError"),
        IncidentKind.LOST,
        FailureClass.INFRASTRUCTURE,
        (1,),
    ),
    "its node could not start it": (
        Scene(launched=False, step=-1).pod(
            1, phase=PodPhase.FAILED, exit_code=128, reason="StartError", message=NO_DRIVER
        ),
        IncidentKind.LOST,
        FailureClass.INFRASTRUCTURE,
        (1,),
    ),
    "its agent ended while its ranks trained": (
        Scene().pod(1, phase=PodPhase.FAILED, exit_code=1),
        IncidentKind.LOST,
        FailureClass.INFRASTRUCTURE,
        (1,),
    ),
    "succeeded before the launch": (
        Scene(launched=False, step=-1).pod(1, phase=PodPhase.SUCCEEDED, exit_code=0),
        IncidentKind.LOST,
        FailureClass.INFRASTRUCTURE,
        (1,),
    ),
    "never heard before the launch, for longer than starting may take": (
        Scene(launched=False).unheard(1, 21.0),
        IncidentKind.LOST,
        FailureClass.INFRASTRUCTURE,
        (1,),
    ),
    "never heard before the launch, on a dead node": (
        Scene(launched=False).unheard(1, 6.0).pod(1, node_ready=False, age_seconds=6.0),
        IncidentKind.LOST,
        FailureClass.INFRASTRUCTURE,
        (1,),
    ),
    "silent before the launch": (
        Scene(launched=False).silent(1, 6.0),
        IncidentKind.LOST,
        FailureClass.INFRASTRUCTURE,
        (1,),
    ),
}


@pytest.mark.parametrize("why", GONE)
def test_a_worker_that_is_gone(why: str) -> None:
    """It is named with the class of failure that pays for it, and only it is blamed."""
    scene, kind, failure, workers = GONE[why]
    incident = scene.incident
    assert incident is not None
    assert (incident.kind, incident.failure, incident.workers) == (kind, failure, workers)
    assert incident.verdict.ranks == (workers if scene.launched else ())
    assert incident.verdict.confidence > 0.9


@pytest.mark.parametrize(
    ("reason", "code", "said"),
    [
        ("StartError", 128, f'{RUNC}: exec: "mend-agent": executable file not found in $PATH: unknown'),
        ("StartError", 128, f'{RUNC}: exec: "/src/mend-agent": permission denied: unknown'),
        ("StartError", 128, f'{RUNC}: exec: "/bin/mend-agent": stat /bin/mend-agent: no such file or directory'),
        ("ContainerCannotRun", 128, "OCI runtime create failed: exec /bin/mend-agent: exec format error"),
        ("Error", ExitCode.NOT_FOUND, ""),
    ],
)
def test_an_image_without_the_command_is_not_tried_again(reason: str, code: int, said: str) -> None:
    """What the container runtime says of a command that it cannot execute would be the same on any node."""
    scene = Scene(launched=False).pod(1, phase=PodPhase.FAILED, exit_code=code, reason=reason, message=said)
    incident = scene.incident
    assert incident is not None
    assert (incident.failure, incident.fatal) == (FailureClass.USER, True)


ALL_WELL: dict[str, Scene] = {
    "nothing at all": Scene(),
    "silent while the other steps on": Scene().silent(1, 25.0),
    "nobody is heard: the controller may be cut off": late(20.0).silent(0, 20.0).silent(1, 20.0),
    "told to go, but it may yet save": Scene().pod(1, deleting=True).told_to_go(1),
    "deleted before the launch: it is made anew": Scene(launched=False).pod(1, deleting=True),
    "not there before the launch": Scene(launched=False).no_pod(1),
    "refused by an agent that is starting": Scene().silent(1, 0.5, connected=False, problem="refused"),
    "cut off a moment ago: the cause will show": Scene().rank(0, error=replace(CUT_OFF, age_seconds=0.2)),
    "cut off by one that has missed a heartbeat": (
        Scene().rank(0, error=replace(CUT_OFF, age_seconds=0.8)).silent(1, 0.7)
    ),
    "cut off by one that a new controller has not heard yet": (
        Scene().rank(0, error=replace(CUT_OFF, age_seconds=9.0)).unheard(1, 0.2)
    ),
    "finished": Scene().rank(0, exit=RankExit(code=0)).rank(1, exit=RankExit(code=0)),
    "one saves while the other waits": late(3.0).rank(1, phase=Phase.SAVING),
}


@pytest.mark.parametrize("why", ALL_WELL)
def test_no_incident(why: str) -> None:
    """What may be well is left alone."""
    assert ALL_WELL[why].incident is None


def test_when_nobody_is_heard_for_too_long_nobody_is_blamed() -> None:
    """In the end something must be done, but the controller may be the one that is cut off."""
    incident = late(40.0).silent(0, 40.0).silent(1, 40.0).incident
    assert incident is not None
    assert (incident.workers, incident.verdict.ranks, incident.verdict.confidence) == ((0, 1), (), 0.0)


CLASSES: dict[str, tuple[dict[str, object], FailureClass, bool]] = {
    "killed": ({"exit": RankExit(signal=9)}, FailureClass.INFRASTRUCTURE, False),
    "out of memory": ({"exit": RankExit(signal=9, oom_killed=True)}, FailureClass.USER, False),
    "exit code": ({"exit": RankExit(code=3)}, FailureClass.USER, False),
    "exception": ({"error": RankError(type="ValueError", message="the taxid is bad")}, FailureClass.USER, False),
    "hardware": (
        {"error": RankError(type="RuntimeError", message="CUDA error: Xid 79")},
        FailureClass.INFRASTRUCTURE,
        False,
    ),
    "index out of bounds": (
        {"error": RankError(type="RuntimeError", message="CUDA error: device-side assert triggered")},
        FailureClass.USER,
        False,
    ),
    "misfit": ({"exit": RankExit(code=ExitCode.MISFIT)}, FailureClass.USER, True),
    "no such command": ({"exit": RankExit(code=ExitCode.NOT_FOUND)}, FailureClass.USER, True),
    "fatal by its own word": ({"error": RankError(type="E", message="", fatal=True)}, FailureClass.USER, True),
}


@pytest.mark.parametrize("how", CLASSES)
def test_who_pays_for_a_crash(how: str) -> None:
    """The failure class, and whether trying again can help."""
    changes, failure, fatal = CLASSES[how]
    incident = Scene().rank(1, **changes).incident
    assert incident is not None
    assert (incident.kind, incident.failure, incident.fatal) == (IncidentKind.CRASHED, failure, fatal)
    assert incident.verdict.ranks == (1,)
    assert bool(incident.fingerprint) == (failure is FailureClass.USER)


def evidence(rank: int, state: str = "S", step: int = 20) -> RankEvidence:
    """Evidence about a rank that waits, or is stopped."""
    group = GroupProgress(name="dp", last_enqueued=22, last_completed=21, last_enqueued_name="x")
    alive = state == "S"
    return RankEvidence(
        rank=rank, process_state=state, step=step, groups=(group,) if alive else (), recorder_answered=alive
    )


def test_a_hang_asks_for_evidence_first() -> None:
    """Nothing is judged before anybody was asked."""
    incident = late().incident
    assert incident is not None
    assert (incident.kind, incident.needs_evidence, incident.verdict.is_known) == (IncidentKind.HUNG, True, False)


def test_a_standstill_must_have_been_heard_of() -> None:
    """A rank may have marked since its agent's last heartbeat: the age of what it told is no age of its progress."""
    told = Scene().rank(0, progress_seconds=0.7).rank(1, progress_seconds=0.7)
    assert told.silent(0, 0.4).silent(1, 0.4).incident is None
    told = Scene().rank(0, progress_seconds=0.81).rank(1, progress_seconds=0.81)
    assert told.silent(0, 0.0).silent(1, 0.0).incident is not None


@pytest.mark.parametrize(
    ("states", "patience"),
    [(("S", "S"), 8.0), (("S", "R"), 8.0), (("S", "D"), 8.0), (("S", "T"), 0.0), (("Z", "S"), 0.0)],
)
def test_only_the_kernels_word_makes_patience_needless(states: tuple[str, str], patience: float) -> None:
    """A stopped or a dead process does not go on by itself; one that sleeps, runs or waits for a disk may."""
    incident = late(2.0).asked(*(evidence(n, state) for n, state in enumerate(states))).incident
    assert incident is not None
    assert incident.patience_seconds == pytest.approx(patience)


@pytest.mark.parametrize(
    ("lags", "can_rejoin", "first_tier", "patience"),
    [
        (True, True, FirstTier.REJOIN, 0.41),
        (False, True, FirstTier.REJOIN, 1.66),  # nobody to blame, so all would have to restart
        (True, False, FirstTier.REJOIN, 1.66),
        (True, True, FirstTier.RESTART_RANKS, 1.66),
    ],
)
def test_a_pause_is_borne_for_as_long_as_this_very_cure_would_cost(
    lags: bool, can_rejoin: bool, first_tier: FirstTier, patience: float
) -> None:
    """Two seconds beyond the limit of 0.16, three quarters of one only where the ranks that are left can rejoin."""
    spec = replace(SPEC, recovery=replace(SPEC.recovery, first_tier=first_tier))
    scene = late(0.5).rank(0, can_rejoin=can_rejoin).rank(1, can_rejoin=True)
    group = GroupProgress(name="dp", last_enqueued=21, last_completed=21, last_enqueued_name="x")
    other = replace(evidence(1), groups=(group,)) if lags else evidence(1)
    fast = StepTimes(seconds=(0.1,) * 10)
    incident = diagnose(spec, replace(scene.asked(evidence(0), other).seen, step_times=fast))
    assert incident is not None
    assert incident.verdict.is_known is lags
    assert incident.patience_seconds == pytest.approx(patience)


@pytest.mark.parametrize(
    ("sight", "patience"),
    [
        ({}, 2.0),  # eight medians of half a second: it does nothing at all
        ({"cpu_share": 0.9}, 8.0),  # twenty: it may come to the end of a long step
        ({"threads_running": 1}, 8.0),
        ({"process_state": "D"}, 8.0),
    ],
)
def test_a_rank_that_works_is_waited_for_longer(sight: dict[str, object], patience: float) -> None:
    """One that was seen to compute, or to wait for a disk, is given more steps than one that merely sleeps."""
    group = GroupProgress(name="dp", last_enqueued=21, last_completed=21, last_enqueued_name="x")
    scene = late(2.0).asked(evidence(0), replace(evidence(1), groups=(group,), **sight))
    assert scene.incident is not None
    assert scene.incident.verdict.ranks == (1,)
    assert scene.incident.patience_seconds == pytest.approx(patience)


def eating(growth: int, used: int, at_seconds: float = 8.5) -> Scene:
    """Rank 1 takes up so many MiB a second, of 2 GiB of which so many are used, while rank 0 waits for it."""
    eater = RankEvidence(
        rank=1,
        process_state="R",
        step=20,
        groups=(GroupProgress(name="dp", last_enqueued=21, last_completed=21, last_enqueued_name="x"),),
        recorder_answered=True,
        progress_seconds=at_seconds,
        memory_growth=growth * MIB,
    )
    scene = late(10.1).asked(evidence(0), eater)
    scene.evidence = (
        scene.evidence[0],
        replace(scene.evidence[1], memory_used=used * MIB, memory_limit=2048 * MIB),
    )
    return scene


def test_a_rank_that_takes_up_memory_is_left_to_the_kernel() -> None:
    """Patience has run out, and yet nobody is killed for a hang while an OOM kill is due: that says more."""
    incident = eating(growth=512, used=1024).incident
    assert incident is not None
    assert incident.patience_seconds == pytest.approx(2.5 + 3 * 2 + 2 - 4.1, abs=0.2)
    words = "rank 1 takes up 0.5 GiB of memory a second; worker 1 has 1 of its 2 GiB in use"
    assert incident.awaiting == words
    assert (incident.verdict.ranks, incident.verdict.reasons[-1]) == ((1,), words)


@pytest.mark.parametrize(
    "scene",
    [
        eating(growth=10, used=1024),  # it would last for minutes: that is no reason to stand still
        eating(growth=512, used=1024, at_seconds=-4.0),  # it should have been killed long ago
        eating(growth=0, used=2048),
    ],
)
def test_the_kernel_is_not_waited_for_without_end(scene: Scene) -> None:
    """Where no kill is due, or none came, it is the hang that it seems to be."""
    incident = scene.incident
    assert incident is not None
    assert (incident.patience_seconds, incident.awaiting) == (0.0, "")


def test_a_rank_that_is_killed_while_it_is_asked_about_has_crashed() -> None:
    """The kernel's kill makes a crash of what was noted as a hang, paid by the user."""
    incident = eating(growth=512, used=1024).rank(1, exit=RankExit(signal=9, oom_killed=True)).incident
    assert incident is not None
    assert (incident.kind, incident.failure) == (IncidentKind.CRASHED, FailureClass.USER)
    assert incident.verdict.ranks == (1,)


def test_patience_runs_out() -> None:
    """Twenty steps after the last mark, longer than a limit of 1.6 and a pause, whatever the evidence says."""
    incident = late(10.1).asked(evidence(0), evidence(1)).incident
    assert incident is not None
    assert (incident.needs_evidence, incident.patience_seconds) == (False, 0.0)


def test_evidence_names_the_culprit() -> None:
    """Once all were asked, the verdict stands."""
    incident = late().asked(evidence(0), evidence(1, "T")).incident
    assert incident is not None
    assert (incident.needs_evidence, incident.verdict.ranks) == (False, (1,))


@pytest.mark.parametrize(
    ("state", "phases", "faults"),
    [
        ("SD", (Phase.COLLECTIVE, Phase.STEP), {1: "rank 1 hangs in the kernel"}),
        ("SD", (Phase.COLLECTIVE, Phase.LOADING), {}),
        ("SD", (Phase.COLLECTIVE, Phase.SAVING), {}),
        ("SD", (Phase.COLLECTIVE, Phase.DATA), {}),
        ("DD", (Phase.STEP, Phase.STEP), {}),
        ("ST", (Phase.COLLECTIVE, Phase.STEP), {}),
    ],
)
def test_a_machine_is_at_fault_for_a_rank_that_hangs_in_its_kernel_alone(
    state: str, phases: tuple[Phase, Phase], faults: dict[int, str]
) -> None:
    """Not with ranks of other machines, nor in a phase that waits for storage: then for what others serve."""
    told = [replace(evidence(n, state[n]), phase=phases[n]) for n in (0, 1)]
    incident = late(4.1).asked(*told).incident
    assert incident is not None
    assert incident.machine_faults == faults


@pytest.mark.parametrize(("steps_done", "is_before"), [(0, True), (3, False)])
def test_a_hang_before_the_culprits_first_step_is_told(steps_done: int, is_before: bool) -> None:
    """What hangs at its start may do so on any machine."""
    incident = late(3600.0).rank(1, steps_done=steps_done).asked(evidence(0), evidence(1, "T")).incident
    assert incident is not None
    assert (incident.verdict.ranks, incident.before_stepping) == ((1,), is_before)


@pytest.mark.parametrize(("steps_done", "is_waited_for"), [(0, True), (3, False)])
def test_a_program_that_crashes_at_its_start_may_do_so_in_every_rank(steps_done: int, is_waited_for: bool) -> None:
    """A tenth of a second tells one rank's signal from everybody's; a rank that has stepped is not waited for."""
    crashed = (
        Scene().silent(0, 0.0).silent(1, 0.0).rank(1, steps_done=steps_done, exit=RankExit(signal=11, age_seconds=0.02))
    )
    assert (crashed.incident is None) is is_waited_for
    both = crashed.rank(0, steps_done=steps_done, exit=RankExit(signal=11, age_seconds=0.01)).incident
    assert both is not None
    assert both.verdict.ranks == (0, 1)


def test_evidence_of_an_earlier_stall_is_not_used() -> None:
    """The gang went on by itself after it was gathered, and hangs again: who was guilty then need not be now."""
    incident = late().asked(evidence(0, step=12), evidence(1, "T", step=12)).incident
    assert incident is not None
    assert (incident.needs_evidence, incident.verdict.is_known) == (True, False)


def test_survivors_that_complain_lead_to_the_stopped_one() -> None:
    """All that ended were cut off; the living one is stopped."""
    scene = Scene().rank(0, error=replace(CUT_OFF, age_seconds=1.0))
    asked = scene.incident
    assert asked is not None
    assert asked.needs_evidence
    judged = scene.asked(evidence(0), evidence(1, "T")).incident
    assert judged is not None
    assert (judged.verdict.ranks, judged.summary) == ((1,), "rank 1 is stopped (state T)")


def test_one_that_finished_early_is_named_when_the_others_wait_for_it() -> None:
    """Ranks with unequal data: one has ended, the other waits in a collective."""
    incident = late().rank(1, exit=RankExit(code=0)).asked(evidence(0)).incident
    assert incident is not None
    assert incident.verdict.ranks == (1,)


def test_divergence_is_acted_on_only_when_asked_for() -> None:
    """A loss that is no number rolls back only with spec.recovery.rollBackOnDivergence."""
    scene = Scene().rank(0, nonfinite=True)
    assert scene.incident is None
    willing = replace(SPEC, recovery=replace(SPEC.recovery, roll_back_on_divergence=True))
    incident = diagnose(willing, scene.seen)
    assert incident is not None
    assert (incident.kind, incident.verdict.ranks) == (IncidentKind.DIVERGED, ())


def a_standing(above: int) -> LossStanding:
    """A loss that is high, for so many points up to step 20."""
    return LossStanding(
        step=20,
        loss=9.0,
        median=3.0,
        bound=3.6,
        deviations=200.0,
        above=above,
        above_since_step=21 - above if above else None,
        above_seconds=0.5 * above,
    )


@pytest.mark.parametrize(("above", "is_one"), [(0, False), (15, False), (16, True), (17, True)])
def test_a_loss_that_went_up_is_an_incident_once_it_has_stayed_long_enough(above: int, is_one: bool) -> None:
    """As many points in a row as the rule says; it tells since when, and from which step on nothing is sound."""
    willing = replace(SPEC, health=replace(SPEC.health, loss_spike=LossSpike(roll_back=True)))
    incident = diagnose(willing, replace(Scene().seen, losses=a_standing(above)))
    assert (incident is not None) is is_one
    if incident is not None:
        assert (incident.kind, incident.verdict.ranks) == (IncidentKind.DIVERGED, ())
        assert incident.sound_before == 20 - above
        assert incident.summary == f"the loss went up at step {21 - above} and stayed: 9 after 3"
        assert (
            "10 deviations, and at least 20%, above the median of the 256 before them, 3" in incident.verdict.reasons[0]
        )


def test_a_loss_that_went_up_is_left_alone_unless_asked_for() -> None:
    """By default it is measured and nothing else; what is worse than a high loss comes first."""
    assert diagnose(SPEC, replace(Scene().seen, losses=a_standing(100))) is None
    willing = replace(SPEC, health=replace(SPEC.health, loss_spike=LossSpike(roll_back=True)))
    crashed = replace(Scene().rank(0, exit=RankExit(signal=9)).seen, losses=a_standing(100))
    incident = diagnose(willing, crashed)
    assert incident is not None
    assert incident.kind is IncidentKind.CRASHED


@pytest.mark.parametrize(
    "scene", [Scene(), late(), late(100.0).silent(1, 50.0), Scene().rank(0, exit=RankExit(code=1))]
)
def test_looking_again_is_never_a_busy_loop(scene: Scene) -> None:
    """However overdue something is."""
    assert seconds_until_diagnosis(SPEC, scene.seen) >= 0.02
    assert seconds_until_diagnosis(SPEC, Scene().seen) == pytest.approx(0.7)


def test_two_errors_of_one_type_at_the_same_step_are_two() -> None:
    """Only the same error twice gives up early; addresses, digests and counts in a message do not tell errors apart."""

    def after(message: str) -> str:
        incident = Scene().rank(1, error=RankError(type="ValueError", message=message)).incident
        assert incident is not None
        return incident.fingerprint

    assert after("bad sample") != after("bad label")
    assert after("sample 12 at 0x7f3a is bad\nsee below") == after("sample 7 at 0x99ff is bad\nor not")


RAISED = RankError(type="ValueError", message="bad sample", age_seconds=0.01)


def test_an_exception_waits_a_moment_for_the_others() -> None:
    """Every rank may be about to raise the same; a tenth of a second later, or once all have, nothing is waited for."""
    scene = Scene().silent(0, 0.02).rank(0, error=RAISED)
    assert diagnose(SPEC, scene.seen) is None
    assert seconds_until_diagnosis(SPEC, scene.seen) <= 0.1
    late = Scene().silent(0, 0.2).rank(0, error=RAISED)
    assert (found := diagnose(SPEC, late.seen)) is not None
    assert found.verdict.ranks == (0,)
    everyone = Scene().silent(0, 0.02).silent(1, 0.02).rank(0, error=RAISED).rank(1, error=RAISED)
    assert (found := diagnose(SPEC, everyone.seen)) is not None
    assert found.verdict.ranks == (0, 1)


def test_a_signal_is_acted_on_at_once() -> None:
    """A kill is no mistake of the code: nobody else will be killed by it."""
    found = diagnose(SPEC, Scene().silent(1, 0.0).rank(1, exit=RankExit(signal=9)).seen)
    assert found is not None
    assert found.verdict.ranks == (1,)


def test_ages_of_failures_are_compared_as_of_now() -> None:
    """Rank 1's exception came with an older heartbeat: it is the earlier one, although its age was told as less."""
    scene = Scene().silent(0, 0.1).silent(1, 0.8)
    scene.rank(0, error=RankError(type="KeyError", message="x", age_seconds=0.5))
    scene.rank(1, error=RankError(type="ValueError", message="bad", age_seconds=0.1))
    found = diagnose(SPEC, scene.seen)
    assert found is not None
    assert found.verdict.ranks == (1,)
    assert found.verdict.confidence == 0.95


ILL = ("condition KernelDeadlock",)


@pytest.mark.parametrize(("problems", "is_lost"), [((), False), (ILL, True)])
def test_a_complaint_about_the_machine_explains_a_silence(problems: tuple[str, ...], is_lost: bool) -> None:
    """While ranks load, each by itself, a silent agent on a machine that is complained about is lost sooner."""
    scene = Scene().pod(1, node="n1", node_problems=problems).silent(1, 2.0)
    for number in (0, 1):
        scene.rank(number, phase=Phase.LOADING, steps_done=0, step=-1)
    incident = diagnose(SPEC, scene.seen)
    assert (incident is not None) is is_lost
    if incident is not None:
        assert incident.machine_faults == {1: "worker 1: node n1 has condition KernelDeadlock"}


def test_no_complaint_explains_the_silence_of_all() -> None:
    """When nobody is heard the controller may be cut off, and a machine's illness says nothing about that."""
    scene = Scene().pod(1, node="n1", node_problems=ILL).silent(0, 2.0).silent(1, 2.0)
    assert diagnose(SPEC, scene.seen) is None


@pytest.mark.parametrize(
    ("said", "is_machine"),
    [
        ("CUDA error: uncorrectable ECC error encountered", True),
        ("NVRM: Xid (PCI:0000:3b:00): 79, pid=1", True),
        ("NVRM: Xid (PCI:0000:64:00): 13, Graphics Exception", False),
        ("CUDA error: an illegal memory access was encountered", False),
        ("CUDA error: device-side assert triggered", False),
    ],
)
def test_only_words_of_broken_hardware_blame_the_machine(said: str, is_machine: bool) -> None:
    """A CUDA error may be the code's; an uncorrectable memory error never is."""
    error = RankError(type="RuntimeError", message=said)
    scene = Scene().pod(1, node="n1").rank(1, error=error, exit=RankExit(code=1, age_seconds=1.0))
    incident = diagnose(SPEC, scene.seen)
    assert incident is not None
    assert (1 in incident.machine_faults) is is_machine


@pytest.mark.parametrize(
    ("spent", "may_rejoin", "pause"),
    [
        ((), True, 0.75),  # what a rejoin costs
        ((), False, 2.0),  # what a restart does
        ((99_000.0,), True, 1.5),
        ((98_000.0, 99_000.0), True, 3.0),
        ((1_000.0, 99_000.0), True, 1.5),  # a day ago: forgotten
    ],
)
def test_patience_grows_with_each_hang_of_a_day(spent: tuple[float, ...], may_rejoin: bool, pause: float) -> None:
    """A loop that pauses by design, and does not mark it, is killed for that a few times and then waited for."""
    scene = Scene().rank(0, can_rejoin=may_rejoin).rank(1, can_rejoin=may_rejoin)
    status = replace(scene.seen.status, spent={FailureClass.HANG: spent}, attempt_started_at=100_000.0)
    seen = replace(scene.seen, status=status, step_times=StepTimes(seconds=(0.02,) * 10))
    assert limits_now(SPEC, seen).pause_seconds == pause


@pytest.mark.parametrize(("idle", "borne"), [(False, 10.0 - 0.8), (True, 4.0 - 0.8)])
def test_what_was_learnt_of_steps_is_doubled_too(idle: bool, borne: float) -> None:
    """A run of long steps, of which more is borne anyway, is not killed for one pause until its budget is spent."""
    scene = Scene().rank(0, can_rejoin=True).rank(1, can_rejoin=True)
    for hangs in range(3):
        status = replace(
            scene.seen.status, spent={FailureClass.HANG: (99_000.0,) * hangs}, attempt_started_at=100_000.0
        )
        found = limits_now(SPEC, replace(scene.seen, status=status), idle=idle).pause_seconds
        assert found == pytest.approx(borne * 2**hangs)


def test_a_pause_that_is_given_holds() -> None:
    """However often ranks were killed for longer ones."""
    limits = replace(SPEC.health.limits, pause_seconds=0.3)
    given = replace(SPEC, health=replace(SPEC.health, limits=limits))
    status = replace(Scene().seen.status, spent={FailureClass.HANG: (1.0,) * 9}, attempt_started_at=2.0)
    assert limits_now(given, replace(Scene().seen, status=status)).pause_seconds == 0.3
