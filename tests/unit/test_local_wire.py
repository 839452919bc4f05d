"""What comes and goes over the wire: protobuf bodies, tables, selectors, paths, logs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from api_thread import served_in_a_thread
from cluster_client import Cluster, Namespaced, a_pod
from mend_local import jsonpath, protobuf, tables, targets, times
from mend_local.failures import ApiFailure
from mend_local.protobuf import encode_field as field
from mend_local.resources import BUILT_IN
from mend_local.selectors import by_fields, by_labels

PODS = next(each for each in BUILT_IN if each.qualified == "pods")


def envelope(api_version: str, kind: str, raw: bytes) -> bytes:
    """A message as Kubernetes wraps it."""
    return b"k8s\x00" + field(1, field(1, api_version) + field(2, kind)) + field(2, raw)


def test_protobuf_bodies_become_json() -> None:
    """Strings, maps, lists, bytes, nested messages and numbers are read; what Go left empty and unknown fields go."""
    metadata = field(1, "x") + field(2, "") + field(11, field(1, "a") + field(2, "b")) + field(99, "unknown")
    raw = field(1, metadata) + field(2, field(1, "key") + field(2, b"\x01\x02")) + field(3, "Opaque")
    assert protobuf.decode(envelope("v1", "Secret", raw)) == {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "x", "labels": {"a": "b"}},
        "data": {"key": "AQI="},
        "type": "Opaque",
    }
    grace = b"\x08\x1e" + field(4, "Background")
    options = protobuf.decode(envelope("v1", "DeleteOptions", grace))
    assert options["gracePeriodSeconds"] == 30
    assert options["propagationPolicy"] == "Background"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}",
        envelope("v1", "Pod", b""),
        envelope("v1", "Namespace", b"\x0a\x7f"),
        envelope("v1", "Namespace", b"\xff" * 20),
        envelope("v1", "Namespace", field(1, field(1, b"\xff\xfe"))),
    ],
)
def test_what_is_no_protobuf_is_refused(raw: bytes) -> None:
    """Truncated, foreign or unknown messages are refused, never half read."""
    with pytest.raises(protobuf.Undecodable):
        protobuf.decode(raw)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0, "0s"), (119, "119s"), (120, "2m"), (200, "3m20s"), (3600, "60m"), (4 * 3600, "4h"), (30 * 3600, "30h")),
        *((3 * 86400, "3d"), (3 * 86400 + 7200, "3d2h"), (100 * 86400, "100d"), (-5, "0s")),
    ],
)
def test_ages(seconds: float, text: str) -> None:
    """Ages are shortened as kubectl users know them."""
    assert times.short_age(seconds) == text


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (".a.b", [1]),
        (".missing.b", []),
        (".list[0].n", ["x"]),
        (".list[-1:].n", ["y"]),
        (".list[*].n", ["x", "y"]),
        ('.list[?(@.n=="y")].v', [2]),
        (r".dotted\.name", ["d"]),
        ("['a']['b']", [1]),
        (".list[7]", []),
        (".a[0]", []),
    ],
)
def test_json_paths(path: str, expected: list[Any]) -> None:
    """The JSONPath of printer columns finds what is there and nothing else."""
    value = {"a": {"b": 1}, "list": [{"n": "x", "v": 1}, {"n": "y", "v": 2}], "dotted.name": "d"}
    assert jsonpath.find(value, path) == expected


@pytest.mark.parametrize(
    ("status", "deleting", "word"),
    [
        ({"phase": "Running"}, False, "Running"),
        ({"phase": "Running"}, True, "Terminating"),
        ({"phase": "Failed", "reason": "Evicted"}, False, "Evicted"),
        ({"containerStatuses": [{"state": {"waiting": {"reason": "CrashLoopBackOff"}}}]}, False, "CrashLoopBackOff"),
        ({"containerStatuses": [{"state": {"terminated": {"exitCode": 3}}}]}, False, "ExitCode:3"),
        ({"containerStatuses": [{"state": {"terminated": {"exitCode": 137, "signal": 9}}}]}, False, "Signal:9"),
        ({}, False, "Unknown"),
    ],
)
def test_pod_status_words(status: dict[str, Any], deleting: bool, word: str) -> None:
    """The STATUS of a pod is the most telling of deletion, container states, reason and phase."""
    metadata = {"name": "x", "creationTimestamp": times.timestamp()}
    if deleting:
        metadata["deletionTimestamp"] = times.timestamp()
    table = tables.table(PODS, [{"metadata": metadata, "spec": {}, "status": status}], {}, "None")
    assert table["rows"] == [{"cells": table["rows"][0]["cells"]}]
    assert table["rows"][0]["cells"][2] == word


@pytest.mark.parametrize("selector", ["a in", "a=b=c", "a in (b", "=", "a,,b", "(a)"])
def test_bad_label_selectors(selector: str) -> None:
    """A selector that cannot be read is a 400, not an empty or a full list."""
    with pytest.raises(ApiFailure) as refused:
        by_labels(selector)
    assert refused.value.code == 400


def test_escaped_field_selectors() -> None:
    """Commas and backslashes in the value of a field selector are escaped with a backslash."""
    taken = by_fields(r"reason=a\,b\\c,type!=Normal", "events", "Event")
    assert taken is not None
    assert taken({"metadata": {}, "reason": "a,b\\c", "type": "Warning"})
    assert not taken({"metadata": {}, "reason": "a,b\\c", "type": "Normal"})


@pytest.mark.parametrize(
    ("method", "path", "query", "expected"),
    [
        ("GET", "/api/v1/namespaces/n/pods/p/log", {}, ("get", "", "n", "pods", "p", "log")),
        ("GET", "/api/v1/namespaces/n", {}, ("get", "", "", "namespaces", "n", "")),
        ("PUT", "/api/v1/namespaces/n/status", {}, ("update", "", "", "namespaces", "n", "status")),
        ("GET", "/apis/g/v1/things", {"watch": "1"}, ("watch", "g", "", "things", "", "")),
        ("GET", "/apis/g/v1/things", {"fieldSelector": "metadata.name=x"}, ("list", "g", "", "things", "x", "")),
        ("DELETE", "/apis/g/v1/namespaces/n/things", {}, ("deletecollection", "g", "n", "things", "", "")),
        ("PATCH", "/apis/g/v1/namespaces/n/things/t", {}, ("patch", "g", "n", "things", "t", "")),
        ("GET", "/apis/g/v1", {}, ("get", "", "", "", "", "")),
    ],
)
def test_paths(method: str, path: str, query: dict[str, str], expected: tuple[str, ...]) -> None:
    """A request is taken apart into verb, group, namespace, resource, name and subresource."""
    found = targets.parse(method, path, query)
    assert (found.verb, found.group, found.namespace, found.plural, found.name, found.subresource) == expected


class TwoLines:
    """A log source that remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def read(self, namespace: str, name: str, container: str, **options: Any) -> AsyncIterator[bytes]:
        """Two chunks, or nothing to be had from containers called 'waiting'."""
        self.asked.append((name, container, options))
        if container == "waiting":
            raise LookupError("container waiting has not started")
        yield b"one\n"
        yield b"two\n"


def test_logs_come_from_their_source(tmp_path: Path) -> None:
    """The log subresource streams what the source reads, with the options asked for, and tells why there is none."""
    source = TwoLines()
    with served_in_a_thread(tmp_path, logs=source) as server:
        here = Namespaced("default")
        with Cluster(server.write_kubeconfig(tmp_path / "kubeconfig")) as cluster:
            two = [{"name": "main", "image": "a"}, {"name": "waiting", "image": "a"}]
            cluster.create(here.core("pods"), a_pod("one"))
            cluster.create(here.core("pods"), a_pod("two", containers=two))
            log = here.core("pods", "one", "log")
            assert cluster.call("GET", log, follow="true", tailLines="5", limitBytes="9") == (200, "one\ntwo\n")
            options = {"follow": True, "tail_lines": 5, "limit_bytes": 9, "previous": False}
            assert source.asked == [("one", "main", options)]
            other = here.core("pods", "two", "log")
            status = cluster.refused(400, "BadRequest", "GET", other)
            assert "choose one of: [main waiting]" in status["message"]
            status = cluster.refused(400, "BadRequest", "GET", other, container="waiting")
            assert status["message"] == "container waiting has not started"
            cluster.refused(400, "BadRequest", "GET", other, container="nobody")
            cluster.refused(404, "NotFound", "GET", here.core("pods", "three", "log"))
