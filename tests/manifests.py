"""Manifests for tests that care for a few of their fields only."""

from __future__ import annotations

from typing import Any

from mend.manifest import Manifest


def a_manifest(**fields: Any) -> Manifest:
    """That of a checkpoint of step 1 without tensors, but for these fields."""
    usual: dict[str, Any] = {
        "run": "team/clio",
        "run_uid": "uid-1",
        "step": 1,
        "attempt": 1,
        "lineage": (),
        "world_size": 1,
        "tokens": 0,
        "created_unix_seconds": 0.0,
        "objects": (),
        "tensors": {},
    }
    return Manifest(**(usual | fields))
