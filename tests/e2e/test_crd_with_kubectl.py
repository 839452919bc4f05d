"""What somebody with kubectl sees of a TrainingRun: columns, explanations, and refusals that name the field."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from api_thread import served_in_a_thread
from cluster_client import Cluster, Kubectl
from crds import CRD_PATH, ROOT, sample

pytestmark = [
    pytest.mark.needs_kubectl,
    pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed"),
]
RUNS = "/apis/mend.dev/v1alpha1/namespaces/default/trainingruns"


@pytest.fixture(scope="module")
def kubeconfig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of a laptop-sized API server with nothing in it."""
    state = tmp_path_factory.mktemp("api")
    with served_in_a_thread(state) as server:
        yield server.write_kubeconfig(state / "kubeconfig")


@pytest.fixture(scope="module")
def kubectl(kubeconfig: Path, tmp_path_factory: pytest.TempPathFactory) -> Kubectl:
    """A real kubectl for it, with mend's API made known by `kubectl apply`."""
    program = shutil.which("kubectl")
    assert program
    kubectl = Kubectl(program, kubeconfig, "default", tmp_path_factory.mktemp("home"))
    kubectl("apply", "-f", str(CRD_PATH))
    kubectl("wait", "--for=condition=Established", "crd/trainingruns.mend.dev", "--timeout=60s")
    return kubectl


def named(name: str) -> dict[str, Any]:
    """The sample under another name."""
    run = sample()
    run["metadata"] = {"name": name}
    return run


def test_the_columns_answer_what_is_asked_first(kubectl: Kubectl, kubeconfig: Path) -> None:
    """`kubectl get trun` shows where a run is; -o wide shows the last incident too."""
    kubectl("apply", "-f", "-", given=named("columns"))
    status = {
        "phase": "Running",
        "step": 41,
        "attempt": 3,
        "recoveries": 2,
        "checkpoint": {"step": 40, "attempt": 3, "uri": "s3://b/x", "committedAt": "2026-01-01T00:00:00.000000Z"},
        "ledger": {"goodput": 0.91},
        "workers": {"ready": 4},
        "loss": 2.5,
        "incidents": [an_incident(1, "crashed"), an_incident(2, "hung")],
    }
    with Cluster(kubeconfig) as cluster:
        cluster.patch(f"{RUNS}/columns/status", {"status": status})
    header, line = kubectl("get", "trun", "columns", "-o", "wide").splitlines()
    shown = dict(zip(header.split(), line.split(), strict=True))
    assert shown.pop("AGE")
    assert shown == {
        "NAME": "columns",
        "PHASE": "Running",
        "STEP": "41",
        "ATTEMPT": "3",
        "RECOVERIES": "2",
        "CHECKPOINT": "40",
        "GOODPUT": "0.91",
        "WORKERS": "4",
        "LOSS": "2.5",
        "INCIDENT": "hung",
    }
    assert "columns" in kubectl("get", "all")


def an_incident(number: int, kind: str) -> dict[str, Any]:
    """An incident as it is in a status."""
    times = dict.fromkeys(("beganAt", "detectedAt"), "2026-01-01T00:00:00.000000Z")
    return {"id": number, "kind": kind, "failure": "hang", "attempt": number, "step": 1, **times}


def test_defaults_are_shown(kubectl: Kubectl) -> None:
    """What mend will do is there to be read in the object, not only in the documents."""
    kubectl("apply", "-f", "-", given=named("defaults"))
    spec = yaml.safe_load(kubectl("get", "trun", "defaults", "-o", "yaml"))["spec"]
    assert spec["checkpoint"]["interval"] == "10m"
    assert spec["health"]["limits"]["floor"] == "150ms"
    assert spec["recovery"]["budgets"]["user"] == 3


def test_a_misspelt_field_is_refused(kubectl: Kubectl) -> None:
    """kubectl asks for strict validation, so that a typo does not silently mean the default."""
    run = named("typo")
    run["spec"]["checkpoint"]["intervall"] = "5m"
    assert "intervall" in kubectl.fails("apply", "-f", "-", given=run)


def test_a_bad_value_is_refused_with_its_field(kubectl: Kubectl) -> None:
    """The message names the field and what to do; nothing is made."""
    run = named("bad")
    run["spec"]["workers"]["minReplicas"] = 9
    said = kubectl.fails("apply", "-f", "-", given=run)
    assert "spec.workers" in said
    assert "minReplicas must be at most replicas" in said
    assert "NotFound" in kubectl.fails("get", "trun", "bad")


def test_a_run_cannot_be_cut_off_from_its_checkpoints(kubectl: Kubectl) -> None:
    """Another uri is refused with the way out; another number of workers is taken."""
    kubectl("apply", "-f", "-", given=named("moved"))
    merge = ("patch", "trun", "moved", "--type", "merge", "-p")
    assert "make a new TrainingRun instead" in kubectl.fails(*merge, '{"spec":{"checkpoint":{"uri":"s3://bucket/b"}}}')
    kubectl(*merge, '{"spec":{"workers":{"replicas":2}}}')


def test_every_field_is_explained(kubectl: Kubectl) -> None:
    """`kubectl explain` tells what a field is for."""
    assert "belongs to this run alone" in " ".join(kubectl("explain", "trainingrun.spec.checkpoint.uri").split())


def test_the_rights_in_the_manifests_are_accepted(kubectl: Kubectl) -> None:
    """Roles and bindings apply as they are, and applying them again changes nothing."""
    kubectl("apply", "-f", str(ROOT / "manifests/namespace.yaml"))
    rights = ("apply", "--namespace=mend-system", "-f", str(ROOT / "manifests/rbac.yaml"))
    kubectl(*rights)
    assert {line.rsplit(" ", 1)[1] for line in kubectl(*rights).splitlines()} == {"unchanged"}
