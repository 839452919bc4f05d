"""The life of checkpoints through the whole chain: controller, agents, ranks, savers and an S3 server, all real."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import HERE, NAMESPACE, TrainingCluster, training_cluster
from mend.cli import main
from mend.environment import ENV_SIGNING_KEY
from mend.keys import MANIFEST_NAME, VERIFIED_NAME
from mend.manifest import decode_manifest, signing_key
from mend.names import SIGNING_SECRET_KEY
from mend.store import Credentials, Store, open_store

SECRET = "a secret of the tests, long enough"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingCluster]:
    with training_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


def store_of(cluster: TrainingCluster, name: str) -> Store:
    """The run's prefix."""
    s3 = cluster.local.s3
    assert s3 is not None
    keys = Credentials(access_key_id=s3.access_key_id, secret_access_key=s3.secret_access_key, region=s3.region)
    return open_store(f"s3://{s3.bucket}/{name}", s3.endpoint, keys)


def keys(store: Store, name: str) -> list[str]:
    """Of the objects of that name."""
    return [entry.key for entry in store.list("step-") if entry.key.endswith(f"/{name}")]


def test_a_signed_run_saves_on_request_is_read_back_and_comes_back(
    cluster: TrainingCluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`mend checkpoint now --wait` brings a checkpoint that is signed, verified and sound, and a killed rank's run
    restores what is signed."""
    encoded = base64.b64encode(SECRET.encode()).decode()
    body = {"metadata": {"name": "signing"}, "data": {SIGNING_SECRET_KEY: encoded}}
    cluster.api.create(HERE.core("secrets"), {"apiVersion": "v1", "kind": "Secret", **body})
    run = cluster.run("signed", env={"STEPS": "100000"}, recovery={"firstTier": "restart-ranks"})
    run["spec"]["checkpoint"] |= {"interval": "1h", "verify": True, "signingSecret": "signing"}
    name = cluster.apply(run)
    cluster.training(name)
    where = ("--kubeconfig", str(cluster.local.kubeconfig), "-n", NAMESPACE)
    assert main(["checkpoint", "now", name, "--wait", *where]) == 0
    assert "is committed" in capsys.readouterr().out
    store = store_of(cluster, name)
    (manifest,) = keys(store, MANIFEST_NAME)
    key = signing_key(SECRET.encode(), f"{NAMESPACE}/{name}")
    saved = decode_manifest(store.get(manifest), key)
    cluster.wait_until(lambda: keys(store, VERIFIED_NAME) != [])
    s3 = cluster.local.s3
    assert s3 is not None
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_access_key)
    monkeypatch.setenv(ENV_SIGNING_KEY, SECRET)
    assert main(["checkpoint", "verify", store.uri, "--endpoint", s3.endpoint]) == 0
    assert "sound" in capsys.readouterr().out
    before = cluster.training(name)
    cluster.kill_pid(before.ranks[1].pid)
    after = cluster.recovered(name)
    assert after.attempt == 2
    assert after.restored_step is not None
    assert after.restored_step >= saved.step
    assert after.wish is not None
    assert cluster.events(name)
    cluster.delete(name)


def test_an_automatic_interval_saves_by_the_controllers_clock(cluster: TrainingCluster) -> None:
    """A checkpoint every second or so, and the reasons in the status."""
    run = cluster.run("auto", env={"STEPS": "100000"})
    run["spec"]["checkpoint"] |= {"interval": "auto", "minInterval": "1s", "maxInterval": "1h"}
    run["spec"]["checkpoint"]["keepLast"] = 100
    name = cluster.apply(run)
    cluster.training(name)
    store = store_of(cluster, name)
    # The ranks' own clock would not have saved before ten minutes.
    cluster.wait_until(lambda: len(keys(store, MANIFEST_NAME)) >= 4)
    status = cluster.status(name)
    assert status.interval is not None
    assert status.interval.cost_seconds is not None
    assert status.interval.launched_seconds == 600.0
    assert status.wish is not None
    assert status.wish.by_interval
    cluster.delete(name)


def test_a_pinned_checkpoint_outlives_retention(cluster: TrainingCluster, tmp_path: Path) -> None:
    """Also one that was pinned after the controller had listed the prefix."""
    run = cluster.run("pinned", env={"STEPS": "100000"})
    run["spec"]["checkpoint"] |= {"keepLast": 2}
    name = cluster.apply(run)
    cluster.training(name)
    store = store_of(cluster, name)
    cluster.wait_until(lambda: keys(store, MANIFEST_NAME) != [])
    pinned = keys(store, MANIFEST_NAME)[-1]
    store.put(pinned.replace(MANIFEST_NAME, "pinned.json"), b"{}")
    newest = pinned.partition("/")[0]
    cluster.wait_until(lambda: sum(key.partition("/")[0] > newest for key in keys(store, MANIFEST_NAME)) >= 2)
    later = keys(store, MANIFEST_NAME)[-1]
    cluster.wait_until(lambda: later not in keys(store, MANIFEST_NAME))  # retention has been at work since
    assert pinned in keys(store, MANIFEST_NAME)
    cluster.delete(name)


def test_the_best_by_evaluation_outlives_retention(cluster: TrainingCluster) -> None:
    """What the training loop measures reaches the controller, and the checkpoint that it speaks for stays."""
    run = cluster.run("best", env={"STEPS": "100000", "STEP_SECONDS": "0.1", "BEST_STEP": "30"})
    run["spec"]["checkpoint"] |= {"keepLast": 2, "keepBest": {"metric": "nearness"}}
    name = cluster.apply(run)
    cluster.training(name)
    store = store_of(cluster, name)

    def steps() -> list[int]:
        return [int(key.partition("/")[0].removeprefix("step-")) for key in keys(store, MANIFEST_NAME)]

    cluster.wait_until(lambda: max(steps(), default=0) > 80 and len(steps()) <= 4)
    best, *others = cluster.status(name).scores
    assert best.value > max((each.value for each in others), default=-1000.0)
    assert best.value >= -20  # a busy machine skips saves
    assert best.step in steps()
    assert best.step not in sorted(steps())[-2:]
    cluster.delete(name)
