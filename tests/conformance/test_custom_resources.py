"""Custom resources: schemas, defaults, rules, status and columns."""

from __future__ import annotations

from typing import Any

import pytest

from cluster_client import MERGE, Cluster, Namespaced, a_name, a_trip

Json = dict[str, Any]


@pytest.fixture(scope="module")
def trips(here: Namespaced, group: str) -> str:
    """The path of our custom resources."""
    return here.of(f"{group}/v1", "trips")


def test_defaults_are_filled_in(cluster: Cluster, trips: str, group: str) -> None:
    """What the spec leaves out is filled with the schema's defaults, also inside objects, and generation is 1."""
    created = cluster.create(trips, a_trip(group, a_name("trip")))
    assert created["spec"] == {"seats": 4, "paused": False, "via": "land", "limits": {"speed": 50}}
    assert created["metadata"]["generation"] == 1


def test_unknown_fields_are_pruned(cluster: Cluster, trips: str, group: str) -> None:
    """Fields that the schema does not know are dropped, except where it keeps them."""
    spec: Json = {"wheels": 4, "luggage": {"bag": {"n": 1}}, "notes": {"any": "text"}, "stops": [{"name": "a", "x": 1}]}
    created = cluster.create(trips, a_trip(group, a_name("trip"), **spec), fieldValidation="Ignore")
    assert "wheels" not in created["spec"]
    assert created["spec"]["luggage"] == {"bag": {"n": 1}}
    assert created["spec"]["notes"] == {"any": "text"}
    assert created["spec"]["stops"] == [{"name": "a"}]


def test_strict_field_validation_refuses_unknown_fields(cluster: Cluster, trips: str, group: str) -> None:
    """With fieldValidation=Strict an unknown field is a 400 that names it."""
    body = a_trip(group, a_name("trip"), wheels=4)
    status = cluster.refused(400, "BadRequest", "POST", trips, body, fieldValidation="Strict")
    assert 'strict decoding error: unknown field "spec.wheels"' in status["message"]


@pytest.mark.parametrize(
    ("spec", "field", "words"),
    [
        ({"seats": 0}, "spec.seats", "should be greater than or equal to 1"),
        ({"seats": 101}, "spec.seats", "should be less than or equal to 100"),
        ({"seats": "many"}, "spec.seats", "must be of type integer"),
        ({"via": "air"}, "spec.via", 'supported values: "land", "sea"'),
        ({"ticket": "abc"}, "spec.ticket", "should match"),
        ({"stops": [{"name": "a"}, {}]}, "spec.stops[1].name", "Required value"),
        ({"notes": {"n": 1}}, "spec.notes.n", "must be of type string"),
        ({"taken": 5}, "spec", "taken must be at most seats"),
    ],
)
def test_bad_values_are_named(cluster: Cluster, trips: str, group: str, spec: Json, field: str, words: str) -> None:
    """A value that breaks the schema or a rule is a 422 Invalid whose cause names the field and what is expected."""
    name = a_name("trip")
    status = cluster.refused(422, "Invalid", "POST", trips, a_trip(group, name, **spec))
    causes = {cause["field"]: cause["message"] for cause in status["details"]["causes"]}
    assert words in causes[field], causes
    assert status["message"].startswith(f'Trip.{group} "{name}" is invalid: ')


def test_required_fields(cluster: Cluster, trips: str, group: str) -> None:
    """A missing required field is named, too."""
    body = a_trip(group, a_name("trip"))
    del body["spec"]["seats"]
    status = cluster.refused(422, "Invalid", "POST", trips, body)
    assert ("FieldValueRequired", "spec.seats") in [
        (cause["reason"], cause["field"]) for cause in status["details"]["causes"]
    ]


def test_transition_rules(cluster: Cluster, trips: str, group: str) -> None:
    """A rule over oldSelf lets a field be set at creation and then refuses to change it."""
    name = a_name("trip")
    cluster.create(trips, a_trip(group, name, ticket="ABC"))
    patch = {"spec": {"ticket": "XYZ"}}
    status = cluster.refused(422, "Invalid", "PATCH", f"{trips}/{name}", patch, content_type=MERGE)
    assert "ticket cannot be changed" in status["message"]
    cluster.patch(f"{trips}/{name}", {"spec": {"seats": 9}})


def test_generation_counts_changes_of_the_spec(cluster: Cluster, trips: str, group: str) -> None:
    """The generation grows with the spec, not with labels or status."""
    path = f"{trips}/{cluster.create(trips, a_trip(group, a_name('trip')))['metadata']['name']}"
    assert cluster.patch(path, {"metadata": {"labels": {"a": "b"}}})["metadata"]["generation"] == 1
    assert cluster.patch(f"{path}/status", {"status": {"step": 1}})["metadata"]["generation"] == 1
    assert cluster.patch(path, {"spec": {"seats": 5}})["metadata"]["generation"] == 2
    assert cluster.patch(path, {"spec": {"seats": 5}})["metadata"]["generation"] == 2


def test_status_is_isolated(cluster: Cluster, trips: str, group: str) -> None:
    """The resource's own path never writes status, and the status path nothing else."""
    name = a_name("trip")
    created = cluster.create(trips, {**a_trip(group, name), "status": {"phase": "Forged"}})
    assert "status" not in created
    path = f"{trips}/{name}"
    patch = {"status": {"phase": "Moving", "nonsense": 1}, "spec": {"seats": 7}, "metadata": {"labels": {"a": "b"}}}
    written = cluster.patch(f"{path}/status", patch)
    assert written["status"] == {"phase": "Moving"}
    assert written["spec"]["seats"] == 4
    assert "labels" not in written["metadata"]
    kept = cluster.replace(path, {**written, "status": {"phase": "Forged"}})
    assert kept["status"] == {"phase": "Moving"}
    replaced = cluster.replace(f"{path}/status", {**kept, "status": {"step": 3}, "spec": {"seats": 1}})
    assert replaced["status"] == {"step": 3}
    assert replaced["spec"]["seats"] == 4


def test_stale_status_writes_are_conflicts(cluster: Cluster, trips: str, group: str) -> None:
    """A status write with an old resourceVersion is a 409, so that two controllers cannot overwrite each other."""
    first = cluster.create(trips, a_trip(group, a_name("trip")))
    path = f"{trips}/{first['metadata']['name']}/status"
    cluster.replace(path, {**first, "status": {"step": 1}})
    cluster.refused(409, "Conflict", "PUT", path, {**first, "status": {"step": 2}})


def test_updates_must_name_a_version(cluster: Cluster, trips: str, group: str) -> None:
    """A PUT of a custom resource without resourceVersion is refused."""
    first = cluster.create(trips, a_trip(group, a_name("trip")))
    body = {**first, "metadata": {"name": first["metadata"]["name"]}}
    status = cluster.refused(422, "Invalid", "PUT", f"{trips}/{first['metadata']['name']}", body)
    assert status["details"]["causes"][0]["field"] == "metadata.resourceVersion"


def test_strategic_patches_are_refused(cluster: Cluster, trips: str, group: str) -> None:
    """Custom resources have no strategic merge patch."""
    name = cluster.create(trips, a_trip(group, a_name("trip")))["metadata"]["name"]
    content_type = "application/strategic-merge-patch+json"
    cluster.refused(415, "UnsupportedMediaType", "PATCH", f"{trips}/{name}", {}, content_type=content_type)


def test_columns(cluster: Cluster, trips: str, group: str) -> None:
    """A Table of custom resources has the definition's columns."""
    name = a_name("trip")
    cluster.create(trips, a_trip(group, name))
    cluster.patch(f"{trips}/{name}/status", {"status": {"phase": "Moving"}})
    accept = "application/json;as=Table;v=v1;g=meta.k8s.io"
    _, table = cluster.call("GET", trips, accept=accept, fieldSelector=f"metadata.name={name}")
    columns = [(column["name"], column["priority"]) for column in table["columnDefinitions"]]
    assert columns == [("Name", 0), ("Phase", 0), ("Seats", 0), ("Age", 0), ("Via", 1)]
    cells = table["rows"][0]["cells"]
    assert cells[:3] == [name, "Moving", 4]
    assert cells[4] == "land"


def test_discovery_knows_them(cluster: Cluster, group: str) -> None:
    """Discovery tells plural, kind, short names, status subresource and verbs of what a definition defines."""
    resources = {each["name"]: each for each in cluster.get(f"/apis/{group}/v1")["resources"]}
    assert resources["trips"]["kind"] == "Trip"
    assert resources["trips"]["namespaced"] is True
    assert resources["trips"]["shortNames"] == [f"trp{group.partition('.')[0]}"]
    assert {"get", "list", "watch", "create", "update", "patch", "delete"} <= set(resources["trips"]["verbs"])
    assert "trips/status" in resources
    assert group in [each["name"] for each in cluster.get("/apis")["groups"]]
