"""Writing objects: names, versions, preconditions, patches and finalizers."""

from __future__ import annotations

from cluster_client import JSON_PATCH, MERGE, STRATEGIC, Cluster, Namespaced, a_configmap, a_name, a_pod


def test_created_objects_get_an_identity(cluster: Cluster, here: Namespaced) -> None:
    """A created object has a uid, a version, a time and its namespace, and is what a get then shows."""
    name = a_name()
    created = cluster.create(here.core("configmaps"), a_configmap(name, color="red"))
    metadata = created["metadata"]
    assert metadata["uid"]
    assert metadata["namespace"] == here.namespace
    assert int(metadata["resourceVersion"]) > 0
    assert metadata["creationTimestamp"].endswith("Z")
    assert cluster.get(here.core("configmaps", name)) == created


def test_a_second_create_is_refused(cluster: Cluster, here: Namespaced) -> None:
    """Creating what exists is a 409 AlreadyExists that names it."""
    name = a_name()
    cluster.create(here.core("configmaps"), a_configmap(name))
    status = cluster.refused(409, "AlreadyExists", "POST", here.core("configmaps"), a_configmap(name))
    assert status["message"] == f'configmaps "{name}" already exists'
    assert status["details"]["name"] == name


def test_what_is_not_there(cluster: Cluster, here: Namespaced) -> None:
    """Reading, changing or deleting what is not there is a 404 NotFound that names it."""
    path = here.core("configmaps", "nobody")
    assert cluster.refused(404, "NotFound", "GET", path)["message"] == 'configmaps "nobody" not found'
    cluster.refused(404, "NotFound", "PATCH", path, {"data": {}}, content_type=MERGE)
    cluster.refused(404, "NotFound", "DELETE", path)


def test_a_namespace_must_exist(cluster: Cluster) -> None:
    """Nothing is created in a namespace that does not exist."""
    path = "/api/v1/namespaces/mend-no-such-namespace/configmaps"
    cluster.refused(404, "NotFound", "POST", path, a_configmap("x"))


def test_generated_names(cluster: Cluster, here: Namespaced) -> None:
    """With generateName the server appends a random suffix."""
    body = {"metadata": {"generateName": "many-"}}
    names = {cluster.create(here.core("configmaps"), body)["metadata"]["name"] for _ in range(3)}
    assert len(names) == 3
    assert all(name.startswith("many-") and len(name) > len("many-") for name in names)


def test_bad_names_are_refused(cluster: Cluster, here: Namespaced) -> None:
    """A name that is no DNS subdomain is a 422 whose cause names the field."""
    status = cluster.refused(422, "Invalid", "POST", here.core("configmaps"), a_configmap("Not_A_Name"))
    assert status["details"]["causes"][0]["field"] == "metadata.name"


def test_stale_updates_are_conflicts(cluster: Cluster, here: Namespaced) -> None:
    """An update with an old resourceVersion is a 409 Conflict and changes nothing."""
    first = cluster.create(here.core("configmaps"), a_configmap(a_name(), n="1"))
    path = here.core("configmaps", first["metadata"]["name"])
    second = cluster.replace(path, {**first, "data": {"n": "2"}})
    assert int(second["metadata"]["resourceVersion"]) > int(first["metadata"]["resourceVersion"])
    status = cluster.refused(409, "Conflict", "PUT", path, {**first, "data": {"n": "3"}})
    assert "the object has been modified" in status["message"]
    assert cluster.get(path)["data"] == {"n": "2"}


def test_stale_patches_are_conflicts(cluster: Cluster, here: Namespaced) -> None:
    """A patch that carries a resourceVersion or uid holds only for that very state and object."""
    first = cluster.create(here.core("configmaps"), a_configmap(a_name()))
    path = here.core("configmaps", first["metadata"]["name"])
    cluster.patch(path, {"data": {"n": "1"}})
    stale = {"metadata": {"resourceVersion": first["metadata"]["resourceVersion"]}, "data": {"n": "2"}}
    cluster.refused(409, "Conflict", "PATCH", path, stale, content_type=MERGE)
    other = {"metadata": {"uid": "00000000-0000-0000-0000-000000000000"}}
    cluster.refused(409, "Conflict", "PATCH", path, other, content_type=MERGE)


def test_writing_the_same_changes_nothing(cluster: Cluster, here: Namespaced) -> None:
    """An update or patch to the state that is there already leaves the version alone."""
    first = cluster.create(here.core("configmaps"), a_configmap(a_name(), n="1"))
    path = here.core("configmaps", first["metadata"]["name"])
    assert cluster.replace(path, first)["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    patched = cluster.patch(path, {"data": {"n": "1"}})
    assert patched["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]


def test_dry_runs_store_nothing(cluster: Cluster, here: Namespaced) -> None:
    """With dryRun=All the answer is as if, and nothing is stored."""
    name = a_name()
    assert cluster.create(here.core("configmaps"), a_configmap(name), dryRun="All")["metadata"]["name"] == name
    cluster.refused(404, "NotFound", "GET", here.core("configmaps", name))
    cluster.create(here.core("configmaps"), a_configmap(name, n="1"))
    cluster.patch(here.core("configmaps", name), {"data": {"n": "2"}}, dryRun="All")
    cluster.delete(here.core("configmaps", name), dryRun="All")
    assert cluster.get(here.core("configmaps", name))["data"] == {"n": "1"}


def test_merge_patches(cluster: Cluster, here: Namespaced) -> None:
    """A merge patch merges objects and removes what is null."""
    name = a_name()
    cluster.create(here.core("configmaps"), a_configmap(name, {"a": "1"}, keep="x", drop="y"))
    patched = cluster.patch(here.core("configmaps", name), {"data": {"drop": None, "more": "z"}})
    assert patched["data"] == {"keep": "x", "more": "z"}
    assert patched["metadata"]["labels"] == {"a": "1"}


def test_json_patches(cluster: Cluster, here: Namespaced) -> None:
    """A JSON patch does its operations in order, and none of them when a test fails."""
    name = a_name()
    path = here.core("configmaps", name)
    cluster.create(here.core("configmaps"), a_configmap(name, a="1"))
    operations = [
        {"op": "test", "path": "/data/a", "value": "1"},
        {"op": "replace", "path": "/data/a", "value": "2"},
        {"op": "add", "path": "/metadata/labels", "value": {"x/y": "z"}},
        {"op": "add", "path": "/metadata/labels/x~1w", "value": "v"},
    ]
    patched = cluster.patch(path, operations, JSON_PATCH)
    assert patched["data"] == {"a": "2"}
    assert patched["metadata"]["labels"] == {"x/y": "z", "x/w": "v"}
    assert cluster.call("PATCH", path, operations, content_type=JSON_PATCH)[0] == 422
    assert cluster.get(path)["data"] == {"a": "2"}


def test_strategic_patches_merge_known_lists(cluster: Cluster, here: Namespaced) -> None:
    """A strategic merge patch finds containers by name."""
    name = a_name()
    containers = [{"name": "a", "image": "busybox:1"}, {"name": "b", "image": "busybox:1"}]
    cluster.create(here.core("pods"), a_pod(name, containers=containers))
    patch = {"spec": {"containers": [{"name": "b", "image": "busybox:2"}]}}
    patched = cluster.patch(here.core("pods", name), patch, STRATEGIC)
    assert [each["image"] for each in patched["spec"]["containers"]] == ["busybox:1", "busybox:2"]
    cluster.delete(here.core("pods", name), gracePeriodSeconds="0")


def test_unknown_patches_are_refused(cluster: Cluster, here: Namespaced) -> None:
    """A patch of an unknown kind is a 415."""
    name = a_name()
    cluster.create(here.core("configmaps"), a_configmap(name))
    code, _ = cluster.call("PATCH", here.core("configmaps", name), {}, content_type="application/strange+json")
    assert code == 415


def test_deletions_with_preconditions(cluster: Cluster, here: Namespaced) -> None:
    """A deletion can be bound to a uid and a version; another object of that name is left alone."""
    created = cluster.create(here.core("configmaps"), a_configmap(a_name()))
    path = here.core("configmaps", created["metadata"]["name"])
    for wrong in ({"uid": "00000000-0000-0000-0000-000000000000"}, {"resourceVersion": "1"}):
        cluster.refused(409, "Conflict", "DELETE", path, {"preconditions": wrong})
    cluster.delete(path, {"preconditions": {"uid": created["metadata"]["uid"]}})
    cluster.refused(404, "NotFound", "GET", path)


def test_finalizers_hold_a_deletion_up(cluster: Cluster, here: Namespaced) -> None:
    """A deleted object with finalizers stays, marked, accepts no new ones, and goes with the last of them."""
    name = a_name()
    path = here.core("configmaps", name)
    body = a_configmap(name)
    body["metadata"]["finalizers"] = ["mend.dev/test"]
    cluster.create(here.core("configmaps"), body)
    cluster.delete(path)
    marked = cluster.get(path)
    assert marked["metadata"]["deletionTimestamp"]
    more = {"metadata": {"finalizers": ["mend.dev/test", "mend.dev/more"]}}
    assert cluster.call("PATCH", path, more, content_type=MERGE)[0] in (403, 422)
    cluster.patch(path, {"metadata": {"finalizers": None}})
    cluster.refused(404, "NotFound", "GET", path)


def test_deleting_a_collection(cluster: Cluster, here: Namespaced) -> None:
    """A collection can be deleted by a selector."""
    label = a_name("batch")
    for _ in range(3):
        cluster.create(here.core("configmaps"), a_configmap(a_name(), {"batch": label}))
    other = cluster.create(here.core("configmaps"), a_configmap(a_name(), {"batch": "other"}))
    cluster.delete(here.core("configmaps"), labelSelector=f"batch={label}")
    assert cluster.get(here.core("configmaps"), labelSelector=f"batch={label}")["items"] == []
    assert cluster.get(here.core("configmaps", other["metadata"]["name"]))


def test_secrets_take_plain_text(cluster: Cluster, here: Namespaced) -> None:
    """stringData of a Secret is stored as base64 in data."""
    name = a_name()
    created = cluster.create(here.core("secrets"), {"metadata": {"name": name}, "stringData": {"token": "abc"}})
    assert created["data"] == {"token": "YWJj"}
    assert created["type"] == "Opaque"
    assert "stringData" not in created
