"""The injection campaign: every kind of fault, many times, at gangs of 2 to 8 real ranks; what was said of each.

    python benchmarks/campaign.py [--count N] [--seed S] [--gangs G] [--out FOLDER] [--quick] [--json FILE]

Agents, ranks and evidence are real, and mend's own `diagnose` and `decide` think about them; only the cluster around
them is left out. The same seed gives the same faults at the same ranks of the same gangs. What is done is appended to
FOLDER/campaign-SEED-CODE.jsonl, and a later call with the same code goes on behind it. Every wrong verdict is also
written as a line of a journal, for `mend replay`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import pytest
from figures import Row, parser, publish
from rich.console import Console
from rich.progress import Progress, TaskID
from with_tests import TESTS

from injection import KINDS, FaultKind, Ground, InjuredGang, Outcome, a_gang, expected, inject
from mend.decide import decide
from mend.journal import Entry

ROOT = TESTS.parent
OUT = ROOT / "benchmarks" / "out"
BLOCK = 20  # injections that one gang lives through: its start costs as much as two of them
SHAPES = ((1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (1, 4), (4, 1), (2, 3), (3, 2), (1, 6), (2, 4), (4, 2), (1, 8))
GROUNDS = (Ground.PLAIN,) * 5 + (Ground.MEMORY, Ground.NETWORK, Ground.CLOCK)
OWN_KINDS = 6  # how many times more often what only this ground makes possible is done there
QUICK_COUNT, QUICK_SECONDS = 100, 140.0
TARGET_PERCENT = 0.5
WRONG_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Plan:
    """One injection, decided before anything runs."""

    number: int
    workers: int
    ranks: int  # of each worker
    ground: str
    kind: str
    rank: int


@dataclass(frozen=True, slots=True)
class Result:
    """What came of it. `said` is in the words of the confusion matrix; `skipped` why it could not be done here."""

    plan: Plan
    said: str = ""
    should: str = ""
    exact: bool = False
    wrong_workers: int = 0  # workers with a rank that is blamed, of which none did anything
    seconds: float = 0.0  # from asking for the fault to the verdict
    reasons: tuple[str, ...] = ()
    skipped: str = ""


# ---------------------------------------------------------------- thinking
def plans(seed: int, count: int) -> list[Plan]:
    """The campaign of this seed, of which a longer one is a continuation."""
    return [plan for block in range(-(-count // BLOCK)) for plan in _block(seed, block)][:count]


def _block(seed: int, block: int) -> list[Plan]:
    """The injections of one gang: kinds in a random order, each as often as the others before it comes again."""
    chance = random.Random(f"{seed}/{block}")
    ground = GROUNDS[block % len(GROUNDS)]
    shapes = [shape for shape in SHAPES if ground is not Ground.NETWORK or shape[0] > 1]
    workers, ranks = chance.choice(shapes)
    able = [name for name, kind in KINDS.items() if _fits(kind, workers, ranks, ground)]
    own = [name for name in able if KINDS[name].ground is not Ground.PLAIN]
    deck: list[str] = []
    chosen = []
    for number in range(block * BLOCK, (block + 1) * BLOCK):
        if not deck:
            deck = [*able, *own * OWN_KINDS]
            chance.shuffle(deck)
        chosen.append(Plan(number, workers, ranks, ground.name, deck.pop(), chance.randrange(workers * ranks)))
    return chosen


def _fits(kind: FaultKind, workers: int, ranks: int, ground: Ground) -> bool:
    on_ground = kind.ground in (Ground.PLAIN, ground)
    return on_ground and workers >= kind.min_workers and workers * ranks >= kind.min_ranks


def whom(named: Iterable[int], guilty: Iterable[int]) -> str:
    """Who was blamed, seen from who did it."""
    blamed, did = set(named), set(guilty)
    if not blamed:
        return "nobody"
    if blamed == did:
        return "the guilty"
    if blamed < did:
        return "some of the guilty"
    return "the guilty and others" if did and did < blamed else "others"


def said(outcome: Outcome) -> str:
    """The incident and whom it was blamed on, as a column of the confusion matrix."""
    if outcome.incident is None:
        return "no incident"
    return f"{outcome.incident.kind}: {whom(outcome.incident.verdict.ranks, outcome.expected.ranks)}"


def should(kind: FaultKind, guilty: Sequence[int]) -> str:
    """What a right verdict says, in the same words."""
    if not kind.incidents:
        return "no incident"
    return f"{'/'.join(sorted(kind.incidents))}: {whom(guilty, guilty)}"


def wrong_workers(outcome: Outcome, ranks_per_worker: int) -> int:
    """How many workers are blamed that hold none of the guilty: their nodes would be excluded in the end."""
    blamed = outcome.incident.verdict.ranks if outcome.incident is not None else ()
    guilty = {rank // ranks_per_worker for rank in outcome.expected.ranks}
    return len({rank // ranks_per_worker for rank in blamed} - guilty)


def confusion(results: Iterable[Result]) -> dict[str, dict[str, Any]]:
    """By kind: what should be said, how often exactly that was, and how often what was said."""
    table: dict[str, dict[str, Any]] = {}
    for each in results:
        line = table.setdefault(each.plan.kind, {"should": each.should, "exact": 0, "said": Counter()})
        line["exact"] += each.exact
        line["said"][each.said] += 1
    return {kind: {**line, "said": dict(line["said"])} for kind, line in sorted(table.items())}


def rows(results: Sequence[Result]) -> list[Row]:
    """The two figures of the campaign."""
    done = [each for each in results if not each.skipped]
    wrong = [each for each in done if not each.exact]
    blamed = sum(each.wrong_workers for each in done)
    percent = round(100 * len(wrong) / len(done), 3) if done else None
    kinds = f"{len({each.plan.kind for each in done})} of {len(KINDS)} kinds, 2 to 8 ranks"
    missing = sorted({each.skipped for each in results if each.skipped})
    note = "; ".join([kinds, *(f"not possible here: {why}" for why in missing)])
    return [
        Row(
            "verdict not exact (kind of incident, ranks)", "%", percent, TARGET_PERCENT,
            n=len(done), met=percent is not None and percent <= TARGET_PERCENT, note=note,
        ),
        Row("innocent workers blamed", "", float(blamed), 0.0, n=len(done), met=bool(done) and blamed == 0),
    ]  # fmt: skip


# ---------------------------------------------------------------- doing
def code_digest() -> str:
    """Of all that a verdict depends on: what another version of the code has said is no figure of this one."""
    folders = (ROOT / "operator" / "mend", ROOT / "trainer" / "mend_trainer", TESTS / "programs")
    files = sorted(path for folder in folders for path in folder.rglob("*.py"))
    return hashlib.sha256(b"".join(map(Path.read_bytes, [*files, *sorted(TESTS.glob("inj*.py"))]))).hexdigest()[:10]


class Campaign:
    """Carries plans out, and appends what came of each."""

    def __init__(self, folder: Path, seed: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"campaign-{seed}-{code_digest()}"
        self._path = folder / f"{name}.jsonl"
        self._wrong = folder / f"{name}.wrong.journal.jsonl"
        self.results: dict[int, Result] = {each.plan.number: each for each in self._earlier()}

    def _earlier(self) -> list[Result]:
        if not self._path.exists():
            return []
        lines = self._path.read_bytes().splitlines()
        found = []
        for line in lines:
            with suppress(msgspec.DecodeError):  # the last line of a campaign that was killed
                found.append(msgspec.json.decode(line, type=Result))
        return found

    async def run(self, todo: Sequence[Plan], gangs: int, deadline: float, tell: Callable[[], object]) -> None:
        """All of them, so many gangs side by side; none is begun after `deadline`, by time.monotonic()."""
        blocks = [list(block) for _, block in groupby(todo, key=lambda plan: plan.number // BLOCK)]
        turn = asyncio.Semaphore(gangs)

        async def one(block: list[Plan]) -> None:
            async with turn:
                await self._block(block, deadline, tell)

        await asyncio.gather(*map(one, blocks))

    async def _block(self, block: Sequence[Plan], deadline: float, tell: Callable[[], object]) -> None:
        """One gang after the other until the block is done: what broke a gang is tried once more with a new one."""
        left, broken = list(block), Counter[int]()
        while left and time.monotonic() < deadline:
            try:
                await self._gang(left, deadline, tell)
            except pytest.skip.Exception as why:
                while left:
                    self._note(Result(left.pop(0), skipped=str(why)))
                    tell()
            except (AssertionError, OSError, TimeoutError) as problem:
                broken[left[0].number] += 1
                if broken[left[0].number] > 1:
                    raise RuntimeError(f"the gang broke twice before {left[0]}: {problem}") from problem

    async def _gang(self, left: list[Plan], deadline: float, tell: Callable[[], object]) -> None:
        """Does what is left with one gang, from the front; each is taken off once it is done."""
        ground = Ground[left[0].ground]
        with tempfile.TemporaryDirectory(prefix="mend-campaign-", ignore_cleanup_errors=True) as folder:
            async with a_gang(Path(folder), workers=left[0].workers, ranks=left[0].ranks, ground=ground) as gang:
                while left and time.monotonic() < deadline:
                    await gang.launch()
                    self._note(await self._one(left[0], gang))
                    left.pop(0)
                    tell()

    async def _one(self, plan: Plan, gang: InjuredGang) -> Result:
        kind = KINDS[plan.kind]
        try:
            outcome = await inject(kind, gang, plan.rank)
        except AssertionError:  # nothing was noticed for so long that the harness gave up waiting
            outcome = Outcome(kind, plan.rank, expected(kind, gang, plan.rank), None, float("inf"))
        result = Result(
            plan,
            said=said(outcome),
            should=should(kind, outcome.expected.ranks),
            exact=outcome.is_right,
            wrong_workers=wrong_workers(outcome, plan.ranks),
            seconds=round(min(outcome.seconds, 1e6), 4),
            reasons=outcome.incident.verdict.reasons if outcome.incident else (),
        )
        if not result.exact:
            self._write_down(gang)
        return result

    def _write_down(self, gang: InjuredGang) -> None:
        now, seen = time.time(), gang.observe()
        seen = msgspec.structs.replace(seen, status=msgspec.structs.replace(seen.status, attempt_started_at=now - 60))
        entry = Entry(now=now, spec=gang.spec, seen=seen, decision=decide(gang.spec, seen, now))
        with self._wrong.open("ab") as journal:
            journal.write(msgspec.json.encode(entry) + b"\n")

    def _note(self, result: Result) -> None:
        self.results[result.plan.number] = result
        with self._path.open("ab") as lines:
            lines.write(msgspec.json.encode(result) + b"\n")


def main() -> int:
    """Run it."""
    options = parser(__doc__ or "")
    options.add_argument("--count", type=int, default=1000, metavar="N", help="injections in all (default: 1000)")
    options.add_argument("--seed", type=int, default=1, metavar="S", help="which campaign (default: 1)")
    options.add_argument("--gangs", type=int, default=1, metavar="G", help="gangs side by side (default: 1)")
    options.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help="where lines and journals go")
    chosen = options.parse_args()
    if chosen.count < 1 or chosen.gangs < 1:
        options.error(f"--count {chosen.count} --gangs {chosen.gangs}: both must be at least 1")
    return publish(*asyncio.run(measure(chosen)))


async def measure(options: Namespace) -> tuple[str, list[Row], Namespace, dict[str, Any]]:
    """What `publish` wants: title, rows, options and the confusion matrix."""
    count = min(options.count, QUICK_COUNT) if options.quick else options.count
    seconds = QUICK_SECONDS if options.quick else float("inf")
    campaign = Campaign(options.out, options.seed)
    done = 1 + max(campaign.results, default=-1)
    wanted = plans(options.seed, max(count, done))  # what a longer call has done is shown, too
    todo = [plan for plan in wanted[:count] if plan.number not in campaign.results]
    with Progress(console=Console(stderr=True)) as bar:
        task: TaskID = bar.add_task("injections", total=len(wanted), completed=len(wanted) - len(todo))
        await campaign.run(todo, options.gangs, time.monotonic() + seconds, lambda: bar.advance(task))
    results = [campaign.results[plan.number] for plan in wanted if plan.number in campaign.results]
    matrix = confusion(each for each in results if not each.skipped)
    _print(matrix, results)
    more = {"seed": options.seed, "confusion": matrix, "wrong": [_told(each) for each in _wrong(results)]}
    return "The injection campaign", rows(results), options, more


def _wrong(results: Sequence[Result]) -> list[Result]:
    return [each for each in results if not each.exact and not each.skipped][:WRONG_SHOWN]


def _told(result: Result) -> Mapping[str, Any]:
    return {**asdict(result.plan), "said": result.said, "should": result.should, "reasons": result.reasons}


def _print(matrix: Mapping[str, Mapping[str, Any]], results: Sequence[Result]) -> None:
    for kind, line in matrix.items():
        counts = ", ".join(f"{word} {count}" for word, count in sorted(line["said"].items()))
        print(f"{kind:14} exact {line['exact']:4} of {sum(line['said'].values()):4}   {counts}")
    for each in _wrong(results):
        print(f"wrong: {json.dumps(_told(replace(each, reasons=each.reasons[:2])))}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
