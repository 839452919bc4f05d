"""`mend local` from the command line: up, status, down, and what becomes of it when it is killed or interrupted."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from mend_local.certificates import credentials
from mend_local.client import Api
from mend_local.cluster import Places, api_port, cluster_id
from mend_local.daemon import find_daemon, stop_daemon
from mend_local.processes import is_running, owned_by
from pod_host import a_pod, shell

PODS = "/api/v1/namespaces/default/pods"


def mend_local(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "mend_local", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Places]:
    """A state directory whose cluster is ended afterwards, whatever the test did."""
    places = Places(root=tmp_path / "state")
    yield places
    if places.root.exists():
        stop_daemon(places)


def wait_for(true: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)


async def start_pod(places: Places) -> None:
    """A pod that runs and forks."""
    known = credentials(places.api)
    async with Api(f"https://127.0.0.1:{api_port(places)}", known.admin_token, known.client_context()) as api:
        pod = a_pod(shell("sleep 1000 & wait"), name="p")
        del pod["metadata"]["uid"], pod["spec"]["nodeName"]
        await api.create(PODS, pod)
        async for event in api.watch(PODS, "0"):
            if event.type != "BOOKMARK" and (event.object.get("status") or {}).get("phase") == "Running":
                return


def left(places: Places) -> list[int]:
    """Every process of the cluster but its daemon."""
    return [each.identity.pid for each in owned_by(f"{cluster_id(places)}/")]


def test_up_status_down(places: Places) -> None:
    """`up` returns when all is up and says how to use it, `status` shows it, and `down` leaves nothing."""
    state = ["--state-dir", str(places.root)]
    assert mend_local("status", *state).returncode == 3
    up = mend_local("up", *state, "--no-controller")
    assert up.returncode == 0, up.stderr
    assert f"export KUBECONFIG={places.kubeconfig}" in up.stdout
    assert "credentialsSecret mend-local-s3" in up.stdout
    assert yaml.safe_load(places.kubeconfig.read_text())["kind"] == "Config"
    assert places.kubeconfig.stat().st_mode & 0o077 == 0
    asyncio.run(start_pod(places))
    assert mend_local("up", *state, "--no-controller").stdout == f"the cluster of {places.root} already runs\n"
    status = mend_local("status", *state)
    assert status.returncode == 0
    assert "node mend-local-1: Ready" in status.stdout
    assert "pod default/p: Running on mend-local-0" in status.stdout
    assert "object-store: running" in status.stdout
    assert "faults of the API server: none" in status.stdout
    down = mend_local("down", *state)
    assert (down.returncode, down.stdout) == (0, "the cluster is down\n")
    assert left(places) == []
    assert mend_local("down", *state, "--purge").returncode == 0
    assert not places.root.exists()


def test_a_killed_daemon_is_followed_by_a_clean_one(places: Places) -> None:
    """After kill -9 of the daemon, `up` ends what it left, the objects are there, and the pod has failed."""
    state = ["--state-dir", str(places.root)]
    assert mend_local("up", *state, "--no-controller").returncode == 0
    asyncio.run(start_pod(places))
    daemon = find_daemon(places)
    assert daemon is not None
    before = left(places)
    assert len(before) == 3  # two of the pod, one of the object store
    os.kill(daemon.identity.pid, signal.SIGKILL)
    wait_for(lambda: not is_running(daemon.identity), "the daemon is dead")
    assert mend_local("status", *state).returncode == 3
    up = mend_local("up", *state, "--no-controller")
    assert up.returncode == 0, up.stdout + up.stderr
    assert "ended 3 processes that an earlier life of this cluster had left" in up.stdout
    assert not set(before) & set(left(places))
    wait_for(lambda: "pod default/p: Failed" in mend_local("status", *state).stdout, "the pod has failed")
    assert mend_local("down", *state).returncode == 0
    assert left(places) == []


def test_down_after_a_killed_daemon(places: Places) -> None:
    """After kill -9 of the daemon, `down` ends what it left and says so."""
    state = ["--state-dir", str(places.root)]
    assert mend_local("up", *state, "--no-controller", "--object-store", "rclone").returncode == 0
    daemon = find_daemon(places)
    assert daemon is not None
    os.kill(daemon.identity.pid, signal.SIGKILL)
    wait_for(lambda: not is_running(daemon.identity), "the daemon is dead")
    assert mend_local("down", *state).stdout == "the cluster was not running\nended 1 processes that it had left\n"
    assert left(places) == []


def test_interrupted_in_the_foreground(places: Places) -> None:
    """Ctrl-C ends a cluster in the foreground with all its processes, also while it starts."""
    command = [sys.executable, "-m", "mend_local", "up", "--foreground", "--state-dir", str(places.root)]
    for when_up in (True, False):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        last_word = "To end it" if when_up else "API server"
        for line in child.stdout:
            if line.startswith(last_word):
                break
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 0
        child.stdout.close()
        assert left(places) == []
        assert find_daemon(places) is None


def test_two_clusters_in_one_state_directory(places: Places) -> None:
    """A second cluster in the same state directory is refused with the remedy, and harms nothing of the first."""
    state = ["--state-dir", str(places.root), "--no-controller", "--object-store", "none"]
    assert mend_local("up", *state).returncode == 0
    asyncio.run(start_pod(places))
    before = left(places)
    second = mend_local("up", "--foreground", *state)
    assert second.returncode == 1
    assert "end it with `mend local down`, or choose another with --state-dir" in second.stderr
    assert left(places) == before
    assert find_daemon(places) is not None


def test_wrong_arguments_are_explained() -> None:
    """A number of nodes that is none is refused with what is expected."""
    assert "expected a whole number of at least 1" in mend_local("up", "--nodes", "0").stderr
