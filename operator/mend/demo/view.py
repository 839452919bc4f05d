"""The live view of the demonstration: progress, ranks, and incidents as they happen."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mend.demo.watch import Sight
from mend.status import RunPhase
from mend.story import culprits

SAID_LINES = 12
PLAIN_SECONDS = 5.0
PHASE_STYLES = {
    RunPhase.PENDING: "yellow",
    RunPhase.RUNNING: "green",
    RunPhase.RECOVERING: "bold red",
    RunPhase.SUCCEEDED: "bold green",
    RunPhase.FAILED: "bold white on red",
    RunPhase.SUSPENDED: "blue",
}


class View:
    """A terminal gets a live picture; a file or a pipe gets a line now and then."""

    def __init__(self, console: Console, steps: int) -> None:
        self._console = console
        self._steps = steps
        self._began = time.monotonic()
        self._said: deque[Text] = deque(maxlen=SAID_LINES)
        self._sights: dict[str, Sight] = {}
        self._live: Live | None = None
        self._last_plain = 0.0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the live picture while the block runs, if there is a terminal."""
        if not self._console.is_terminal:
            yield
            return
        with Live(self._picture(), console=self._console, refresh_per_second=8, transient=True) as self._live:
            yield
        self._live = None

    def say(self, words: str, style: str = "") -> None:
        """Something has happened."""
        line = Text(f"{time.monotonic() - self._began:6.1f} s  {words}", style=style)
        self._said.append(line)
        if self._live is None:
            self._console.print(line)

    def update(self, sight: Sight) -> None:
        """This is how the run is now."""
        self._sights[sight.name] = sight
        if self._live is not None:
            self._live.update(self._picture())
        elif time.monotonic() - self._last_plain > PLAIN_SECONDS:
            self._last_plain = time.monotonic()
            status = sight.status
            loss = "" if status.loss is None else f", loss {status.loss:.4f}"
            self.say(
                f"{sight.name}: {status.phase}, attempt {status.attempt}, step {sight.step} of {self._steps}{loss}"
            )

    def history(self) -> Iterator[Text]:
        """What was said last, for when the live picture is gone."""
        yield from self._said

    def _picture(self) -> RenderableType:
        parts: list[RenderableType] = [self._progress()]
        if self._sights:
            parts.append(_ranks(list(self._sights.values())[-1]))
        parts.append(Panel(Group(*self._said) if self._said else Text("..."), title="what happens", title_align="left"))
        return Group(*parts)

    def _progress(self) -> Table:
        grid = Table.grid(padding=(0, 2))
        for sight in self._sights.values():
            done = max(0, sight.step + 1)
            loss = "" if sight.status.loss is None else f"loss {sight.status.loss:.4f}"
            grid.add_row(
                Text(sight.name, style="bold"),
                ProgressBar(total=self._steps, completed=done, width=40),
                f"step {done}/{self._steps}",
                Text(str(sight.status.phase), style=PHASE_STYLES[sight.status.phase]),
                f"attempt {sight.status.attempt}",
                loss,
            )
        return grid


def _ranks(sight: Sight) -> RenderableType:
    view = Table(title=f"ranks of {sight.name}", title_justify="left", box=None, header_style="dim")
    for heading in ("rank", "worker", "pid", "phase", "step", "last sign", ""):
        view.add_column(
            heading, justify="right" if heading in ("rank", "worker", "pid", "step", "last sign") else "left"
        )
    blamed = sight.status.open_incident.culprit_ranks if sight.status.open_incident else ()
    for rank in sight.ranks:
        note = Text("blamed", style="bold red") if rank.rank in blamed else Text("")
        if rank.exit is not None:
            note = Text("ended", style="red")
        style = "red" if rank.progress_seconds > 1.0 else "green"
        view.add_row(
            str(rank.rank),
            str((sight.workers or {}).get(rank.rank, "?")),
            str(rank.pid),
            str(rank.phase),
            str(rank.step),
            Text(f"{rank.progress_seconds:5.1f} s ago", style=style),
            note,
        )
    return view


def told(sight: Sight, known: set[tuple[int, str]]) -> Iterator[tuple[str, str]]:
    """(words, style) for what is new in a run's incidents; remembers in `known` what was told."""
    for incident in sight.status.incidents:
        stages = [("seen", f"mend noticed: {incident.kind}, {incident.summary}", "bold red")]
        if incident.tier is not None:
            stages.append(("blamed", f"mend blames {culprits(incident)}; {incident.tier}", "red"))
        if incident.recovered_at is not None:
            seconds = incident.recovered_at - incident.began_at
            back = f"back in training after {seconds:.2f} s, {incident.steps_lost} steps lost"
            stages.append(("back", back, "bold green"))
        for stage, words, style in stages:
            if (incident.id, stage) not in known:
                known.add((incident.id, stage))
                yield words, style
