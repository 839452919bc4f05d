"""What watching costs: a mark and the hooks in the rank, a heartbeat of 8 ranks in the agent and in the controller.

    python benchmarks/heartbeat.py [--quick] [--json FILE]

The agent's part reads 8 progress pages and what 8 arenas have reached, builds the heartbeat and encodes it. The
controller's part decodes it, compares it with the one before, learns from it and asks how long until the gang counts as
hung. Between two heartbeats every rank makes a step, so that there is something to learn each time. Nothing is on a
network.
"""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from figures import Row, arguments, publish, row
from torch import nn

from mend.heard import StepSamples, is_news, is_stale
from mend.heartbeats import AgentState, Heartbeat, Phase, decode_stream
from mend.protocol import encode
from mend.spec import Limits
from mend.states import Held
from mend.stragglers import Paces
from mend.watchdog import until_bounds
from mend_trainer.arenas import Arenas
from mend_trainer.progress import ProgressPage
from mend_trainer.ranks import Rank
from mend_trainer.slots import SlotWord, packed
from mend_trainer.waiting import watch_waiting

RANKS: Final = 8
HEARTBEAT_SECONDS: Final = 0.3
WORKERS_OF_1024: Final = 1024 // RANKS
LIMITS: Final = Limits(
    start_seconds=900,
    first_step_seconds=900,
    floor_seconds=0.4,
    ceiling_seconds=600,
    saving_seconds=600,
    evaluating_seconds=3600,
)


def main() -> int:
    """Run it."""
    options = arguments(__doc__ or "")
    return publish("The price of watching", measure(options), options)


def measure(options: Namespace) -> list[Row]:
    """A row for each of the three parts, and what 1024 ranks take of a core."""
    rounds = 2_000 if options.quick else 20_000
    with tempfile.TemporaryDirectory(prefix="mend-bench-") as folder:
        ranks = [Rank(number, Path(folder)) for number in range(RANKS)]
        pages = [ProgressPage.open(each.page_path) for each in ranks]
        arenas = Arenas(RANKS)
        told, lines = _agent(ranks, pages, arenas, rounds)
        arenas.close()
        marks = _marks(pages[0], rounds)
        for page, rank in zip(pages, ranks, strict=True):
            page.close()
            rank.close()
    heard = _controller(lines)
    share = [100 * WORKERS_OF_1024 * each * 1e-6 / HEARTBEAT_SECONDS for each in heard]
    return [
        row("a mark of progress in the rank", marks, 1000.0, unit="ns"),
        row("measuring the wait for others, two hooks a step", _hooks(rounds // 20), 2.0, unit="us"),
        row(f"a heartbeat of {RANKS} ranks, in the agent", told, 50.0, unit="us"),
        row(f"the same in the controller ({len(lines[0])} bytes)", heard, 50.0, unit="us"),
        row(f"the controller's core for 1024 ranks, every {HEARTBEAT_SECONDS:g} s", share, 2.5, unit="%"),
    ]


def _marks(page: ProgressPage, rounds: int) -> list[float]:
    """Nanoseconds of one `enter`, the dearer kind of mark, by hundreds."""
    return [_timed(lambda: page.enter(Phase.STEP), 100) * 1e9 for _ in range(rounds // 10)]


def _hooks(rounds: int) -> list[float]:
    """Microseconds by which the two hooks make a step longer: the shortest of 50 with them less the shortest without.

    The shortest, since a step of 300 us is easily interrupted, and hooks do not make interruptions.
    """
    bare, watched = _a_step(), _a_step(lambda nanoseconds: None)

    def shortest(step: Callable[[], None]) -> float:
        return min(_timed(step, 1) for _ in range(50))

    return [(shortest(watched) - shortest(bare)) * 1e6 for _ in range(rounds)]


def _a_step(waited: Callable[[int], None] | None = None) -> Callable[[], None]:
    """The step of a model of 12 parameters."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    inputs = torch.ones(2, 16)
    if waited is not None:
        watch_waiting(model, optimizer, waited)

    def step() -> None:
        optimizer.zero_grad()
        model(inputs).sum().backward()
        optimizer.step()

    step()
    return step


def _timed(call: Callable[[], object], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times


def _agent(
    ranks: list[Rank], pages: list[ProgressPage], arenas: Arenas, rounds: int
) -> tuple[list[float], list[bytes]]:
    """Microseconds of each heartbeat, and the lines; every rank has published two snapshots, which are told as held."""
    micros, lines = [], []
    for words in arenas.words:
        for slot, step in enumerate((5, 10)):
            words.put(slot, SlotWord.REACHED, packed(1, step))
            words.put(slot, SlotWord.SEQUENCE, 2 * (slot + 1))
    everyone = tuple(range(RANKS))
    held = tuple(
        Held(save_id=f"{step:016x}", run_uid="u", attempt=1, step=step, tokens=0, world_size=RANKS, ranks=everyone)
        for step in (10, 5)
    )
    for number in range(rounds):
        for page in pages:
            page.enter(Phase.DATA)
            page.enter(Phase.STEP)
            page.waited(1_000_000)
            page.complete_step(number, tokens=1000 * number, seconds=0.5, loss=2.5)
        began = time.perf_counter()
        now = time.monotonic()
        assert arenas.reached(RANKS) == (1, 10)
        beat = Heartbeat(
            attempt=1,
            worker=0,
            agent_id="0123456789abcdef0123456789abcdef",
            state=AgentState.RUNNING,
            sequence=number,
            ranks=tuple(rank.report(now) for rank in ranks),
            standbys_ready=RANKS,
            store_port=29500,
            held=held,
        )
        line = encode(beat)
        micros.append((time.perf_counter() - began) * 1e6)
        lines.append(line)
    return micros, lines


def _controller(lines: list[bytes]) -> list[float]:
    """Microseconds for each line, from its bytes to the bounds of the gang."""
    samples, paces = StepSamples(attempt=1), Paces(attempt=1)
    previous: Heartbeat | None = None
    micros = []
    for line in lines:
        began = time.perf_counter()
        beat = decode_stream(line)
        assert isinstance(beat, Heartbeat)
        assert not is_stale(previous, beat)
        is_news(previous, beat)
        samples.add(beat)
        paces.add(beat)
        until_bounds(beat.ranks, samples.times(), LIMITS)
        micros.append((time.perf_counter() - began) * 1e6)
        previous = beat
    return micros


if __name__ == "__main__":
    raise SystemExit(main())
