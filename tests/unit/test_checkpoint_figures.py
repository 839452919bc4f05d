"""How the figures of checkpoints follow from what was measured, and the outcome of a campaign from its results."""

from __future__ import annotations

import ast
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from checkpoint import gathered, ratios, restore_row, slowdown_row, stall_row
from checkpoint_campaign import KILLS, Campaign, counts, own_files, phases, rows
from render import counts_table, phases_table

from saving_faults import BLOCK, plans
from saving_gang import NotBack, SavingGang
from saving_injection import Result
from saving_phases import SavePhase


def lines(way: str, *seconds: float) -> list[dict[str, object]]:
    """What a loop prints of one way."""
    return [{"way": way, "seconds": each} for each in seconds]


def test_a_stall_is_told_in_copies_of_its_own_round() -> None:
    """Twice as slow a machine makes both twice as slow; a way that cannot be gone says why."""
    printed = [
        *lines("memcpy", 0.1, 0.2),
        *lines("mend", 0.105, 0.21),
        *lines("dcp.save", 1.0, 2.0),
        {"way": "NVRx async", "why": "needs CUDA"},
    ]
    taken, missing = gathered(printed)
    found = stall_row(400, [taken], missing)
    assert (found.ours, found.met) == (1.05, True)
    assert found.peers == {"dcp.save": 10.0, "NVRx async": "needs CUDA"}


def test_processes_of_their_own_have_copies_of_their_own() -> None:
    """Where not everything fits into memory, a peer is held against the copies that its own process made."""
    mend, _ = gathered([*lines("memcpy", 0.1), *lines("mend", 0.2)])
    peer, _ = gathered([*lines("memcpy", 0.4), *lines("torch.save", 0.8)])
    found = stall_row(4000, [mend, peer], {})
    assert (found.ours, found.met, found.peers) == (2.0, False, {"torch.save": 2.0})


def test_steps_beside_a_save_are_held_against_steps_beside_a_copy() -> None:
    """What an idle copy costs is nobody's fault; ways that stop the loop have no steps meanwhile."""
    taken = {"bare": [[1.0, 1.0]], "copy": [[1.1, 1.1]], "mend": [[1.1, 1.144]], "dcp.async_save, thread": [[2.2, 2.2]]}
    found = slowdown_row(taken, {})
    assert found.ours == 2.0
    assert found.met
    assert found.peers["dcp.async_save, thread"] == 100.0
    assert found.peers["torch.save"] == "no steps meanwhile"


def test_a_restore_is_told_in_copies() -> None:
    """1.6 copies are too many."""
    taken, _ = gathered([*lines("memcpy", 0.1), *lines("mend", 0.16), *lines("dcp.load", 0.5)])
    found = restore_row(100, taken)
    assert (round(found.ours or 0, 3), found.met) == (1.6, False)
    assert ratios([3.0], [2.0]) == [1.5]


def test_one_broken_promise_misses_the_target() -> None:
    """Kills are counted apart from other faults; what could not be done counts neither way."""
    done = [Result(plan=plan, restored="memory:1", phase=SavePhase.BETWEEN) for plan in plans(1, 1350)]
    assert [each.met for each in rows(done)] == [True, True]
    first = next(each for each in done if each.plan.kind.startswith("kill-"))
    worse = [*done, Result(plan=first.plan, broken=("a wrong byte",))]
    assert [each.ours for each in rows(worse)] == [1.0, 0.0]
    assert rows([Result(plan=first.plan, skipped="needs a mount")])[0].met is False


def test_fewer_kills_than_the_figure_speaks_of_do_not_meet_it() -> None:
    """A short campaign says how many there were."""
    kills = [plan for plan in plans(1, 1350) if plan.kind.startswith("kill-")][:KILLS]
    done = [Result(plan=plan, phase=SavePhase.COPYING) for plan in kills]
    assert rows(done)[0].met
    assert not rows(done[1:])[0].met
    assert rows(done[1:])[0].note.startswith("only 999 of the 1,000")


def test_what_nobody_saw_happen_is_no_kill() -> None:
    """Without a word for the moment nothing was hit, unless a promise was broken all the same."""
    killed, *_ = [plan for plan in plans(1, 100) if plan.kind == "kill-rank"]
    assert rows([Result(plan=killed)])[0].n == 0
    assert rows([Result(plan=killed, broken=("does not resume",))])[0].ours == 1.0


async def test_a_gang_that_does_not_begin_breaks_a_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for its block; the other blocks are gone on with, and what it left behind is kept."""

    @asynccontextmanager
    async def barren(folder: Path, *_: object, **__: object) -> AsyncIterator[SavingGang]:
        (folder / "gang").mkdir()
        (folder / "gang" / "log").write_text("no standbys")
        raise NotBack("not within 60 s")
        yield

    monkeypatch.setattr("checkpoint_campaign.a_ground", barren)
    campaign = Campaign(tmp_path, 1, None)
    await campaign.run(plans(1, 2 * BLOCK), 1, math.inf, lambda: None)
    assert sorted(campaign.results) == [0, BLOCK]
    assert {each.broken for each in campaign.results.values()} == {("does not begin: not within 60 s",)}
    assert (tmp_path / f"broken-1-{BLOCK}" / "log").exists()
    assert sorted(Campaign(tmp_path, 1, None).results) == [0, BLOCK]


def test_outcomes_belong_to_all_code_that_carries_faults_out() -> None:
    """Whatever of the tests' code an injection imports, at first or second hand."""
    tests = Path(__file__).resolve().parents[1]
    assert _imported(tests / "saving_injection.py") <= set(own_files())


def _imported(path: Path, before: frozenset[Path] = frozenset()) -> set[Path]:
    found = {path, *before}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (other := path.with_name(f"{node.module}.py")).exists():
            found |= _imported(other, frozenset(found)) if other not in found else set()
    return found


def test_the_page_shows_what_came_of_each_kind() -> None:
    """By kind: how often, how often a promise was broken, and from where it was restored."""
    plan = plans(1, 1)[0]
    table = counts([Result(plan=plan, restored="memory:1"), Result(plan=plan, restored="s3://b/x", broken=("lost",))])
    assert table[plan.kind] == {"done": 2, "broken": 1, "from memory": 1, "from the store": 1}
    assert f"| {plan.kind} | 2 | 1 | 1 | 1 |" in counts_table(table)


def test_kills_are_told_by_what_saving_or_restoring_was_doing() -> None:
    """Also those that came between two saves or met nobody, as what they were; other faults are not among them."""
    killed, *_ = [plan for plan in plans(1, 100) if plan.kind == "kill-rank"]
    other, *_ = [plan for plan in plans(1, 100) if plan.kind == "flip-shard"]
    met = [SavePhase.COPYING, SavePhase.NOBODY, SavePhase.COPYING, SavePhase.BETWEEN]
    done = [*(Result(plan=killed, phase=phase) for phase in met), Result(plan=other)]
    table = phases(done)
    assert {phase: count for phase, count in table["all kills"].items() if count} == {
        "copying": 2, "nobody there": 1, "between": 1,
    }  # fmt: skip
    assert list(table) == ["kill-rank", "all kills"]
    assert rows(done)[0].n == 3
    assert "when they came: between 1, copying 2, nobody there 1" in rows(done)[0].note
    assert "| kill-rank | 0 | 0 | 1 | 0 | 2 |" in phases_table(table)
