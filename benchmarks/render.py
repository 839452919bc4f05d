"""Renders docs/benchmarks.md from the files under benchmarks/results: every figure with its command and machine.

python benchmarks/render.py [--results FOLDER] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import Row, cells, peer_names

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- figures: by benchmarks/render.py -->", "<!-- end of figures -->"
RECOVERIES = (  # file, part of the figure's name
    ("detection", "SIGKILL to a rank: the controller has the incident, p50"),
    ("detection", "kinds of hang, steps of 0.1 s: noticed, p99"),
    ("campaign", "verdict not exact"),
    ("campaign", "innocent workers blamed"),
    ("recovery", "SIGKILL -> first new step, 2 ranks, rejoin"),
    ("recovery", "SIGKILL -> first new step, 2 ranks, restart-ranks"),
    ("recovery", "SIGSTOP -> first new step"),
    ("overhead", "calls in the rank"),
)
CHECKPOINTS = (
    ("checkpoint", "stall of the loop per save"),
    ("checkpoint", "steps beside a save"),
    ("checkpoint", "restore from shared memory"),
    ("checkpoint", "steps lost: a rank is killed"),
    ("checkpoint", "steps lost: a worker is lost"),
    ("checkpoint_campaign", "kills while saving or restoring"),
    ("checkpoint_campaign", "other faults"),
)
IN_README = (RECOVERIES, CHECKPOINTS)  # a table each, for their peers are others
ORDER = (
    "detection",
    "campaign",
    "recovery",
    "checkpoint",
    "checkpoint_campaign",
    "store_throughput",
    "overhead",
    "anatomy",
)
INTRODUCTION = """# Figures

Made by `make bench` (the campaigns in full length by `make bench-faults` and `make bench-checkpoints`) and rendered
from the files in [benchmarks/results](../benchmarks/results) by `python benchmarks/render.py`; nothing here is written
by hand. Less is better. "Ours" is the quantile that the target is set for; p50, p90, p99 and n show the spread. Peers
run the same trainer (or the closest that their interface allows) and meet the same faults, on the same machine, in the
same run; the factor in brackets is theirs over ours. A target that is missed says "no", a figure whose feature is not
there yet says so.
"""


def main() -> int:
    """Read, render, write."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="where the files are")
    options.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks.md", help="the page to write")
    options.add_argument("--readme", type=Path, default=ROOT / "README.md", help="whose figures to renew")
    chosen = options.parse_args()
    files = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in chosen.results.glob("*.json")}
    chosen.out.write_text(page(files), encoding="utf-8")
    chosen.readme.write_text(renewed(chosen.readme.read_text(encoding="utf-8"), files), encoding="utf-8")
    print(f"{chosen.out}: {sum(len(each['rows']) for each in files.values())} rows of {len(files)} files")
    return 0


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole page from the files' contents by name; names that are not in `ORDER` come last."""
    names = sorted(results, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    return "\n".join([INTRODUCTION, *(_section(name, results[name]) for name in names)])


def renewed(readme: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """The README with today's figures between its two comments. Raises `ValueError` if it has lost them."""
    before, begun, rest = readme.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not begun or not ended:
        raise ValueError(f"the README: expected the comments {BEGIN!r} and {END!r}, between which figures are put")
    return f"{before}{BEGIN}\n{_short_tables(results)}{END}{after}"


def _short_tables(results: Mapping[str, Mapping[str, Any]]) -> str:
    return "\n".join(table for wanted in IN_README if (table := _short_table(wanted, results)))


def _short_table(wanted: Sequence[tuple[str, str]], results: Mapping[str, Mapping[str, Any]]) -> str:
    found = []
    for name, part in wanted:
        rows = (Row(**each) for each in results.get(name, {}).get("rows", ()))
        found += [each for each in rows if part in each.figure][:1]
    if not found:
        return ""
    peers = peer_names(found)
    lines = [cells(each, peers) for each in found]
    table = _table(["", "mend", "target", *peers], [[line[0], line[1], line[6], *line[7:-1]] for line in lines])
    used = {name: results[name] for name, _ in wanted if name in results}
    return f"{table}\n{'; '.join(_where(used))}.\n"


def _where(used: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """On which machines, and how busy with other things, these figures were taken."""
    busy = ", ".join(f"{name} {each['load_at_start']:g}" for name, each in used.items() if "load_at_start" in each)
    machines = dict.fromkeys(each["machine"] for each in used.values())
    return [*machines, *([f"load when it began: {busy}"] if busy else [])]


def _section(name: str, facts: Mapping[str, Any]) -> str:
    rows = [Row(**each) for each in facts["rows"]]
    load = facts.get("load_at_start")
    busy = f", load {load:g} when it began" if load is not None else ""
    parts = [f"## {facts.get('title', name)}\n", f"`{facts['command']}` on {facts['machine']}{busy}.\n"]
    if rows:
        parts += [_table(_headings(rows), [cells(each, peer_names(rows)) for each in rows]), *_notes(rows)]
    if "confusion" in facts:
        parts.append(confusion_table(facts["confusion"]))
    if "counts" in facts:
        parts.append(counts_table(facts["counts"]))
    if "phases" in facts:
        parts.append(phases_table(facts["phases"]))
    if "parts" in facts:
        parts.append(parts_table(facts["parts"]))
    if "picture" in facts:
        parts.append(f"![{facts.get('title', name)}]({facts['picture']})\n")
    parts += [f"{each}\n" for each in facts.get("remarks", ())]
    return "\n".join(parts)


def _headings(rows: Sequence[Row]) -> list[str]:
    return ["figure", "ours", "p50", "p90", "p99", "n", "target", *peer_names(rows), "met"]


def _notes(rows: Iterable[Row]) -> list[str]:
    noted = [f"- {each.figure}: {each.note}" for each in rows if each.note and each.ours is not None]
    return ["\n".join(noted) + "\n"] if noted else []


def confusion_table(confusion: Mapping[str, Mapping[str, Any]]) -> str:
    """Kind injected by what was said of it, with counts; what was said is in the order of its frequency."""
    total: Counter[str] = Counter()
    for line in confusion.values():
        total.update(line["said"])
    words = sorted(total, key=lambda word: (-total[word], word))
    body = [
        [kind, line["should"], str(line["exact"]), *(str(line["said"].get(word, "")) for word in words)]
        for kind, line in sorted(confusion.items())
    ]
    told = "Kind injected (down) by kind of incident and ranks named (across):\n\n"
    return told + _table(["injected", "right would be", "exact", *words], body)


def counts_table(counts: Mapping[str, Mapping[str, int]]) -> str:
    """By kind of fault, how often each thing came of it."""
    return "By kind of fault:\n\n" + _counted(dict(sorted(counts.items())))


def phases_table(phases: Mapping[str, Mapping[str, int]]) -> str:
    """By kind of kill, what saving or restoring was doing when it came."""
    return "Kills by what saving or restoring was doing when they came:\n\n" + _counted(phases)


def _counted(counts: Mapping[str, Mapping[str, int]]) -> str:
    words = list(dict.fromkeys(word for line in counts.values() for word in line))
    body = [[kind, *(str(line.get(word, "")) for word in words)] for kind, line in counts.items()]
    return _table(["", *words], body)


def parts_table(parts: Mapping[str, Mapping[str, float]]) -> str:
    """Seconds of each part of a recovery (across) by way of recovering (down)."""
    names = list(dict.fromkeys(part for each in parts.values() for part in each))
    body = [
        [way, *(f"{each[name]:.3f}" if name in each else "" for name in names), f"{sum(each.values()):.3f}"]
        for way, each in parts.items()
    ]
    return "Seconds, medians:\n\n" + _table(["", *names, "sum"], body)


def _table(headings: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *body]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
