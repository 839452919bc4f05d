"""The spec parser: a bad value is answered by a sentence that names field, value and remedy, and by nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mend.spec import InvalidSpec, MemoryTier, parse_spec

GOOD: dict[str, Any] = {
    "workers": {
        "replicas": 4,
        "template": {
            "spec": {"containers": [{"name": "trainer", "image": "clio:1", "command": ["python", "train.py"]}]},
        },
    },
    "checkpoint": {"uri": "s3://bucket/clio"},
}
TRAINER = "spec.workers.template.spec.containers[0]"
ABSENT = object()


def changed(path: str, value: Any) -> dict[str, Any]:
    """The good spec with the value at a dotted path (list indices as numbers) replaced, or removed if `ABSENT`."""
    root: Any = {"spec": copy.deepcopy(GOOD)}
    here = root
    *parents, last = [int(word) if word.isdigit() else word for word in path.split(".")]
    for word in parents:
        here = here[word] if isinstance(here, list) else here.setdefault(word, {})
    if value is ABSENT:
        del here[last]
    else:
        here[last] = value
    spec: dict[str, Any] = root["spec"]
    return spec


def problems_of(raw: Any) -> tuple[str, ...]:
    """What the parser says against a spec."""
    with pytest.raises(InvalidSpec) as caught:
        parse_spec(raw)
    return caught.value.problems


BAD = [
    ("spec.workers", ABSENT, "spec.workers: missing; expected an object"),
    ("spec.workers", "four", 'spec.workers: got "four"; expected an object'),
    ("spec.workers.replicas", ABSENT, "spec.workers.replicas: missing; expected a whole number of at least 1"),
    ("spec.workers.replicas", 0, "spec.workers.replicas: got 0; expected a whole number of at least 1"),
    ("spec.workers.replicas", -3, "spec.workers.replicas: got -3; expected a whole number of at least 1"),
    ("spec.workers.replicas", True, "spec.workers.replicas: got true; expected a whole number of at least 1"),
    ("spec.workers.replicas", "4", 'spec.workers.replicas: got "4"; expected a whole number of at least 1'),
    ("spec.workers.replicas", 1.5, "spec.workers.replicas: got 1.5; expected a whole number of at least 1"),
    (
        "spec.health.limits.pause",
        "a while",
        "spec.health.limits.pause: got \"a while\"; expected a duration such as '2s', or 'auto'",
    ),
    (
        "spec.workers.replicas",
        10**40,
        f"spec.workers.replicas: got {10**40}; expected a whole number of at least 1 and at most 4096",
    ),
    (
        "spec.workers.minReplicas",
        5,
        "spec.workers.minReplicas: got 5; expected at most replicas (4) (lower it or raise replicas)",
    ),
    ("spec.workers.spares", -1, "spec.workers.spares: got -1; expected a whole number of at least 0"),
    ("spec.workers.spares", 65, "spec.workers.spares: got 65; expected a whole number of at least 0 and at most 64"),
    (
        "spec.recovery.nodeStrikes.limit",
        0,
        "spec.recovery.nodeStrikes.limit: got 0; expected a whole number of at least 1",
    ),
    (
        "spec.recovery.nodeStrikes.expireAfter",
        "1d",
        "spec.recovery.nodeStrikes.expireAfter: got \"1d\"; expected a duration above zero such as '24h'",
    ),
    (
        "spec.recovery.nodeCheck",
        "Often",
        'spec.recovery.nodeCheck: got "Often"; expected one of Never, Suspects, Always',
    ),
    ("spec.recovery.rules", {}, "spec.recovery.rules: got {}; expected a list"),
    ("spec.workers.ranksPerWorker", 0, "spec.workers.ranksPerWorker: got 0; expected a whole number of at least 1"),
    ("spec.workers.template", ABSENT, "spec.workers.template: missing; expected an object"),
    ("spec.workers.template", {}, "spec.workers.template.spec.containers: got nothing; expected a list of containers"),
    ("spec.workers.template.spec", {"containers": 7}, "containers: got 7; expected a list of containers"),
    (
        "spec.workers.template.spec.containers.0.name",
        "main",
        "spec.workers.template.spec.containers: got [\"main\"]; expected a container named 'trainer' "
        "(name the one that trains so)",
    ),
    (
        "spec.workers.template.spec.containers.0.command",
        ABSENT,
        f"{TRAINER}.command: got nothing; expected the command that starts one rank (write it as a list, "
        'e.g. ["python", "-m", "mend_trainer.train"]; mend runs it under its agent)',
    ),
    ("spec.workers.template.spec.containers.0.command", "python", f'{TRAINER}.command: got "python"; expected'),
    ("spec.workers.template.spec.containers.0.command", [], f"{TRAINER}.command: got []; expected the command"),
    ("spec.workers.template.spec.containers.0.args", [1], f"{TRAINER}.args: got [1]; expected a list of words"),
    ("spec.workers.template.spec.containers.0.image", ABSENT, f"{TRAINER}.image: got nothing; expected an image"),
    ("spec.workers.template.spec.containers.0.env", 5, f"{TRAINER}.env: got 5; expected a list of objects"),
    ("spec.workers.template.spec.containers.0.ports", True, f"{TRAINER}.ports: got true; expected a list of objects"),
    (
        "spec.workers.template.spec.containers.0.ports",
        [{"containerPort": 7117}],
        f"{TRAINER}.ports: got 7117; expected any other port: mend's agent listens on this one",
    ),
    (
        "spec.workers.template.spec.restartPolicy",
        "Always",
        "spec.workers.template.spec.restartPolicy: got \"Always\"; expected 'Never': mend restarts ranks itself",
    ),
    ("spec.workers.template.spec.volumes", {}, "template.spec.volumes: got {}; expected a list of objects"),
    (
        "spec.workers.template.spec.terminationGracePeriodSeconds",
        "30s",
        'template.spec.terminationGracePeriodSeconds: got "30s"; expected a whole number of at least 0',
    ),
    ("spec.workers.template.spec.volumes", ["data"], 'template.spec.volumes: got ["data"]; expected a list of objects'),
    ("spec.workers.template.metadata", [], "template.metadata: got []; expected an object"),
    (
        "spec.workers.template.metadata",
        {"labels": {"tier": 1}},
        'template.metadata.labels: got {"tier": 1}; expected an object of texts (put numbers and booleans in quotes)',
    ),
    ("spec.workers.replicsa", 4, "spec.workers.replicsa: unknown field; did you mean replicas?"),
    ("spec.zzz", 4, "spec.zzz: unknown field; known are activeDeadlineSeconds, checkpoint, health,"),
    ("spec.checkpoint.uri", ABSENT, "spec.checkpoint.uri: missing; expected s3://BUCKET/PREFIX or file:///PATH"),
    ("spec.checkpoint.uri", "gs://b/x", 'spec.checkpoint.uri: got "gs://b/x"; expected s3://BUCKET/PREFIX or file:'),
    ("spec.checkpoint.uri", "file:////", 'spec.checkpoint.uri: got "file:////"; expected s3://BUCKET/PREFIX or file:'),
    (
        "spec.checkpoint.endpoint",
        "minio:9000",
        'spec.checkpoint.endpoint: got "minio:9000"; expected http://HOST[:PORT',
    ),
    ("spec.checkpoint.credentialsSecret", "A_B", 'credentialsSecret: got "A_B"; expected the name of a Secret'),
    ("spec.checkpoint.interval", "often", "spec.checkpoint.interval: got \"often\"; expected a duration such as '10m'"),
    ("spec.checkpoint.interval", "0 steps", 'spec.checkpoint.interval: got "0 steps"; expected a duration such as'),
    ("spec.checkpoint.interval", "9" * 5000 + " steps", "spec.checkpoint.interval: got "),
    ("spec.checkpoint.keepLast", 1, "spec.checkpoint.keepLast: got 1; expected a whole number of at least 2"),
    ("spec.checkpoint.memory", "yes", 'spec.checkpoint.memory: got "yes"; expected an object'),
    (
        "spec.checkpoint.memory.interval",
        "10s",
        "spec.checkpoint.memory.interval: got \"10s\"; expected a number of steps such as '10 steps': by time, ranks "
        "would not all take theirs at the same one",
    ),
    ("spec.checkpoint.memory.peers", "all", 'spec.checkpoint.memory.peers: got "all"; expected true or false'),
    (
        "spec.checkpoint.memory.peerBandwidth",
        "1.5G",
        "spec.checkpoint.memory.peerBandwidth: got \"1.5G\"; expected a quantity of bytes above zero such as '500Mi'",
    ),
    ("spec.checkpoint.memory.peerBandwidth", "999999999Ti", "peerBandwidth: got"),
    ("spec.checkpoint.memory.peerBandwidth", "0", 'peerBandwidth: got "0"; expected a quantity of bytes above zero'),
    ("spec.checkpoint.memory.peerBandwidth", 500, "peerBandwidth: got 500; expected a quantity of bytes above zero"),
    ("spec.checkpoint.memory.slots", 2, "spec.checkpoint.memory.slots: unknown field; known are interval, peer"),
    ("spec.checkpoint.verify", "deep", 'spec.checkpoint.verify: got "deep"; expected true or false'),
    ("spec.checkpoint.signingSecret", "A_B", 'signingSecret: got "A_B"; expected the name of a Secret'),
    ("spec.checkpoint.requestsPerSecond", 0, "requestsPerSecond: got 0; expected a whole number of at least 1"),
    ("spec.checkpoint.keepEvery", 0, "spec.checkpoint.keepEvery: got 0; expected a whole number of at least 1"),
    ("spec.health.heartbeatInterval", "0s", 'heartbeatInterval: got "0s"; expected a duration above zero such as'),
    ("spec.health.heartbeatInterval", "٣s", 'heartbeatInterval: got "٣s"; expected a duration above zero such as'),
    ("spec.health.heartbeatInterval", "9999999999h", "heartbeatInterval: got"),
    ("spec.health.lostAfter", "500ms", 'lostAfter: got "0.5s"; expected at least 3 heartbeat intervals (0.9s)'),
    ("spec.health.limits.floor", "11m", 'spec.health.limits.floor: got "660s"; expected at most ceiling (600s)'),
    ("spec.health.limits.step", "1s", "spec.health.limits.step: unknown field"),
    ("spec.health.lossSpike.points", 2, "spec.health.lossSpike.points: got 2; expected a whole number of at least 3"),
    ("spec.health.lossSpike.window", 5000, "lossSpike.window: got 5000; expected a whole number"),
    ("spec.health.lossSpike.rollBack", "yes", 'lossSpike.rollBack: got "yes"; expected true or false'),
    ("spec.health.lossSpike.factor", 2, "spec.health.lossSpike.factor: unknown field"),
    ("spec.recovery.budgets.user", -1, "spec.recovery.budgets.user: got -1; expected a whole number of at least 0"),
    ("spec.recovery.rollBackOnDivergence", "no", 'rollBackOnDivergence: got "no"; expected true or false'),
    ("spec.suspend", 1, "spec.suspend: got 1; expected true or false"),
    ("spec.managedBy", "kueue", 'spec.managedBy: got "kueue"; expected DOMAIN/NAME such as mend.dev/controller'),
    ("spec.activeDeadlineSeconds", 0, "spec.activeDeadlineSeconds: got 0; expected a whole number of at least 1"),
    ("spec.ttlSecondsAfterFinished", -1, "spec.ttlSecondsAfterFinished: got -1; expected a whole number of at least 0"),
    ("spec.priorityClassName", "High!", 'spec.priorityClassName: got "High!"; expected the name of a PriorityClass'),
]


@pytest.mark.parametrize(("path", "value", "sentence"), BAD)
def test_a_bad_value_is_named_with_its_field_and_what_was_expected(path: str, value: Any, sentence: str) -> None:
    """One bad value gives exactly one problem: the field's path, the value as written, and what to write instead."""
    raw = changed(path, value)
    problems = problems_of(raw)
    assert len(problems) == 1, problems
    assert sentence in problems[0]


def test_all_problems_are_told_at_once() -> None:
    """A user who made three mistakes hears of three."""
    raw = changed("spec.workers.replicas", 0)
    raw["checkpoint"]["uri"] = "nowhere"
    raw["health"] = {"lostAftr": "30s"}
    problems = problems_of(raw)
    assert [problem.split(":")[0] for problem in problems] == [
        "spec.workers.replicas",
        "spec.checkpoint.uri",
        "spec.health.lostAftr",
    ]


def test_the_same_spec_gives_the_same_facts() -> None:
    """Defaults are filled in, durations become seconds, and a slash at the end of the prefix does not matter."""
    spec = parse_spec(changed("spec.checkpoint.uri", "s3://bucket/clio/"))
    assert spec.checkpoint.uri == "s3://bucket/clio"
    assert spec.checkpoint.interval_seconds == 600
    assert spec.workers.min_replicas == spec.workers.replicas == spec.world_size == 4
    assert parse_spec(changed("spec.checkpoint.interval", "500 steps")).checkpoint.interval_steps == 500
    memory = parse_spec(changed("spec.checkpoint.memory", {"interval": "1 step", "peerBandwidth": "500Mi"}))
    assert memory.checkpoint.memory == MemoryTier(interval_steps=1, peers=True, peer_bytes_per_second=500 << 20)
    assert parse_spec(changed("spec.health.lostAfter", "1h2m3s4ms")).health.lost_after_seconds == 3723.004


def refused(raw: Any) -> tuple[str, ...] | None:
    """What the parser says against a spec; None if it takes it."""
    try:
        parse_spec(raw)
    except InvalidSpec as refusal:
        return refusal.problems
    return None


json_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
json_values = st.recursive(
    json_scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


@given(json_values)
def test_arbitrary_json_is_parsed_or_refused_never_a_crash(raw: Any) -> None:
    """Whatever JSON a spec is, the answer is a Spec or InvalidSpec with at least one problem."""
    problems = refused(raw)
    assert problems is None or problems


PATHS = [path for path, _, _ in BAD]


@given(st.dictionaries(st.sampled_from(PATHS), json_values, min_size=1, max_size=3))
def test_arbitrary_values_in_known_fields_are_parsed_or_refused(changes: dict[str, Any]) -> None:
    """Nonsense in fields that the parser does read is refused by name; nothing else is ever raised."""
    raw = copy.deepcopy(GOOD)
    for path, value in changes.items():
        top = path.split(".")[1]
        raw[top] = changed(path, value).get(top)
    assert all(problem.startswith("spec.") for problem in refused(raw) or ())
