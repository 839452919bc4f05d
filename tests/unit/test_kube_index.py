"""The local copy of objects, against a scan of all of them."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
from hypothesis import given

from mend.kube.index import Index

NAMES = st.sampled_from(["a", "b", "c"])
OBJECTS = st.builds(
    lambda namespace, name, label, owner: {
        "metadata": {
            "namespace": namespace,
            "name": name,
            "uid": "u",
            "labels": {"run": label} if label else None,
            "ownerReferences": [{"uid": owner}] if owner else None,
            "managedFields": [1],
        }
    },
    NAMES,
    NAMES,
    st.sampled_from([None, "x", "y"]),
    st.sampled_from([None, "o1", "o2"]),
)


@given(st.lists(st.one_of(OBJECTS, st.tuples(NAMES, NAMES)), max_size=30))
def test_lookups_equal_a_scan(moves: list[Any]) -> None:
    """After any puts and removes, lookups by name, label and owner give what looking through all objects gives."""
    index, twin = Index(), {}
    for move in moves:
        if isinstance(move, dict):
            meta = move["metadata"]
            index.put(move)
            twin[meta["namespace"], meta["name"]] = move
        else:
            assert index.remove(*move) is twin.pop(move, None)

    def names(objects: Any) -> set[tuple[str, str]]:
        return {(obj["metadata"]["namespace"], obj["metadata"]["name"]) for obj in objects}

    assert names(index.values()) == set(twin)
    for label in "xy":
        labelled = {k for k, o in twin.items() if (o["metadata"]["labels"] or {}).get("run") == label}
        assert names(index.by_label("run", label)) == labelled
        assert names(index.by_label("run", label, namespace="a")) == {k for k in labelled if k[0] == "a"}
    for owner in ("o1", "o2"):
        owned = {k for k, o in twin.items() if (o["metadata"]["ownerReferences"] or [{}])[0].get("uid") == owner}
        assert names(index.by_owner(owner)) == owned
    assert all("managedFields" not in obj["metadata"] for obj in index)
