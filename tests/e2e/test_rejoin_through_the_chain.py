"""A rank is lost and the others stay, from the fault in a real pod to the status."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from cluster import TrainingCluster, training_cluster
from mend.incidents import IncidentKind, IncidentRecord, Origin, Tier

NAME = "staying"
TRAINER = ["python", "-m", "mend_trainer.train", "--set", "steps=1000000", "--set", "micro_batch=2"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingCluster]:
    """A cluster with one run of the reference trainer, four ranks in two pods."""
    with training_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        run = cluster.run(NAME, workers=2, ranks=2, env={"MEND_PRELOAD": "mend_trainer.train"})
        container = run["spec"]["workers"]["template"]["spec"]["containers"][0]
        container["command"] = [*TRAINER, "--set", f"data.cache={cluster.folder}/data"]
        cluster.apply(run)
        yield cluster


def after(cluster: TrainingCluster, before: int) -> IncidentRecord:
    """The incident after `before` earlier ones, once the run is back from it."""
    status = cluster.recovered(NAME, before + 1)
    assert len(status.incidents) == before + 1, status.incidents
    return status.incidents[-1]


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGKILL, IncidentKind.CRASHED), (signal.SIGSTOP, IncidentKind.HUNG)]
)
def test_the_others_keep_their_processes(cluster: TrainingCluster, number: int, kind: IncidentKind) -> None:
    """Only the culprit's process is another afterwards; at most the step that was broken off is done again."""
    sight = cluster.training(NAME, attempt=cluster.status(NAME).attempt or 1)
    before = {rank.rank: rank.pid for rank in sight.ranks}
    pods = {each["metadata"]["uid"] for each in cluster.pods(NAME)}
    cluster.injure(NAME, 2, number)
    incident = after(cluster, len(sight.status.incidents))
    assert (incident.kind, incident.culprit_ranks, incident.tier) == (kind, (2,), Tier.REJOIN)
    assert incident.origin is Origin.RANKS
    assert incident.steps_lost is not None
    assert incident.steps_lost <= 1
    now = cluster.pids(NAME)
    assert {rank for rank in before if before[rank] == now[rank]} == {0, 1, 3}
    assert {each["metadata"]["uid"] for each in cluster.pods(NAME)} == pods
    cluster.training(NAME, attempt=incident.attempt + 1)


def test_a_checkpoint_after_a_rejoin_is_on_the_line(cluster: TrainingCluster) -> None:
    """What is saved after a rejoin is restored by the next attempt, which has to start all ranks anew."""
    sight = cluster.training(NAME)
    attempt = sight.status.attempt
    cluster.until(
        NAME, lambda status: status.checkpoint is not None and status.checkpoint.attempt == attempt, "it has saved"
    )
    cluster.patch(NAME, recovery={"firstTier": "restart-ranks"})
    cluster.injure(NAME, 1, signal.SIGKILL)
    incident = after(cluster, len(sight.status.incidents))
    assert incident.tier is Tier.RESTART_RANKS
    assert incident.origin is not Origin.RANKS
    status = cluster.status(NAME)
    assert status.restored_step is not None
    assert status.restored_step > 0
    assert status.lineage[-1].attempt == attempt
