"""What containers are run with: env, expansion, mounts, quantities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mend_local.podspec import ConfigError, PodFacts, Source, command_of, expand, quantity, sources, through_mounts
from pod_host import a_pod

FACTS = PodFacts(pod_ip="127.70.0.1", host_ip="127.0.0.1")
TOKEN = Source("secrets", "token")


def run_with(container: dict[str, Any], **found: dict[str, bytes]) -> Any:
    """The command of a container, with Secrets by name."""
    container = {"name": "main", "command": ["run"], **container}
    entries = {Source("secrets", name): value for name, value in found.items()}
    return command_of(container, a_pod(container), FACTS, entries, {}, {"PATH": "/bin"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$(A)", "1"),
        ("x$(A)y$(B)z", "x1y2z"),
        ("$(UNKNOWN)", "$(UNKNOWN)"),
        ("$$(A)", "$(A)"),
        ("$$", "$"),
        ("cost $5", "cost $5"),
    ],
)
def test_variables_are_expanded_as_kubernetes_does(text: str, expected: str) -> None:
    """Known variables are replaced, unknown ones stay, and a double dollar is one that is not a variable."""
    assert expand(text, {"A": "1", "B": "2"}) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("metadata.name", "worker-0"),
        ("metadata.namespace", "default"),
        ("metadata.labels['mend.dev/worker']", "0"),
        ("metadata.annotations['note']", "kept"),
        ("metadata.labels['none']", ""),
        ("status.podIP", "127.70.0.1"),
        ("status.hostIP", "127.0.0.1"),
        ("spec.nodeName", "mend-local-0"),
    ],
)
def test_fields_of_the_pod(path: str, expected: str) -> None:
    """Every field that a pod may ask for about itself."""
    env = [{"name": "F", "valueFrom": {"fieldRef": {"fieldPath": path}}}]
    assert run_with({"env": env}).env["F"] == expected


def test_a_field_that_is_unknown() -> None:
    """A field path that is not supported is refused with those that are."""
    env = [{"name": "F", "valueFrom": {"fieldRef": {"fieldPath": "spec.color"}}}]
    with pytest.raises(ConfigError, match=r"fieldPath 'spec.color' is not supported; known are metadata.name"):
        run_with({"env": env})


def test_env_from_secrets_comes_before_env() -> None:
    """Whole Secrets come first, with their prefix; env overrides them and may refer to them."""
    command = run_with(
        {
            "envFrom": [{"prefix": "S3_", "secretRef": {"name": "token"}}],
            "env": [{"name": "URL", "value": "http://$(S3_HOST)"}, {"name": "S3_KEY", "value": "mine"}],
            "args": ["--url=$(URL)"],
        },
        token={"HOST": b"store", "KEY": b"theirs"},
    )
    assert (command.env["URL"], command.env["S3_KEY"]) == ("http://store", "mine")
    assert command.words == ("run", "--url=http://store")


def test_optional_sources_may_be_absent() -> None:
    """An optional key or Secret that is absent leaves its variable unset; one that is not optional is an error."""
    reference = {"name": "token", "key": "k"}
    optional = {"name": "A", "valueFrom": {"secretKeyRef": reference | {"optional": True}}}
    assert "A" not in run_with({"env": [optional]}).env
    with pytest.raises(ConfigError, match='secret "token" not found'):
        run_with({"env": [{"name": "A", "valueFrom": {"secretKeyRef": reference}}]})
    with pytest.raises(ConfigError, match="couldn't find key k"):
        run_with({"env": [{"name": "A", "valueFrom": {"secretKeyRef": reference}}]}, token={})


def test_a_container_without_a_command() -> None:
    """There is no image to take the entrypoint from, and the error says so."""
    with pytest.raises(ConfigError, match="write the command in the pod"):
        run_with({"command": []})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/data", "/real"),
        ("/data/x", "/real/x"),
        ("--dir=/data/x", "--dir=/real/x"),
        ("file:///data/x", "file:///real/x"),
        ("/data:/data/b", "/real:/real/b"),
        ("/data-two", "/data-two"),
        ("/database", "/database"),
        ("/a/data", "/a/data"),
        ("s3://bucket/data/x", "s3://bucket/data/x"),
        ("/data/deep/x", "/deeper/x"),
    ],
)
def test_mount_paths_are_replaced_where_they_are_paths(text: str, expected: str) -> None:
    """A mount path is replaced wherever it is meant, the longest first, and nowhere else."""
    assert through_mounts(text, {"/data": Path("/real"), "/data/deep": Path("/deeper")}) == expected


def test_every_source_is_found() -> None:
    """Sources are collected from env, envFrom and volumes, each once."""
    container = {
        "name": "main",
        "envFrom": [{"configMapRef": {"name": "settings", "optional": True}}],
        "env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "token", "key": "k"}}}],
    }
    pod = a_pod(container, volumes=[{"name": "v", "secret": {"secretName": "token"}}, {"name": "w", "emptyDir": {}}])
    assert sources(pod) == [Source("configmaps", "settings", optional=True), TOKEN]


@pytest.mark.parametrize(
    ("text", "expected"), [("1Gi", 2**30), ("500m", 1), ("2", 2), ("1.5Ki", 1536), ("2e3", 2000), ("10M", 10**7)]
)
def test_quantities(text: str, expected: int) -> None:
    """Quantities as Kubernetes writes them, rounded up to whole units."""
    assert quantity(text) == expected


def test_a_quantity_that_is_none() -> None:
    """What is no quantity is refused with an example of one."""
    with pytest.raises(ConfigError, match="expected for example"):
        quantity("much")
