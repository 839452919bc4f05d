"""Whether a checkpoint fits those it came from, and whether a buffer was saved twice."""

from __future__ import annotations

from pathlib import Path

from mend.ancestry import chain_doubts, gone_ancestors, is_stale
from mend.keys import MANIFEST_NAME
from mend.manifest import Manifest, decode_manifest
from mend.states import Ancestor
from mend.store import open_store
from stored_checkpoint import save


def made(folder: Path, step: int, attempt: int = 1, *lineage: Ancestor, **options: object) -> Manifest:
    """The manifest of a checkpoint."""
    store = open_store(f"file://{folder}/run")
    saved = save(store, step, attempt, lineage=lineage, **options)  # type: ignore[arg-type]
    return decode_manifest(store.get(f"{saved}/{MANIFEST_NAME}"))


def link(attempt: int, step: int) -> Ancestor:
    """Of the one run of these tests."""
    return Ancestor(attempt=attempt, step=step, uid="uid-1")


def test_a_chain_that_holds_raises_no_doubts(tmp_path: Path) -> None:
    """Each ancestor that is left tells of the same ancestors before it."""
    first = made(tmp_path, 5)
    second = made(tmp_path, 8, 2, link(1, 5))
    third = made(tmp_path, 9, 3, link(1, 5), link(2, 8))
    assert chain_doubts(third, [first, second]) == ()
    assert chain_doubts(first, [second, third]) == ()
    assert gone_ancestors(third, [first, second]) == ()


def test_an_ancestor_that_is_gone_is_told_and_is_no_doubt(tmp_path: Path) -> None:
    """Retention deletes checkpoints, and ranks that rejoined never had one."""
    third = made(tmp_path, 9, 3, link(1, 5), link(2, 8))
    assert chain_doubts(third, []) == ()
    assert gone_ancestors(third, [made(tmp_path, 5)]) == (link(2, 8),)


def test_links_of_before_they_named_a_run_fit_any(tmp_path: Path) -> None:
    """An older mend wrote no uid into lineages."""
    first, second = made(tmp_path, 5), made(tmp_path, 8, 2, Ancestor(attempt=1, step=5))
    third = made(tmp_path, 9, 3, link(1, 5), link(2, 8))
    assert chain_doubts(second, [first]) == chain_doubts(third, [first, second]) == ()


def test_a_chain_that_contradicts_itself_is_doubted(tmp_path: Path) -> None:
    """Attempts and steps only grow along it, and nobody has two pasts."""
    back = made(tmp_path, 4, 3, link(1, 5))
    assert "from step 5 of attempt 1 to step 4" in chain_doubts(back, [])[0]
    older = made(tmp_path, 9, 2, link(2, 5))
    assert chain_doubts(older, [])
    second = made(tmp_path, 8, 2, link(1, 3))
    third = made(tmp_path, 9, 3, link(1, 5), link(2, 8))
    assert "tells of other ancestors" in chain_doubts(third, [second])[0]


def test_a_model_that_did_not_change_although_steps_were_made_is_stale(tmp_path: Path) -> None:
    """The known bug of others: a buffer that was not copied anew is saved under the next step's name."""
    first, second = made(tmp_path, 5), made(tmp_path, 6)
    assert not is_stale(second, first)
    twice = made(tmp_path, 7, model=b"the same weights")
    again = made(tmp_path, 8, model=b"the same weights")
    assert is_stale(again, twice)
    assert not is_stale(twice, again)
    assert not is_stale(made(tmp_path, 9, ranks=1, model=b"the same"), made(tmp_path, 8, ranks=2))


def test_two_saves_of_one_step_may_be_equal(tmp_path: Path) -> None:
    """An order to save now and the interval may meet."""
    one, other = made(tmp_path, 5, save_id="a"), made(tmp_path, 5, save_id="b")
    assert not is_stale(one, other)
