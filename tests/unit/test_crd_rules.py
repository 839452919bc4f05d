"""The CRD refuses at the door what can be told at the door, and its columns, rules and descriptions are sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from crds import ROOT, crd, sample, schema, walk
from mend.spec import parse_spec
from mend_local.schema import Schema


def problems(new: dict[str, Any], old: dict[str, Any] | None = None) -> str:
    """Everything that the API server would answer to a create (or to an update of `old`)."""
    rules = Schema(schema())
    stored, unknown = rules.admit(new)
    before = None if old is None else rules.admit(old)[0]
    return "; ".join([*unknown, *(f"{each.field}: {each.detail}" for each in rules.problems(stored, before))])


def changed(*path: str | int, to: Any) -> dict[str, Any]:
    """The sample with one value replaced."""
    run = sample()
    here: Any = run
    for step in path[:-1]:
        here = here[step]
    here[path[-1]] = to
    return run


def test_the_sample_is_accepted() -> None:
    """The smallest run needs a template with a container named trainer, a number of replicas and a place to save."""
    assert problems(sample()) == ""


CONTAINERS = ("spec", "workers", "template", "spec", "containers")


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (changed("metadata", "name", to="x" * 53), "at most 52 characters"),
        (changed("metadata", "name", to="1clio"), "must begin with a letter"),
        (changed("metadata", "name", to="clio.v2"), "hold only a-z, 0-9 and '-'"),
        (changed("spec", "workers", "minReplicas", to=5), "minReplicas must be at most replicas"),
        (changed(*CONTAINERS, 0, "name", to="main"), "one container must be named trainer"),
        (changed(*CONTAINERS, to=[]), "spec.workers.template.spec.containers"),
        (changed("spec", "workers", "replicas", to=0), "spec.workers.replicas"),
        (changed("spec", "checkpoint", "uri", to="bucket/x"), "spec.checkpoint.uri"),
        (changed("spec", "checkpoint", "interval", to="sometimes"), "spec.checkpoint.interval"),
        (changed("spec", "workers", "replicsa", to=2), "replicsa"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_bad_run_is_refused_with_the_fields_name(run: dict[str, Any], said: str) -> None:
    """kubectl apply answers at once, naming the field or what is to be done."""
    assert said in problems(run)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("checkpoint", "uri"), "s3://bucket/other", "checkpoint.uri cannot be changed"),
        (("workers", "ranksPerWorker"), 8, "ranksPerWorker cannot be changed"),
        (("managedBy",), "kueue.x-k8s.io/multikueue", "managedBy cannot be changed"),
    ],
)
def test_what_a_run_stands_on_cannot_be_changed(path: tuple[str, ...], value: Any, said: str) -> None:
    """An edit that would cut the run off from its checkpoints or its pods is refused, and says what to do instead."""
    assert said in problems(changed("spec", *path, to=value), sample())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("workers", "replicas"), 8),
        (("suspend",), True),
        (("checkpoint", "credentialsSecret"), "rotated"),
        (("checkpoint", "interval"), "100 steps"),
        ((*CONTAINERS[1:], 0, "image"), "clio:2"),
    ],
)
def test_what_may_change_while_a_run_lives_is_accepted(path: tuple[Any, ...], value: Any) -> None:
    """Replicas, images, intervals and credentials change in place."""
    assert problems(changed("spec", *path, to=value), sample()) == ""


def test_the_template_keeps_every_field_of_a_pod() -> None:
    """Nothing that a PodTemplateSpec may hold is pruned."""
    run = sample()
    pod = run["spec"]["workers"]["template"]
    pod["metadata"] = {"labels": {"team": "clio"}, "annotations": {"a/b": "c"}}
    pod["spec"] |= {"nodeSelector": {"gpu": "h100"}, "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}]}
    pod["spec"]["containers"][0]["resources"] = {"limits": {"nvidia.com/gpu": 8}}
    stored, unknown = Schema(schema()).admit(run)
    assert (stored["spec"]["workers"]["template"], unknown) == (pod, [])


def test_every_field_has_a_description() -> None:
    """`kubectl explain` answers for every field of spec and status."""
    silent = [path for path, below in walk(schema()) if path.count(".") > 1 and not below.get("description")]
    assert silent == [".spec.workers.template.spec.containers"] or silent == []


def test_the_columns_say_what_an_operator_asks_first() -> None:
    """`kubectl get trun` shows phase, step, attempt, recoveries, checkpoint, goodput and age; -o wide shows more."""
    columns = crd()["spec"]["versions"][0]["additionalPrinterColumns"]
    narrow = [each["name"] for each in columns if not each.get("priority")]
    wide = [each["name"] for each in columns if each.get("priority")]
    assert narrow == ["Phase", "Step", "Attempt", "Recoveries", "Checkpoint", "Goodput", "Age"]
    assert wide == ["Workers", "Loss", "Incident"]


def test_every_column_reads_a_field_that_exists() -> None:
    """A column over a misspelt path would stay empty for ever."""
    known = {path.replace("[]", "") for path, _ in walk(schema())} | {".metadata.creationTimestamp"}
    columns = crd()["spec"]["versions"][0]["additionalPrinterColumns"]
    assert [each["name"] for each in columns if each["jsonPath"].replace("[-1:]", "") not in known] == []


def test_the_schema_is_structural() -> None:
    """Every node has a type, and nothing beside `properties` opens a hole in the schema but the pod template."""
    nodes = [("", schema()), *walk(schema())]
    assert [path for path, below in nodes if "type" not in below] == []
    open_nodes = {path for path, below in nodes if below.get("x-kubernetes-preserve-unknown-fields")}
    assert {path.split(".template")[0] for path in open_nodes} == {".spec.workers"}


RUNS = sorted([*(ROOT / "examples").rglob("*.yaml"), *(ROOT / "tests/e2e").rglob("*.yaml")])


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_run_that_is_shown_to_users_is_accepted(path: Path) -> None:
    """Each TrainingRun in examples and end-to-end tests passes the schema, its rules, and the parser."""
    for each in yaml.safe_load_all(path.read_text()):
        if each and each.get("kind") == "TrainingRun":
            assert problems(each) == ""
            parse_spec(each["spec"])
