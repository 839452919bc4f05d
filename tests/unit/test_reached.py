"""The checker of the checkpoint campaign: it must find what is planted, or it proves nothing."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from reached import FRESH, History, Note, Notebook, State, broken_promises, commits, floor


def reached(attempt: int, steps: range, ranks: int = 2) -> list[Note]:
    """Ranks that complete these steps, each state with a digest of its own."""
    return [Note("reached", attempt, rank, step, f"{attempt}/{step}/{rank}") for step in steps for rank in range(ranks)]


def restored(attempt: int, state: State | None, ranks: int = 2) -> list[Note]:
    """Ranks that take up that state, bit for bit, or none."""
    if state is None:
        return [Note("restored", attempt, rank, FRESH, "fresh") for rank in range(ranks)]
    return [
        Note("restored", attempt, rank, state.step, f"{state.attempt}/{state.step}/{rank}") for rank in range(ranks)
    ]


def a_history(*parts: list[Note], floors: dict[int, State] | None = None) -> History:
    """Two ranks."""
    return History((note for part in parts for note in part), floors)


SOUND = [
    restored(1, None),
    reached(1, range(10)),
    restored(2, State(6, 1)),
    reached(2, range(7, 12)),
    restored(3, State(9, 2)),
]


def test_a_sound_history_breaks_nothing() -> None:
    """Three attempts, each on a state that the one before had reached."""
    assert broken_promises(a_history(*SOUND, floors={2: State(6, 1), 3: State(9, 2)})) == []


def test_a_planted_wrong_byte_is_found() -> None:
    """One rank whose digest is that of no state it has reached."""
    wrong = [replace_digest(SOUND[4][0], "other"), SOUND[4][1]]
    (told,) = broken_promises(a_history(*SOUND[:4], wrong))
    assert "attempt 3, rank 0" in told
    assert "a wrong byte" in told


def replace_digest(note: Note, digest: str) -> Note:
    """The same note of another state."""
    return msgspec.structs.replace(note, digest=digest)


def test_the_state_of_another_rank_is_a_wrong_byte() -> None:
    """A rank that takes up what its neighbour had reached has not taken up its own state."""
    swapped = [replace_digest(SOUND[4][0], "2/9/1"), SOUND[4][1]]
    assert any("a wrong byte" in told for told in broken_promises(a_history(*SOUND[:4], swapped)))


def test_a_state_with_the_right_bytes_under_another_step_is_wrong() -> None:
    """Bytes of step 8 that call themselves step 9 were never reached as step 9."""
    lied = [msgspec.structs.replace(note, digest=f"2/8/{note.rank}") for note in SOUND[4]]
    assert len(broken_promises(a_history(*SOUND[:4], lied))) == 2


def test_a_state_of_a_future_that_was_given_up_is_off_the_lineage() -> None:
    """Attempt 2 went back to step 6, so what attempt 1 had reached at step 8 counts no more."""
    told = broken_promises(a_history(*SOUND[:4], restored(3, State(8, 1))))
    assert len(told) == 2
    assert all("off the lineage" in each for each in told)


def test_an_ancestors_state_before_the_fork_is_on_the_lineage() -> None:
    """To fall back to step 5 of attempt 1 is sound, if nothing newer was there."""
    assert broken_promises(a_history(*SOUND[:4], restored(3, State(5, 1)))) == []


def test_a_fresh_start_after_a_commit_has_lost_it() -> None:
    """To start again from nothing is no way back once something was committed."""
    (told,) = broken_promises(a_history(*SOUND[:4], restored(3, None), floors={3: State(9, 2)}))
    assert "step 9 was committed: lost" in told


def test_ranks_at_different_steps_are_found() -> None:
    """Each rank's state is one of its own, and yet they do not belong together."""
    mixed = [restored(3, State(9, 2))[0], restored(3, State(8, 2))[1]]
    assert any("different steps" in told for told in broken_promises(a_history(*SOUND[:4], mixed)))


def test_an_attempt_that_made_no_step_moves_no_lineage() -> None:
    """Attempt 3 was killed while it restored; attempt 4 may take up all that attempt 2 had reached."""
    parts = [*SOUND[:4], restored(3, State(7, 2)), restored(4, State(11, 2))]
    assert broken_promises(a_history(*parts)) == []


@pytest.mark.parametrize(("damaged", "expected"), [((), State(9, 2)), (("step-000000000009/000002-c",), State(6, 1))])
def test_the_floor_is_the_newest_sound_commit_on_the_lineage(damaged: tuple[str, ...], expected: State) -> None:
    """What was damaged on purpose is excused, and what is off the lineage promises nothing."""
    found = commits(
        [
            "step-000000000006/000001-a/manifest.json",
            "step-000000000008/000001-b/manifest.json",
            "step-000000000008/000001-b/__0_0.distcp",
            "step-000000000009/000002-c/manifest.json",
            "step-000000000010/000002-d/__0_0.distcp",
            "owner.json",
        ]
    )
    assert len(found) == 3
    assert floor(a_history(*SOUND[:4]), found, 3, damaged) == expected


def test_a_line_that_a_kill_cut_short_is_no_note(tmp_path: Path) -> None:
    """The last line of a killed rank may lack its end; the rank that takes its place writes behind it."""
    note = SOUND[1][0]
    path, line = tmp_path / "rank-0", msgspec.json.encode(note)
    notebook = Notebook(tmp_path)
    path.write_bytes(line + b"\n" + line[:20])
    assert notebook.news() == [note]
    path.write_bytes(path.read_bytes() + line + b"\n")
    assert notebook.news() == [note]
    assert notebook.news() == []
