"""The benchmarks' pure parts: rows, the page rendered from them, the campaign's plans, the parts of a recovery."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from campaign import BLOCK, Plan, Result, confusion, plans, rows, should, whom, wrong_workers
from figures import Row, cells, command, not_built, row
from marks import BEGAN, IMPORTED, JOINED, PARTS, RESTORED, STEPPED, Mark, parts
from peers import Package, PeerUnavailable, python_of
from render import BEGIN, END, page, renewed

from injection import KINDS, Expected, Ground, Outcome
from mend.incidents import FailureClass, Incident, IncidentKind, Verdict

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PROGRAMS = sorted(
    path.name for path in BENCHMARKS.glob("*.py") if "publish(" in path.read_text() and path.name != "figures.py"
)


# ---------------------------------------------------------------- rows
def test_the_target_is_held_against_the_quantile_that_it_is_set_for() -> None:
    """A median within the target does not meet a target for p99."""
    samples = [1.0] * 90 + [9.0] * 10
    assert (row("x", samples, 2.0).ours, row("x", samples, 2.0).met) == (1.0, True)
    assert (row("x", samples, 2.0, of=0.99).ours, row("x", samples, 2.0, of=0.99).met) == (9.0, False)


def test_a_figure_without_samples_is_never_met() -> None:
    """Nothing measured, or nothing built, is no success, and says why."""
    for empty in (row("x", [], 2.0), not_built("x", 2.0, what="spec.workers.spares")):
        assert not empty.met
        assert empty.ours is None
        assert cells(empty, [])[-1] == "-"
    assert "spec.workers.spares" in cells(not_built("x", 2.0, what="spec.workers.spares"), [])[1]


def test_a_peer_is_a_figure_a_reason_or_never() -> None:
    """Peers' cells tell the factor over ours, why there is none, or how long was waited in vain."""
    told = row("x", [2.0], 3.0, peers={"A": 8.0, "B": None, "C": "could not install it"}, limit="not in 60 s")
    assert cells(told, ["A", "B", "C", "D"])[-5:-1] == ["8 s (4.0x)", "not in 60 s", "could not install it", "-"]


def test_the_command_is_told_without_the_places_of_its_results() -> None:
    """Where files are put belongs to the machine, not to the figure."""
    words = ["benchmarks/x.py", "--quick", "--json", "/tmp/x.json", "--seed", "3", "--out", "/tmp/out"]
    assert command(words) == "python benchmarks/x.py --quick --seed 3"


def a_file(*rows: Row, **more: object) -> dict[str, object]:
    """The contents of a results file."""
    return {
        "title": "T",
        "machine": "a machine",
        "command": "python x.py",
        "rows": [asdict(each) for each in rows],
        **more,
    }


def test_the_page_says_command_machine_and_what_was_missed() -> None:
    """Every section names what was run where; a missed target reads "no"."""
    text = page({"recovery": a_file(row("slow thing", [5.0], 1.0))})
    assert "`python x.py` on a machine" in text
    assert "| slow thing | 5 s | 5 s | 5 s | 5 s | 1 | <= 1 s | no |" in text


def test_the_page_shows_matrix_parts_and_picture() -> None:
    """What a file holds beside its rows comes as tables and a picture."""
    matrix = {
        "kill": {"should": "crashed: the guilty", "exact": 3, "said": {"crashed: the guilty": 3, "no incident": 1}}
    }
    text = page({"x": a_file(confusion=matrix, parts={"rejoin": {"detect": 0.02, "kill": 0.1}}, picture="p.png")})
    assert "| kill | crashed: the guilty | 3 | 3 | 1 |" in text
    assert "| rejoin | 0.020 | 0.100 | 0.120 |" in text
    assert "![T](p.png)" in text


def test_the_readme_shows_the_same_figures() -> None:
    """Between its comments the README has what the files say, and nothing else of it is touched."""
    figure = row(
        "SIGSTOP -> first new step, 2 ranks, rejoin", [1.25], 1.5, peers={"torchrun": None}, limit="not in 60 s"
    )
    text = renewed(f"before {BEGIN} yesterday {END} after", {"recovery": a_file(figure)})
    assert text.startswith(f"before {BEGIN}\n")
    assert text.endswith(f"{END} after")
    assert "| SIGSTOP -> first new step, 2 ranks, rejoin | 1.25 s | <= 1.5 s | not in 60 s |" in text
    assert "yesterday" not in text


def test_a_readme_without_its_comments_is_left_alone() -> None:
    """Figures are put between two comments or nowhere."""
    with pytest.raises(ValueError, match="expected the comments"):
        renewed("no comments", {})


# ---------------------------------------------------------------- the campaign
def test_a_longer_campaign_continues_a_shorter_one() -> None:
    """The same seed gives the same faults, so a campaign can be resumed and extended; another seed gives others."""
    assert plans(1, 70) == plans(1, 200)[:70]
    assert plans(1, 70) != plans(2, 70)
    assert [plan.number for plan in plans(1, 70)] == list(range(70))


def test_a_campaign_injects_only_what_its_gang_allows() -> None:
    """Each fault fits its gang's shape and ground; gangs have 2 to 8 ranks and keep for a whole block."""
    for plan in plans(7, 2000):
        kind, world = KINDS[plan.kind], plan.workers * plan.ranks
        assert 2 <= world <= 8
        assert plan.rank < world
        assert plan.workers >= kind.min_workers
        assert kind.ground in (Ground.PLAIN, Ground[plan.ground])
    gangs = {plan.number // BLOCK: set() for plan in plans(7, 200)}
    for plan in plans(7, 200):
        gangs[plan.number // BLOCK].add((plan.workers, plan.ranks, plan.ground))
    assert all(len(each) == 1 for each in gangs.values())


def test_a_thousand_injections_hold_every_kind_often() -> None:
    """None of the kinds is left to chance."""
    done = [plan.kind for plan in plans(1, 1000)]
    assert min(done.count(kind) for kind in KINDS) >= 10


@pytest.mark.parametrize(
    ("named", "guilty", "word"),
    [
        ((), (1,), "nobody"),
        ((1,), (1,), "the guilty"),
        ((1,), (1, 2), "some of the guilty"),
        ((0, 1), (1,), "the guilty and others"),
        ((0,), (1,), "others"),
        ((0,), (), "others"),
    ],
)
def test_blame_is_told_from_guilt(named: tuple[int, ...], guilty: tuple[int, ...], word: str) -> None:
    """Who is blamed is put into words by who did it."""
    assert whom(named, guilty) == word


def an_outcome(*blamed: int, guilty: tuple[int, ...] = (1,)) -> Outcome:
    """A kill that was noticed as a crash and blamed on these."""
    incident = Incident(
        kind=IncidentKind.CRASHED,
        failure=FailureClass.INFRASTRUCTURE,
        attempt=1,
        ranks=blamed,
        workers=(),
        age_seconds=0.0,
        verdict=Verdict(ranks=blamed, confidence=0.9),
        summary="",
    )
    return Outcome(KINDS["kill"], 1, Expected(KINDS["kill"].incidents, guilty), incident, 0.1)


def test_an_innocent_worker_is_one_without_any_guilty_rank() -> None:
    """A neighbour in the guilty worker costs no innocent node; a rank elsewhere does."""
    assert wrong_workers(an_outcome(0, 1), ranks_per_worker=2) == 0
    assert wrong_workers(an_outcome(1, 2, 3), ranks_per_worker=2) == 1
    assert wrong_workers(an_outcome(), ranks_per_worker=2) == 0


def a_result(exact: bool = True, **more: object) -> Result:
    """What came of one kill."""
    plan = Plan(number=0, workers=1, ranks=2, ground="PLAIN", kind="kill", rank=1)
    said = "crashed: the guilty" if exact else "no incident"
    return replace(Result(plan, said=said, should=should(KINDS["kill"], (1,)), exact=exact), **more)


def test_one_wrong_verdict_in_a_hundred_misses_the_target() -> None:
    """The share of wrong verdicts and the blamed innocents are the campaign's figures."""
    good, bad = rows([a_result()] * 300), rows([a_result()] * 99 + [a_result(False, wrong_workers=1)])
    assert [(each.ours, each.met) for each in good] == [(0.0, True), (0.0, True)]
    assert [(each.ours, each.met) for each in bad] == [(1.0, False), (1.0, False)]


def test_what_could_not_be_done_counts_neither_way() -> None:
    """A kind that this machine cannot have is told in the note, and is no success."""
    told, _ = rows([a_result(skipped="needs root")] * 3)
    assert (told.n, told.met) == (0, False)
    assert "needs root" in told.note


def test_the_matrix_counts_what_was_said_of_each_kind() -> None:
    """Kind injected by what was said."""
    assert confusion([a_result(), a_result(), a_result(False)]) == {
        "kill": {"should": "crashed: the guilty", "exact": 2, "said": {"crashed: the guilty": 2, "no incident": 1}}
    }


# ---------------------------------------------------------------- the parts of a recovery
def the_way(pid: int, rank: int, *points: tuple[float, str]) -> list[Mark]:
    """Marks of one process."""
    return [Mark(at, pid, rank, what) for at, what in points]


def test_the_parts_of_a_recovery_add_up_to_the_whole() -> None:
    """A cold start of two ranks: the slower process of each part counts, and nothing is counted twice."""
    first = the_way(11, 0, (102.0, BEGAN), (104.0, IMPORTED), (105.0, JOINED), (106.0, RESTORED), (107.0, STEPPED))
    second = the_way(12, 1, (102.1, BEGAN), (104.5, IMPORTED), (105.0, JOINED), (106.2, RESTORED), (107.3, STEPPED))
    found = parts(100.0, 100.5, 101.0, [101.5], sorted([*first, *second], key=lambda each: each.at))
    assert found is not None
    assert list(found) == list(PARTS)
    assert sum(found.values()) == pytest.approx(7.3)
    assert found["import"] == pytest.approx(2.4)


def test_a_standby_has_nothing_to_import() -> None:
    """It began before the fault: from the decision to its post is the spawn; a survivor only steps."""
    standby = the_way(12, 1, (50.0, BEGAN), (100.2, IMPORTED), (100.3, JOINED), (100.5, RESTORED), (100.6, STEPPED))
    survivor = the_way(11, 0, (99.9, STEPPED), (100.7, STEPPED))
    found = parts(100.0, 100.02, 100.1, [100.01], sorted([*standby, *survivor], key=lambda each: each.at))
    assert found is not None
    assert found["import"] == 0.0
    assert found["spawn"] == pytest.approx(0.1)
    assert sum(found.values()) == pytest.approx(0.7)


def test_a_start_that_failed_belongs_to_the_spawn() -> None:
    """A process that never got to a step is no part of the gang that came back."""
    failed = the_way(10, 0, (101.0, BEGAN), (102.0, IMPORTED))
    second = the_way(11, 0, (103.0, BEGAN), (104.0, IMPORTED), (104.1, JOINED), (104.2, RESTORED), (104.5, STEPPED))
    found = parts(100.0, 100.2, 100.2, [100.3], [*failed, *second])
    assert found is not None
    assert found["spawn"] == pytest.approx(2.7)
    assert sum(found.values()) == pytest.approx(4.5)


def test_an_unfinished_recovery_has_no_parts() -> None:
    """While a rank is still on its way there is nothing to tell."""
    assert parts(100.0, 100.1, 100.1, [], the_way(11, 0, (101.0, IMPORTED), (102.0, JOINED))) is None


# ---------------------------------------------------------------- the programs
def test_a_peer_that_cannot_be_installed_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is a sentence for a cell, and no half-made environment passes for a whole one."""
    monkeypatch.setattr("peers.FOLDER", tmp_path)
    nowhere = Package("nowhere", (str(tmp_path / "no-such-package"),))
    for _ in range(2):
        with pytest.raises(PeerUnavailable, match="could not install it"):
            python_of(nowhere)


@pytest.mark.parametrize("program", [*PROGRAMS, "render.py"])
def test_every_benchmark_explains_itself(program: str) -> None:
    """`--help` works, and knows `--quick` and `--json`."""
    done = subprocess.run(
        [sys.executable, BENCHMARKS / program, "--help"], capture_output=True, text=True, timeout=120, check=True
    )
    assert "usage:" in done.stdout
    assert program == "render.py" or ("--quick" in done.stdout and "--json FILE" in done.stdout)
