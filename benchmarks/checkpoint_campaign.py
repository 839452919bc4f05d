"""The checkpoint campaign: faults at random moments of saving and restoring, and what was restored after each.

    python benchmarks/checkpoint_campaign.py [--count N] [--seed S] [--gangs N] [--endpoint URL] [--quick] [--json FILE]
    python benchmarks/checkpoint_campaign.py --seed S --only NUMBER

Agents, savers, ranks and S3 servers are real; every state that a rank reaches is noted outside of it, and what is
restored is held against that, bit for bit; a lookout sees what saving was doing when a kill came. The same seed gives
the same faults. A gang lives through many of them, and another one does beside it: each mostly waits. What is done is
appended to FOLDER/checkpoint-SEED-GROUND-CODE.jsonl, and a later call with the same code goes on behind it. `--only`
does one of them again at a gang of its own, and tells what came of it. Where a promise was broken, notes and logs of
the gang are kept under FOLDER/broken-SEED-NUMBER.
With `--endpoint`, an S3-compatible service of yours is used (keys from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY,
`--bucket`), and what needs the right to kill it is left out; else two servers are started on loopback and take turns.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
from figures import Row, parser, publish
from rich.console import Console
from rich.progress import Progress
from with_tests import TESTS

from mend.store import Credentials
from s3 import S3Server
from saving_faults import BLOCK, KINDS, Ground, Plan, plans
from saving_gang import NotBack, SavingGang
from saving_injection import Result, a_ground, inject
from saving_phases import SavePhase

ROOT = TESTS.parent
OUT = ROOT / "benchmarks" / "out"
KILLS = 1000  # that the figure speaks of: fewer do not meet it
COUNT, QUICK_COUNT, QUICK_SECONDS = 1350, 100, 140.0  # so many hold as many kills
GANGS = 2
# Ranks that mostly sleep leave the cores to those that save and restore; and there is room for each save.
TRAINING: Mapping[str, Any] = {"pace_seconds": 0.03, "save_every_steps": 6}
SHOWN = 20
SERVERS = (Ground.MINISTACK, Ground.RCLONE)
GROUNDWORK = ("agents_real.py", "gang_of_agents.py", "lying_proxy.py", "mortal_server.py", "reached.py", "s3.py")


# ---------------------------------------------------------------- thinking
def rows(results: Sequence[Result]) -> list[Row]:
    """Kills apart from everything else; a promise is broken or it is not. A kill that hit nobody counts only if so."""
    done = [each for each in results if not each.skipped]
    killed = [each for each in done if is_kill(each) and (each.broken or each.phase not in (None, SavePhase.NOBODY))]
    others = [each for each in done if not is_kill(each)]
    left_out = Counter(f"{each.plan.kind} ({each.skipped})" for each in results if each.skipped)
    note = "; ".join(f"left out {count} times: {what}" for what, count in sorted(left_out.items()))
    return [
        _row("kills while saving or restoring, after which a promise was broken", killed, KILLS, _spread(done)),
        _row("other faults, after which a promise was broken", others, 1, note),
    ]


def _row(figure: str, done: Sequence[Result], least: int, note: str = "") -> Row:
    few = f"only {len(done)} of the {least:,} that the figure speaks of" if 0 < len(done) < least else ""
    broken = sum(bool(each.broken) for each in done)
    kinds = f"{len({each.plan.kind for each in done})} kinds"
    told = "resumed, bit for bit what was reached, on the lineage, nothing committed lost"
    return Row(
        figure, "", float(broken) if done else None, 0.0,
        n=len(done), met=len(done) >= least and not broken, note="; ".join(filter(None, [few, kinds, told, note])),
    )  # fmt: skip


def is_kill(result: Result) -> bool:
    """Whether something was killed; everything else is another fault."""
    return KINDS[result.plan.kind].is_kill


def _spread(results: Iterable[Result]) -> str:
    """At which moments of saving and restoring kills came."""
    met = Counter(each.phase for each in results if is_kill(each))
    return "when they came: " + ", ".join(f"{phase} {met[phase]}" for phase in SavePhase if met[phase])


def phases(results: Iterable[Result]) -> dict[str, dict[str, int]]:
    """Kills by kind and by what saving or restoring was doing at the moment."""
    done = [each for each in results if is_kill(each) and each.phase and not each.skipped]
    table = {kind: Counter(each.phase for each in done if each.plan.kind == kind) for kind in KINDS}
    table["all kills"] = Counter(each.phase for each in done)
    return {kind: {phase.value: met[phase] for phase in SavePhase} for kind, met in table.items() if met}


def counts(results: Iterable[Result]) -> dict[str, dict[str, int]]:
    """By kind: how often it was done, broke a promise, and was answered from memory or from the store."""
    table: dict[str, Counter[str]] = {}
    for each in results:
        line = table.setdefault(each.plan.kind, Counter())
        line["left out" if each.skipped else "done"] += 1
        line["broken"] += bool(each.broken)
        if each.restored:
            line["from memory" if each.restored.startswith("memory:") else "from the store"] += 1
    return {kind: dict(line) for kind, line in sorted(table.items())}


# ---------------------------------------------------------------- doing
def code_digest() -> str:
    """Of all that an outcome depends on: what another version of the code has done is no figure of this one."""
    folders = (ROOT / "operator" / "mend", ROOT / "trainer" / "mend_trainer", TESTS / "programs")
    files = sorted(path for folder in folders for path in folder.rglob("*.py"))
    return hashlib.sha256(b"".join(map(Path.read_bytes, [*files, *own_files()]))).hexdigest()[:10]


def own_files() -> list[Path]:
    """What carries the faults out, and judges what came of them."""
    return sorted([*TESTS.glob("saving_*.py"), *(TESTS / name for name in GROUNDWORK)])


class Campaign:
    """Carries plans out, and appends what came of each."""

    def __init__(self, folder: Path, seed: int, given: S3Server | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._seed, self._given = folder, seed, given
        self._path = folder / f"checkpoint-{seed}-{'given' if given else 'ours'}-{code_digest()}.jsonl"
        self.results: dict[int, Result] = {each.plan.number: each for each in self._earlier()}

    def _earlier(self) -> list[Result]:
        found = []
        for line in self._path.read_bytes().splitlines() if self._path.exists() else ():
            with suppress(msgspec.DecodeError):  # the last line of a campaign that was killed
                found.append(msgspec.json.decode(line, type=Result))
        return found

    async def run(self, todo: Sequence[Plan], gangs: int, deadline: float, tell: Callable[[], object]) -> None:
        """All of them, in so many rows of blocks; none is begun after `deadline`, by time.monotonic()."""
        blocks = deque(list(block) for _, block in groupby(todo, key=lambda plan: plan.number // BLOCK))

        async def one_after_the_other() -> None:
            while blocks:
                left = blocks.popleft()
                while left and time.monotonic() < deadline:
                    await self._gang(left, deadline, tell)

        await asyncio.gather(*(one_after_the_other() for _ in range(gangs)))

    async def _gang(self, left: list[Plan], deadline: float, tell: Callable[[], object]) -> None:
        """Does what is left with one gang, from the front, until it does not come back.

        One that does not begin has broken a promise, once: the rest of its block is left for a later call.
        """
        with tempfile.TemporaryDirectory(prefix="mend-checkpoints-", ignore_cleanup_errors=True) as folder:
            try:
                async with a_ground(Path(folder), left[0], self._given, **TRAINING) as gang:
                    await self._live_through(gang, left, deadline, tell)
            except NotBack as why:
                self._note(not_begun(left[0], why), Path(folder) / "gang")
                tell()
                left.clear()

    async def _live_through(
        self, gang: SavingGang, left: list[Plan], deadline: float, tell: Callable[[], object]
    ) -> None:
        while left and time.monotonic() < deadline:
            result = await inject(gang, left.pop(0))
            if not left or result.is_lost:
                wrong = await asyncio.to_thread(gang.wrong_in_store)
                result = msgspec.structs.replace(result, broken=(*result.broken, *wrong))
            self._note(result, gang.folder)
            tell()
            if result.is_lost:
                return

    def _note(self, result: Result, folder: Path) -> None:
        self.results[result.plan.number] = result
        with self._path.open("ab") as lines:
            lines.write(msgspec.json.encode(result) + b"\n")
        if result.broken:
            kept = self._folder / f"broken-{self._seed}-{result.plan.number}"
            shutil.copytree(folder, kept, dirs_exist_ok=True)
            (kept / "result.json").write_bytes(msgspec.json.format(msgspec.json.encode(result)))


async def replay(plan: Plan, given: S3Server | None) -> Result:
    """One injection again, at a gang of its own."""
    with tempfile.TemporaryDirectory(prefix="mend-checkpoints-", ignore_cleanup_errors=True) as folder:
        try:
            async with a_ground(Path(folder), plan, given, **TRAINING) as gang:
                result = await inject(gang, plan)
                wrong = await asyncio.to_thread(gang.wrong_in_store)
                return msgspec.structs.replace(result, broken=(*result.broken, *wrong))
        except NotBack as why:
            return not_begun(plan, why)


def not_begun(plan: Plan, why: NotBack) -> Result:
    """What came of an injection whose gang never trained."""
    return Result(plan=plan, broken=(f"does not begin: {why}",), is_lost=True)


def main() -> int:
    """Run it."""
    options = parser(__doc__ or "")
    options.add_argument("--count", type=int, default=COUNT, metavar="N", help=f"faults in all (default: {COUNT})")
    options.add_argument("--seed", type=int, default=1, metavar="S", help="which campaign (default: 1)")
    options.add_argument("--gangs", type=int, default=GANGS, metavar="N", help=f"side by side (default: {GANGS})")
    options.add_argument("--only", type=int, metavar="NUMBER", help="the injection of this number alone; 1 if it fails")
    options.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help="where lines go")
    options.add_argument("--endpoint", default="", metavar="URL", help="an S3-compatible service of yours")
    options.add_argument("--bucket", default="mend-campaign", help="an empty bucket there (default: mend-campaign)")
    chosen = options.parse_args()
    for name, value, least in (("count", chosen.count, 1), ("gangs", chosen.gangs, 1), ("only", chosen.only, 0)):
        if value is not None and value < least:
            options.error(f"--{name} {value}: must be at least {least}")
    if chosen.only is not None:
        given = _given(chosen)
        result = asyncio.run(replay(plans(chosen.seed, chosen.only + 1, _grounds(given))[-1], given))
        print(msgspec.json.format(msgspec.json.encode(result)).decode())
        return int(bool(result.broken))
    return publish(*asyncio.run(measure(chosen)))


async def measure(options: Namespace) -> tuple[str, list[Row], Namespace, dict[str, Any]]:
    """What `publish` wants: title, rows, options and the counts by kind."""
    count = min(options.count, QUICK_COUNT) if options.quick else options.count
    seconds = QUICK_SECONDS if options.quick else float("inf")
    given = _given(options)
    campaign = Campaign(options.out, options.seed, given)
    done = 1 + max(campaign.results, default=-1)
    wanted = plans(options.seed, max(count, done), _grounds(given))
    todo = [plan for plan in wanted[:count] if plan.number not in campaign.results]
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("faults", total=len(wanted), completed=len(wanted) - len(todo))
        await campaign.run(todo, options.gangs, time.monotonic() + seconds, lambda: bar.advance(task))
    results = [campaign.results[plan.number] for plan in wanted if plan.number in campaign.results]
    table = counts(results)
    for kind, line in table.items():
        print(f"{kind:22} {', '.join(f'{word} {number}' for word, number in line.items())}")
    spread = phases(results)
    for phase in SavePhase:
        print(f"kills, {phase:15} {spread.get('all kills', {}).get(phase.value, 0):5}")
    for each in [each for each in results if each.broken][:SHOWN]:
        print(f"broken: {json.dumps(told(each))}", file=sys.stderr)
    broken = [told(each) for each in results if each.broken][:SHOWN]
    more = {"seed": options.seed, "counts": table, "phases": spread, "broken": broken}
    return "The checkpoint campaign", rows(results), options, more


def _grounds(given: S3Server | None) -> Sequence[Ground]:
    return (Ground.GIVEN,) if given else SERVERS


def _given(options: Namespace) -> S3Server | None:
    if not options.endpoint:
        return None
    keys = Credentials(
        access_key_id=os.environ.get("AWS_ACCESS_KEY_ID"),
        secret_access_key=os.environ.get("AWS_SECRET_ACCESS_KEY"),
        region=os.environ.get("AWS_REGION"),
    )
    return S3Server(endpoint=options.endpoint, bucket=options.bucket, credentials=keys)


def told(result: Result) -> Mapping[str, Any]:
    """A result for a person."""
    return {**asdict(result.plan), "broken": [sentence[:2000] for sentence in result.broken]}


if __name__ == "__main__":
    raise SystemExit(main())
