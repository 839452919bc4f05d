"""What mend relies on of Kubernetes, asked of the laptop-sized one, or with `--kubeconfig FILE` of any cluster.

Everything happens in a namespace and an API group of its own, which are removed at the end.
Passing on the laptop-sized Kubernetes shows nothing about Kubernetes: run it against your cluster, too.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from api_thread import in_a_thread
from cluster_client import Cluster, Kubectl, Namespaced, a_definition
from mend_local.cluster import ClusterSettings, LocalCluster
from mend_local.objectstore import StoreKind


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--kubeconfig FILE` names another cluster than the one that the tests start."""
    parser.addoption("--kubeconfig", help="run against this cluster instead of the laptop-sized one")


@pytest.fixture(scope="session")
def kubeconfig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of the cluster that is asked."""
    given = request.config.getoption("--kubeconfig", default=None)
    if given:
        yield Path(given).resolve()
        return
    settings = ClusterSettings(with_controller=False, object_store=StoreKind.NONE)
    with in_a_thread(lambda: LocalCluster(tmp_path_factory.mktemp("conformance"), settings)) as local:
        yield local.kubeconfig


@pytest.fixture(scope="session")
def cluster(kubeconfig: Path) -> Iterator[Cluster]:
    """The cluster, through the official client's transport."""
    with Cluster(kubeconfig) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace that is ours alone."""
    name = f"mend-conformance-{secrets.token_hex(4)}"
    cluster.create("/api/v1/namespaces", {"metadata": {"name": name}})
    yield name
    cluster.delete(f"/api/v1/namespaces/{name}")


@pytest.fixture(scope="session")
def here(cluster: Cluster, namespace: str) -> Namespaced:
    """Paths inside our namespace."""
    return Namespaced(namespace)


@pytest.fixture(scope="session")
def group(cluster: Cluster) -> Iterator[str]:
    """An API group of ours that serves `trips` (short name `trp<random>`), see `cluster_client.a_definition`."""
    group = f"g{secrets.token_hex(4)}.conformance.mend.dev"
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    cluster.create(path, a_definition(group))
    cluster.eventually_condition(f"{path}/trips.{group}", "Established")
    cluster.eventually(lambda: cluster.call("GET", f"/apis/{group}/v1")[0] == 200, f"{group} is served")
    yield group
    cluster.delete(f"{path}/trips.{group}")


@pytest.fixture(scope="session")
def kubectl(kubeconfig: Path, namespace: str, tmp_path_factory: pytest.TempPathFactory) -> Kubectl:
    """A real kubectl ($KUBECTL, or the one on the PATH) in our namespace."""
    program = os.environ.get("KUBECTL") or shutil.which("kubectl")
    if not program:
        pytest.skip("no kubectl found: put one on the PATH or name it in $KUBECTL")
    return Kubectl(program, kubeconfig, namespace, tmp_path_factory.mktemp("kubectl-home"))
