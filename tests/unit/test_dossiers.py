"""An incident's dossier: what is in it, how it stays small, where it is kept, and how a person is shown it."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from mend.actions import Decision
from mend.catalog import KEPT_DOSSIERS, Catalog
from mend.cli import main
from mend.dossier import Dossier, UnreadableDossier, compose, decode, encode
from mend.evidence import GroupProgress, RankEvidence
from mend.exhibit import exhibit
from mend.heartbeats import Phase, RankError, RankExit, RankReport
from mend.incidents import FailureClass, IncidentKind, IncidentRecord
from mend.journal import Entry, Journal
from mend.keys import checkpoint_key, incident_key
from mend.listing import StoreView
from mend.observation import Observation
from mend.records import kept
from mend.status import RunStatus
from mend.store import open_store
from mend_trainer.alone import next_attempt
from world import World, a_spec

RECORD = IncidentRecord(
    id=3,
    kind=IncidentKind.HUNG,
    failure=FailureClass.HANG,
    attempt=2,
    step=17,
    culprit_ranks=(3,),
    culprit_workers=(1,),
    confidence=0.95,
    reasons=("rank 3: 3 others wait in collective 18",),
    summary="rank 3: 3 others wait in collective 18",
    began_at=100.0,
    detected_at=101.0,
)
WAITING = 'Current thread 0x1 (most recent call first):\n  File "/torch/c10d.py", line 9 in all_reduce\n' + "\n".join(
    f'  File "/app/train.py", line {n} in f{n}' for n in range(20)
)
STUCK = 'Current thread 0x1 (most recent call first):\n  File "/app/train.py", line 12 in load\n'


def a_rank(number: int, **more: object) -> RankEvidence:
    """One of four that wait in collective 18."""
    group = GroupProgress(
        name="0:default_pg", last_enqueued=18, last_completed=17, last_enqueued_name="gloo:all_reduce"
    )
    given = {"groups": (group,), "recorder_answered": True, "stack": WAITING, "phase": Phase.COLLECTIVE, **more}
    return RankEvidence(rank=number, process_state="S", step=17, progress_seconds=1.5, **given)  # type: ignore[arg-type]


def a_dossier(ranks: int = 4, log: tuple[str, ...] = ()) -> Dossier:
    """Of a hang of the last of `ranks`."""
    behind = GroupProgress(
        name="0:default_pg", last_enqueued=17, last_completed=17, last_enqueued_name="gloo:all_gather"
    )
    guilty = a_rank(3, groups=(behind,), stack=STUCK, phase=Phase.DATA, python_answers=False)
    others = [a_rank(n, log_tail=log) for n in range(ranks) if n != 3]
    return Dossier(run="team/clio", run_uid="run-uid", incident=RECORD, evidence=(*others, guilty))


def test_all_that_was_seen_is_in_it() -> None:
    """In the simulated world: the dossier that is sent has evidence of every rank, and the status says where it is."""
    world = World(a_spec(2, 2))
    world.until_step(12).harm_rank(1, "stop")
    world.until(lambda world: bool(world.kept))
    (key, raw), *more = world.kept.items()
    record = world.status.incidents[-1]
    told = decode(raw)
    assert more == []
    assert key == incident_key(1, 1, "run-uid")
    assert record.evidence_uri == f"s3://bucket/clio/{key}"
    assert (told.run, told.incident.culprit_ranks) == ("team/clio", (1,))
    assert [rank.rank for rank in told.evidence] == [rank.rank for rank in told.ranks] == [0, 1, 2, 3]


@pytest.mark.parametrize("store", [StoreView(), StoreView(listed=True, problem="x", problem_reason="PrefixOwned")])
def test_nothing_is_sent_under_the_prefix_of_another_run(store: StoreView) -> None:
    """Before the prefix is known, and when it is another run's, no address is promised and nothing is written."""
    seen = Observation(
        name="clio", namespace="team", uid="u", generation=1, created_at=0.0, status=RunStatus(), store=store
    )
    assert kept(a_spec(), seen, RECORD) == (RECORD, ())


@pytest.mark.parametrize("most", [1 << 20, 200_000, 20_000, 3_000, 600])
def test_it_is_as_large_as_it_may_be(most: int) -> None:
    """Stacks and log lines of ranks that are not blamed go first, the record and the verdict never."""
    told = decode(encode(a_dossier(600, log=("x" * 200,) * 50), most))
    assert len(encode(told)) <= most
    assert told.incident == RECORD
    if most >= 3_000:
        assert any(rank.rank == 3 and rank.stack for rank in told.evidence)
    assert told.shortened


def test_a_small_one_is_whole() -> None:
    """Nothing is cut that need not be."""
    assert decode(encode(a_dossier())) == a_dossier()


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'{"run": 3}', b"\x80\x04pickle"])
def test_nonsense_is_no_dossier(raw: bytes) -> None:
    """It is refused by one named error."""
    with pytest.raises(UnreadableDossier):
        decode(raw)


def test_it_is_kept_beside_the_checkpoints_and_mistaken_for_none(tmp_path: Path) -> None:
    """Neither the controller's listing nor a run that is alone sees a checkpoint in it; it is written once."""
    store = open_store(f"file://{tmp_path}/run")
    key = incident_key(2, 3, "run-uid")
    Catalog(store).keep_dossier(key, b"first")
    Catalog(store).keep_dossier(key, b"second")
    assert store.get(key) == b"first"
    assert Catalog(store).checkpoints() == ()
    assert next_attempt(store) == (1, ())


def test_the_newest_hundred_are_kept_and_nothing_else_is_touched(tmp_path: Path) -> None:
    """The oldest goes for each that is too many; what is no dossier stays, checkpoints above all."""
    store = open_store(f"file://{tmp_path}/run")
    others = [f"{checkpoint_key(5, 1, 'a')}/manifest.json", "incidents/notes.txt", "incidents.json"]
    for key in others:
        store.put(key, b"mine")
    catalog = Catalog(store)
    for number in range(KEPT_DOSSIERS + 3):
        catalog.keep_dossier(incident_key(1, number, "run-uid"), b"{}")
    left = {entry.key for entry in store.list()}
    assert left >= set(others)
    assert left - set(others) == {incident_key(1, number, "run-uid") for number in range(3, KEPT_DOSSIERS + 3)}


def test_only_a_dossiers_key_is_written(tmp_path: Path) -> None:
    """A key that could be a checkpoint's is a mistake of ours, and raises."""
    with pytest.raises(ValueError, match="no key of a dossier"):
        Catalog(open_store(f"file://{tmp_path}/run")).keep_dossier("step-000000000001/000001-a/manifest.json", b"{}")


def test_a_person_sees_who_stood_where() -> None:
    """The blamed first and marked, counters as a table, equal stacks once and trimmed."""
    told = "\n".join(exhibit(a_dossier()))
    lines = told.splitlines()
    head = next(n for n, line in enumerate(lines) if line.split()[:2] == ["rank", "step"])
    assert lines[head + 1].split()[:5] == ["3*", "17", "data", "1.5s", "S"]
    assert lines[head + 1].endswith("the GIL is held")
    assert lines[head + 2].split()[5:9] == ["0:default_pg", "18", "17", "gloo:all_reduce"]
    assert "Stack of rank 3, innermost frame first:" in told
    assert told.count("Stack of ranks 0, 1, 2,") == 1
    assert "... 9 more" in told


def test_the_last_words_of_a_crash_are_shown() -> None:
    """A traceback, or the last lines of the log."""
    ranks = (
        RankReport(
            rank=0, pid=1, error=RankError(type="ValueError", message="bad", traceback="Traceback:\nbad sample")
        ),
        RankReport(rank=1, pid=2, exit=RankExit(signal=9, log_tail=("step 3 is done",))),
    )
    told = "\n".join(exhibit(Dossier(run="t/c", run_uid="u", incident=RECORD, ranks=ranks)))
    assert "Last words of rank 0:\n     Traceback:\n     bad sample" in told
    assert "Last words of rank 1:\n     step 3 is done" in told


def test_mend_explain_reads_a_downloaded_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--evidence FILE needs no cluster and no store."""
    (tmp_path / "it.json").write_bytes(encode(a_dossier()))
    assert main(["explain", "clio", "--evidence", str(tmp_path / "it.json")]) == 0
    assert "3*" in capsys.readouterr().out


def test_mend_explain_says_what_is_wrong_with_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that names the file, whether it is missing or something else."""
    (tmp_path / "it.json").write_text("{}")
    for name, words in (("it.json", "no dossier of mend's"), ("none.json", "No such file")):
        assert main(["explain", "clio", "--evidence", str(tmp_path / name)]) == 1
        said = capsys.readouterr().err
        assert str(tmp_path / name) in said
        assert words in said
        assert len(said.splitlines()) == 1


def test_the_action_is_composed_of_what_it_was_judged_on() -> None:
    """Evidence of an earlier attempt is not in it."""
    world = World(a_spec(2, 2))
    world.until_step(12)
    assert world.controller is not None
    seen = world.observe(world.controller)
    assert compose(seen, replace(RECORD, attempt=9)).evidence == ()


def a_journal(folder: Path, evidence_uri: str) -> Path:
    """The journal of a run with the incident `RECORD`, whose dossier is said to be at this address."""
    seen = Observation(name="clio", namespace="team", uid="u", generation=1, created_at=0.0, status=RunStatus())
    status = RunStatus(attempt=2, incidents=(replace(RECORD, evidence_uri=evidence_uri),))
    decision = Decision(status=status, reason="judged")
    journal = Journal(folder)
    journal.decided("team/clio", Entry(now=1.0, spec=a_spec(), seen=seen, decision=decision))
    return journal.path("team/clio")


def test_mend_explain_fetches_it_from_the_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the address in the status, here as a journal has it."""
    store, key = open_store(f"file://{tmp_path}/run"), incident_key(2, 3, "run-uid")
    store.put(key, encode(a_dossier()))
    journal = a_journal(tmp_path / "data", f"{store.uri}/{key}")
    assert main(["explain", "clio", "--journal", str(journal), "--incident", "3"]) == 0
    assert "Stack of rank 3, innermost frame first:" in capsys.readouterr().out
    assert main(["explain", "clio", "--journal", str(journal)]) == 0
    assert f"evidence {store.uri}/{key}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("uri", "number", "words"),
    [
        ("file:///nowhere/run/incidents/000002-000003-u.json", "3", "download it and give it by --evidence FILE"),
        ("", "3", "its evidence was not kept"),
        ("file:///nowhere/run/incidents/000002-000003-u.json", "9", "the status knows no such incident; there are: 3"),
    ],
)
def test_evidence_that_cannot_be_had_is_one_line(
    uri: str, number: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was asked for, why it is not there, and what to do."""
    code = main(["explain", "clio", "--journal", str(a_journal(tmp_path, uri)), "--incident", number])
    said = capsys.readouterr().err
    assert code == 1
    assert words in said
    assert len(said.splitlines()) == 1
