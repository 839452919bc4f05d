"""The controller's HTTP endpoint over a real socket: what is open, what is locked, and that Prometheus can read it."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from mend.metrics import Metrics, WatchFigures
from mend.observation import Observation
from mend.serve import application, serving, token_file
from mend.status import RunPhase, RunStatus


@asynccontextmanager
async def an_endpoint(token: str = "s3cret", ready: list[str] | None = None) -> AsyncIterator[str]:
    """A controller's endpoint with one run and one watch; gives its base URL."""
    registry = CollectorRegistry()
    metrics = Metrics(registry, clock=lambda: 100.0)
    status = RunStatus(phase=RunPhase.RUNNING, attempt=2, step=41)
    seen = Observation(name="clio", namespace="ml", uid="u", generation=1, created_at=0, status=RunStatus())
    metrics.record(seen, status, now=99.0)
    metrics.follow_watch("pods", lambda: WatchFigures(silent_seconds=1.5, relists=2, errors=3))
    metrics.follow_queue(lambda: 4)
    metrics.follow_strikes(lambda: {"node-1": 2})
    metrics.looked(0.02, waited_seconds=0.001)
    metrics.looked(0.02, waited_seconds=0.001, error=TimeoutError("slow"))

    async def page(request: web.Request) -> web.Response:
        return web.Response(text="page")

    trouble = ready or []
    app = application(
        registry, lambda: token, unready=lambda: ", ".join(trouble), routes=[web.get("/runs/{name}", page)]
    )
    async with serving(app, "127.0.0.1", 0) as (host, port):
        yield f"http://{host}:{port}"


async def fetched(url: str, token: str = "") -> tuple[int, str]:
    """Status and body of a GET."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as answer:
        return answer.status, await answer.text()


async def test_a_scrape_gives_the_runs_and_the_controllers_own_health() -> None:
    """The text parses, and holds runs, queue, looks, errors and watches."""
    async with an_endpoint() as base:
        status, body = await fetched(f"{base}/metrics", "s3cret")
    assert status == 200
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(body)
        for sample in family.samples
    }
    assert samples["mend_run_step", "clio", "ml"] == 41
    assert samples["mend_queue_depth",] == 4
    assert samples["mend_reconcile_seconds_count",] == 2
    assert samples["mend_reconcile_errors_total", "TimeoutError"] == 1
    assert samples["mend_watch_age_seconds", "pods"] == 1.5
    assert samples["mend_watch_relists_total", "pods"] == 2
    assert samples["mend_node_strikes", "node-1"] == 2


@pytest.mark.parametrize("path", ["/metrics", "/runs/clio", "/nothing-here"])
@pytest.mark.parametrize("token", ["", "wrong", "s3cre"])
async def test_everything_but_health_is_behind_the_token(path: str, token: str) -> None:
    """Without the token, nobody learns even which paths there are."""
    async with an_endpoint() as base:
        status, body = await fetched(base + path, token)
    assert status == 401
    assert "Bearer" in body


async def test_routes_of_others_are_served_with_the_token() -> None:
    """The run page hangs on the same endpoint and the same lock."""
    async with an_endpoint() as base:
        assert await fetched(f"{base}/runs/clio", "s3cret") == (200, "page")


async def test_an_endpoint_without_a_token_stays_shut() -> None:
    """A token that was never mounted locks the door instead of opening it."""
    async with an_endpoint(token="") as base:
        status, body = await fetched(f"{base}/metrics", "")
        assert await fetched(f"{base}/healthz") == (200, "ok\n")
    assert status == 401
    assert "started without one" in body


async def test_readiness_says_what_is_missing() -> None:
    """kubectl describe shows the reason, not only a failed probe."""
    waiting = ["the first list of pods"]
    async with an_endpoint(ready=waiting) as base:
        assert await fetched(f"{base}/readyz") == (503, "the first list of pods\n")
        waiting.clear()
        assert await fetched(f"{base}/readyz") == (200, "ok\n")


def test_the_token_file_is_read_anew_and_may_be_missing(tmp_path: Path) -> None:
    """A rotated Secret counts at once; a missing or unreadable file is no token."""
    path = tmp_path / "token"
    read = token_file(path)
    assert read() == ""
    path.write_text("one\n")
    assert read() == "one"
    path.write_text("two\n")
    assert read() == "two"
    path.write_bytes(b"\xff\xfe")
    assert read() == ""


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian package prometheus)")
async def test_promtool_finds_nothing_to_improve() -> None:
    """Names, units and help texts follow Prometheus' own rules."""
    async with an_endpoint() as base:
        _, body = await fetched(f"{base}/metrics", "s3cret")
    checked = await asyncio.to_thread(
        subprocess.run, ["promtool", "check", "metrics"], input=body.encode(), capture_output=True, check=False
    )
    assert checked.returncode == 0, checked.stdout.decode() + checked.stderr.decode()


PROMETHEUS = """
global: {scrape_interval: 200ms, scrape_timeout: 200ms}
scrape_configs:
  - job_name: mend
    authorization: {credentials_file: token}
    static_configs: [{targets: ["TARGET"]}]
"""


@pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed (Debian package prometheus)"
)
async def test_a_real_prometheus_scrapes_it(tmp_path: Path) -> None:
    """A Prometheus that is given the token finds the run; this is the configuration that the manifests make."""
    async with an_endpoint() as base:
        (tmp_path / "token").write_text("s3cret")
        config = tmp_path / "prometheus.yml"
        config.write_text(PROMETHEUS.replace("TARGET", base.removeprefix("http://")))
        port = await free_port()
        server = await asyncio.create_subprocess_exec(
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=error",
        )
        try:
            async with asyncio.timeout(90):
                found = await until_found(f"http://127.0.0.1:{port}/api/v1/query?query=mend_run_step")
        finally:
            server.kill()
            await server.wait()
    assert found["metric"]["run"] == "clio"
    assert found["value"][1] == "41"


async def until_found(url: str) -> dict[str, dict[str, str]]:
    """The first series that a query of Prometheus gives, asked until there is one."""
    async with aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(url) as answer:
                    if answer.status != 503:  # said in words that are no JSON: it listens before it is ready
                        body = await answer.json(content_type=None)
                        if answer.status == 200 and body["data"]["result"]:
                            return dict(body["data"]["result"][0])
            except aiohttp.ClientConnectionError:
                pass  # it is starting
            await asyncio.sleep(0.1)


async def free_port() -> int:
    """A port that was free a moment ago; Prometheus cannot be asked to choose one and tell."""
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port: int = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    return port
