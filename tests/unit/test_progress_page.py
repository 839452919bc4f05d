"""The progress page: what a rank writes is what its agent reads, whatever happens to the rank."""

from __future__ import annotations

import math
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mend.heartbeats import Phase
from mend_trainer.progress import PAGE_BYTES, PageReader, ProgressPage, UnreadablePage, create_page


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A page as the agent makes it."""
    page = tmp_path / "rank-0.page"
    create_page(page)
    return page


def test_a_fresh_page_says_starting(path: Path) -> None:
    """Before the rank's first word: starting, no step, no loss, nothing committed, nothing wished for."""
    seen = PageReader(path).read()
    assert (seen.phase, seen.step, seen.steps_done, seen.loss) == (Phase.STARTING, -1, 0, None)
    assert (seen.committed_step, seen.save_requested, seen.nonfinite) == (-1, 0, False)


def test_a_step_is_read_as_written(path: Path) -> None:
    """Step, tokens, seconds and loss arrive, and steps are counted."""
    writer, reader = ProgressPage.open(path), PageReader(path)
    writer.complete_step(7, 4096, 0.25, 3.5)
    writer.complete_step(8, 8192, 0.5, 3.25)
    seen = reader.read()
    assert (seen.step, seen.steps_done, seen.tokens, seen.step_seconds, seen.loss) == (8, 2, 8192, 0.5, 3.25)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_told_as_such(path: Path, loss: float) -> None:
    """NaN and infinity show as `nonfinite`, and the next finite loss ends that."""
    writer, reader = ProgressPage.open(path), PageReader(path)
    writer.complete_step(0, 0, 0.1, loss)
    assert (reader.read().loss, reader.read().nonfinite) == (None, True)
    writer.complete_step(1, 0, 0.1, 2.0)
    assert (reader.read().loss, reader.read().nonfinite) == (2.0, False)


def test_a_step_without_a_loss_keeps_the_last_one(path: Path) -> None:
    """A rank that does not know the loss (it is another's) says None, which is no news."""
    writer, reader = ProgressPage.open(path), PageReader(path)
    writer.complete_step(0, 0, 0.1, 2.0)
    writer.complete_step(1, 0, 0.1, None)
    assert reader.read().loss == 2.0


@pytest.mark.parametrize("phase", list(Phase))
def test_every_phase_has_its_code(path: Path, phase: Phase) -> None:
    """A phase entered is the phase read."""
    ProgressPage.open(path).enter(phase)
    assert PageReader(path).read().phase is phase


def test_ages_begin_at_the_mark(path: Path) -> None:
    """A mark renews the age of progress and leaves that of the phase; entering a phase renews both."""
    writer, reader = ProgressPage.open(path), PageReader(path)
    writer.enter(Phase.STEP)
    time.sleep(0.02)
    writer.mark()
    seen = reader.read()
    assert seen.phase_seconds >= 0.02
    assert seen.progress_seconds < seen.phase_seconds


def test_the_longest_gap_is_kept_for_each_phase(path: Path) -> None:
    """Between two marks, whichever made them; the gap belongs to the phase in which it passed."""
    writer, reader = ProgressPage.open(path), PageReader(path)
    writer.enter(Phase.SAVING)
    time.sleep(0.02)
    writer.mark()
    writer.enter(Phase.STEP)
    gaps = reader.read().longest_gaps
    assert gaps[Phase.SAVING] >= 0.02
    assert Phase.STEP not in gaps
    assert Phase.EVALUATING not in gaps


def test_what_broke_a_rank_off_teaches_no_gap(path: Path) -> None:
    """How long an evaluation stood still for a lost peer is not how long one may take; the step that was done stays."""
    writer, reader = ProgressPage.open(path), PageReader(path)
    writer.complete_step(7, 4096, 0.25, 3.5)
    writer.offer_to_rejoin()
    assert reader.read().can_rejoin
    writer.enter(Phase.EVALUATING)
    time.sleep(0.05)
    writer.is_cut_off()
    writer.mark()
    writer.begin_anew()
    seen = reader.read()
    assert seen.longest_gaps.get(Phase.EVALUATING, 0.0) < 0.05
    assert (seen.phase, seen.step, seen.steps_done, seen.can_rejoin) == (Phase.STARTING, 7, 0, False)


def test_wishes_and_commits_cross_the_page(path: Path) -> None:
    """The agent's wish reaches the rank as a growing number, the rank's commit reaches the agent."""
    writer, reader = ProgressPage.open(path), PageReader(path)
    reader.request_save()
    reader.request_save()
    assert writer.save_requested == 2
    writer.committed_step = 40
    assert (writer.committed_step, reader.read().committed_step) == (40, 40)


def test_the_page_outlives_a_killed_rank(path: Path) -> None:
    """SIGKILL right after a step: the agent still reads that step."""
    script = (
        "import os, signal, sys; from mend_trainer.progress import ProgressPage;"
        "ProgressPage.open(sys.argv[1]).complete_step(5, 50, 0.1, 1.5);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert PageReader(path).read().step == 5


def test_no_detail_is_older_than_its_step(path: Path) -> None:
    """While another process writes as fast as it can, a step read never comes with the tokens of an older one."""
    script = (
        "import sys; from mend_trainer.progress import ProgressPage; page = ProgressPage.open(sys.argv[1])\n"
        "for step in range(10**9): page.complete_step(step, step * 10, float(step), float(step))"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, str(path)])
    try:
        reader, deadline = PageReader(path), time.monotonic() + 60
        seen = reader.read()
        while seen.step < 20_000:
            assert time.monotonic() < deadline
            seen = reader.read()
            assert seen.tokens >= seen.step * 10
            assert seen.step_seconds >= seen.step
            assert seen.loss is None or seen.loss >= seen.step
            assert seen.steps_done >= seen.step
    finally:
        writer.kill()
        writer.wait()


def test_opening_keeps_what_the_page_says(path: Path) -> None:
    """A rank that opens its page does not make the agent forget since when it has been starting."""
    before = PageReader(path).read()
    ProgressPage.open(path)
    assert PageReader(path).read().progress_seconds >= before.progress_seconds


def test_a_detached_page_works_without_a_file() -> None:
    """A loop outside mend marks memory of its own, and nobody ever wishes for a save."""
    page = ProgressPage.detached()
    page.enter(Phase.STEP)
    page.mark()
    page.complete_step(0, 1, 0.1, 1.0)
    assert page.save_requested == 0
    page.close()


@pytest.mark.parametrize("first_word", [0, 1, 2**62])
def test_a_page_of_another_version_is_refused(path: Path, first_word: int) -> None:
    """Agent and rank of different versions say so instead of reading nonsense."""
    path.write_bytes(struct.pack("<Q", first_word) + bytes(PAGE_BYTES - 8))
    for opener in (ProgressPage.open, PageReader):
        with pytest.raises(UnreadablePage, match="same version of mend"):
            opener(path)


@settings(deadline=None)  # busy machines take their time
@given(words=st.binary(min_size=PAGE_BYTES - 8, max_size=PAGE_BYTES - 8))
def test_a_scribbled_page_breaks_no_agent(words: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever a rank with wild pointers leaves on its page, reading it gives a snapshot."""
    path = tmp_path_factory.mktemp("scribbled") / "page"
    create_page(path)
    with path.open("r+b") as file:
        file.seek(8)
        file.write(words)
    reader = PageReader(path)
    assert reader.read().progress_seconds >= 0
    reader.close()


def test_the_page_is_private(path: Path) -> None:
    """Only the owner reads and writes it."""
    assert path.stat().st_mode & 0o777 == 0o600
