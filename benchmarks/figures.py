"""What every benchmark shares: a row per figure, the machine it was taken on, a table for people, JSON for programs."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Peer = float | str | None  # a figure; why there is none; None: not within the row's `limit`


@dataclass(frozen=True, slots=True)
class Row:
    """One figure, of which less is better: `ours` is the quantile that `target` is set for, in `unit`.

    `peers` have the same quantile of theirs where they have enough samples, else their median. `limit` says how long
    a peer was waited for; `note` why there is nothing to compare, or what the figure leaves out.
    """

    figure: str
    unit: str
    ours: float | None
    target: float
    peers: dict[str, Peer] = field(default_factory=dict)
    limit: str = ""
    n: int = 0
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    met: bool = False
    note: str = ""


def row(
    figure: str,
    samples: Sequence[float],
    target: float,
    *,
    unit: str = "s",
    of: float = 0.5,
    peers: dict[str, Peer] | None = None,
    limit: str = "",
    note: str = "",
) -> Row:
    """The row of samples; `of` is the quantile that the target is for: 0.5 the median, 1.0 the worst."""
    if not samples:
        return Row(figure, unit, None, target, peers or {}, limit, note=note or "not measured")
    ours = middle(samples) if of == 0.5 else quantile(samples, of)
    return Row(
        figure=figure,
        unit=unit,
        ours=round(ours, 4),
        target=target,
        peers=peers or {},
        limit=limit,
        n=len(samples),
        p50=round(middle(samples), 4),
        p90=round(quantile(samples, 0.9), 4),
        p99=round(quantile(samples, 0.99), 4),
        met=ours <= target,
        note=note,
    )


def not_built(figure: str, target: float, *, unit: str = "s", what: str) -> Row:
    """The row of a figure whose feature this version does not have; it says so instead of staying away."""
    return Row(figure, unit, None, target, note=f"not built: {what}")


def middle(samples: Sequence[float]) -> float:
    """The median."""
    return statistics.median(samples)


def quantile(samples: Sequence[float], share: float) -> float:
    """The nearest-rank quantile."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def parser(description: str) -> argparse.ArgumentParser:
    """`--quick` and `--json FILE`, which every benchmark takes. SIGTERM ends it as Ctrl-C does, children and all."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    options.add_argument("--quick", action="store_true", help="few repetitions: under 3 minutes on 2 cores")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    return options


def arguments(description: str) -> argparse.Namespace:
    """The arguments of a benchmark that takes no others."""
    return parser(description).parse_args()


def machine() -> str:
    """The machine in a line, with how busy others keep it: figures of a loaded machine are no figures."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return f"{os.cpu_count()} cores, {memory:.0f} GiB, {system}"


def command(words: Sequence[str]) -> str:
    """The command without its options for where results go: they change no figure."""
    kept = [word for before, word in pairwise(["", *words]) if not {before, word} & OUTPUTS]
    return " ".join(["python", *kept])


OUTPUTS = {"--json", "--out", "--picture"}
LOAD_AT_START = os.getloadavg()[0]


def publish(title: str, rows: Sequence[Row], options: argparse.Namespace, more: Mapping[str, Any] | None = None) -> int:
    """Print the table, write the file; 0, since a missed target is a result and not an error.

    `more` goes into the file beside the rows, for `render.py`.
    """
    Console(width=None if sys.stdout.isatty() else 140).print(table(title, rows))
    if options.json is not None:
        facts = {
            "title": title,
            "machine": machine(),
            "load_at_start": round(LOAD_AT_START, 1),
            "command": command(sys.argv),
            "rows": [asdict(each) for each in rows],
            **(more or {}),
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return 0


def table(title: str, rows: Sequence[Row]) -> Table:
    """The rows for people."""
    shown = Table(title=f"{title}\n{machine()}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    names = peer_names(rows)
    for heading in ("figure", "ours", "p50", "p90", "p99", "n", "target", *names, "met"):
        shown.add_column(heading, justify="left" if heading == "figure" else "right", overflow="fold")
    for each in rows:
        shown.add_row(*cells(each, names))
    return shown


def peer_names(rows: Sequence[Row]) -> list[str]:
    """Every peer of any row, in the order of their coming."""
    return list(dict.fromkeys(name for each in rows for name in each.peers))


def cells(row: Row, peers: Sequence[str]) -> list[str]:
    """A row as words: figure, ours, p50, p90, p99, n, target, each peer, met."""
    ours = shown(row.ours, row.unit) if row.ours is not None else row.note
    spread = [shown(value, row.unit) for value in (row.p50, row.p90, row.p99)]
    target = f"<= {shown(row.target, row.unit)}"
    return [row.figure, ours, *spread, str(row.n), target, *(_peer(row, name) for name in peers), verdict(row)]


def verdict(row: Row) -> str:
    """Whether the target is met, in a word."""
    if row.ours is None:
        return "-"
    return "yes" if row.met else "no"


def _peer(row: Row, name: str) -> str:
    if name not in row.peers:
        return "-"
    value = row.peers[name]
    if isinstance(value, str):
        return value
    if value is None:
        return row.limit or "never"
    ratio = f" ({value / row.ours:.1f}x)" if row.ours else ""
    return f"{shown(value, row.unit)}{ratio}"


def shown(value: float | None, unit: str) -> str:
    """A figure with its unit, three digits that count."""
    return "-" if value is None else f"{value:.3g} {unit}".rstrip()
