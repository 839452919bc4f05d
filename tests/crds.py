"""The CRD of TrainingRun as tests need it: the document, its schema, and a sample that passes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
CRD_PATH = ROOT / "charts/mend/crds/trainingruns.mend.dev.yaml"

SAMPLE: dict[str, Any] = {
    "apiVersion": "mend.dev/v1alpha1",
    "kind": "TrainingRun",
    "metadata": {"name": "clio", "namespace": "default"},
    "spec": {
        "workers": {
            "replicas": 4,
            "template": {
                "spec": {"containers": [{"name": "trainer", "image": "clio:1", "command": ["python", "train.py"]}]},
            },
        },
        "checkpoint": {"uri": "s3://bucket/clio"},
    },
}


def crd() -> dict[str, Any]:
    """The whole document."""
    document: dict[str, Any] = yaml.safe_load(CRD_PATH.read_text())
    return document


def schema() -> dict[str, Any]:
    """The schema of its only version."""
    raw: dict[str, Any] = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return raw


def sample() -> dict[str, Any]:
    """The smallest run that is accepted; yours to change."""
    return copy.deepcopy(SAMPLE)


def walk(raw: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every property below a schema with its dotted path; items of lists and values of maps are `[]`."""
    for name, below in raw.get("properties", {}).items():
        yield f"{path}.{name}", below
        yield from walk(below, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(raw.get(key), dict):
            yield from walk(raw[key], f"{path}[]")
