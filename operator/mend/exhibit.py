"""Pure: a dossier told to a person: who stood where, as a table; the stacks, equal ones once and the blamed first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from mend.dossier import Dossier
from mend.evidence import RankEvidence
from mend.heartbeats import RankReport
from mend.stacks import doing
from mend.story import tell_incident

MOST_FRAMES = 12
MOST_LINES = 8
COLUMNS = ("rank", "step", "phase", "idle", "state", "group", "entered", "left", "collective", "seen")


def exhibit(dossier: Dossier) -> Iterator[str]:
    """The whole dossier, a line at a time."""
    yield from tell_incident(dossier.incident)
    if dossier.shortened:
        yield "     (what was said of ranks that are not blamed was cut to keep the dossier small)"
    blamed = dossier.incident.culprit_ranks
    evidence = sorted(dossier.evidence, key=lambda rank: (rank.rank not in blamed, rank.rank))
    if evidence:
        yield ""
        yield from _table(COLUMNS, [row for rank in evidence for row in _rows(rank, blamed)])
    for stack, ranks in _alike(evidence):
        yield ""
        yield f"  Stack of {_numbers(ranks)}, innermost frame first:"
        yield from (f"     {line}" for line in stack)
    for report in dossier.ranks:
        yield from _last_words(report)


def _rows(rank: RankEvidence, blamed: Sequence[int]) -> Iterator[tuple[str, ...]]:
    """A row for each process group of a rank; one that told of none has one row all the same."""
    mark = "*" if rank.rank in blamed else ""
    who = (f"{rank.rank}{mark}", str(rank.step), str(rank.phase), f"{rank.progress_seconds:.1f}s", rank.process_state)
    silence = "" if rank.recorder_answered else "its recorder did not answer"
    seen = ", ".join(filter(None, (doing(rank), silence)))
    if not rank.groups:
        yield (*who, "", "", "", "", seen)
    for group in rank.groups:
        counts = (str(group.last_enqueued), str(group.last_completed))
        yield (*who, group.name, *counts, group.last_enqueued_name, seen)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as their widest cell; those that are empty throughout are left out."""
    columns = [(name, [row[n] for row in rows]) for n, name in enumerate(head) if any(row[n] for row in rows)]
    widths = [max(len(name), *map(len, cells)) for name, cells in columns]
    yield _line([name for name, _ in columns], widths)
    for n in range(len(rows)):
        yield _line([cells[n] for _, cells in columns], widths)


def _line(cells: Iterable[str], widths: Iterable[int]) -> str:
    return "  " + "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _alike(evidence: Iterable[RankEvidence]) -> Iterator[tuple[tuple[str, ...], list[int]]]:
    """The stacks of main threads, each with the ranks that stood there: of a thousand that wait, one is enough."""
    found: dict[tuple[str, ...], list[int]] = {}
    for rank in evidence:
        if stack := _main_thread(rank.stack):
            found.setdefault(stack, []).append(rank.rank)
    yield from found.items()


def _main_thread(stack: str) -> tuple[str, ...]:
    """The innermost frames of the last thread in faulthandler's dump."""
    lines = [line.strip() for line in stack.splitlines() if line.strip()]
    heads = [n for n, line in enumerate(lines) if line.startswith(("Thread ", "Current thread "))]
    frames = lines[heads[-1] + 1 :] if heads else lines
    more = [f"... {len(frames) - MOST_FRAMES} more"] if len(frames) > MOST_FRAMES else []
    return (*frames[:MOST_FRAMES], *more)


def _last_words(rank: RankReport) -> Iterator[str]:
    """The traceback of a rank that raised, or the last lines of one that ended."""
    if rank.error is not None and rank.error.traceback:
        words = rank.error.traceback.strip().splitlines()
    elif rank.exit is not None and rank.exit.log_tail:
        words = list(rank.exit.log_tail)
    else:
        return
    yield ""
    yield f"  Last words of rank {rank.rank}:"
    yield from (f"     {line}" for line in words[-MOST_LINES:])


def _numbers(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:16]) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
