"""The progress page of a rank: a few words of shared memory that the rank writes and its agent reads from outside.

A Python thread cannot report while a C extension holds the GIL, and one that can report says nothing about the main
thread: so a rank merely stores words, and the agent reads them whatever state the rank is in, even after its death.

Layout, version 1: one 4096-byte page of aligned 8-byte words in the machine's byte order (see `_Word`). A memoryview
stores and loads such a word by one 8-byte move, which x86-64 and AArch64 make atomic: no word is ever torn. Words are
not synchronised with each other; each group is written so that its *telling* word comes last and is read first, hence
what a reader may see in between is a newer detail beside an older fact, which is at most one mark young.
Times are CLOCK_MONOTONIC nanoseconds, which all processes of a machine share.
"""

from __future__ import annotations

import math
import mmap
import os
import time
from enum import IntEnum
from pathlib import Path
from typing import Final

import msgspec

from mend.heartbeats import Phase

PAGE_BYTES: Final = 4096
LAYOUT_VERSION: Final = 1
_MAGIC: Final = int.from_bytes(b"mendpag\0", "little") + (LAYOUT_VERSION << 56)
_PHASES: Final = tuple(Phase)
_CODES: Final = {phase: code for code, phase in enumerate(_PHASES)}


class _Word(IntEnum):
    """Index of each 8-byte word: signed integers but for `STEP_SECONDS` and `LOSS`, which are doubles."""

    MAGIC = 0  # "mendpag", then the version of the layout in the highest byte; 0 until the page is made
    MARKED_NS = 1  # time of the last mark of any kind
    PHASE = 2  # index in heartbeats.Phase
    PHASE_NS = 3  # when that phase began
    STEP = 4  # last completed step; tells that the next four, STEPPED_NS and WAITED_NS belong to it, or to a newer one
    STEP_SECONDS = 5
    STEPS_DONE = 6
    LOSS = 7
    TOKENS = 8
    LOSS_STATE = 9  # 0: none yet, 1: finite, 2: NaN or infinite
    COMMITTED_STEP = 10  # last step whose save this rank knows to be committed
    SAVE_REQUESTED = 11  # the only word that the agent writes: grows with every wish for a save
    STEPPED_NS = 12  # length of all steps of this process
    WAITED_NS = 13  # of that spent waiting for other ranks; 0: not measured
    LONGEST_GAPS_NS = 16  # and the seven after it: the longest time between two marks in each phase
    CAN_REJOIN = 24  # 1 while the process could go on in another attempt


class _LossState(IntEnum):
    NONE = 0
    FINITE = 1
    NONFINITE = 2


# Plain module constants, since an attribute lookup on an enum would cost as much as the mark itself.
_MARKED_NS: Final = int(_Word.MARKED_NS)
_PHASE: Final = int(_Word.PHASE)
_PHASE_NS: Final = int(_Word.PHASE_NS)
_STEP: Final = int(_Word.STEP)
_STEP_SECONDS: Final = int(_Word.STEP_SECONDS)
_STEPS_DONE: Final = int(_Word.STEPS_DONE)
_LOSS: Final = int(_Word.LOSS)
_TOKENS: Final = int(_Word.TOKENS)
_LOSS_STATE: Final = int(_Word.LOSS_STATE)
_COMMITTED_STEP: Final = int(_Word.COMMITTED_STEP)
_SAVE_REQUESTED: Final = int(_Word.SAVE_REQUESTED)
_STEPPED_NS: Final = int(_Word.STEPPED_NS)
_WAITED_NS: Final = int(_Word.WAITED_NS)
_LONGEST_GAPS_NS: Final = int(_Word.LONGEST_GAPS_NS)
_CAN_REJOIN: Final = int(_Word.CAN_REJOIN)
_WORDS: Final = max(_Word) + 1
_NO_LOSS: Final = int(_LossState.NONE)
_NONFINITE: Final = int(_LossState.NONFINITE)
_now_ns: Final = time.monotonic_ns


class UnreadablePage(ValueError):
    """The file is no progress page of this version."""


class PageSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What a page said at one moment; ages in seconds."""

    phase: Phase
    phase_seconds: float
    progress_seconds: float
    step: int
    step_seconds: float
    steps_done: int
    loss: float | None
    nonfinite: bool
    tokens: int
    committed_step: int
    save_requested: int
    stepped_seconds: float  # length of all steps of this process
    waited_seconds: float  # of that for other ranks; 0: not measured
    can_rejoin: bool
    longest_gaps: dict[Phase, float]  # seconds between two marks, for each phase that was seen


class _Mapping:
    """One mapped page seen as integers and as doubles."""

    __slots__ = ("_memory", "doubles", "words")

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self.words = memoryview(memory).cast("q")
        self.doubles = memoryview(memory).cast("d")

    def close(self) -> None:
        self.words.release()
        self.doubles.release()
        self._memory.close()


def _map(descriptor: int) -> _Mapping:
    return _Mapping(mmap.mmap(descriptor, PAGE_BYTES))


def _format(mapping: _Mapping) -> None:
    """Make an empty page: a rank that is starting, as of now."""
    words, now = mapping.words, _now_ns()
    words[_MARKED_NS] = words[_PHASE_NS] = now
    words[_PHASE] = _CODES[Phase.STARTING]
    words[_Word.STEP] = words[_Word.COMMITTED_STEP] = -1
    words[_Word.MAGIC] = _MAGIC


def _check(mapping: _Mapping, path: Path | str) -> None:
    found = mapping.words[_Word.MAGIC]
    if found != _MAGIC:
        mapping.close()
        raise UnreadablePage(
            f"{path}: first word {found:#x}; expected {_MAGIC:#x}, a progress page of version {LAYOUT_VERSION}: "
            "agent and rank must run the same version of mend"
        )


def create_page(path: Path) -> None:
    """Make the page of a rank that is about to start; a file already there is begun anew."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_TRUNC, 0o600)
    try:
        os.ftruncate(descriptor, PAGE_BYTES)
        mapping = _map(descriptor)
    finally:
        os.close(descriptor)
    _format(mapping)
    mapping.close()


class ProgressPage:
    """The writer's side, in the rank. Not for use by several threads at once."""

    __slots__ = ("_doubles", "_mapping", "_waited_ns", "_words")

    def __init__(self, mapping: _Mapping) -> None:
        self._waited_ns = 0  # in the step that is not completed yet
        self._mapping = mapping
        self._words = mapping.words
        self._doubles = mapping.doubles

    @classmethod
    def open(cls, path: Path | str) -> ProgressPage:
        """The page that the agent made at `path` (environment `MEND_PAGE`); what it says already is kept."""
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            mapping = _map(descriptor)
        finally:
            os.close(descriptor)
        _check(mapping, path)
        return cls(mapping)

    @classmethod
    def detached(cls) -> ProgressPage:
        """A page in memory of its own, for a loop that runs outside mend."""
        mapping = _map(-1)
        _format(mapping)
        return cls(mapping)

    def mark(self) -> None:
        """Progress of any kind was made. Costs a fraction of a microsecond."""
        self._mark(_now_ns())

    def enter(self, phase: Phase) -> None:
        """`phase` begins now, which is progress too."""
        now = _now_ns()
        self._mark(now)
        words = self._words
        words[_PHASE_NS] = now  # before the phase: a reader must not see the new phase with the age of the old
        words[_PHASE] = _CODES[phase]

    def complete_step(self, step: int, tokens: int, seconds: float, loss: float | None) -> None:
        """Step `step` is done after `seconds`; `tokens` is the total of the run so far."""
        words = self._words
        if loss is not None:
            self._doubles[_LOSS] = loss
            words[_LOSS_STATE] = _LossState.FINITE if math.isfinite(loss) else _LossState.NONFINITE
        self._doubles[_STEP_SECONDS] = seconds
        words[_TOKENS] = tokens
        words[_STEPPED_NS] += int(seconds * 1e9)
        words[_WAITED_NS] += self._waited_ns
        self._waited_ns = 0
        words[_STEPS_DONE] += 1
        self._mark(_now_ns())
        words[_STEP] = step

    def waited(self, nanoseconds: int) -> None:
        """So much of the present step was spent waiting for other ranks; told with the step."""
        self._waited_ns += nanoseconds

    def _mark(self, now: int) -> None:
        words = self._words
        gap = now - words[_MARKED_NS]
        words[_MARKED_NS] = now
        word = _LONGEST_GAPS_NS + words[_PHASE]
        if gap > words[word]:
            words[word] = gap

    def begin_anew(self) -> None:
        """The rank starts again, in another attempt and the same process; how long it stood still teaches nothing."""
        words = self._words
        words[_MARKED_NS] = _now_ns()
        words[_Word.CAN_REJOIN] = words[_Word.STEPS_DONE] = 0
        words[_Word.COMMITTED_STEP] = -1
        self.enter(Phase.STARTING)

    def offer_to_rejoin(self, can: bool = True) -> None:
        """From now on the process could go on in another attempt, or could not."""
        self._words[_Word.CAN_REJOIN] = int(can)

    def is_cut_off(self) -> None:
        """A peer was lost: how long was waited for it is no length of anything."""
        self._words[_MARKED_NS] = _now_ns()

    @property
    def steps_done(self) -> int:
        """Steps that this process has completed in this attempt."""
        return self._words[_STEPS_DONE]

    @property
    def committed_step(self) -> int:
        """The last step whose save this rank knows to be committed; -1 before the first."""
        return self._words[_Word.COMMITTED_STEP]

    @committed_step.setter
    def committed_step(self, step: int) -> None:
        self._words[_Word.COMMITTED_STEP] = step

    @property
    def save_requested(self) -> int:
        """Grows each time the agent wishes for a save (an order `save-now`, or SIGTERM): compare with what you saw."""
        return self._words[_Word.SAVE_REQUESTED]

    def close(self) -> None:
        """Unmap the page; it must not be used any more."""
        self._words.release()
        self._doubles.release()
        self._mapping.close()


class PageReader:
    """The agent's side: reads the page of a rank, and asks for saves."""

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._mapping = _map(descriptor)
        finally:
            os.close(descriptor)
        _check(self._mapping, path)

    def read(self) -> PageSnapshot:
        """What the page says now."""
        live, doubles = self._mapping.words, self._mapping.doubles
        phase, step, state = (
            live[_PHASE],
            live[_STEP],
            live[_LOSS_STATE],
        )  # telling words first, see the module's docstring
        loss, seconds = doubles[_LOSS], doubles[_STEP_SECONDS]
        words = live[
            :_WORDS
        ].tolist()  # one call for the rest: a lookup each would cost more than all that is done here
        now = _now_ns()
        return PageSnapshot(
            phase=_PHASES[phase] if 0 <= phase < len(_PHASES) else Phase.STARTING,
            phase_seconds=_age(now, words[_PHASE_NS]),
            progress_seconds=_age(now, words[_MARKED_NS]),
            step=step,
            step_seconds=seconds,
            steps_done=words[_STEPS_DONE],
            loss=loss if state != _NO_LOSS and math.isfinite(loss) else None,
            nonfinite=state == _NONFINITE,
            tokens=words[_TOKENS],
            committed_step=words[_COMMITTED_STEP],
            save_requested=words[_SAVE_REQUESTED],
            stepped_seconds=words[_STEPPED_NS] / 1e9,
            waited_seconds=words[_WAITED_NS] / 1e9,
            can_rejoin=bool(words[_CAN_REJOIN]),
            longest_gaps={
                phase: gap / 1e9
                for phase, gap in zip(_PHASES, words[_LONGEST_GAPS_NS:_CAN_REJOIN], strict=True)
                if gap > 0
            },
        )

    def silent_seconds(self) -> float:
        """Since the last mark."""
        return _age(_now_ns(), self._mapping.words[_MARKED_NS])

    def step_seconds(self) -> float:
        """Of the last completed step; 0 before there was one."""
        return self._mapping.doubles[_STEP_SECONDS]

    def request_save(self) -> None:
        """Ask the rank to save at the end of its current step."""
        self._mapping.words[_Word.SAVE_REQUESTED] += 1

    def close(self) -> None:
        """Unmap the page."""
        self._mapping.close()


def _age(now_ns: int, then_ns: int) -> float:
    return max(0.0, (now_ns - then_ns) / 1e9)
