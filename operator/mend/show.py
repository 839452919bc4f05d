"""What `mend get` and `mend describe` print: runs in a table, and one run with its workers, conditions and past."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from mend.model import Observation, RunPhase, RunStatus, WorkerPod
from mend.observe import Unreadable
from mend.protocol import CheckpointRef
from mend.story import headline, tell_incident, tell_ledger

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
    if status.lineage:
        yield "  Lineage: " + ", then ".join(f"attempt {each.attempt} to step {each.step}" for each in status.lineage)
    if status.checkpoint is not None:
        yield escape(f"  Checkpoint: {_checkpoint(status, now)}, {status.checkpoint.uri}")
    yield from (escape(f"  May restart from: {_named(each)}") for each in status.restore)
    for incident in status.incidents:
        yield ""
        yield from map(escape, tell_incident(incident))
    if status.started_at is not None:
        yield ""
        yield from map(escape, tell_ledger(status))


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
    return status.incidents[-1].summary if status.incidents else ""


def _named(ref: CheckpointRef) -> str:
    return f"step {ref.step} of attempt {ref.attempt}, {ref.uri}"
