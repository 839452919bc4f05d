"""The spec of a TrainingRun, parsed once into frozen types: every bad value names field, value and remedy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, TypeGuard

import msgspec

from mend.fields import Fields, parse_duration
from mend.names import CONTROLLER_NAME, TRAINER_CONTAINER
from mend.orders import CheckpointPlan
from mend.protocol import AGENT_PORT
from mend.ruleset import Rule, parse_rules

# Digits are counted: int() raises on absurd numbers.
_STEPS = re.compile(r"([1-9][0-9]{0,8}) steps?")
_METRIC = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]{0,127}")
_URI = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/\S*)?|file:///[^\s/]\S*")
_DNS_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_CONTROLLER = re.compile(r"[a-z0-9][a-z0-9.-]*/[A-Za-z0-9][A-Za-z0-9._-]*")

# Beyond any gang that trains today; what they keep out is the slip of a finger that would stall all other runs.
MAX_REPLICAS = 4096
MAX_RANKS_PER_WORKER = 64
MAX_RANKS = 65536
MAX_SPARES = 64
MAX_KEPT_BEST = 10
FIRST_INTERVAL_SECONDS = 600.0


class InvalidSpec(ValueError):
    """The spec cannot be run. `problems` holds one sentence per bad field."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class _Facts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of the spec's types: immutable and encodable, so that journals can hold them."""


class Workers(_Facts, frozen=True, kw_only=True):
    """The gang: `replicas` pods of `ranks_per_worker` ranks; it may shrink to `min_replicas` when nodes are short.

    Beside them `spares` more are kept that hold no ranks until one of the others is gone.
    """

    replicas: int
    min_replicas: int
    ranks_per_worker: int
    template: dict[str, Any]
    spares: int = 0

    @property
    def pods(self) -> int:
        """How many pods the run has: those of the gang and the spares."""
        return self.replicas + self.spares


class MemoryTier(_Facts, frozen=True, kw_only=True):
    """What is kept in the memory of workers beside what is saved.

    Each save is a snapshot first; `interval_steps` asks for more of them in between, and `peers` for copies of each
    with a buddy, where there is another worker.
    """

    interval_steps: int | None = None
    peers: bool = True
    peer_bytes_per_second: int | None = None


class KeepBest(_Facts, frozen=True, kw_only=True):
    """How many checkpoints are kept for what an evaluation says of them, and whether more or less of it is better."""

    metric: str
    mode: str = "max"
    count: int = 1


class Checkpointing(_Facts, frozen=True, kw_only=True):
    """Where and how often the run saves; of the two intervals and `interval_auto` exactly one is set."""

    uri: str
    endpoint: str | None = None
    credentials_secret: str | None = None
    interval_steps: int | None = None
    interval_seconds: float | None = None
    interval_auto: bool = False
    min_interval_seconds: float = 60.0  # the bounds of an automatic one
    max_interval_seconds: float = 3600.0
    keep_last: int = 3
    keep_every: int | None = None
    keep_best: KeepBest | None = None
    memory: MemoryTier = MemoryTier()
    verify: bool = False
    signing_secret: str | None = None
    requests_per_second: int | None = None

    @property
    def first_interval_seconds(self) -> float:
        """What ranks keep by themselves of an automatic interval, while nothing has been measured."""
        return min(max(FIRST_INTERVAL_SECONDS, self.min_interval_seconds), self.max_interval_seconds)

    def plan(self, auto_seconds: float | None = None) -> CheckpointPlan:
        """The part that ranks are told; `auto_seconds` is what an automatic interval has come to."""
        return CheckpointPlan(
            uri=self.uri,
            endpoint=self.endpoint,
            interval_steps=self.interval_steps,
            interval_seconds=auto_seconds if self.interval_auto else self.interval_seconds,
            keep_last=self.keep_last,
            keep_every=self.keep_every,
            memory_interval_steps=self.memory.interval_steps,
            peer_bytes_per_second=self.memory.peer_bytes_per_second or 0,
            verify=self.verify,
        )


class Limits(_Facts, frozen=True, kw_only=True):
    """How long a rank may go without progress, in seconds. A step's limit is learnt between `floor` and `ceiling`.

    Without proof that a process is stopped or dead, ranks are not killed before a `pause` has gone by on top of that;
    None: one that mend chooses (`watchdog.pause_in_force`).
    """

    start_seconds: float
    first_step_seconds: float
    floor_seconds: float
    ceiling_seconds: float
    saving_seconds: float
    evaluating_seconds: float
    pause_seconds: float | None = 2.0  # what is left out of specs that an older mend kept in a status


class LossSpike(_Facts, frozen=True, kw_only=True):
    """When the loss counts as gone: `points` in a row that lie above the median of the `window` points before them, by
    so many deviations and so many percent. It is always measured; `roll_back` says whether it is acted on.
    """

    roll_back: bool = False
    deviations: int = 10
    rise_percent: int = 20
    window: int = 256
    points: int = 16


class Health(_Facts, frozen=True, kw_only=True):
    """How closely the run is watched."""

    heartbeat_seconds: float
    lost_after_seconds: float
    limits: Limits
    slow_percent: int = 130  # a rank that works so much of the gang's median on each step is a straggler
    loss_spike: LossSpike = LossSpike()


class Budgets(_Facts, frozen=True, kw_only=True):
    """Recoveries allowed per failure class within `window_seconds`."""

    user: int
    infrastructure: int
    hang: int
    preemption: int
    window_seconds: float


class FirstTier(StrEnum):
    """The least disruptive means that may be tried."""

    REJOIN = "rejoin"
    RESTART_RANKS = "restart-ranks"
    REPLACE_WORKER = "replace-worker"


class NodeStrikes(_Facts, frozen=True, kw_only=True):
    """From how many strikes on a node is kept away from, and how long a strike of this run counts."""

    limit: int = 2
    expire_after_seconds: float = 86400.0


class NodeChecks(StrEnum):
    """When machines are checked before an attempt is launched on them."""

    NEVER = "Never"
    SUSPECTS = (
        "Suspects"  # when a verdict that was not certain names a worker again, or nobody was named twice in a row
    )
    ALWAYS = "Always"  # in every recovery


class Recovery(_Facts, frozen=True, kw_only=True):
    """How the run may be brought back."""

    budgets: Budgets
    first_tier: FirstTier = FirstTier.REJOIN
    roll_back_on_divergence: bool
    shrink_after_seconds: float
    node_strikes: NodeStrikes = NodeStrikes()
    node_check: NodeChecks = NodeChecks.SUSPECTS
    rules: tuple[Rule, ...] = ()


class Spec(_Facts, frozen=True, kw_only=True):
    """A TrainingRun's spec with every default filled in."""

    workers: Workers
    checkpoint: Checkpointing
    health: Health
    recovery: Recovery
    suspend: bool = False
    managed_by: str = CONTROLLER_NAME
    active_deadline_seconds: int | None = None
    ttl_seconds_after_finished: int | None = None
    priority_class_name: str | None = None

    @property
    def world_size(self) -> int:
        """Ranks of the whole gang at full size."""
        return self.workers.replicas * self.workers.ranks_per_worker


def parse_spec(raw: Any) -> Spec:
    """The spec of a TrainingRun as plain JSON; raises `InvalidSpec` with every problem found, not only the first."""
    problems: list[str] = []
    root = Fields(raw, "spec", problems)
    spec = Spec(
        workers=_workers(root.child("workers", required=True)),
        checkpoint=_checkpoint(root.child("checkpoint", required=True)),
        health=_health(root.child("health")),
        recovery=_recovery(root.child("recovery")),
        suspend=root.boolean("suspend", False),
        managed_by=root.text("managedBy", CONTROLLER_NAME, _CONTROLLER, f"DOMAIN/NAME such as {CONTROLLER_NAME}"),
        active_deadline_seconds=root.optional_integer("activeDeadlineSeconds", at_least=1),
        ttl_seconds_after_finished=root.optional_integer("ttlSecondsAfterFinished", at_least=0),
        priority_class_name=root.optional_text("priorityClassName", _DNS_NAME, "the name of a PriorityClass"),
    )
    root.done()
    if problems:
        raise InvalidSpec(tuple(problems))
    return spec


def _workers(fields: Fields) -> Workers:
    replicas = fields.integer("replicas", at_least=1, at_most=MAX_REPLICAS)
    minimum = fields.integer("minReplicas", default=replicas, at_least=1, at_most=MAX_REPLICAS)
    if minimum > replicas:
        fields.problem("minReplicas", minimum, f"at most replicas ({replicas})", "lower it or raise replicas")
    ranks_per_worker = fields.integer("ranksPerWorker", default=1, at_least=1, at_most=MAX_RANKS_PER_WORKER)
    if replicas * ranks_per_worker > MAX_RANKS:
        remedy = "lower it or ranksPerWorker"
        fields.problem("replicas", replicas, f"at most {MAX_RANKS} ranks, replicas x ranksPerWorker", remedy)
    spares = fields.integer("spares", default=0, at_least=0, at_most=MAX_SPARES)
    template = fields.mapping("template")
    if template is not None:
        _check_template(template, fields)
    fields.done()
    return Workers(
        replicas=replicas,
        min_replicas=minimum,
        ranks_per_worker=ranks_per_worker,
        template=template or {},
        spares=spares,
    )


def _check_template(template: Mapping[str, Any], fields: Fields) -> None:
    """The template must hold a container `trainer` with the command that starts one rank, and be fit to render."""
    pod = template.get("spec")
    containers = pod.get("containers") if isinstance(pod, Mapping) else None
    if not isinstance(pod, Mapping) or not _is_list_of_objects(containers):
        fields.problem("template.spec.containers", containers, "a list of containers")
        return
    if (policy := pod.get("restartPolicy") or "Never") != "Never":
        fields.problem("template.spec.restartPolicy", policy, "'Never': mend restarts ranks itself")
    grace = pod.get("terminationGracePeriodSeconds", 0)
    if isinstance(grace, bool) or not isinstance(grace, int) or grace < 0:
        fields.problem("template.spec.terminationGracePeriodSeconds", grace, "a whole number of at least 0")
    _check_metadata(template.get("metadata"), fields)
    _check_lists(pod, "template.spec", ("volumes", "initContainers", "tolerations", "imagePullSecrets"), fields)
    named = [(n, each) for n, each in enumerate(containers) if each.get("name") == TRAINER_CONTAINER]
    if named:
        index, trainer = named[0]
        _check_trainer(trainer, f"template.spec.containers[{index}]", fields)
    else:
        names = [each.get("name") for each in containers]
        remedy = "name the one that trains so"
        fields.problem("template.spec.containers", names, f"a container named {TRAINER_CONTAINER!r}", remedy)


def _check_trainer(trainer: Mapping[str, Any], where: str, fields: Fields) -> None:
    command = trainer.get("command")
    if not _is_list_of(str, command) or not command:
        fields.problem(
            f"{where}.command",
            command,
            "the command that starts one rank",
            'write it as a list, e.g. ["python", "-m", "mend_trainer.train"]; mend runs it under its agent',
        )
    if not _is_list_of(str, trainer.get("args") or []):
        fields.problem(f"{where}.args", trainer["args"], "a list of words")
    image = trainer.get("image")
    if not isinstance(image, str) or not image:
        fields.problem(f"{where}.image", image, "an image that holds the trainer and mend[trainer]")
    if _check_lists(trainer, where, ("env", "envFrom", "ports", "volumeMounts"), fields):
        taken = [port for port in trainer.get("ports") or () if port.get("containerPort") == AGENT_PORT]
        if taken:
            fields.problem(f"{where}.ports", AGENT_PORT, "any other port: mend's agent listens on this one")


def _check_metadata(metadata: Any, fields: Fields) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, Mapping):
        fields.problem("template.metadata", metadata, "an object")
        return
    for field in ("labels", "annotations"):
        texts = metadata.get(field) or {}
        if not isinstance(texts, Mapping) or not all(isinstance(each, str) for each in texts.values()):
            fields.problem(
                f"template.metadata.{field}", texts, "an object of texts", "put numbers and booleans in quotes"
            )


def _check_lists(holder: Mapping[str, Any], where: str, names: tuple[str, ...], fields: Fields) -> bool:
    """Whether each of these is absent or a list of objects; `render` relies on it."""
    bad = [name for name in names if holder.get(name) is not None and not _is_list_of_objects(holder[name])]
    for name in bad:
        fields.problem(f"{where}.{name}", holder[name], "a list of objects")
    return not bad


def _is_list_of_objects(value: Any) -> TypeGuard[list[Mapping[str, Any]]]:
    return _is_list_of(Mapping, value)


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, kind) for each in value)


def _checkpoint(fields: Fields) -> Checkpointing:
    uri = fields.text("uri", None, _URI, "s3://BUCKET/PREFIX or file:///PATH")
    steps, seconds = _interval(fields)
    least, most = fields.seconds("minInterval", "1m"), fields.seconds("maxInterval", "1h")
    if least > most:
        fields.problem("minInterval", f"{least:g}s", f"at most maxInterval ({most:g}s)")
    checkpoint = Checkpointing(
        uri=uri.rstrip("/"),
        endpoint=fields.optional_text("endpoint", re.compile(r"https?://\S+"), "http://HOST[:PORT] or https://HOST"),
        credentials_secret=fields.optional_text("credentialsSecret", _DNS_NAME, "the name of a Secret"),
        interval_steps=steps,
        interval_seconds=seconds,
        interval_auto=steps is None and seconds is None,
        min_interval_seconds=least,
        max_interval_seconds=most,
        keep_last=fields.integer("keepLast", default=3, at_least=2),
        keep_every=fields.optional_integer("keepEvery", at_least=1),
        keep_best=_keep_best(fields.child("keepBest")) if fields.has("keepBest") else None,
        memory=_memory(fields.child("memory")),
        verify=fields.boolean("verify", False),
        signing_secret=fields.optional_text("signingSecret", _DNS_NAME, "the name of a Secret"),
        requests_per_second=fields.optional_integer("requestsPerSecond", at_least=1),
    )
    fields.done()
    return checkpoint


def _memory(fields: Fields) -> MemoryTier:
    expected = "a number of steps such as '10 steps': by time, ranks would not all take theirs at the same one"
    text = fields.optional_text("interval", _STEPS, expected)
    steps = _STEPS.fullmatch(text or "")
    memory = MemoryTier(
        interval_steps=int(steps[1]) if steps else None,
        peers=fields.boolean("peers", True),
        peer_bytes_per_second=fields.optional_bytes("peerBandwidth"),
    )
    fields.done()
    return memory


def _keep_best(fields: Fields) -> KeepBest:
    best = KeepBest(
        metric=fields.text("metric", None, _METRIC, "the name of an evaluation's metric, such as lambada_acc"),
        mode=fields.choice("mode", "max", ("max", "min")),
        count=fields.integer("count", default=1, at_least=1, at_most=MAX_KEPT_BEST),
    )
    fields.done()
    return best


def _interval(fields: Fields) -> tuple[int | None, float | None]:
    text = fields.text("interval", "10m")
    if steps := _STEPS.fullmatch(text):
        return int(steps[1]), None
    return None, _auto_or_seconds(fields, "interval", text, "a duration such as '10m', '500 steps', or 'auto'")


def _auto_or_seconds(fields: Fields, field: str, text: str, expected: str) -> float | None:
    """A duration in seconds; None for 'auto', and for what is neither."""
    if text == "auto":
        return None
    length = parse_duration(text)
    if length is None:
        fields.problem(field, text, expected)
        return None
    return length.total_seconds()


def _health(fields: Fields) -> Health:
    limits, spike = fields.child("limits"), fields.child("lossSpike")
    health = Health(
        heartbeat_seconds=fields.seconds("heartbeatInterval", "300ms"),
        lost_after_seconds=fields.seconds("lostAfter", "30s"),
        slow_percent=fields.integer("slowPercent", default=130, at_least=110),
        loss_spike=LossSpike(
            roll_back=spike.boolean("rollBack", False),
            deviations=spike.integer("deviations", default=10, at_least=3, at_most=1000),
            rise_percent=spike.integer("risePercent", default=20, at_least=1, at_most=10000),
            window=spike.integer("window", default=256, at_least=16, at_most=4096),
            points=spike.integer("points", default=16, at_least=3, at_most=4096),
        ),
        limits=Limits(
            start_seconds=limits.seconds("start", "15m"),
            first_step_seconds=limits.seconds("firstStep", "15m"),
            floor_seconds=limits.seconds("floor", "150ms"),
            ceiling_seconds=limits.seconds("ceiling", "10m"),
            pause_seconds=_auto_or_seconds(
                limits, "pause", limits.text("pause", "auto"), "a duration such as '2s', or 'auto'"
            ),
            saving_seconds=limits.seconds("saving", "10m"),
            evaluating_seconds=limits.seconds("evaluating", "1h"),
        ),
    )
    if health.limits.floor_seconds > health.limits.ceiling_seconds:
        limits.problem(
            "floor",
            f"{health.limits.floor_seconds:g}s",
            f"at most ceiling ({health.limits.ceiling_seconds:g}s)",
        )
    if health.lost_after_seconds < 3 * health.heartbeat_seconds:
        least = 3 * health.heartbeat_seconds
        fields.problem("lostAfter", f"{health.lost_after_seconds:g}s", f"at least 3 heartbeat intervals ({least:g}s)")
    limits.done()
    spike.done()
    fields.done()
    return health


def _recovery(fields: Fields) -> Recovery:
    budgets, strikes = fields.child("budgets"), fields.child("nodeStrikes")
    recovery = Recovery(
        budgets=Budgets(
            user=budgets.integer("user", default=3, at_least=0),
            infrastructure=budgets.integer("infrastructure", default=20, at_least=0),
            hang=budgets.integer("hang", default=20, at_least=0),
            preemption=budgets.integer("preemption", default=100, at_least=0),
            window_seconds=budgets.seconds("window", "24h"),
        ),
        first_tier=FirstTier(fields.choice("firstTier", FirstTier.REJOIN, tuple(FirstTier))),
        roll_back_on_divergence=fields.boolean("rollBackOnDivergence", False),
        shrink_after_seconds=fields.seconds("shrinkAfter", "5m"),
        node_strikes=NodeStrikes(
            limit=strikes.integer("limit", default=2, at_least=1),
            expire_after_seconds=strikes.seconds("expireAfter", "24h"),
        ),
        node_check=NodeChecks(fields.choice("nodeCheck", NodeChecks.SUSPECTS, tuple(NodeChecks))),
        rules=parse_rules(fields),
    )
    budgets.done()
    strikes.done()
    fields.done()
    return recovery
