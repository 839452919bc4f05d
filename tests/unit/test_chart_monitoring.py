"""Dashboard and alerts ask only for what the controller exports, and the alerts fire when they should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from mend.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "charts/mend/files"
PROMTOOL_TESTS = ROOT / "tests/alerts.promtool.yaml"


def exported() -> set[str]:
    """Every series name that the controller can export."""
    registry = CollectorRegistry()
    Metrics(registry, clock=lambda: 0.0)
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    return {family.name + suffix for family in registry.collect() for suffix in suffixes.get(family.type, ("",))}


def alerts() -> list[dict[str, Any]]:
    """All rules."""
    groups = yaml.safe_load((FILES / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard_queries() -> Iterator[tuple[str, str]]:
    """Panel titles with their queries, and the queries of variables and annotations."""
    board = json.loads((FILES / "dashboard.json").read_text())
    for panel in board["panels"]:
        yield from ((panel["title"], target["expr"]) for target in panel["targets"])
    for variable in board["templating"]["list"]:
        query = variable["query"]
        yield variable["name"], query["query"] if isinstance(query, dict) else ""
    yield from ((each["name"], each["expr"]) for each in board["annotations"]["list"])


def names_in(query: str) -> set[str]:
    """Metric names in a query."""
    return set(re.findall(r"\bmend_\w+", query))


def test_the_dashboard_asks_only_for_what_is_exported() -> None:
    """A renamed metric would leave a panel empty, and nobody looks at an empty panel until it is needed."""
    unknown = {title: names_in(query) - exported() for title, query in dashboard_queries()}
    assert {title: names for title, names in unknown.items() if names} == {}


def test_the_alerts_ask_only_for_what_is_exported() -> None:
    """A renamed metric would silence an alert for ever."""
    unknown = {rule["alert"]: names_in(rule["expr"]) - exported() for rule in alerts()}
    assert {name: names for name, names in unknown.items() if names} == {}


def test_every_metric_is_looked_at() -> None:
    """Nothing is exported that neither a panel nor an alert shows (loss of tokens apart: totals are for queries)."""
    queries = " ".join([*(query for _, query in dashboard_queries()), *(rule["expr"] for rule in alerts())])
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported()}
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in names_in(queries)}
    for_queries = {
        "mend_attempts_total",
        "mend_checkpoint_size_bytes",
        "mend_rank_step",
        "mend_run_recoveries",
        "mend_run_tokens",
    }
    assert families - shown == for_queries


def test_every_alert_has_a_severity_a_sentence_and_a_page_to_turn_to() -> None:
    """Who is paged at three in the morning is told what it means and what to do."""
    runbook = (ROOT / "docs/runbook.md").read_text()
    sections = {f"docs/runbook.md#{title.lower()}" for title in re.findall(r"^#+ (Mend\w+)$", runbook, re.M)}
    for rule in alerts():
        assert rule["labels"]["severity"] in {"critical", "warning"}, rule["alert"]
        assert rule["annotations"]["summary"], rule["alert"]
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{rule['alert'].lower()}"
    assert {rule["annotations"]["runbook"] for rule in alerts()} == sections


def test_every_alert_is_tested() -> None:
    """No rule is shipped that was never seen to fire."""
    tests = yaml.safe_load(PROMTOOL_TESTS.read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert fired == {rule["alert"] for rule in alerts()}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian package prometheus)")
def test_the_alerts_fire_on_trouble_and_stay_silent_on_its_healthy_twin(tmp_path: Path) -> None:
    """promtool runs the rules that are shipped over invented series."""
    for path in (FILES / "alerts.yaml", PROMTOOL_TESTS):
        shutil.copy(path, tmp_path)
    command = ["promtool", "test", "rules", PROMTOOL_TESTS.name]
    tested = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert tested.returncode == 0, tested.stdout + tested.stderr
