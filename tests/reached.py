"""What every rank really reached, noted outside of it, and which promises of saving and restoring that breaks.

Ranks of tests/programs/reaching.py append a line per step to a file, which no kill takes back: a digest of their whole
state that mend has no part in. Each attempt trains on data of its own, so a state tells the attempts it stands on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec

ENDLESS: Final = 1 << 60
FRESH: Final = -1  # the step of a rank that restored nothing
_MANIFEST: Final = re.compile(r"step-(\d{12})/(\d{6,})-[^/]+/manifest\.json")


class Note(msgspec.Struct, frozen=True):
    """A rank completed a step with this state, or has just taken it up."""

    what: Literal["reached", "restored"]
    attempt: int
    rank: int
    step: int
    digest: str


@dataclass(frozen=True, slots=True, order=True)
class State:
    """A state of the whole gang by name: the attempt that reached it, and the step."""

    step: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Commit:
    """A checkpoint whose manifest was seen in the store; `folder` is its key prefix."""

    folder: str
    state: State


class History:
    """Everything noted of one run so far. `floors`: by attempt, the least that it had to restore; absent: nothing."""

    def __init__(self, notes: Iterable[Note] = (), floors: Mapping[int, State] | None = None) -> None:
        self.floors = dict(floors or {})
        self._restored: dict[int, dict[int, Note]] = {}
        self._reached: dict[tuple[int, int, str], list[State]] = {}
        self._stepped: dict[int, dict[int, int]] = {}  # by attempt, each rank's last step
        self.add(notes)

    def add(self, notes: Iterable[Note]) -> None:
        """What ranks have noted since, each rank's notes in their order."""
        for note in notes:
            if note.what == "restored":
                self._restored.setdefault(note.attempt, {})[note.rank] = note
            else:
                state = State(note.step, note.attempt)
                self._reached.setdefault((note.rank, note.step, note.digest), []).append(state)
                self._stepped.setdefault(note.attempt, {})[note.rank] = note.step

    @property
    def attempts(self) -> list[int]:
        """Those in which any rank took up a state."""
        return sorted(self._restored)

    def restored(self, attempt: int) -> Mapping[int, Note]:
        """What each rank of the attempt took up."""
        return self._restored.get(attempt, {})

    def origins(self, note: Note) -> list[State]:
        """Every state that this rank had really reached in an earlier attempt and that has this digest."""
        found = self._reached.get((note.rank, note.step, note.digest), ())
        return [state for state in found if state.attempt < note.attempt]

    def parent(self, attempt: int) -> State | None:
        """The state that the attempt stands on; None for a fresh start, or if it is none that was reached."""
        found = [origins for note in self.restored(attempt).values() if (origins := self.origins(note))]
        return found[0][-1] if found else None

    def base(self, attempt: int) -> int | None:
        """The attempt that `attempt` carries on: the last before it that made a step."""
        return max((each for each in self._stepped if each < attempt), default=None)

    def last_step(self, attempt: int) -> int:
        """The last that every rank of the attempt has completed."""
        return min(self._stepped.get(attempt, {}).values(), default=FRESH)

    def line(self, attempt: int | None) -> dict[int, int]:
        """The attempts that `attempt` stands on, itself included, each with the last step that counts."""
        steps: dict[int, int] = {}
        last = ENDLESS
        while attempt is not None:
            steps[attempt] = last
            above = self.parent(attempt)
            attempt, last = (above.attempt, above.step) if above else (None, 0)
        return steps

    def is_on_line(self, state: State, attempt: int) -> bool:
        """Whether an attempt of this number may stand on that state."""
        return state.step <= self.line(self.base(attempt)).get(state.attempt, FRESH)


def broken_promises(history: History) -> list[str]:
    """What was promised and not kept, in sentences; empty if all is well."""
    return [sentence for attempt in history.attempts for sentence in broken_by(history, attempt)]


def broken_by(history: History, attempt: int) -> list[str]:
    """What this attempt's restoring has broken."""
    restored = history.restored(attempt)
    told = [sentence for note in restored.values() for sentence in _untrue(history, note)]
    if len({note.step for note in restored.values()}) > 1:
        steps = {rank: note.step for rank, note in sorted(restored.items())}
        told.append(f"attempt {attempt}: its ranks took up different steps: {steps}")
    floor = history.floors.get(attempt)
    if floor is not None and any(note.step < floor.step for note in restored.values()):
        steps = sorted({note.step for note in restored.values()})
        told.append(f"attempt {attempt}: took up step {steps} although step {floor.step} was committed: lost")
    return told


def _untrue(history: History, note: Note) -> list[str]:
    if note.step == FRESH:
        return []
    who = f"attempt {note.attempt}, rank {note.rank}"
    origins = history.origins(note)
    if not origins:
        return [f"{who}: took up step {note.step} in a state that it never reached: a wrong byte"]
    if not any(history.is_on_line(state, note.attempt) for state in origins):
        return [f"{who}: took up step {note.step} of attempt {origins[-1].attempt}, which is off the lineage"]
    return []


def commits(keys: Iterable[str]) -> list[Commit]:
    """The committed checkpoints among keys of a store, oldest step first, by their names alone."""
    found = [match for key in keys if (match := _MANIFEST.fullmatch(key))]
    folders = (each[0].rpartition("/")[0] for each in found)
    states = (State(int(each[1]), int(each[2])) for each in found)
    return sorted(map(Commit, folders, states), key=lambda commit: (commit.state, commit.folder))


def floor(history: History, found: Iterable[Commit], attempt: int, damaged: Iterable[str]) -> State | None:
    """The newest committed state that `attempt` may stand on and that nobody has damaged on purpose."""
    excused = set(damaged)
    sound = [each.state for each in found if each.folder not in excused]
    return max((state for state in sound if history.is_on_line(state, attempt)), default=None)


class Notebook:
    """Reads what ranks append to their files, each line once; one that a kill cut short is none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}

    def news(self) -> list[Note]:
        """The notes since the last call."""
        found = []
        for path in sorted(self._folder.glob("rank-*")):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                whole = file.read().rpartition(b"\n")[0]
            if whole:
                self._read[path] = self._read.get(path, 0) + len(whole) + 1
                found += [_note(line) for line in whole.split(b"\n")]
        return [note for note in found if note is not None]


def _note(line: bytes) -> Note | None:
    """The last note of a killed rank may lack its end, and the next rank's begin behind it."""
    start = line.rfind(b'{"what"')
    try:
        return msgspec.json.decode(line[max(start, 0) :], type=Note)
    except msgspec.DecodeError:
        return None
