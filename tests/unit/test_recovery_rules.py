"""The user's rules: what they may say, what they see, and that the first that fits decides."""

from __future__ import annotations

import time
from typing import Any

import pytest
from msgspec.structs import replace

from mend.heartbeats import RankError, RankExit
from mend.incidents import FailureClass, Incident, IncidentKind, Tier, Verdict
from mend.observation import Observation, PodPhase, WorkerPod
from mend.patterns import is_in, problem_of
from mend.rules import Symptoms, answers, rule_for
from mend.ruleset import Rule
from mend.spec import InvalidSpec, Spec
from mend.status import RunPhase, RunStatus
from world import World, a_spec


def a_spec_with(*rules: dict[str, Any]) -> Spec:
    """A run with these rules, which are named by their number unless they have a name."""
    named = [{"name": f"rule {n}", **rule} for n, rule in enumerate(rules)]
    return a_spec(2, 2, recovery={"rules": named})


def the_rule(**rule: Any) -> Rule:
    """One parsed rule."""
    (parsed,) = a_spec_with({"action": "Ignore", **rule}).recovery.rules
    return parsed


def problems_of(*rules: Any) -> str:
    """What the parser says against rules."""
    with pytest.raises(InvalidSpec) as caught:
        a_spec(2, 2, recovery={"rules": list(rules)})
    return str(caught.value)


OOM = {"name": "oom", "action": "FailRun", "onReasons": ["OOMKilled"]}


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("x", 'spec.recovery.rules[0]: got "x"; expected an object'),
        ({**OOM, "name": ""}, 'spec.recovery.rules[0].name: got ""; expected up to 63 letters'),
        ({**OOM, "action": "Reboot"}, 'rules[0].action: got "Reboot"; expected one of Restart, ReplaceWorker'),
        ({"name": "all", "action": "Ignore"}, "rules[0].onExitCodes: got nothing; expected one of onExitCodes"),
        ({**OOM, "budget": "mine"}, 'rules[0].budget: got "mine"; expected one of user, infrastructure'),
        ({**OOM, "onReasons": "OOMKilled"}, 'rules[0].onReasons: got "OOMKilled"; expected a list'),
        ({**OOM, "onReasons": ["a b"]}, 'rules[0].onReasons[0]: got "a b"; expected a reason such as OOMKilled'),
        ({**OOM, "onLogPattern": "("}, 'rules[0].onLogPattern: got "("; expected a regular expression in RE2'),
        ({**OOM, "onLogPattern": "a(?=b)"}, "invalid perl operator"),
        ({**OOM, "onLogPattern": "x" * 257}, "expected at most 256 characters"),
        ({**OOM, "onExitCodes": {"operator": "Is", "values": [1]}}, 'operator: got "Is"; expected In or NotIn'),
        ({**OOM, "onExitCodes": {"operator": "In", "values": []}}, "values: got nothing; expected one whole number"),
        ({**OOM, "onExitCodes": {"operator": "In", "values": [0]}}, "values: got 0; expected codes of failures"),
        ({**OOM, "onExitCodes": {"operator": "In", "values": [256]}}, "values[0]: got 256; expected a whole number"),
        ({**OOM, "onNodeConditions": [{"status": "True"}]}, "onNodeConditions[0].type: missing"),
        ({**OOM, "onReason": ["x"]}, "rules[0].onReason: unknown field; did you mean onReasons?"),
    ],
    ids=lambda each: str(each)[:40] if isinstance(each, str) else "",
)
def test_a_bad_rule_is_named_with_its_field(rule: Any, said: str) -> None:
    """Each mistake names the rule by its place, the field, the value and what is expected."""
    assert said in problems_of(rule)


def test_two_rules_of_one_name_are_refused() -> None:
    """Events could not say which of them decided."""
    assert 'spec.recovery.rules: got "oom"; expected a name of its own' in problems_of(OOM, OOM)


def test_too_many_rules_are_refused() -> None:
    """Every rule is asked at every incident."""
    many = [{**OOM, "name": f"r{n}"} for n in range(21)]
    assert 'spec.recovery.rules: got "21 entries"; expected at most 20' in problems_of(*many)


SYMPTOMS = Symptoms(
    exit_codes=frozenset({3}),
    reasons=frozenset({"crashed", "ValueError"}),
    node_conditions=frozenset({"KernelDeadlock=True"}),
    lines=("step 7", "ValueError: NCCL watchdog at step 8"),
)


@pytest.mark.parametrize(
    ("rule", "fits"),
    [
        ({"onExitCodes": {"operator": "In", "values": [2, 3]}}, True),
        ({"onExitCodes": {"operator": "In", "values": [2]}}, False),
        ({"onExitCodes": {"operator": "NotIn", "values": [2]}}, True),
        ({"onExitCodes": {"operator": "NotIn", "values": [3]}}, False),
        ({"onReasons": ["OOMKilled", "ValueError"]}, True),
        ({"onReasons": ["valueerror"]}, False),
        ({"onNodeConditions": [{"type": "KernelDeadlock"}]}, True),
        ({"onNodeConditions": [{"type": "KernelDeadlock", "status": "False"}]}, False),
        ({"onLogPattern": "NCCL .* step [0-9]+$"}, True),
        ({"onLogPattern": "^NCCL"}, False),
        ({"onReasons": ["ValueError"], "onLogPattern": "NCCL"}, True),
        ({"onReasons": ["OOMKilled"], "onLogPattern": "NCCL"}, False),
    ],
)
def test_a_rule_fits_when_everything_in_it_does(rule: dict[str, Any], fits: bool) -> None:
    """Within a field one value is enough; of the fields, all must fit."""
    assert answers(the_rule(**rule), SYMPTOMS) is fits


def test_a_rule_on_exit_codes_needs_an_exit() -> None:
    """A hang, in which nobody exits, fits no rule on exit codes, not even a NotIn."""
    hung = Symptoms(frozenset(), frozenset({"hung"}), frozenset(), ())
    assert not answers(the_rule(onExitCodes={"operator": "NotIn", "values": [1]}), hung)


def test_a_pattern_cannot_keep_the_controller_busy() -> None:
    """What would take an engine that backtracks longer than the universe lives is answered at once."""
    began = time.process_time()
    assert not is_in("(a+)+$", "a" * 1000 + "b")
    assert time.process_time() - began < 1.0
    assert problem_of("(a+)+$") == ""


SEEN = Observation(
    name="clio",
    namespace="team",
    uid="u",
    generation=1,
    created_at=0.0,
    status=RunStatus(attempt=5, participants=(0, 1)),
    pods=(
        WorkerPod(index=0, name="p0", uid="u0", phase=PodPhase.RUNNING, node_conditions=("GpuMissing=True",)),
        WorkerPod(
            index=1,
            name="p1",
            uid="u1",
            phase=PodPhase.FAILED,
            exit_code=137,
            reason="OOMKilled",
            log_tail=("killed process 7",),
        ),
    ),
)
LOST = Incident(
    kind=IncidentKind.LOST,
    failure=FailureClass.USER,
    attempt=5,
    ranks=(2, 3),
    workers=(1,),
    age_seconds=0.0,
    verdict=Verdict(ranks=(2, 3), confidence=0.95),
    summary="",
)


def test_the_first_rule_that_fits_decides() -> None:
    """In the order in which they are written; none may fit."""
    spec = a_spec_with(
        {"action": "FailRun", "onReasons": ["Evicted"]},
        {"action": "Restart", "onExitCodes": {"operator": "In", "values": [137]}},
        {"action": "Ignore", "onReasons": ["lost"]},
    )
    rule = rule_for(spec, SEEN, LOST)
    assert rule is not None
    assert rule.name == "rule 1"
    assert rule_for(a_spec_with({"action": "FailRun", "onReasons": ["Evicted"]}), SEEN, LOST) is None
    assert rule_for(a_spec(2, 2), SEEN, LOST) is None


def test_rules_look_at_the_culprit_and_at_nobody_else() -> None:
    """The other worker's node has a condition of its own, which is no reason for anything."""
    other = a_spec_with({"action": "ExcludeNode", "onNodeConditions": [{"type": "GpuMissing"}]})
    assert rule_for(other, SEEN, LOST) is None
    assert rule_for(other, SEEN, replace(LOST, workers=(0,), verdict=Verdict(ranks=(0,), confidence=0.9))) is not None
    mine = a_spec_with({"action": "FailRun", "onLogPattern": "killed process [0-9]+"})
    assert rule_for(mine, SEEN, LOST) is not None


def crash(world: World, exit: RankExit, error: RankError | None = None) -> None:
    """Rank 1 ends so."""
    rank = world.live_ranks()[1]
    world.harmed_ranks.add((world.status.attempt, rank.number))
    rank.end(world.now, exit, error)


@pytest.mark.parametrize(
    ("action", "tier"),
    [
        ("Restart", Tier.RESTART_RANKS),
        ("ReplaceWorker", Tier.REPLACE_WORKER),
        ("ExcludeNode", Tier.EXCLUDE_NODE),
        ("Ignore", Tier.RESTART_RANKS),
        ("FailRun", Tier.GIVE_UP),
    ],
)
def test_what_an_action_does(action: str, tier: Tier) -> None:
    """Each action leads to its tier, the incident names the rule, and all but Ignore draw on the budget."""
    spec = a_spec_with({"name": "mine", "action": action, "onExitCodes": {"operator": "In", "values": [3]}})
    world = World(spec, nodes=3).until_step(12)
    crash(world, RankExit(code=3))
    world.until_end()
    incident = world.status.incidents[0]
    assert (incident.tier, incident.rule) == (tier, "mine")
    spent = world.status.spent.get(FailureClass.USER, ())
    assert len(spent) == (0 if action in ("Ignore", "FailRun") else 1)
    assert [each.node for each in world.book] == (["node-0"] if action == "ExcludeNode" else [])
    assert world.status.phase is (RunPhase.FAILED if action == "FailRun" else RunPhase.SUCCEEDED)


@pytest.mark.parametrize(("action", "struck"), [("Ignore", ["node-1"]), ("Restart", [])])
def test_a_rule_that_ignores_changes_nothing_but_the_budget(action: str, struck: list[str]) -> None:
    """The machine of a rank that died on a node with a fault gets its strike as without the rule."""
    world = World(a_spec_with({"action": action, "onReasons": ["SIGKILL"]}), nodes=3).until_step(12)
    world.make_node_ill(1, "condition KernelDeadlock")
    world.harm_rank(2, "kill")
    world.until_end()
    assert [each.node for each in world.book] == struck
    assert world.status.incidents[0].rule == "rule 0"


def test_a_rule_names_the_budget_that_pays() -> None:
    """An exit that is no fault of the training code can be paid from another budget than the user's."""
    spec = a_spec_with(
        {"action": "Restart", "budget": "infrastructure", "onExitCodes": {"operator": "In", "values": [3]}}
    )
    world = World(spec, nodes=3).until_step(12)
    crash(world, RankExit(code=3))
    world.until_end()
    assert {name: len(spent) for name, spent in world.status.spent.items()} == {FailureClass.INFRASTRUCTURE: 1}


def test_a_rule_knows_better_than_the_exit_code() -> None:
    """A code that mend holds to be hopeless is tried again when a rule says so; without one the run fails."""
    rules = ({"action": "Restart", "onExitCodes": {"operator": "In", "values": [65]}},)
    ends = []
    for spec in (a_spec_with(*rules), a_spec(2, 2)):
        world = World(spec, nodes=3).until_step(12)
        crash(world, RankExit(code=65))
        ends.append(world.until_end().status.phase)
    assert ends == [RunPhase.SUCCEEDED, RunPhase.FAILED]
