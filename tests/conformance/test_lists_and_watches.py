"""Lists and watches: what a reflector builds on."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest

from cluster_client import Cluster, Namespaced, a_configmap, a_name, a_pod

Json = dict[str, Any]


def names(listed: Json) -> list[str]:
    """Names of the items of a list."""
    return [item["metadata"]["name"] for item in listed["items"]]


def told(events: list[Json]) -> list[tuple[str, str]]:
    """Types and names of watch events."""
    return [(event["type"], event["object"]["metadata"]["name"]) for event in events]


@pytest.fixture(scope="module")
def batch(cluster: Cluster, here: Namespaced) -> str:
    """The label of five configmaps: n=0..4, the even ones with even=yes."""
    label = a_name("batch")
    for n in range(5):
        labels = {"batch": label, "n": str(n), **({"even": "yes"} if n % 2 == 0 else {})}
        cluster.create(here.core("configmaps"), a_configmap(f"{label}-{n}", labels))
    return label


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("even=yes", [0, 2, 4]),
        ("even==yes,n!=2", [0, 4]),
        ("even", [0, 2, 4]),
        ("!even", [1, 3]),
        ("n in (1, 2)", [1, 2]),
        ("n notin (1,2),even", [0, 4]),
        ("even!=yes", [1, 3]),
    ],
)
def test_label_selectors(cluster: Cluster, here: Namespaced, batch: str, selector: str, expected: list[int]) -> None:
    """Labels select by equality, by sets and by existence."""
    listed = cluster.get(here.core("configmaps"), labelSelector=f"batch={batch},{selector}")
    assert names(listed) == [f"{batch}-{n}" for n in expected]


def test_field_selectors(cluster: Cluster, here: Namespaced, batch: str) -> None:
    """Every object can be selected by name, pods by phase and node, and unknown fields are refused."""
    assert names(cluster.get(here.core("configmaps"), fieldSelector=f"metadata.name={batch}-3")) == [f"{batch}-3"]
    name = a_name("pod")
    cluster.create(here.core("pods"), a_pod(name))
    for selector, expected in (
        (f"metadata.name={name},status.phase=Pending", [name]),
        (f"metadata.name={name},status.phase!=Pending", []),
        (f"metadata.name={name},spec.nodeName=", [name]),
        (f"metadata.name={name},spec.nodeName=elsewhere", []),
    ):
        assert names(cluster.get(here.core("pods"), fieldSelector=selector)) == expected
    cluster.refused(400, "BadRequest", "GET", here.core("pods"), fieldSelector="spec.nonsense=1")
    cluster.delete(here.core("pods", name), gracePeriodSeconds="0")


def test_pages_show_one_state(cluster: Cluster, here: Namespaced, batch: str) -> None:
    """The pages of a list fit together, whatever is written between them."""
    query = {"labelSelector": f"batch={batch}", "limit": "2"}
    first = cluster.get(here.core("configmaps"), **query)
    assert len(first["items"]) == 2
    cluster.create(here.core("configmaps"), a_configmap(f"{batch}-3-late", {"batch": batch}))
    second = cluster.get(here.core("configmaps"), **query, **{"continue": first["metadata"]["continue"]})
    third = cluster.get(here.core("configmaps"), **query, **{"continue": second["metadata"]["continue"]})
    assert names(first) + names(second) + names(third) == [f"{batch}-{n}" for n in range(5)]
    assert first["metadata"]["resourceVersion"] == third["metadata"]["resourceVersion"]
    assert not third["metadata"].get("continue")
    cluster.delete(here.core("configmaps", f"{batch}-3-late"))


def test_bad_continue_tokens_are_refused(cluster: Cluster, here: Namespaced) -> None:
    """A continue token that the server did not give is a 400."""
    assert cluster.call("GET", here.core("configmaps"), limit="1", **{"continue": "!nonsense!"})[0] == 400


def test_a_watch_goes_on_where_a_list_ended(cluster: Cluster, here: Namespaced) -> None:
    """From a list's version a watch shows every later change, once and in order, and nothing earlier."""
    name = a_name()
    cluster.create(here.core("configmaps"), a_configmap(a_name()))
    version = cluster.get(here.core("configmaps"))["metadata"]["resourceVersion"]
    created = cluster.create(here.core("configmaps"), a_configmap(name))
    path = here.core("configmaps", name)
    with cluster.watching(here.core("configmaps"), resourceVersion=version) as events:
        assert told(list(islice(events, 1))) == [("ADDED", name)]
        patched = cluster.patch(path, {"data": {"n": "1"}})
        modified = next(events)
        assert modified == {"type": "MODIFIED", "object": patched}
        cluster.delete(path)
        deleted = next(events)
        assert told([deleted]) == [("DELETED", name)]
        assert deleted["object"]["metadata"]["uid"] == created["metadata"]["uid"]
        after = int(deleted["object"]["metadata"]["resourceVersion"])
        assert after > int(patched["metadata"]["resourceVersion"])


def test_a_watch_without_version_begins_with_what_is_there(cluster: Cluster, here: Namespaced, batch: str) -> None:
    """Without a version a watch first shows what exists as ADDED."""
    with cluster.watching(here.core("configmaps"), labelSelector=f"batch={batch},even") as events:
        assert told(list(islice(events, 3))) == [("ADDED", f"{batch}-{n}") for n in (0, 2, 4)]


def test_selected_watches(cluster: Cluster, here: Namespaced) -> None:
    """To a watch with a selector objects appear when they begin to match and vanish when they cease to."""
    name, label = a_name(), a_name("team")
    path = here.core("configmaps", name)
    version = cluster.create(here.core("configmaps"), a_configmap(name))["metadata"]["resourceVersion"]
    query = {"labelSelector": f"team={label}", "resourceVersion": version}
    with cluster.watching(here.core("configmaps"), **query) as events:
        cluster.patch(path, {"metadata": {"labels": {"team": label}}})
        cluster.patch(path, {"data": {"n": "1"}})
        cluster.patch(path, {"metadata": {"labels": {"team": None}}})
        expected = [("ADDED", name), ("MODIFIED", name), ("DELETED", name)]
        assert told(list(islice(events, 3))) == expected


def test_a_watch_ends_in_time_with_a_bookmark(cluster: Cluster, here: Namespaced) -> None:
    """A watch ends after timeoutSeconds; a bookmark on the way tells a version to go on from."""
    version = cluster.get(here.core("services"))["metadata"]["resourceVersion"]
    cluster.create(here.core("configmaps"), a_configmap(a_name()))
    query = {"resourceVersion": version, "allowWatchBookmarks": "true", "timeoutSeconds": "2"}
    with cluster.watching(here.core("services"), **query) as events:
        seen = list(events)
    assert {event["type"] for event in seen} <= {"BOOKMARK"}
    for event in seen:
        assert event["object"]["kind"] == "Service"
        assert int(event["object"]["metadata"]["resourceVersion"]) >= int(version)


def test_watches_of_one_object(cluster: Cluster, here: Namespaced) -> None:
    """A watch can be limited to one name."""
    name = a_name()
    version = cluster.get(here.core("configmaps"))["metadata"]["resourceVersion"]
    query = {"fieldSelector": f"metadata.name={name}", "resourceVersion": version}
    with cluster.watching(here.core("configmaps"), **query) as events:
        cluster.create(here.core("configmaps"), a_configmap(a_name()))
        cluster.create(here.core("configmaps"), a_configmap(name))
        assert told(list(islice(events, 1))) == [("ADDED", name)]


def test_versions_older_than_the_history_are_gone(cluster: Cluster, here: Namespaced) -> None:
    """A watch from a version that is too old gets a 410 Expired, as an answer or as its first event."""
    code, _ = cluster.call("GET", "/mend-local/faults")
    if code != 200:
        pytest.skip("only the laptop-sized Kubernetes forgets its history on command")
    version = cluster.get(here.core("configmaps"))["metadata"]["resourceVersion"]
    cluster.create(here.core("configmaps"), a_configmap(a_name()))
    cluster.call("PUT", "/mend-local/faults", {"forgetHistory": True})
    with cluster.watching(here.core("configmaps"), resourceVersion=version) as events:
        event = next(events)
    assert (event["type"], event["object"]["code"], event["object"]["reason"]) == ("ERROR", 410, "Expired")


def test_tables(cluster: Cluster, here: Namespaced, batch: str) -> None:
    """On demand a list comes as a Table of cells, as kubectl asks for."""
    accept = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"
    _, table = cluster.call("GET", here.core("configmaps"), accept=accept, labelSelector=f"batch={batch},n=1")
    assert table["kind"] == "Table"
    assert [column["name"] for column in table["columnDefinitions"]] == ["Name", "Data", "Age"]
    (row,) = table["rows"]
    assert row["cells"][:2] == [f"{batch}-1", 0]
    assert row["object"]["kind"] == "PartialObjectMetadata"
