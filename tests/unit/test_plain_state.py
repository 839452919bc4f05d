"""Any state made of plain values and tensors comes back exactly through JSON; anything else is named and refused."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mend_trainer.plain import NotPlain, join, keys, split

_LEAVES = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)
_KEYS = st.text() | st.integers() | st.sampled_from(["$tensor", "$tuple", "$float", "$items"])
_TREES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(_KEYS, inner),
    max_leaves=20,
)


@given(tree=_TREES)
def test_trees_survive_json(tree: Any) -> None:
    """Tuples stay tuples, infinities stay infinite, integer keys stay integers, and a "$" in a key does no harm."""
    plain, tensors = split(tree, "state")
    again = join(json.loads(json.dumps(plain, allow_nan=False)), tensors)
    assert again == tree
    assert repr(again) == repr(tree)


@given(tree=st.dictionaries(_KEYS, _LEAVES))
def test_keys_are_known_without_tensors(tree: dict[Any, Any]) -> None:
    """Whatever they are."""
    plain, _ = split(tree, "state")
    assert keys(json.loads(json.dumps(plain, allow_nan=False))) == set(tree)


def test_tensors_are_set_aside_by_path() -> None:
    """They are handed over as they are, and put back where they were."""
    weight = torch.ones(2)
    plain, tensors = split({"a": [{"w": weight}], 3: math.nan, "n": np.float32(0.5), "c": Counter([5, 5])}, "state")
    assert tensors == {"a.0.w": weight}
    tree = join(json.loads(json.dumps(plain)), {"a.0.w": torch.zeros(2)})
    assert tree["a"][0]["w"].tolist() == [0, 0]
    assert math.isnan(tree[3])
    assert (tree["n"], tree["c"]) == (0.5, {5: 2})


def test_what_cannot_be_saved_is_named() -> None:
    """The path, the type and the remedy are in the error."""
    with pytest.raises(NotPlain, match=r"scheduler\.fn\.1: function, expected tensors, numbers"):
        split({"fn": [1, lambda: 0]}, "scheduler")


def test_states_of_schedulers_are_plain() -> None:
    """Those of torch that people use can be saved as they are."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    schedulers = torch.optim.lr_scheduler
    for scheduler in (
        schedulers.LambdaLR(optimizer, lambda step: 1.0),
        schedulers.MultiStepLR(optimizer, [3, 5]),
        schedulers.OneCycleLR(optimizer, 0.2, 10),
        schedulers.ReduceLROnPlateau(optimizer),
        schedulers.SequentialLR(
            optimizer,
            [schedulers.LinearLR(optimizer), schedulers.CosineAnnealingLR(optimizer, 5)],
            milestones=[2],
        ),
    ):
        state = scheduler.state_dict()
        plain, tensors = split(state, "scheduler")
        scheduler.load_state_dict(join(json.loads(json.dumps(plain, allow_nan=False)), tensors))
        assert scheduler.state_dict() == state
