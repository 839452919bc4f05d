"""What every benchmark shares: a row per figure, the machine it was taken on, a table for people, JSON for programs."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: ours is the median; `peers` have theirs, None where a peer never got there within `limit`."""

    figure: str
    unit: str
    ours: float | None
    target: float
    peers: dict[str, float | None] = field(default_factory=dict)
    limit: str = ""
    n: int = 0
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    met: bool = False


def row(
    figure: str,
    samples: Sequence[float],
    target: float,
    *,
    unit: str = "s",
    peers: dict[str, float | None] | None = None,
    limit: str = "",
) -> Row:
    """The row of samples, where less is better."""
    if not samples:
        return Row(figure, unit, None, target, peers or {}, limit)
    middle = statistics.median(samples)
    return Row(
        figure=figure,
        unit=unit,
        ours=round(middle, 4),
        target=target,
        peers=peers or {},
        limit=limit,
        n=len(samples),
        p50=round(middle, 4),
        p90=round(quantile(samples, 0.9), 4),
        p99=round(quantile(samples, 0.99), 4),
        met=middle <= target,
    )


def quantile(samples: Sequence[float], share: float) -> float:
    """The nearest-rank quantile."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def arguments(description: str) -> argparse.Namespace:
    """`--quick` and `--json FILE`, which every benchmark takes. SIGTERM ends it as Ctrl-C does, children and all."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="few repetitions: under 3 minutes on 2 cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    return parser.parse_args()


def machine() -> str:
    """The machine in a line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return f"{os.cpu_count()} cores, {memory:.0f} GiB, {system}"


def publish(title: str, rows: Sequence[Row], options: argparse.Namespace) -> int:
    """Print the table, write the file; 0, since a missed target is a result and not an error."""
    table = Table(title=f"{title}\n{machine()}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    names = list(dict.fromkeys(name for each in rows for name in each.peers))
    for heading in ("figure", "ours p50", "p90", "p99", "n", "target", *names, "met"):
        table.add_column(heading, justify="left" if heading == "figure" else "right", overflow="fold")
    for each in rows:
        shown = [_shown(value, each.unit) for value in (each.p50, each.p90, each.p99)]
        peers = [_peer(each, name) for name in names]
        met = "yes" if each.met else "no"
        table.add_row(each.figure, *shown, str(each.n), f"<= {_shown(each.target, each.unit)}", *peers, met)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if options.json is not None:
        command = " ".join(["python", *sys.argv])
        facts = {"machine": machine(), "command": command, "rows": [asdict(each) for each in rows]}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return 0


def _peer(row: Row, name: str) -> str:
    if name not in row.peers:
        return "-"
    value = row.peers[name]
    if value is None:
        return row.limit or "never"
    ratio = f" ({value / row.ours:.1f}x)" if row.ours else ""
    return f"{_shown(value, row.unit)}{ratio}"


def _shown(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.3g} {unit}"
