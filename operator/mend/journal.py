"""The journal: every decision that changed something, with what it was based on, one line of JSON each.

`replay` decides again on the same facts and shows where today's code would decide otherwise.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from mend.actions import Decision
from mend.decide import decide
from mend.heartbeats import Point
from mend.observation import Observation
from mend.room import make_room
from mend.spec import Spec

log = logging.getLogger(__name__)

T = TypeVar("T")
ROTATE_BYTES = 32 << 20
FOLDER_BYTES = 512 << 20


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One decision: at `now`, on these facts."""

    now: float
    spec: Spec
    seen: Observation
    decision: Decision


class CurvePoint(msgspec.Struct, frozen=True, kw_only=True):
    """A point of a run's curve and the attempt that made it."""

    attempt: int
    point: Point


class Difference(msgspec.Struct, frozen=True):
    """A line of a journal that today's code would decide otherwise."""

    line: int
    now: float
    then: Decision
    today: Decision


class UnreadableJournal(ValueError):
    """A line of the file is no journal entry."""


class Journal:
    """Appends to `<folder>/<run>.journal.jsonl` and `<run>.curve.jsonl`; the older half is dropped beyond 32 MiB.

    All files together stay below `most_bytes`: a pod whose volume grows beyond its limit is evicted. A disk that is
    full, or a file that cannot be read, costs lines, never a recovery.
    """

    def __init__(self, folder: Path, most_bytes: int = FOLDER_BYTES) -> None:
        self._folder = folder
        self._most_bytes = most_bytes
        self._unchecked_bytes = most_bytes  # written since the folder was last measured: at first, who knows
        self._is_living: Callable[[str], bool] = lambda run: True
        self._newest: dict[str, dict[str, tuple[int, int]]] = {}  # run -> name of a curve -> (attempt, step)
        self._problem = ""
        folder.mkdir(parents=True, exist_ok=True)

    def follow_runs(self, is_living: Callable[[str], bool]) -> None:
        """Ask this whether a run (namespace/name) is still there, whenever files have to go."""
        self._is_living = is_living

    def decided(self, run: str, entry: Entry) -> None:
        """Note a decision that changes something."""
        if entry.decision.status.attempt == 1 and entry.seen.status.attempt == 0:
            self._newest[run] = {}
            _put_aside(self.path(run), self.curve_path(run))
        self._append(self.path(run), msgspec.json.encode(entry) + b"\n")

    def measured(self, run: str, attempt: int, points: tuple[Point, ...]) -> None:
        """Note the points that are new: an agent tells all of its attempt again to each new listener."""
        newest = self._newest.get(run)
        if newest is None:
            newest = self._newest[run] = self._newest_written(run)
        lines = []
        for point in points:
            if (attempt, point.step) > newest.get(point.name, (0, -1)):
                newest[point.name] = (attempt, point.step)
                lines.append(msgspec.json.encode(CurvePoint(attempt=attempt, point=point)) + b"\n")
        if lines:
            self._append(self.curve_path(run), b"".join(lines))

    def forget(self, run: str) -> None:
        """The run is gone; its files stay while there is room."""
        self._newest.pop(run, None)

    def path(self, run: str) -> Path:
        """The journal of `run` (namespace/name)."""
        return self._folder / f"{run.replace('/', '_')}.journal.jsonl"

    def curve_path(self, run: str) -> Path:
        """The curve of `run`."""
        return self._folder / f"{run.replace('/', '_')}.curve.jsonl"

    def _newest_written(self, run: str) -> dict[str, tuple[int, int]]:
        """What a controller before this one has written down last."""
        path = self.curve_path(run)
        if not path.exists():
            return {}
        try:
            return {each.point.name: (each.attempt, each.point.step) for each in read_curve(path)}
        except (OSError, UnreadableJournal) as error:
            log.error("the curve of %s is begun anew: %s", run, error)
            _put_aside(path)
            return {}

    def _append(self, path: Path, raw: bytes) -> None:
        try:
            self._make_room(len(raw))
            with path.open("ab") as file:
                file.write(raw)
                full = file.tell() > ROTATE_BYTES
            if full:
                path.replace(path.with_suffix(".1.jsonl"))
        except OSError as error:
            if str(error) != self._problem:
                log.error("nothing is written down any more until this is put right: %s", error)
            self._problem = str(error)
        else:
            self._problem = ""

    def _make_room(self, more_bytes: int) -> None:
        """An eighth of the bound may be written before the folder is measured again; so that much is kept free."""
        eighth = self._most_bytes // 8
        self._unchecked_bytes += more_bytes
        if self._unchecked_bytes >= eighth:
            make_room(self._folder, self._most_bytes - eighth, lambda stem: self._is_living(stem.replace("_", "/", 1)))
            self._unchecked_bytes = more_bytes


def _put_aside(*paths: Path) -> None:
    """What an earlier run of this name has left is another story."""
    for path in paths:
        try:
            path.with_suffix(".1.jsonl").unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                path.replace(path.with_suffix(".before.jsonl"))
        except OSError as error:
            log.error("%s cannot be put aside: %s", path, error)


def changes_something(before: Observation, decision: Decision) -> bool:
    """Whether a decision is worth a line: it acts, or moves the run on."""
    old, new = before.status, decision.status
    return bool(decision.actions) or (
        (old.phase, old.attempt, old.incidents, old.participants, old.restored_step)
        != (new.phase, new.attempt, new.incidents, new.participants, new.restored_step)
    )


def read_journal(path: Path) -> Iterator[Entry]:
    """The entries of a journal, oldest first."""
    yield from (entry for _, entry in _lines(path, Entry))


def read_curve(path: Path) -> Iterator[CurvePoint]:
    """The points of a curve in the order in which they came, those of the older half first."""
    for half in (path.with_suffix(".1.jsonl"), path):
        if half.exists() or half == path:
            yield from (point for _, point in _lines(half, CurvePoint))


def _lines(path: Path, kind: type[T]) -> Iterator[tuple[int, T]]:
    """Numbered lines; one that a full disk or a kill has torn is passed over, one of another shape is not."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            if line:
                yield number, msgspec.json.decode(line, type=kind)
        except msgspec.ValidationError as error:
            raise UnreadableJournal(f"{path}:{number}: {error}; was it written by this version of mend?") from error
        except msgspec.DecodeError:
            log.warning("%s:%d: a torn line is passed over", path, number)


def replay(path: Path) -> Iterator[Difference]:
    """Decide again on every entry; yields where the outcome differs."""
    for line, entry in _lines(path, Entry):
        today = decide(entry.spec, entry.seen, entry.now)
        if today != entry.decision:
            yield Difference(line, entry.now, entry.decision, today)
