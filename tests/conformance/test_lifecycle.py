"""How things end and who may do what: owners, namespaces, pods with grace, leases, events, rights."""

from __future__ import annotations

from typing import Any

import pytest

from cluster_client import CRDS, MERGE, Cluster, Namespaced, a_configmap, a_definition, a_name, a_pod, a_trip

Json = dict[str, Any]
_RBAC = "rbac.authorization.k8s.io/v1"


def owned_by(owner: Json, value: Json, *, blocking: bool = False) -> Json:
    """The object with an owner reference."""
    reference = {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": blocking,
    }
    return {**value, "metadata": {**value["metadata"], "ownerReferences": [reference]}}


def test_what_is_owned_goes_with_its_owner(cluster: Cluster, here: Namespaced, group: str) -> None:
    """Deleting a custom resource deletes, in the background, what it owns, and what that owns."""
    trips = here.of(f"{group}/v1", "trips")
    trip = cluster.create(trips, a_trip(group, a_name("trip")))
    first = cluster.create(here.core("configmaps"), owned_by(trip, a_configmap(a_name())))
    first = {**first, "apiVersion": "v1", "kind": "ConfigMap"}
    second = cluster.create(here.core("secrets"), owned_by(first, {"metadata": {"name": a_name()}}))
    cluster.delete(f"{trips}/{trip['metadata']['name']}")
    cluster.eventually_gone(here.core("configmaps", first["metadata"]["name"]))
    cluster.eventually_gone(here.core("secrets", second["metadata"]["name"]))


def test_an_owner_that_is_gone(cluster: Cluster, here: Namespaced, group: str) -> None:
    """An object created for an owner that exists no more, or only under another uid, is collected."""
    trips = here.of(f"{group}/v1", "trips")
    trip = cluster.create(trips, a_trip(group, a_name("trip")))
    trip["metadata"]["uid"] = "00000000-0000-0000-0000-000000000000"
    orphan = cluster.create(here.core("configmaps"), owned_by(trip, a_configmap(a_name())))
    cluster.eventually_gone(here.core("configmaps", orphan["metadata"]["name"]))


def test_orphaning(cluster: Cluster, here: Namespaced) -> None:
    """With propagationPolicy Orphan what was owned stays and is owned no more."""
    owner = cluster.create(here.core("configmaps"), a_configmap(a_name()))
    owner = {**owner, "apiVersion": "v1", "kind": "ConfigMap"}
    child = cluster.create(here.core("configmaps"), owned_by(owner, a_configmap(a_name())))
    cluster.delete(here.core("configmaps", owner["metadata"]["name"]), {"propagationPolicy": "Orphan"})
    cluster.eventually_gone(here.core("configmaps", owner["metadata"]["name"]))
    kept = cluster.get(here.core("configmaps", child["metadata"]["name"]))
    assert "ownerReferences" not in kept["metadata"]


def test_foreground_deletion(cluster: Cluster, here: Namespaced) -> None:
    """With propagationPolicy Foreground the owner waits for what blocks its deletion."""
    owner = cluster.create(here.core("configmaps"), a_configmap(a_name()))
    owner = {**owner, "apiVersion": "v1", "kind": "ConfigMap"}
    held = owned_by(owner, a_configmap(a_name()), blocking=True)
    held["metadata"]["finalizers"] = ["mend.dev/test"]
    child = here.core("configmaps", cluster.create(here.core("configmaps"), held)["metadata"]["name"])
    path = here.core("configmaps", owner["metadata"]["name"])
    cluster.delete(path, {"propagationPolicy": "Foreground"})
    cluster.eventually(lambda: cluster.get(child)["metadata"].get("deletionTimestamp"), "the child is deleted first")
    assert "foregroundDeletion" in cluster.get(path)["metadata"]["finalizers"]
    cluster.patch(child, {"metadata": {"finalizers": None}})
    cluster.eventually_gone(path)


def test_a_namespace_ends_with_all_it_holds(cluster: Cluster) -> None:
    """A deleted namespace takes no more objects, empties itself and vanishes."""
    name = a_name("mend-conformance-ending")
    path = f"/api/v1/namespaces/{name}"
    cluster.create("/api/v1/namespaces", {"metadata": {"name": name}})
    held = a_configmap("held")
    held["metadata"]["finalizers"] = ["mend.dev/test"]
    cluster.create(f"{path}/configmaps", held)
    cluster.create(f"{path}/configmaps", a_configmap("free"))
    cluster.delete(path)
    cluster.eventually_gone(f"{path}/configmaps/free")
    assert cluster.get(path)["status"]["phase"] == "Terminating"
    status = cluster.refused(403, "Forbidden", "POST", f"{path}/configmaps", a_configmap("late"))
    assert status["details"]["causes"][0]["reason"] == "NamespaceTerminating"
    cluster.patch(f"{path}/configmaps/held", {"metadata": {"finalizers": None}})
    cluster.eventually_gone(path)


def test_a_definition_ends_with_all_it_defines(cluster: Cluster, here: Namespaced) -> None:
    """Deleting a definition deletes its objects, and then its API is served no more."""
    group = f"{a_name('ending')}.conformance.mend.dev"
    definition = f"{CRDS}/trips.{group}"
    cluster.create(CRDS, a_definition(group))
    cluster.eventually_condition(definition, "Established")
    cluster.eventually(lambda: cluster.call("GET", f"/apis/{group}/v1")[0] == 200, f"{group} is served")
    trips = here.of(f"{group}/v1", "trips")
    cluster.create(trips, a_trip(group, "one"))
    cluster.delete(definition)
    cluster.eventually_gone(definition)
    cluster.eventually(lambda: cluster.call("GET", trips)[0] == 404, "the API is gone")


def test_bad_definitions_are_refused(cluster: Cluster) -> None:
    """A definition whose rule does not compile is a 422, not a surprise later."""
    definition = a_definition(f"{a_name('bad')}.conformance.mend.dev")
    schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    schema["properties"]["spec"]["x-kubernetes-validations"][0]["rule"] = "self.seats >"
    cluster.refused(422, "Invalid", "POST", CRDS, definition)


def test_pods_get_defaults_and_keep_their_spec(cluster: Cluster, here: Namespaced) -> None:
    """A pod is completed with defaults, starts Pending whatever it says, and its command cannot be changed."""
    name = a_name("pod")
    created = cluster.create(here.core("pods"), {**a_pod(name), "status": {"phase": "Running"}})
    assert created["status"]["phase"] == "Pending"
    assert created["spec"]["restartPolicy"] == "Always"
    assert created["spec"]["terminationGracePeriodSeconds"] == 30
    patch = [{"op": "replace", "path": "/spec/containers/0/command", "value": ["true"]}]
    path = here.core("pods", name)
    status = cluster.refused(422, "Invalid", "PATCH", path, patch, content_type="application/json-patch+json")
    assert "pod updates may not change fields" in status["message"]
    cluster.delete(path)
    cluster.eventually_gone(path)


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"containers": []}, "spec.containers"),
        ({"containers": [{"name": "a", "image": "b"}] * 2}, "spec.containers[1].name"),
        ({"restartPolicy": "Perhaps"}, "spec.restartPolicy"),
    ],
)
def test_bad_pods_are_refused(cluster: Cluster, here: Namespaced, spec: Json, field: str) -> None:
    """A pod that cannot run is a 422 that names the field."""
    status = cluster.refused(422, "Invalid", "POST", here.core("pods"), a_pod(a_name("pod"), **spec))
    assert field in [cause["field"] for cause in status["details"]["causes"]]


def test_pods_on_a_node_are_given_time(cluster: Cluster, here: Namespaced) -> None:
    """A pod on a node is only marked when deleted; grace period 0 removes it at once, e.g. from a dead node."""
    name = a_name("pod")
    path = here.core("pods", name)
    cluster.create(here.core("pods"), a_pod(name, nodeName="mend-no-such-node", nodeSelector=None))
    cluster.delete(path, {"gracePeriodSeconds": 300})
    marked = cluster.get(path)["metadata"]
    assert marked["deletionTimestamp"]
    assert marked["deletionGracePeriodSeconds"] == 300
    cluster.delete(path, {"gracePeriodSeconds": 200})
    assert cluster.get(path)["metadata"]["deletionGracePeriodSeconds"] == 200
    uid = {"preconditions": {"uid": marked["uid"]}}
    cluster.delete(path, {"gracePeriodSeconds": 0, **uid})
    cluster.refused(404, "NotFound", "GET", path)


def test_a_pod_is_bound_once(cluster: Cluster, here: Namespaced) -> None:
    """A pod gets its node by a binding, once, and never by an update."""
    name = a_name("pod")
    path = here.core("pods", name)
    cluster.create(here.core("pods"), a_pod(name))
    cluster.refused(422, "Invalid", "PATCH", path, {"spec": {"nodeName": "mend-no-such-node"}}, content_type=MERGE)
    binding = {
        "apiVersion": "v1",
        "kind": "Binding",
        "metadata": {"name": name},
        "target": {"apiVersion": "v1", "kind": "Node", "name": "mend-no-such-node"},
    }
    cluster.create(here.core("pods", name, "binding"), binding)
    assert cluster.get(path)["spec"]["nodeName"] == "mend-no-such-node"
    cluster.refused(409, "Conflict", "POST", here.core("pods", name, "binding"), binding)
    cluster.delete(path, {"gracePeriodSeconds": 0})


def test_leases_are_won_by_one(cluster: Cluster, here: Namespaced) -> None:
    """Of two holders that write from the same version one wins, and the other is told 409."""
    leases = here.of("coordination.k8s.io/v1", "leases")
    name = a_name("lease")
    spec = {"holderIdentity": "a", "leaseDurationSeconds": 15, "renewTime": "2026-01-01T00:00:00.000000Z"}
    body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name}, "spec": spec}
    first = cluster.create(leases, body)
    assert first["spec"]["renewTime"] == "2026-01-01T00:00:00.000000Z"
    cluster.replace(f"{leases}/{name}", {**first, "spec": {**spec, "holderIdentity": "b"}})
    cluster.refused(409, "Conflict", "PUT", f"{leases}/{name}", {**first, "spec": {**spec, "holderIdentity": "c"}})
    assert cluster.get(f"{leases}/{name}")["spec"]["holderIdentity"] == "b"


def test_events_are_seen_through_both_apis(cluster: Cluster, here: Namespaced) -> None:
    """An Event can be selected by what it is about, and is the same in v1 and events.k8s.io/v1."""
    about = {"kind": "ConfigMap", "namespace": here.namespace, "name": a_name("about"), "uid": "u-1"}
    event = {
        "metadata": {"generateName": "event-"},
        "involvedObject": about,
        "type": "Warning",
        "reason": "RankCrashed",
        "message": "rank 3 crashed",
        "source": {"component": "mend"},
        "count": 1,
    }
    name = cluster.create(here.core("events"), event)["metadata"]["name"]
    selector = f"involvedObject.name={about['name']},involvedObject.kind=ConfigMap,reason=RankCrashed"
    found = cluster.get(here.core("events"), fieldSelector=selector)["items"]
    assert [each["message"] for each in found] == ["rank 3 crashed"]
    new_face = cluster.get(here.of("events.k8s.io/v1", "events", name))
    assert (new_face["note"], new_face["regarding"]["name"]) == ("rank 3 crashed", about["name"])


def test_rights_follow_from_roles(cluster: Cluster, here: Namespaced) -> None:
    """A service account may do what its bindings say and is told 403 for everything else; strangers are told 401."""
    name = a_name("robot")
    cluster.create(here.core("serviceaccounts"), {"metadata": {"name": name}})
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 600}}
    token = cluster.create(here.core("serviceaccounts", name, "token"), request)["status"]["token"]
    rules = [
        {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get", "list"]},
        {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"], "resourceNames": ["mine"]},
        {"apiGroups": [""], "resources": ["pods/status"], "verbs": ["patch"]},
    ]
    cluster.create(here.of(_RBAC, "roles"), {"metadata": {"name": name}, "rules": rules})
    binding = {
        "metadata": {"name": name},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": here.namespace}],
    }
    cluster.create(here.of(_RBAC, "rolebindings"), binding)
    with Cluster(cluster.kubeconfig, token) as robot:
        cluster.eventually(lambda: robot.call("GET", here.core("configmaps"))[0] == 200, "the binding works")
        status = robot.refused(403, "Forbidden", "POST", here.core("configmaps"), a_configmap("x"))
        user = f"system:serviceaccount:{here.namespace}:{name}"
        assert f'User "{user}" cannot create resource "configmaps" in API group ""' in status["message"]
        robot.refused(404, "NotFound", "GET", here.core("secrets", "mine"))
        robot.refused(403, "Forbidden", "GET", here.core("secrets", "other"))
        robot.refused(403, "Forbidden", "PATCH", here.core("pods", "x"), {}, content_type=MERGE)
        robot.refused(404, "NotFound", "PATCH", here.core("pods", "x", "status"), {}, content_type=MERGE)
        robot.refused(403, "Forbidden", "GET", "/api/v1/configmaps")
        attributes = {"namespace": here.namespace, "verb": "list", "resource": "configmaps"}
        review = {"spec": {"resourceAttributes": attributes}}
        answer = robot.create("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)
        assert answer["status"]["allowed"] is True
    with Cluster(cluster.kubeconfig, "nobody's token") as stranger:
        stranger.refused(401, "Unauthorized", "GET", here.core("configmaps"))
