"""What `mend get` and `mend describe` print: runs in a table, and one run with its workers, conditions and past."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from mend.interval import why
from mend.noted import accepted_spec
from mend.observation import Observation, WorkerPod
from mend.observe import Unreadable
from mend.snapshots import in_bytes
from mend.spec import Spec
from mend.states import CheckpointRef
from mend.status import LimitInForce, RunPhase, RunStatus, Straggler
from mend.story import headline, start, tell_incident, tell_ledger
from mend.strikes import in_words

STYLES = {
    RunPhase.RUNNING: "green",
    RunPhase.SUCCEEDED: "green",
    RunPhase.RECOVERING: "yellow",
    RunPhase.FAILED: "red",
}


def runs_table(runs: Iterable[Observation | Unreadable], now: float, *, with_namespace: bool) -> Table:
    """One row per run: where it is, what it went through, and how old what it could restart from is."""
    table = Table(box=None, pad_edge=False, header_style="bold", expand=True)
    for heading in (["NAMESPACE"] if with_namespace else []) + ["NAME", "PHASE"]:
        table.add_column(heading, no_wrap=True)
    for heading in ("STEP", "LOSS", "ATTEMPT", "RECOVERIES", "CHECKPOINT", "GOODPUT", "AGE"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("LAST INCIDENT", overflow="ellipsis", no_wrap=True, ratio=1)  # only this one gives way
    for seen in runs:
        names = [*([seen.namespace] if with_namespace else []), seen.name]
        if isinstance(seen, Unreadable):
            table.add_row(*names, "[red]Unreadable[/]", *"------", age(seen.age_seconds), escape(seen.problem))
            continue
        status = seen.status
        table.add_row(
            *names,
            f"[{STYLES.get(status.phase, 'default')}]{status.phase}[/]",
            str(status.step) if status.step >= 0 else "-",
            "-" if status.loss is None else f"{status.loss:.4f}",
            str(status.attempt),
            str(status.recoveries),
            _checkpoint(status, now),
            f"{status.ledger.goodput:.0%}" if status.started_at is not None else "-",
            age(now - seen.created_at),
            escape(_last_incident(status)),
        )
    return table


def description(seen: Observation, pods: Sequence[WorkerPod], now: float) -> Iterator[RenderableType]:
    """One run in paragraphs."""
    status = seen.status
    yield escape(headline(f"{seen.namespace}/{seen.name}", status))
    yield ""
    if (spec := accepted_spec(status)) is not None:
        yield from (escape(f"  {line}") for line in _understood(spec))
    workers = _table("WORKER", "POD", "PHASE", "NODE", "MADE FOR", "")
    for pod in sorted(pods, key=lambda each: (each.index, each.attempt)):
        part = "takes part" if pod.index in status.participants else ""
        note = pod.reason or ("going" if pod.deleting else part)
        workers.add_row(str(pod.index), pod.name, pod.phase, pod.node or "-", f"attempt {pod.attempt}", escape(note))
    yield workers
    conditions = _table("CONDITION", "IS", "FOR", "REASON", "MESSAGE")
    for each in status.conditions:
        conditions.add_row(each.type, each.status, age(now - each.since), each.reason, escape(each.message))
    yield conditions
    if status.limits:
        yield _limits(status.limits)
    if status.stragglers:
        yield _stragglers(status.stragglers, now)
    struck = (each for each in status.strikes if now < each.expires_at)
    yield from (escape(f"  Strike: {in_words(each, now)}") for each in struck)
    if status.lineage:
        told = ", then ".join(f"attempt {each.attempt} to step {each.step}" for each in status.lineage)
        yield f"  Lineage: {told}; this attempt {_began(status)}"
    if status.checkpoint is not None:
        yield escape(f"  Checkpoint: {_checkpoint(status, now)}, {status.checkpoint.uri}")
    yield from map(escape, _saves(status, now))
    yield from map(escape, _in_memory(status, now))
    yield from (escape(f"  May restart from: {_named(each)}") for each in status.restore)
    for incident in status.incidents:
        yield ""
        yield from map(escape, tell_incident(incident))
    if status.started_at is not None:
        yield ""
        yield from map(escape, tell_ledger(status))


def _understood(spec: Spec) -> Iterator[str]:
    """The spec in words, with every default filled in."""
    workers, saves, health, recovery = spec.workers, spec.checkpoint, spec.health, spec.recovery
    least = f", at least {workers.min_replicas}" if workers.min_replicas < workers.replicas else ""
    yield f"Workers: {workers.replicas} of {workers.ranks_per_worker} ranks{least}"
    fixed = counted(saves.interval_steps) if saves.interval_steps else age(saves.interval_seconds or 0)
    often = f"every {fixed}"
    if saves.interval_auto:
        often = f"as often as pays ({age(saves.min_interval_seconds)} to {age(saves.max_interval_seconds)})"
    every = f", and every {saves.keep_every}th" if saves.keep_every else ""
    best = saves.keep_best
    every += f", and the {best.count} best by {best.metric} ({best.mode})" if best else ""
    yield f"Saves: to {saves.uri}, {often}; the newest {saves.keep_last} are kept{every}"
    beside = f", a snapshot every {counted(saves.memory.interval_steps)}" if saves.memory.interval_steps else ""
    copies = "copied to a buddy" if saves.memory.peers and workers.replicas > 1 else "not copied"
    yield f"Memory: the last two snapshots of each rank{beside}, {copies}"
    limits, paid = health.limits, recovery.budgets
    pause = (
        "as long as a recovery takes, more after each hang,"
        if limits.pause_seconds is None
        else f"of {limits.pause_seconds:g} s"
    )
    yield (
        f"Health: a heartbeat every {health.heartbeat_seconds:g} s, lost after {health.lost_after_seconds:g} s; limits "
        f"from {limits.floor_seconds:g} s to {limits.ceiling_seconds:g} s, pauses {pause} are "
        f"borne; slow from {health.slow_percent}%"
    )
    spike = health.loss_spike
    yield (
        f"Loss: {spike.points} points in a row {spike.deviations} deviations and {spike.rise_percent}% above the "
        f"median of {spike.window} are a spike, which {'rolls back' if spike.roll_back else 'is only measured'}"
    )
    yield (
        f"Recoveries in {age(paid.window_seconds)}: {paid.user} for user errors, {paid.hang} for hangs, "
        f"{paid.infrastructure} for infrastructure, {paid.preemption} for preemption"
    )


def _saves(status: RunStatus, now: float) -> Iterator[str]:
    """How often the run saves if mend chose that, the last wish, and what is best."""
    if status.interval is not None:
        yield f"  Saves every {status.interval.seconds:.3g} s: {why(status.interval)}"
    if (wish := status.wish) is not None and not wish.by_interval:
        yield f"  Save asked for {age(now - wish.asked_at)} ago, at step {wish.step}: {wish.state}"
    for score in status.scores:
        yield f"  Score: {score.name} {score.value:.4g}, step {score.step} of attempt {score.attempt}"


def counted(steps: int) -> str:
    """A number of steps in words."""
    return "step" if steps == 1 else f"{steps} steps"


def _began(status: RunStatus) -> str:
    if status.restored_step is None:
        return "has not said yet what it begins with"
    return f"began {start(status.restored_step, status.origin)}"


def _in_memory(status: RunStatus, now: float) -> Iterator[str]:
    """What lies in the memory of workers, and what that costs."""
    memory = status.memory
    if memory is None:
        return
    if memory.step >= 0:
        copied = {True: ", copied to buddies", False: ", NOT copied to buddies yet", None: ""}[memory.copied]
        since = f", for {age(now - memory.seen_at)}" if memory.seen_at is not None else ""
        workers = f"{memory.workers} worker{'' if memory.workers == 1 else 's'}"
        yield f"  In memory: step {memory.step} of attempt {memory.attempt} on {workers}{copied}{since}"
    if memory.needed_bytes:
        limit = f" of its limit of {in_bytes(memory.limit_bytes)}" if memory.limit_bytes else ", which has no limit"
        yield f"  Snapshots need {in_bytes(memory.needed_bytes)} in each worker{limit}"


def _limits(limits: Sequence[LimitInForce]) -> Table:
    table = _table("PHASE", "LIMIT", "PATIENCE", "LEARNT FROM")
    for each in limits:
        facts = [f"median {each.median_seconds:.3g} s"] if each.median_seconds is not None else []
        facts += [f"longest {each.longest_seconds:.3g} s"] if each.longest_seconds is not None else []
        what = f"{each.samples} samples: {', '.join(facts)}" if each.samples > 1 else ", ".join(facts)
        bounds = f"{each.limit_seconds:.3g} s", f"{each.patience_seconds:.3g} s"
        table.add_row(each.phase, *bounds, what if each.samples else "nothing yet: the spec's")
    return table


def _stragglers(slow: Sequence[Straggler], now: float) -> Table:
    table = _table("STRAGGLER", "WORKER", "SLOWER BY", "WORK PER STEP", "FOR")
    for each in slow:
        factor, work = f"{each.factor:.2f}x", f"{each.work_seconds:.3g} s"
        table.add_row(f"rank {each.rank}", str(each.worker), factor, work, age(now - each.began_at))
    return table


def age(seconds: float) -> str:
    """A length of time as kubectl shows it: the two largest units at most."""
    seconds = max(0, int(seconds))
    for unit, length, part, finer in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if seconds >= length:
            rest = seconds % length // finer
            return f"{seconds // length}{unit}" + (f"{rest}{part}" if rest and seconds < 10 * length else "")
    return f"{seconds}s"


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _checkpoint(status: RunStatus, now: float) -> str:
    known = status.checkpoint
    return "-" if known is None else f"step {known.step}, {age(now - known.committed_at)} ago"


def _last_incident(status: RunStatus) -> str:
    """What last had to be done something about; a pause that ended by itself is told by `describe` only."""
    told = (each.summary for each in reversed(status.incidents) if each.is_open or each.tier is not None)
    return next(told, "")


def _named(ref: CheckpointRef) -> str:
    where = "in the memory of workers" if ref.save_in_memory else ref.uri
    return f"step {ref.step} of attempt {ref.attempt}, {where}"
