"""What a user can get wrong about a run: each is met with a message that says what to do, and nothing is lost."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator
from typing import Any

import boto3
import pytest

from cluster import HERE, TrainingCluster, training_cluster
from mend.incidents import FailureClass, IncidentKind, Tier
from mend.names import API_VERSION, PLURAL
from mend.status import RunPhase

RUNS = HERE.of(API_VERSION, PLURAL)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingCluster]:
    """A cluster for all tests here; each has a run of its own."""
    with training_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


def trainer(run: dict[str, Any]) -> dict[str, Any]:
    """The trainer's container in a run."""
    container: dict[str, Any] = run["spec"]["workers"]["template"]["spec"]["containers"][0]
    return container


def a_run(
    cluster: TrainingCluster, name: str, *, env: dict[str, str] | None = None, **checkpoint: Any
) -> dict[str, Any]:
    """A short run with other words about its checkpoints."""
    run = cluster.run(name, env={"STEPS": "2", **(env or {})})
    run["spec"]["checkpoint"] |= checkpoint
    return run


# ---------------------------------------------------------------- the spec
@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("workers", "replicas"), 0, "spec.workers.replicas: Invalid value: 0"),
        (("workers", "ranksPerWorker"), -1, "spec.workers.ranksPerWorker: Invalid value: -1"),
        (("workers", "minReplicas"), 2, "minReplicas"),
        (("checkpoint", "keepLast"), 0, "spec.checkpoint.keepLast: Invalid value: 0"),
        (("checkpoint", "uri"), "gs://bucket/x", "spec.checkpoint.uri: Invalid value"),
        (("activeDeadlineSeconds",), 0, "spec.activeDeadlineSeconds: Invalid value: 0"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_at_the_door(
    cluster: TrainingCluster, path: tuple[str, ...], value: Any, said: str
) -> None:
    """The API server refuses it with the field's name; no run comes to be."""
    run = cluster.run("refused")
    place = run["spec"]
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    told = cluster.api.refused(422, "Invalid", "POST", RUNS, run)
    assert said in told["message"]


def test_a_misspelt_field_is_named(cluster: TrainingCluster) -> None:
    """With strict validation, as kubectl asks for, a misspelt field is refused by its full name."""
    run = cluster.run("misspelt")
    run["spec"]["checkpoint"]["intervall"] = "10m"
    told = cluster.api.refused(400, "BadRequest", "POST", RUNS, run, fieldValidation="Strict")
    assert 'unknown field "spec.checkpoint.intervall"' in told["message"]


def test_what_the_schema_lets_through_is_not_accepted_and_can_be_mended(cluster: TrainingCluster) -> None:
    """A template without the trainer's command: Accepted=False and an event that says so, no pod; mended, it runs."""
    run = a_run(cluster, "wordless")
    command = trainer(run).pop("command")
    trainer(run)["image"] = ""
    cluster.apply(run)
    message = cluster.condition("wordless", "Accepted", "False", says="InvalidSpec")
    assert "spec.workers.template.spec.containers[0].command" in message
    assert 'write it as a list, e.g. ["python", "-m", "mend_trainer.train"]' in message
    assert "spec.workers.template.spec.containers[0].image" in message, "all problems are told at once"
    cluster.api.eventually(lambda: "InvalidSpec" in [reason for reason, _ in cluster.events("wordless")], "an event")
    assert cluster.pods("wordless") == []
    assert len([reason for reason, _ in cluster.events("wordless") if reason == "InvalidSpec"]) == 1
    mended = copy.deepcopy(run["spec"]["workers"]["template"])
    mended["spec"]["containers"][0] |= {"command": command, "image": "loop"}
    cluster.patch("wordless", workers={"template": mended})
    cluster.succeeded("wordless")


def test_a_bad_edit_does_not_stop_a_run_that_trains(cluster: TrainingCluster) -> None:
    """A spec that is spoilt while the run trains is refused; the ranks train on, and are brought back if one dies."""
    cluster.apply(cluster.run("spoilt"))
    cluster.training("spoilt")
    pids, before = cluster.pids("spoilt"), cluster.sight("spoilt").step
    template = cluster.read("spoilt")["spec"]["workers"]["template"]
    del template["spec"]["containers"][0]["command"]
    cluster.patch("spoilt", workers={"template": template})
    cluster.condition("spoilt", "Accepted", "False", says="containers[0].command")
    cluster.until_seen("spoilt", lambda sight: sight.step > before + 20, "it trains on")
    assert cluster.pids("spoilt") == pids
    cluster.injure("spoilt", rank=1, number=signal.SIGKILL)
    assert cluster.recovered("spoilt").incidents[-1].culprit_ranks == (1,)
    cluster.delete("spoilt")


# ---------------------------------------------------------------- the store
def test_a_store_that_cannot_be_used_is_named_and_nothing_starts(cluster: TrainingCluster) -> None:
    """Unreachable, without the bucket, without the Secret, with wrong keys: each with its reason; no attempt begins."""
    secret = {"metadata": {"name": "wrong"}, "stringData": {"AWS_ACCESS_KEY_ID": "AKIAX", "AWS_SECRET_ACCESS_KEY": "y"}}
    access = cluster.local.s3
    assert access is not None
    secret["stringData"]["AWS_ENDPOINT_URL"] = access.endpoint
    cluster.api.create(HERE.core("secrets"), secret)
    cluster.apply(a_run(cluster, "away", endpoint="http://127.0.0.1:9"))
    cluster.apply(a_run(cluster, "bucketless", uri="s3://nowhere/bucketless"))
    cluster.apply(a_run(cluster, "keyless", credentialsSecret="wrong"))
    cluster.apply(a_run(cluster, "secretless", credentialsSecret="later"))
    for name, reason, words in (
        ("away", "Unreachable", "check spec.checkpoint.endpoint"),
        ("bucketless", "NoSuchBucket", "s3://nowhere"),
        ("keyless", "BadCredentials", "the Secret named by spec.checkpoint.credentialsSecret"),
        ("secretless", "SecretNotFound", "there is no Secret 'later' in namespace default"),
    ):
        message = cluster.condition(name, "StorageReady", "False", says=reason)
        assert words in message, message
        assert cluster.status(name).attempt == 0
        assert cluster.pods(name) == []

    # Whatever is put right is noticed without anybody touching the run.
    cluster.api.create(HERE.core("secrets"), {"metadata": {"name": "later"}, "stringData": access.as_env()})
    cluster.succeeded("secretless")
    for name in ("away", "bucketless", "keyless"):
        assert cluster.status(name).phase is RunPhase.PENDING
        cluster.delete(name)


def test_two_runs_on_one_prefix(cluster: TrainingCluster) -> None:
    """The second is refused with the owner's name and the remedy, and starts once the owner's mark is taken away."""
    cluster.apply(a_run(cluster, "first"))
    cluster.succeeded("first")
    cluster.apply(a_run(cluster, "second", uri="s3://mend/first"))
    message = cluster.condition("second", "StorageReady", "False", says="PrefixOwned")
    assert "it is owned by run default/first" in message
    assert "delete owner.json there" in message
    assert cluster.pods("second") == []
    access = cluster.local.s3
    assert access is not None
    store = boto3.client(
        "s3",
        endpoint_url=access.endpoint,
        region_name=access.region,
        aws_access_key_id=access.access_key_id,
        aws_secret_access_key=access.secret_access_key,
    )
    store.delete_object(Bucket=access.bucket, Key="first/owner.json")
    assert cluster.succeeded("second").restored_step == 1, "it goes on from what the first has left"


def test_a_full_disk_while_saving_costs_saves_and_never_the_run(cluster: TrainingCluster) -> None:
    """Training goes on while no save works, a condition says so, and turns when there is room again."""
    run = cluster.run("full", env={"STEPS": "1000000"})
    run["spec"]["checkpoint"] = {"uri": f"file://{cluster.folder}/full", "interval": "5 steps"}
    cluster.apply(run)
    cluster.training("full")
    pids = cluster.pids("full")
    for rank in (0, 1):
        cluster.ask_fault("full", rank, "fill-disk")
    message = cluster.condition("full", "StorageReady", "False", says="SaveFailed")
    assert "the run goes on" in message
    step = cluster.sight("full").step
    cluster.until_seen("full", lambda sight: sight.step > step + 20, "it trains on")
    for rank in (0, 1):
        cluster.ask_fault("full", rank, "empty-disk")
    cluster.condition("full", "StorageReady", "True")
    assert cluster.pids("full") == pids
    status = cluster.status("full")
    assert (status.attempt, status.incidents) == (1, ())
    cluster.delete("full")


def test_a_disk_that_is_full_at_the_end_is_nobodys_fault(cluster: TrainingCluster) -> None:
    """The last step cannot be saved, time and again: no rank is blamed, the run never fails, and ends once it can."""
    run = cluster.run("brimful", env={"STEPS": "15", "FINAL_SAVE_SECONDS": "0"})
    run["spec"]["checkpoint"] = {"uri": f"file://{cluster.folder}/brimful", "interval": "10 steps"}
    for rank in (0, 1):
        cluster.ask_fault("brimful", rank, "fill-disk!")  # and again whenever it is restarted
    cluster.apply(run)
    cluster.until("brimful", lambda status: status.recoveries >= 3, "it is tried again")
    for rank in (0, 1):
        cluster.ask_fault("brimful", rank, "empty-disk!")  # the saver, whose disk it is, outlives the ranks
    status = cluster.succeeded("brimful")
    assert {
        (each.kind, each.failure, each.fingerprint, each.culprit_ranks, each.tier) for each in status.incidents
    } == {(IncidentKind.CRASHED, FailureClass.INFRASTRUCTURE, "", (), Tier.RESTART_RANKS)}
    assert "could not save its last step" in status.incidents[0].summary
    assert (status.step, status.checkpoint and status.checkpoint.step) == (14, 14)


# ---------------------------------------------------------------- the program
def test_a_program_that_ends_at_once_is_given_up_with_its_traceback(cluster: TrainingCluster) -> None:
    """The same exception twice is enough: the run fails with the traceback, and no pod goes on."""
    run = a_run(cluster, "hopeless")
    trainer(run)["command"] = ["python", "-c", "import os\nopen('/no/such/data')"]
    cluster.apply(run)
    message = cluster.condition("hopeless", "Failed")
    assert message.startswith("GaveUp: ")
    assert "FileNotFoundError: [Errno 2] No such file or directory: '/no/such/data'" in message
    status = cluster.status("hopeless")
    assert 1 <= status.recoveries <= 3
    assert {each.failure for each in status.incidents} == {FailureClass.USER}
    assert status.incidents[-1].tier is Tier.GIVE_UP


def test_a_command_that_does_not_exist_fails_at_once(cluster: TrainingCluster) -> None:
    """No second try for a command that is not in the image."""
    run = a_run(cluster, "lost")
    trainer(run)["command"] = ["no-such-trainer", "--fast"]
    cluster.apply(run)
    message = cluster.condition("lost", "Failed")
    assert "no-such-trainer" in message
    assert cluster.status("lost").recoveries == 0


def test_an_image_without_the_agent_fails_at_once(cluster: TrainingCluster) -> None:
    """No second try for an image in which the container runtime does not find mend's agent."""
    run = a_run(cluster, "agentless", env={"PATH": "/nowhere"})
    cluster.apply(run)
    message = cluster.condition("agentless", "Failed")
    assert 'exec: "mend-agent": executable file not found in $PATH' in message
    status = cluster.status("agentless")
    assert (status.recoveries, [each.failure for each in status.incidents]) == (0, [FailureClass.USER])


def test_an_image_whose_agent_cannot_start_is_given_up_with_its_traceback(cluster: TrainingCluster) -> None:
    """What ends before its agent was heard is paid from the user's budget: a few tries, then the traceback."""
    broken = cluster.folder / "broken"
    broken.mkdir()
    (broken / "aiohttp.py").write_text("raise ImportError('libssl.so.3: cannot open shared object file')")
    run = a_run(cluster, "broken", env={"PYTHONPATH": str(broken)})
    run["spec"]["recovery"] = {"budgets": {"user": 1}}
    cluster.apply(run)
    message = cluster.condition("broken", "Failed")
    assert message.startswith("GaveUp: ")
    assert "Traceback (most recent call last)" in message
    assert "ImportError: libssl.so.3: cannot open shared object file" in message
    assert "raise spec.recovery.budgets.user" in message
    status = cluster.status("broken")
    assert (status.attempt, status.recoveries) == (2, 1)
    assert [each.failure for each in status.incidents] == [FailureClass.USER] * 2


def test_a_success_without_training_is_no_endless_loop(cluster: TrainingCluster) -> None:
    """A command that ends with 0 at once has succeeded, whatever it did."""
    run = a_run(cluster, "easy")
    trainer(run)["command"] = ["true"]
    cluster.apply(run)
    assert cluster.succeeded("easy").step == -1


def test_a_checkpoint_of_another_model_is_named_tensor_by_tensor(cluster: TrainingCluster) -> None:
    """A run made anew with another model fails at once, with every tensor that does not fit; the checkpoint stays."""
    cluster.apply(a_run(cluster, "model", env={"WIDTH": "8"}))
    cluster.succeeded("model")
    kept = cluster.manifests("model")
    cluster.delete("model")
    cluster.api.eventually_gone(HERE.of(API_VERSION, PLURAL, "model"))
    cluster.apply(a_run(cluster, "model", env={"WIDTH": "16", "STEPS": "5"}))
    message = cluster.condition("model", "Failed")
    for words in ("model.weight", "model.bias", "[8, 8]", "[16, 16]"):
        assert words in message
    status = cluster.status("model")
    assert (status.recoveries, [each.kind for each in status.incidents]) == (0, [IncidentKind.CRASHED])
    assert cluster.manifests("model") == kept


def test_a_checkpoint_of_another_world_size_is_loaded(cluster: TrainingCluster) -> None:
    """A run made anew with another number of ranks goes on from the step that the other gang saved."""
    cluster.apply(a_run(cluster, "world"))
    cluster.succeeded("world")
    cluster.delete("world")
    cluster.api.eventually_gone(HERE.of(API_VERSION, PLURAL, "world"))
    run = a_run(cluster, "world", env={"STEPS": "4"})
    run["spec"]["workers"]["ranksPerWorker"] = 3
    cluster.apply(run)
    status = cluster.succeeded("world")
    assert (status.restored_step, status.step) == (1, 3)
