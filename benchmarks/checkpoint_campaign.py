"""The checkpoint campaign: faults at random moments of saving and restoring, and what was restored after each.

    python benchmarks/checkpoint_campaign.py [--count N] [--seed S] [--endpoint URL] [--quick] [--json FILE]

Agents, savers, ranks and S3 servers are real; every state that a rank reaches is noted outside of it, and what is
restored is held against that, bit for bit. The same seed gives the same faults. What is done is appended to
FOLDER/checkpoint-SEED-GROUND-CODE.jsonl, and a later call with the same code goes on behind it. With `--endpoint`, an
S3-compatible service of yours is used (keys from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, `--bucket`), and what
needs the right to kill it is left out; else two servers are started on loopback and take turns.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
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
from saving_gang import NotBack
from saving_injection import Result, a_ground, inject

ROOT = TESTS.parent
OUT = ROOT / "benchmarks" / "out"
COUNT, QUICK_COUNT, QUICK_SECONDS = 2000, 50, 140.0
KILLS = frozenset(name for name in KINDS if name.startswith("kill-"))
SHOWN = 20
SERVERS = (Ground.MINISTACK, Ground.RCLONE)


# ---------------------------------------------------------------- thinking
def rows(results: Sequence[Result]) -> list[Row]:
    """Kills apart from everything else; a promise is broken or it is not."""
    done = [each for each in results if not each.skipped]
    killed = [each for each in done if each.plan.kind in KILLS]
    others = [each for each in done if each.plan.kind not in KILLS]
    left_out = Counter(f"{each.plan.kind} ({each.skipped})" for each in results if each.skipped)
    note = "; ".join(f"left out {count} times: {what}" for what, count in sorted(left_out.items()))
    return [
        _row("kills while saving or restoring, after which a promise was broken", killed),
        _row("other faults, after which a promise was broken", others, note),
    ]


def _row(figure: str, done: Sequence[Result], note: str = "") -> Row:
    broken = sum(bool(each.broken) for each in done)
    kinds = f"{len({each.plan.kind for each in done})} kinds"
    told = "resumed, bit for bit what was reached, on the lineage, nothing committed lost"
    return Row(
        figure, "", float(broken) if done else None, 0.0,
        n=len(done), met=bool(done) and not broken, note="; ".join(filter(None, [kinds, told, note])),
    )  # fmt: skip


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
    own = sorted([*TESTS.glob("saving_*.py"), *TESTS.glob("reached.py"), *TESTS.glob("lying_proxy.py")])
    return hashlib.sha256(b"".join(map(Path.read_bytes, [*files, *own]))).hexdigest()[:10]


class Campaign:
    """Carries plans out, and appends what came of each."""

    def __init__(self, folder: Path, name: str, given: S3Server | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"checkpoint-{name}-{code_digest()}.jsonl"
        self._given = given
        self.results: dict[int, Result] = {each.plan.number: each for each in self._earlier()}

    def _earlier(self) -> list[Result]:
        found = []
        for line in self._path.read_bytes().splitlines() if self._path.exists() else ():
            with suppress(msgspec.DecodeError):  # the last line of a campaign that was killed
                found.append(msgspec.json.decode(line, type=Result))
        return found

    async def run(self, todo: Sequence[Plan], deadline: float, tell: Callable[[], object]) -> None:
        """All of them, block by block; none is begun after `deadline`, by time.monotonic()."""
        for _, block in groupby(todo, key=lambda plan: plan.number // BLOCK):
            left = list(block)
            while left and time.monotonic() < deadline:
                await self._gang(left, deadline, tell)

    async def _gang(self, left: list[Plan], deadline: float, tell: Callable[[], object]) -> None:
        """Does what is left with one gang, from the front, until it does not come back."""
        with tempfile.TemporaryDirectory(prefix="mend-checkpoints-", ignore_cleanup_errors=True) as folder:
            async with a_ground(Path(folder), left[0], self._given) as gang:
                while left and time.monotonic() < deadline:
                    result = await inject(gang, left.pop(0))
                    if not left or result.is_lost:
                        wrong = await asyncio.to_thread(gang.wrong_in_store)
                        result = msgspec.structs.replace(result, broken=(*result.broken, *wrong))
                    self._note(result)
                    tell()
                    if result.is_lost:
                        return

    def _note(self, result: Result) -> None:
        self.results[result.plan.number] = result
        with self._path.open("ab") as lines:
            lines.write(msgspec.json.encode(result) + b"\n")


def main() -> int:
    """Run it."""
    options = parser(__doc__ or "")
    options.add_argument("--count", type=int, default=COUNT, metavar="N", help=f"faults in all (default: {COUNT})")
    options.add_argument("--seed", type=int, default=1, metavar="S", help="which campaign (default: 1)")
    options.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help="where lines go")
    options.add_argument("--endpoint", default="", metavar="URL", help="an S3-compatible service of yours")
    options.add_argument("--bucket", default="mend-campaign", help="an empty bucket there (default: mend-campaign)")
    chosen = options.parse_args()
    if chosen.count < 1:
        options.error(f"--count {chosen.count}: must be at least 1")
    return publish(*asyncio.run(measure(chosen)))


async def measure(options: Namespace) -> tuple[str, list[Row], Namespace, dict[str, Any]]:
    """What `publish` wants: title, rows, options and the counts by kind."""
    count = min(options.count, QUICK_COUNT) if options.quick else options.count
    seconds = QUICK_SECONDS if options.quick else float("inf")
    given = _given(options)
    campaign = Campaign(options.out, f"{options.seed}-{'given' if given else 'ours'}", given)
    done = 1 + max(campaign.results, default=-1)
    wanted = plans(options.seed, max(count, done), (Ground.GIVEN,) if given else SERVERS)
    todo = [plan for plan in wanted[:count] if plan.number not in campaign.results]
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("faults", total=len(wanted), completed=len(wanted) - len(todo))
        with suppress(NotBack):
            await campaign.run(todo, time.monotonic() + seconds, lambda: bar.advance(task))
    results = [campaign.results[plan.number] for plan in wanted if plan.number in campaign.results]
    table = counts(results)
    for kind, line in table.items():
        print(f"{kind:22} {', '.join(f'{word} {number}' for word, number in line.items())}")
    for each in [each for each in results if each.broken][:SHOWN]:
        print(f"broken: {json.dumps(told(each))}", file=sys.stderr)
    more = {"seed": options.seed, "counts": table, "broken": [told(each) for each in results if each.broken][:SHOWN]}
    return "The checkpoint campaign", rows(results), options, more


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
