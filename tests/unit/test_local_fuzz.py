"""No request body can break the local API server: it is stored whole or refused with a reason."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster_client import a_configmap, a_definition, a_pod, a_trip
from mend_local.failures import ApiFailure
from mend_local.housekeeping import Housekeeping
from mend_local.objects import DeleteOptions, Objects, WriteOptions
from mend_local.resources import Registry, ResourceType
from mend_local.storage import Storage
from mend_local.tables import table

GROUP = "fuzz.mend.dev"
LEASE = {"metadata": {"name": "l"}, "spec": {"holderIdentity": "a", "leaseDurationSeconds": 15}}
SECRET = {"metadata": {"name": "s"}, "data": {"a": "YQ=="}, "stringData": {"b": "c"}}
SERVICE = {"metadata": {"name": "v"}, "spec": {"clusterIP": "None", "ports": [{"port": 80}]}}
ROLE = {"metadata": {"name": "r"}, "rules": [{"verbs": ["get"], "apiGroups": [""], "resources": ["pods"]}]}
EVENT = {"metadata": {"name": "e"}, "involvedObject": {"kind": "Pod", "name": "p"}, "reason": "R", "message": "m"}
OWNED = {
    "metadata": {
        "name": "o",
        "labels": {"a": "b"},
        "finalizers": ["mend.dev/x"],
        "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "u"}],
    }
}
BODIES: list[tuple[str, str, dict[str, Any]]] = [
    ("v1", "Pod", a_pod("p")),
    ("v1", "ConfigMap", a_configmap("c", {"a": "b"}, x="y")),
    ("v1", "ConfigMap", OWNED),
    ("v1", "Secret", SECRET),
    ("v1", "Service", SERVICE),
    ("v1", "Event", EVENT),
    ("coordination.k8s.io/v1", "Lease", LEASE),
    ("rbac.authorization.k8s.io/v1", "Role", ROLE),
    ("apiextensions.k8s.io/v1", "CustomResourceDefinition", a_definition("other.mend.dev")),
    (f"{GROUP}/v1", "Trip", a_trip(GROUP, "t", stops=[{"name": "a"}], notes={"a": "b"})),
]
JUNK = st.sampled_from([None, 0, -1, 2.5, "", "text", True, [], {}, [None], [[]], {"": None}, ["a"], {"a": {"b": []}}])


def paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    found = [here] if here else []
    if isinstance(value, dict):
        for name, inner in value.items():
            found.extend(paths(inner, (*here, name)))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            found.extend(paths(inner, (*here, number)))
    return found


def replaced(value: Any, path: tuple[Any, ...], junk: Any) -> Any:
    """A copy of the value with junk at one place."""
    damaged = copy.deepcopy(value)
    holder = damaged
    for part in path[:-1]:
        holder = holder[part]
    holder[path[-1]] = copy.deepcopy(junk)
    return damaged


@st.composite
def damaged_bodies(draw: st.DrawFn) -> tuple[str, str, Any]:
    """A body that would be accepted, with junk at one of its places."""
    api_version, kind, body = draw(st.sampled_from(BODIES))
    return api_version, kind, replaced(body, draw(st.sampled_from(paths(body))), draw(JUNK))


def a_cluster() -> tuple[Objects, Housekeeping]:
    """Objects in memory with the namespace `default` and a custom resource."""
    objects = Objects(Storage(), Registry())
    housekeeping = Housekeeping(objects)
    housekeeping.prepare()
    definitions = the_type(objects, "apiextensions.k8s.io/v1", "CustomResourceDefinition")
    objects.create(definitions, "", a_definition(GROUP), WriteOptions())
    return objects, housekeeping


def the_type(objects: Objects, api_version: str, kind: str) -> ResourceType:
    """A resource type that is served."""
    found = objects.registry.by_kind(api_version, kind)
    assert found is not None
    return found


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(damaged_bodies())
def test_junk_is_refused_or_harmless(damaged: tuple[str, str, Any]) -> None:
    """Junk anywhere in a body is a refusal with a 4xx, or an object that can be shown, changed, kept and deleted."""
    api_version, kind_name, body = damaged
    objects, housekeeping = a_cluster()
    kind = the_type(objects, api_version, kind_name)
    namespace = "default" if kind.namespaced else ""
    try:
        created = objects.create(kind, namespace, body, WriteOptions())
    except ApiFailure as failure:
        if failure.code >= 500:
            raise
        return
    name = created["metadata"]["name"]
    table(kind, [created], {})
    housekeeping.tidy()
    if objects.storage.get(kind.storage_name, (namespace, name)) is None:
        return  # collected, since its owner does not exist
    current = objects.get(kind, namespace, name)
    assert objects.update(kind, namespace, name, copy.deepcopy(current), WriteOptions()) == current
    objects.delete(kind, namespace, name, DeleteOptions(propagation="Foreground"))
    housekeeping.tidy()
