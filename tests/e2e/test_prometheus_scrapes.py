"""A real Prometheus scrapes the controller while a run is hurt: the incident is in its time series."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import ProxyHandler, build_opener

import pytest
import yaml

from cluster import ControllerProcess, TrainingCluster, training_cluster
from s3 import free_port

pytestmark = pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
TOKEN = "only-prometheus-may-read"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingCluster]:
    """A cluster without a controller."""
    with training_cluster(tmp_path_factory.mktemp("cluster"), with_controller=False) as cluster:
        yield cluster


def test_the_incident_is_in_the_metrics(cluster: TrainingCluster, tmp_path: Path) -> None:
    """Phase, attempts, the incident by kind, its seconds and the steps lost are there for dashboards and alerts."""
    metrics, port = f"127.0.0.1:{free_port()}", free_port()
    (tmp_path / "token").write_text(TOKEN)
    controller = ControllerProcess(cluster, options=("--listen", metrics, "--token-file", str(tmp_path / "token")))
    controller.start()
    prometheus = subprocess.Popen(_prometheus(tmp_path, metrics, port), stderr=(tmp_path / "log").open("wb"))
    try:
        name = cluster.apply(cluster.run("measured"))
        cluster.training(name)
        cluster.injure(name, 1, signal.SIGKILL)
        cluster.recovered(name)
        cluster.training(name, attempt=2)

        def value(query: str) -> float:
            return cluster.api.eventually(lambda: _ask(port, query), f"{query}\n{(tmp_path / 'log').read_text()}")

        mine = f'namespace="default",run="{name}"'
        assert value(f'mend_run_phase{{{mine},phase="Running"}} == 1') == 1
        assert value(f"mend_run_attempt{{{mine}}} == 2") == 2
        assert value(f'mend_incidents_total{{{mine},kind="crashed"}} >= 1') == 1
        assert value('sum(mend_recovery_seconds_count{kind="crashed"}) >= 1') == 1
        assert value(f"mend_run_step{{{mine}}} > 12") > 12
        assert value(f"count(mend_rank_progress_age_seconds{{{mine}}}) == 2") == 2
        assert value('up{job="mend"} == 1') == 1
        cluster.delete(name)
        gone = f"absent(mend_run_step{{{mine}}})"
        assert value(gone) == 1, "the series of a run that was deleted end"
    finally:
        prometheus.terminate()
        prometheus.wait(30)
        controller.end(signal.SIGTERM)


def _prometheus(folder: Path, target: str, port: int) -> list[str]:
    job = {
        "job_name": "mend",
        "scrape_interval": "1s",
        "authorization": {"credentials_file": str(folder / "token")},
        "static_configs": [{"targets": [target]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump({"scrape_configs": [job]}))
    return [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]


def _ask(port: int, query: str) -> Any:
    """The value of the only series that a query gives; None if there is none yet, or no Prometheus."""
    direct = build_opener(ProxyHandler({}))
    try:
        with direct.open(f"http://127.0.0.1:{port}/api/v1/query?{urlencode({'query': query})}", timeout=10) as answer:
            found = json.load(answer)["data"]["result"]
    except OSError:
        return None
    assert len(found) <= 1, found
    return float(found[0]["value"][1]) if found else None
