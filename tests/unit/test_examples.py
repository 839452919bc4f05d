"""Every example can be applied: its manifest is accepted, and what it asks of the trainer is a configuration."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from mend.names import API_VERSION, KIND, TRAINER_CONTAINER
from mend.spec import parse_spec
from mend_trainer.config import read_config

_EXAMPLES = Path(__file__).parents[2] / "examples"
_MANIFESTS = sorted([*_EXAMPLES.glob("*.yaml"), *_EXAMPLES.glob("gpu/*.yaml"), *_EXAMPLES.glob("local/*.yaml")])


def trainer_of(manifest: Path) -> tuple[Any, list[str]]:
    """The run, and the words of its trainer's command."""
    run = yaml.safe_load(manifest.read_text())
    containers = run["spec"]["workers"]["template"]["spec"]["containers"]
    return run, next(each["command"] for each in containers if each["name"] == TRAINER_CONTAINER)


@pytest.mark.parametrize("manifest", _MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_is_accepted(manifest: Path) -> None:
    """By the same parser that the controller uses, and named as its file is."""
    run, command = trainer_of(manifest)
    assert (run["apiVersion"], run["kind"], run["metadata"]["name"]) == (API_VERSION, KIND, manifest.stem)
    assert parse_spec(run["spec"]).checkpoint.uri.startswith("s3://")
    assert command[:3] == ["python", "-m", "mend_trainer.train"]
    read_config(None, [after for word, after in pairwise(command) if word == "--set"])


@pytest.mark.parametrize("config", sorted(_EXAMPLES.glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_is_complete(config: Path) -> None:
    """And fits the gang of the manifest of the same name, if there is one."""
    chosen = read_config(config)
    beside = _EXAMPLES / "gpu" / config.name
    if beside.exists():
        ranks = parse_spec(trainer_of(beside)[0]["spec"]).world_size
        assert chosen.global_batch % ranks == 0
