"""`mend checkpoint` against real stores and a real API server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from api_thread import served_in_a_thread
from cluster_client import CRDS, Cluster
from crds import crd, sample
from mend.catalog import Catalog
from mend.cli import main
from mend.crstatus import from_resource, to_resource
from mend.environment import ENV_SIGNING_KEY
from mend.keys import PINNED_NAME, QUARANTINE_NAME, VERIFIED_NAME
from mend.manifest import signing_key
from mend.names import ANNOTATION_SAVE_NOW, API_VERSION
from mend.ownership import Owner, claim
from mend.states import Ancestor
from mend.status import CheckpointStatus, RunPhase, RunStatus, SaveWish, WishState
from mend.store import Store, open_store
from s3 import KEY_ID, SECRET, S3Server, ministack
from stored_checkpoint import save

OWNER = Owner(namespace="team", name="clio", uid="uid-1")
SIGNING = "a secret of the tests, long enough"
RUNS = f"/apis/{API_VERSION}/namespaces/default/trainingruns"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A prefix that belongs to team/clio."""
    found = open_store(f"file://{tmp_path}/run")
    claim(found, OWNER)
    return found


@dataclass
class Said:
    """What a command has answered."""

    code: int
    out: str
    err: str


Say = Callable[..., Said]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    def run(*words: str) -> Said:
        code = main(["checkpoint", *words])
        told = capsys.readouterr()
        return Said(code, told.out, told.err)

    return run


def rows(said: Said) -> list[list[str]]:
    """The table's cells, without its head."""
    lines = [line.split() for line in said.out.splitlines() if line.strip() and "─" not in line]
    return lines[1:]


def test_list_shows_what_there_is(store: Store, say: Say) -> None:
    """Newest first, with size and marks, and what is off the lineage."""
    save(store, 5)
    save(store, 9)  # after it attempt 2 began from step 5
    newest = save(store, 7, 2, lineage=(Ancestor(attempt=1, step=5, uid="uid-1"),))
    spoilt = save(store, 8, 2, lineage=(Ancestor(attempt=1, step=5, uid="uid-1"),))
    store.put(f"{newest}/{VERIFIED_NAME}", b"{}")
    store.put(f"{newest}/{PINNED_NAME}", b"{}")
    store.put(f"{spoilt}/{QUARANTINE_NAME}", b"{}")
    said = say("list", store.uri)
    assert said.code == 0
    shown = {(int(row[0]), int(row[1])): " ".join(row[2:]) for row in rows(said)}
    assert list(shown) == [(9, 1), (8, 2), (7, 2), (5, 1)]
    assert shown[9, 1].endswith("- - off the lineage")
    assert shown[8, 2].endswith("- - quarantined")
    assert shown[7, 2].endswith("880 B yes yes")
    assert shown[5, 1].endswith("880 B - -")


def test_list_shows_one_checkpoint_by_its_uri_and_says_if_there_is_none(store: Store, say: Say) -> None:
    """An empty table under a mistyped prefix would be taken for a run that has saved nothing."""
    empty = say("list", store.uri)
    assert (empty.code, rows(empty)) == (0, [])
    assert "there is no committed checkpoint" in empty.err
    folder = save(store, 5)
    save(store, 6)
    assert [row[0] for row in rows(say("list", f"{store.uri}/{folder}"))] == ["5"]


def test_verify_reads_the_newest_and_notes_it(store: Store, say: Say) -> None:
    """By default the newest on the lineage, each of its objects in a row; the catalog then knows it as verified."""
    save(store, 5)
    save(store, 6)
    said = say("verify", store.uri)
    assert said.code == 0, said
    assert [row[2] for row in rows(said)] == ["(whole)", "__0_0.distcp", "__1_0.distcp"]
    assert "1 of 1 checkpoints are sound" in said.err
    assert [each.verified for each in Catalog(store).checkpoints()] == [False, True]


def test_verify_all_names_what_is_damaged_and_marks_it_on_request(store: Store, say: Say) -> None:
    """Exit code 1; without --quarantine nothing is marked."""
    save(store, 5)
    damaged = save(store, 6)
    store.delete([f"{damaged}/__1_0.distcp"])
    said = say("verify", store.uri, "--all")
    assert said.code == 1
    assert "__1_0.distcp" in said.out
    assert "missing" in said.out
    assert "--quarantine" in said.err
    assert [each.quarantined for each in Catalog(store).checkpoints()] == [False, False]
    assert say("verify", store.uri, "--all", "--quarantine").code == 1
    assert [each.quarantined for each in Catalog(store).checkpoints()] == [False, True]


def test_verify_doubts_a_model_that_did_not_change(store: Store, say: Say) -> None:
    """A buffer that was saved twice is no sound checkpoint, and no damaged one."""
    save(store, 5, model=b"the same weights")
    save(store, 6, model=b"the same weights")
    said = say("verify", store.uri, "--step", "6", "--quarantine")
    assert said.code == 1
    assert "byte for byte that of step 5" in " ".join(said.out.split())
    assert [each.quarantined for each in Catalog(store).checkpoints()] == [False, False]
    assert say("verify", store.uri, "--step", "5").code == 0


def test_verify_doubts_a_chain_that_contradicts_itself(store: Store, say: Say) -> None:
    """An ancestor that is there has to tell of the same ancestors; one that is gone is merely told."""
    save(store, 5, 2, lineage=(Ancestor(attempt=1, step=2),))
    save(store, 6, 3, lineage=(Ancestor(attempt=1, step=3), Ancestor(attempt=2, step=5)))
    said = say("verify", store.uri, "--step", "6")
    assert said.code == 1
    assert "tells of other ancestors" in " ".join(said.out.split())
    said = say("verify", store.uri, "--step", "5")
    assert said.code == 0
    assert "of 1 ancestors 1 are gone" in " ".join(said.out.split())


def test_one_checkpoint_is_named_by_its_uri(store: Store, say: Say) -> None:
    """Whatever else lies there, on the lineage or not."""
    folder = save(store, 5)
    save(store, 6)
    said = say("verify", f"{store.uri}/{folder}/")
    assert [row[0] for row in rows(said)] == ["5"] * 3
    said = say("verify", f"{store.uri}/step-000000000005/000001-other")
    assert said.code == 1
    assert "there is no committed checkpoint" in said.err


def test_a_step_that_is_not_there_names_those_that_are(store: Store, say: Say) -> None:
    """The error tells what can be asked for."""
    save(store, 5)
    save(store, 6)
    said = say("pin", store.uri, "--step", "7")
    assert said.code == 1
    assert said.err.strip().endswith("there is no checkpoint of step 7; on the lineage are: 6, 5")


def test_pinned_and_unpinned(store: Store, say: Say) -> None:
    """The mark lies beside the manifest, with the reason."""
    folder = save(store, 5)
    assert say("pin", store.uri, "--step", "5", "--reason", "paper").code == 0
    assert b'"paper"' in store.get(f"{folder}/{PINNED_NAME}")
    assert Catalog(store).checkpoints()[0].pinned
    assert say("unpin", store.uri, "--step", "5").code == 0
    assert not Catalog(store).checkpoints()[0].pinned


def test_two_saves_of_one_step_have_to_be_told_apart(store: Store, say: Say) -> None:
    """Both are named."""
    save(store, 5, save_id="a")
    save(store, 5, save_id="b")
    said = say("pin", store.uri, "--step", "5")
    assert said.code == 1
    assert "000001-a" in said.err
    assert "000001-b" in said.err


def test_with_a_key_what_is_not_signed_is_doubted_until_it_is(
    store: Store,
    say: Say,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`sign` reads back before it signs; a damaged checkpoint is not signed, and a foreign run's key signs nothing."""
    monkeypatch.setenv(ENV_SIGNING_KEY, SIGNING)
    key = signing_key(SIGNING.encode(), "team/clio")
    save(store, 5)
    damaged = save(store, 6)
    store.delete([f"{damaged}/__1_0.distcp"])
    assert "not signed" in " ".join(say("verify", store.uri, "--step", "5").out.split())
    said = say("sign", store.uri, "--all")
    assert said.code == 1
    assert "step 6 of attempt 1 is not signed" in said.err
    assert [each.ref.step for each in Catalog(store, key=key).checkpoints()] == [5]
    assert say("verify", store.uri, "--step", "5").code == 0
    assert "not by this run's" in say("verify", store.uri, "--step", "5", "--run-name", "team/dora").out.replace(
        "\n", " "
    )
    listed = say("list", store.uri)
    assert [row[0] for row in rows(listed)] == ["5"]
    assert "1 checkpoints are passed over" in listed.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("list", "s3://"), "expected s3://BUCKET[/PREFIX] or file:///PATH"),
        (("now", "s3://bucket/run"), "expected the name of a TrainingRun"),
        (("verify", "http://bucket/run"), "expected s3://BUCKET[/PREFIX] or file:///PATH"),
        (("verify", "file:///nowhere/at/all"), "there is no checkpoint"),
        (("sign", "file:///nowhere/at/all"), "give --signing-key FILE"),
        (("list", "file:///nowhere/at/all", "--signing-key", "/no/such"), "--signing-key /no/such: No such file"),
    ],
)
def test_mistakes_are_one_line_with_a_remedy(words: tuple[str, ...], expected: str, say: Say) -> None:
    """No traceback, and what is expected."""
    said = say(*words)
    assert said.code == 1
    assert said.err.startswith("mend: ")
    assert expected in said.err
    assert len(said.err.splitlines()) == 1


def test_it_works_on_a_bucket(tmp_path: Path, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    """With credentials from the environment and the endpoint from the command line."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with ministack(tmp_path) as server:
        assert isinstance(server, S3Server)
        uri = server.uri("clio")
        folder = save(open_store(uri, server.endpoint), 5)
        assert say("verify", uri, "--endpoint", server.endpoint).code == 0
        assert say("verify", f"{uri}/{folder}", "--endpoint", server.endpoint).code == 0
        assert [row[0] for row in rows(say("list", uri, "--endpoint", server.endpoint))] == ["5"]


# ---------------------------------------------------------------- with a cluster
@dataclass
class Asked:
    """A run in a cluster without a controller: the test is the controller."""

    cluster: Cluster
    kubeconfig: str
    path: str = f"{RUNS}/clio"

    def wish(self) -> str:
        """The annotation, once it is there."""
        found = self.cluster.eventually(
            lambda: (self.cluster.get(self.path)["metadata"].get("annotations") or {}).get(ANNOTATION_SAVE_NOW),
            "a wish",
        )
        return str(found)

    def report(self, **status: object) -> None:
        """Write the run's status."""
        run = self.cluster.get(self.path)
        self.cluster.replace(f"{self.path}/status", {**run, "status": to_resource(RunStatus(**status))})  # type: ignore[arg-type]


@pytest.fixture
def asked(tmp_path: Path, store: Store) -> Iterator[Asked]:
    with served_in_a_thread(tmp_path / "api") as server:
        kubeconfig = server.write_kubeconfig(tmp_path / "kubeconfig")
        with Cluster(kubeconfig) as cluster:
            if cluster.call("GET", f"{CRDS}/trainingruns.mend.dev")[0] != 200:
                cluster.create(CRDS, crd())
            run = sample()
            run["metadata"] = {"name": "clio"}
            run["spec"]["checkpoint"]["uri"] = store.uri
            cluster.create(RUNS, run)
            yield Asked(cluster, str(kubeconfig))


def test_a_run_is_named_by_its_name(asked: Asked, store: Store, say: Say) -> None:
    """Its prefix, its lineage and where its attempt started are looked up in the cluster."""
    uid = asked.cluster.get(asked.path)["metadata"]["uid"]
    save(store, 5, run_uid=uid)
    save(store, 9, run_uid=uid)
    asked.report(attempt=2, lineage=(Ancestor(attempt=1, step=5, uid=uid),))
    said = say("list", "clio", "--kubeconfig", asked.kubeconfig)
    assert "off the lineage" in said.out
    assert "the present attempt started here" in said.out
    assert {row[0] for row in rows(say("verify", "clio", "--kubeconfig", asked.kubeconfig))} == {"5"}


def test_now_asks_and_leaves(asked: Asked, say: Say) -> None:
    """Without --wait it says what it asked for; each call is a new wish."""
    assert say("now", "clio", "--kubeconfig", asked.kubeconfig).code == 0
    first = asked.wish()
    assert say("now", "clio", "--kubeconfig", asked.kubeconfig).code == 0
    assert asked.wish() != first


@pytest.mark.parametrize("ending", ["answered", "given up", "finished", "overtaken"])
def test_now_waits_for_what_becomes_of_it(asked: Asked, say: Say, ending: str) -> None:
    """A newer checkpoint, or that none was committed, or that the run has ended."""
    checkpoint = CheckpointStatus(step=12, attempt=1, uri="file:///x/step-12", committed_at=1.0)
    asked.report(phase=RunPhase.RUNNING, step=11)

    def controller() -> None:
        wish = SaveWish(id=asked.wish(), step=11, asked_at=1.0, attempt=1, times=1)
        asked.report(phase=RunPhase.RUNNING, step=12, wish=wish)
        match ending:
            case "answered":
                done = msgspec.structs.replace(wish, state=WishState.ANSWERED)
                asked.report(phase=RunPhase.RUNNING, step=13, wish=done, checkpoint=checkpoint)
            case "given up":
                done = msgspec.structs.replace(wish, state=WishState.GIVEN_UP, times=3)
                asked.report(phase=RunPhase.RUNNING, step=90, wish=done)
            case "overtaken":  # the wish was given up, and the interval asks: nothing newer has been committed
                next_one = msgspec.structs.replace(wish, by_interval=True, times=0)
                older = msgspec.structs.replace(checkpoint, step=10)
                asked.report(phase=RunPhase.FAILED, step=90, wish=next_one, checkpoint=older)
            case _:
                asked.report(phase=RunPhase.FAILED, step=12, wish=wish)

    thread = threading.Thread(target=controller)
    thread.start()
    said = say("now", "clio", "--wait", "--kubeconfig", asked.kubeconfig)
    thread.join()
    expected = {
        "answered": (0, "file:///x/step-12: step 12 is committed"),
        "given up": (1, "asked 3 times, and no checkpoint was committed"),
        "finished": (1, "the run has failed meanwhile"),
        "overtaken": (1, "the run has failed meanwhile"),
    }
    code, words = expected[ending]
    assert said.code == code
    assert words in said.out + said.err


def test_now_is_refused_when_nothing_trains_any_more(asked: Asked, say: Say) -> None:
    """And the wish is not left behind."""
    asked.report(phase=RunPhase.SUCCEEDED)
    said = say("now", "clio", "--kubeconfig", asked.kubeconfig)
    assert said.code == 1
    assert "nothing trains any more" in said.err
    assert "annotations" not in asked.cluster.get(asked.path)["metadata"]


def test_what_was_asked_for_survives_the_status_round_trip(asked: Asked) -> None:
    """The API server keeps the wish as the controller wrote it."""
    wish = SaveWish(id="x", step=3, asked_at=5.0, by_interval=True, state=WishState.GIVEN_UP, attempt=2, times=3)
    asked.report(wish=wish)
    assert from_resource(asked.cluster.get(asked.path)["status"]).wish == wish
