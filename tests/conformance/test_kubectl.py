"""The daily verbs of a real kubectl."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from cluster_client import Cluster, Kubectl, Namespaced, a_configmap, a_name, a_pod, a_trip

pytestmark = pytest.mark.needs_kubectl
Json = dict[str, Any]


@pytest.fixture(scope="module")
def trip(group: str) -> str:
    """How kubectl names our custom resource."""
    return f"trips.{group}"


def test_apply_creates_changes_and_leaves_alone(kubectl: Kubectl, group: str, trip: str) -> None:
    """apply says created, unchanged and configured, of custom resources and built-in ones."""
    name = a_name("trip")
    assert kubectl("apply", "-f", "-", given=a_trip(group, name)).strip() == f"trip.{group}/{name} created"
    assert kubectl("apply", "-f", "-", given=a_trip(group, name)).strip() == f"trip.{group}/{name} unchanged"
    assert kubectl("apply", "-f", "-", given=a_trip(group, name, seats=7)).strip() == f"trip.{group}/{name} configured"
    assert kubectl("get", trip, name, "-o", "jsonpath={.spec.seats}") == "7"
    pod = a_pod(a_name("pod"))
    assert "created" in kubectl("apply", "-f", "-", given=pod)
    assert "unchanged" in kubectl("apply", "-f", "-", given=pod)
    pod["spec"]["containers"][0]["image"] = "busybox:2"
    assert "configured" in kubectl("apply", "-f", "-", given=pod)
    kubectl("delete", "-f", "-", given=pod)


def test_apply_of_nonsense_is_explained(kubectl: Kubectl, group: str) -> None:
    """An invalid object is refused with the field, the value and what is expected."""
    assert "spec.seats: Invalid value: 0" in kubectl.fails("apply", "-f", "-", given=a_trip(group, "bad", seats=0))
    told = kubectl.fails("apply", "-f", "-", given=a_trip(group, "bad", taken=9))
    assert "taken must be at most seats" in told


def test_apply_of_unknown_fields(kubectl: Kubectl, group: str) -> None:
    """A misspelt field is refused by name (kubectl 1.25 and later ask the server to be strict)."""
    if kubectl.minor < 27:
        pytest.skip(f"kubectl 1.{kubectl.minor} does not ask for strict validation")
    told = kubectl.fails("apply", "-f", "-", given=a_trip(group, "bad", seets=4))
    assert 'unknown field "spec.seets"' in told


def test_get_in_every_form(kubectl: Kubectl, cluster: Cluster, here: Namespaced, group: str, trip: str) -> None:
    """get prints the columns of the definition, more with -o wide, and whole objects as YAML, JSON and names."""
    name = a_name("trip")
    cluster.create(here.of(f"{group}/v1", "trips"), a_trip(group, name))
    cluster.patch(here.of(f"{group}/v1", "trips", name, "status"), {"status": {"phase": "Moving"}})
    head, row = kubectl("get", trip, name).splitlines()
    assert head.split() == ["NAME", "PHASE", "SEATS", "AGE"]
    assert row.split()[:3] == [name, "Moving", "4"]
    head, row = kubectl("get", trip, name, "-o", "wide").splitlines()
    assert head.split() == ["NAME", "PHASE", "SEATS", "AGE", "VIA"]
    assert row.split()[-1] == "land"
    assert yaml.safe_load(kubectl("get", trip, name, "-o", "yaml"))["spec"]["seats"] == 4
    listed = json.loads(kubectl("get", trip, "-o", "json"))
    assert name in [item["metadata"]["name"] for item in listed["items"]]
    short = f"trp{group.partition('.')[0]}"
    assert kubectl("get", short, name, "-o", "name").strip() == f"trip.{group}/{name}"
    assert "NotFound" in kubectl.fails("get", trip, "nobody")


def test_get_built_in_kinds(kubectl: Kubectl, cluster: Cluster, here: Namespaced) -> None:
    """Built-in kinds have the columns that users know."""
    name = a_name("pod")
    cluster.create(here.core("pods"), a_pod(name))
    head, row = kubectl("get", "pods", name).splitlines()
    assert head.split() == ["NAME", "READY", "STATUS", "RESTARTS", "AGE"]
    assert row.split()[:4] == [name, "0/1", "Pending", "0"]
    head = kubectl("get", "pods", name, "-o", "wide").splitlines()[0]
    assert head.split()[:1] + head.split()[5:7] == ["NAME", "IP", "NODE"]
    assert name in kubectl("get", "pods", "--all-namespaces")
    assert name in kubectl("get", "pods", "-l", f"app={name}", "--show-labels")
    assert kubectl("get", "pods", "--field-selector=status.phase=Running", "-o", "name") == ""
    for kind in ("namespaces", "services", "secrets", "leases", "events", "serviceaccounts", "roles", "crd"):
        kubectl("get", kind)
    cluster.delete(here.core("pods", name), gracePeriodSeconds="0")


def test_get_watches(kubectl: Kubectl, cluster: Cluster, here: Namespaced) -> None:
    """get --watch goes on printing rows as objects change."""
    name = a_name()
    cluster.create(here.core("configmaps"), a_configmap(name, {"watched": name}))
    with kubectl.start("get", "configmaps", "-l", f"watched={name}", "-w", "--output-watch-events") as watching:
        assert watching.stdout is not None
        lines = iter(watching.stdout.readline, "")
        assert next(lines).split()[:2] == ["EVENT", "NAME"]
        assert next(lines).split()[:3] == ["ADDED", name, "0"]
        cluster.patch(here.core("configmaps", name), {"data": {"a": "1"}})
        assert next(lines).split()[:3] == ["MODIFIED", name, "1"]


def test_describe(kubectl: Kubectl, cluster: Cluster, here: Namespaced, group: str, trip: str) -> None:
    """describe shows the object and the events about it."""
    name = a_name("trip")
    created = cluster.create(here.of(f"{group}/v1", "trips"), a_trip(group, name))
    about = {"apiVersion": f"{group}/v1", "kind": "Trip", "name": name, "namespace": here.namespace}
    event = {
        "metadata": {"generateName": "event-"},
        "involvedObject": {**about, "uid": created["metadata"]["uid"]},
        "type": "Warning",
        "reason": "Delayed",
        "message": "the trip is late",
        "firstTimestamp": created["metadata"]["creationTimestamp"],
        "lastTimestamp": created["metadata"]["creationTimestamp"],
        "count": 1,
        "source": {"component": "mend"},
    }
    cluster.create(here.core("events"), event)
    told = kubectl("describe", trip, name)
    assert "Seats:" in told
    assert "the trip is late" in told
    rows = kubectl("get", "events", f"--field-selector=involvedObject.name={name}")
    assert rows.splitlines()[0].split() == ["LAST", "SEEN", "TYPE", "REASON", "OBJECT", "MESSAGE"]
    assert f"trip/{name}" in rows
    pod = a_name("pod")
    cluster.create(here.core("pods"), a_pod(pod))
    assert "busybox:1" in kubectl("describe", "pod", pod)
    cluster.delete(here.core("pods", pod), gracePeriodSeconds="0")


@pytest.mark.parametrize(
    ("kind", "patch"),
    [
        ("merge", '{"data": {"a": "2", "b": "3"}}'),
        (
            "json",
            '[{"op": "replace", "path": "/data/a", "value": "2"}, {"op": "add", "path": "/data/b", "value": "3"}]',
        ),
        ("strategic", '{"data": {"a": "2", "b": "3"}}'),
    ],
)
def test_patch(kubectl: Kubectl, cluster: Cluster, here: Namespaced, kind: str, patch: str) -> None:
    """patch works in its three types."""
    name = a_name()
    cluster.create(here.core("configmaps"), a_configmap(name, a="1"))
    assert "patched" in kubectl("patch", "configmap", name, f"--type={kind}", "-p", patch)
    assert cluster.get(here.core("configmaps", name))["data"] == {"a": "2", "b": "3"}


def test_patch_of_custom_resources(kubectl: Kubectl, cluster: Cluster, here: Namespaced, group: str, trip: str) -> None:
    """A custom resource is suspended by a merge patch, as users of mend do."""
    name = a_name("trip")
    cluster.create(here.of(f"{group}/v1", "trips"), a_trip(group, name))
    kubectl("patch", trip, name, "--type=merge", "-p", '{"spec": {"paused": true}}')
    assert cluster.get(here.of(f"{group}/v1", "trips", name))["spec"]["paused"] is True


def test_label_and_annotate(kubectl: Kubectl, cluster: Cluster, here: Namespaced) -> None:
    """label and annotate set and remove."""
    name = a_name()
    cluster.create(here.core("configmaps"), a_configmap(name, {"old": "1"}))
    kubectl("label", "configmap", name, "new=2", "old-")
    kubectl("annotate", "configmap", name, "why=because")
    metadata = cluster.get(here.core("configmaps", name))["metadata"]
    assert (metadata["labels"], metadata["annotations"]) == ({"new": "2"}, {"why": "because"})


def test_wait_for_conditions_and_deletion(
    kubectl: Kubectl, cluster: Cluster, here: Namespaced, group: str, trip: str
) -> None:
    """wait returns once a condition is true, and once an object is gone."""
    name = a_name("trip")
    path = here.of(f"{group}/v1", "trips", name)
    cluster.create(here.of(f"{group}/v1", "trips"), a_trip(group, name))
    with kubectl.start("wait", f"{trip}/{name}", "--for=condition=Arrived", "--timeout=60s") as waiting:
        cluster.patch(f"{path}/status", {"status": {"conditions": [{"type": "Arrived", "status": "False"}]}})
        cluster.patch(f"{path}/status", {"status": {"conditions": [{"type": "Arrived", "status": "True"}]}})
        assert waiting.wait(60) == 0
    with kubectl.start("wait", f"{trip}/{name}", "--for=delete", "--timeout=60s") as waiting:
        cluster.delete(path)
        waiting.wait(60)  # its code depends on whether the object was there when it began
    kubectl.fails("wait", f"{trip}/nobody", "--for=condition=Arrived", "--timeout=1s")


def test_delete_waits_for_finalizers(kubectl: Kubectl, cluster: Cluster, here: Namespaced) -> None:
    """delete --wait returns only when the object is gone."""
    name = a_name()
    body = a_configmap(name)
    body["metadata"]["finalizers"] = ["mend.dev/test"]
    cluster.create(here.core("configmaps"), body)
    with kubectl.start("delete", "configmap", name, "--wait=true") as deleting:
        path = here.core("configmaps", name)
        cluster.eventually(lambda: cluster.get(path)["metadata"].get("deletionTimestamp"), "it is marked")
        assert deleting.poll() is None
        cluster.patch(path, {"metadata": {"finalizers": None}})
        assert deleting.wait(60) == 0
    kubectl("delete", "configmap", name, "--ignore-not-found")


def test_create(kubectl: Kubectl, cluster: Cluster, here: Namespaced) -> None:
    """create namespace, secret, configmap, serviceaccount and role work (kubectl sends some of them as protobuf)."""
    name = a_name("mend-conformance-made")
    assert kubectl("create", "namespace", name).strip() == f"namespace/{name} created"
    kubectl("delete", "namespace", name, "--wait=false")
    kubectl("create", "secret", "generic", name, "--from-literal=key=value")
    assert cluster.get(here.core("secrets", name))["data"] == {"key": "dmFsdWU="}
    kubectl("create", "configmap", name, "--from-literal=key=value")
    assert cluster.get(here.core("configmaps", name))["data"] == {"key": "value"}
    kubectl("create", "serviceaccount", name)
    kubectl("create", "role", name, "--verb=get,list", "--resource=pods")
    kubectl("create", "rolebinding", name, f"--role={name}", f"--serviceaccount={here.namespace}:{name}")
    assert "already exists" in kubectl.fails("create", "configmap", name)


def test_auth_can_i(kubectl: Kubectl) -> None:
    """auth can-i asks the server."""
    assert kubectl("auth", "can-i", "create", "pods").strip() == "yes"
    assert "*.*" in kubectl("auth", "can-i", "--list")


def test_api_resources(kubectl: Kubectl, group: str) -> None:
    """api-resources lists custom resources beside built-in ones."""
    told = kubectl("api-resources")
    assert "pods" in told
    assert f"{group}/v1" in told
    assert kubectl("api-resources", f"--api-group={group}", "-o", "name").strip() == f"trips.{group}"


def test_explain(kubectl: Kubectl, trip: str) -> None:
    """explain shows the fields of a custom resource (kubectl 1.27 and later read OpenAPI v3)."""
    if kubectl.minor < 27:
        pytest.skip(f"kubectl 1.{kubectl.minor} explains from OpenAPI v2 only")
    told = kubectl("explain", f"{trip}.spec")
    assert "seats" in told
    assert "<integer>" in told


def test_replace_and_edit_conflicts(kubectl: Kubectl, cluster: Cluster, here: Namespaced) -> None:
    """replace of a stale object is told as a conflict."""
    name = a_name()
    old = cluster.create(here.core("configmaps"), a_configmap(name))
    old = {**old, "apiVersion": "v1", "kind": "ConfigMap"}
    cluster.patch(here.core("configmaps", name), {"data": {"a": "1"}})
    assert "the object has been modified" in kubectl.fails("replace", "-f", "-", given=old)


def test_dry_run(kubectl: Kubectl, group: str, trip: str) -> None:
    """apply --dry-run=server validates and stores nothing."""
    if kubectl.minor < 27:
        pytest.skip(f"kubectl 1.{kubectl.minor} asks for APIs that newer clusters serve no more")
    name = a_name("trip")
    assert "server dry run" in kubectl("apply", "--dry-run=server", "-f", "-", given=a_trip(group, name))
    assert "NotFound" in kubectl.fails("get", trip, name)


def test_logs_and_exit_of_a_real_pod(kubectl: Kubectl, cluster: Cluster, here: Namespaced) -> None:
    """On a cluster with a node: logs -f follows a pod to its end, wait sees it ready, delete --wait ends it."""
    nodes = cluster.get("/api/v1/nodes")["items"]
    if not nodes:
        pytest.skip("this cluster has no node to run a pod on")
    name = a_name("pod")
    script = "for i in 1 2 3; do echo line $i; sleep 0.2; done"
    container = {"name": "main", "image": "busybox:1.36", "command": ["sh", "-c", script]}
    pod = a_pod(name, containers=[container], restartPolicy="Never", nodeSelector=None)
    cluster.create(here.core("pods"), pod)
    path = here.core("pods", name)
    cluster.eventually(lambda: cluster.get(path)["status"]["phase"] != "Pending", "the pod has started")
    assert kubectl("logs", "-f", name).splitlines() == ["line 1", "line 2", "line 3"]
    assert kubectl("logs", name, "--tail=1").strip() == "line 3"
    cluster.eventually(lambda: cluster.get(path)["status"]["phase"] == "Succeeded", "the pod has succeeded")
    assert "Completed" in kubectl("get", "pod", name)
    kubectl("delete", "pod", name, "--wait=true")
    cluster.refused(404, "NotFound", "GET", path)
