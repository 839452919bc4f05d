"""The chart renders to what manifests/ holds, in a part of Helm's language that we render as Helm does."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts/mend"
EVERYTHING = {"watchNamespace": "ml", "metrics": {"serviceMonitor": True, "alerts": True, "dashboard": True}}


def generator() -> ModuleType:
    """manifests/generate.py, which is a program and no package."""
    spec = importlib.util.spec_from_file_location("generate_manifests", ROOT / "manifests/generate.py")
    assert spec
    assert spec.loader
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


generate = generator()


def rendered(**values: Any) -> dict[tuple[str, str], dict[str, Any]]:
    """The chart's objects by kind and name."""
    return {(each["kind"], each["metadata"]["name"]): each for each in generate.objects(values)}


def test_the_manifests_are_those_of_the_chart() -> None:
    """What kustomize applies is what Helm installs; `make manifests` makes it so."""
    assert generate.differences(ROOT / "manifests") == []


def test_a_stale_missing_or_surplus_manifest_is_noticed(tmp_path: Path) -> None:
    """The check fails whichever way the two drift apart."""
    generate.write(tmp_path)
    assert generate.differences(tmp_path) == []
    (tmp_path / "rbac.yaml").write_text("kind: Nothing\n")
    (tmp_path / "namespace.yaml").unlink()
    (tmp_path / "more.yaml").write_text("")
    assert generate.differences(tmp_path) == ["more.yaml", "namespace.yaml", "rbac.yaml"]


@pytest.mark.needs_kubectl
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize(("folder", "kinds"), [("manifests", 14), ("manifests/monitoring", 3)])
def test_a_real_kubectl_reads_them(folder: str, kinds: int) -> None:
    """`kubectl kustomize` gives every object once."""
    built = subprocess.run(["kubectl", "kustomize", ROOT / folder], capture_output=True, text=True, check=True)
    objects = [each for each in yaml.safe_load_all(built.stdout) if each]
    assert len(objects) == kinds == len({(each["kind"], each["metadata"]["name"]) for each in objects})


@pytest.mark.skipif(shutil.which("helm") is None, reason="helm is not installed")
@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_a_real_helm_renders_the_same(values: dict[str, Any], tmp_path: Path) -> None:
    """Our few lines of rendering agree with Helm itself, object by object."""
    given = tmp_path / "values.yaml"
    given.write_text(json.dumps(values))
    command = ["helm", "template", "mend", CHART, "--namespace", generate.NAMESPACE, "--values", given]
    built = subprocess.run(command, capture_output=True, text=True, check=True)

    def in_order(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(objects, key=lambda each: (each["kind"], each["metadata"]["name"]))

    theirs = [each for each in yaml.safe_load_all(built.stdout) if each]
    assert in_order(theirs) == in_order(generate.objects(values))


@pytest.mark.parametrize(
    "template",
    [
        "a: {{ .Values.missing }}\n",
        "a: {{ .Values.image | upper }}\n",
        "{{- range .Values.tolerations }}\n",
        "{{- if .Values.image }}\n",
    ],
)
def test_what_only_helm_could_render_is_refused(template: str) -> None:
    """A template that leaves the small language fails here and not in a cluster."""
    with pytest.raises(generate.UnknownTemplate):
        generate.render(template, generate.context({}), CHART)


def test_conditions_choose_lines_and_nest() -> None:
    """if, else and end work as in Helm."""
    template = "{{- if .Values.image }}\na: 1\n{{- if .Values.watchNamespace }}\nb: 1\n{{- else }}\nc: 1\n"
    template += "{{- end }}\n{{- end }}\n"
    assert generate.render(template, generate.context({}), CHART) == "a: 1\nc: 1\n"
    assert generate.render(template, generate.context({"watchNamespace": "ml"}), CHART) == "a: 1\nb: 1\n"
    assert generate.render(template, generate.context({"image": ""}), CHART) == ""


def test_the_values_and_their_schema_name_the_same_things() -> None:
    """A value without schema could not be set, and one without default could not be found."""

    def names(values: dict[str, Any], schema: dict[str, Any], path: str = "") -> None:
        known = set(schema["properties"]) - {"global"}
        assert set(values) == known, path
        for name, below in schema["properties"].items():
            if "properties" in below:
                names(values[name], below, f"{path}.{name}")

    names(yaml.safe_load((CHART / "values.yaml").read_text()), json.loads((CHART / "values.schema.json").read_text()))


# ------------------------------------------------------------------------------------------------ rights and hardening
def rules(**values: Any) -> list[dict[str, Any]]:
    """Every rule of every role that the controller itself is given."""
    roles = [each for (kind, name), each in rendered(**values).items() if "Role" in kind and name.startswith("mend-c")]
    return [rule for role in roles for rule in role.get("rules", [])]


def test_no_right_is_a_wildcard() -> None:
    """Groups, resources and verbs are all spelt out."""
    assert all("*" not in words for rule in rules() for words in rule.values())


def test_secrets_are_never_listed_and_pods_never_entered() -> None:
    """Secrets are read by name only; there is no exec, no impersonation, no escalation."""
    granted = {(resource, verb) for rule in rules() for resource in rule["resources"] for verb in rule["verbs"]}
    assert {verb for resource, verb in granted if resource == "secrets"} == {"get", "create"}
    assert not {"pods/exec", "pods/attach", "pods/portforward", "roles", "clusterroles"} & {name for name, _ in granted}
    assert not {"impersonate", "escalate", "bind"} & {verb for _, verb in granted}


def test_a_single_namespace_takes_no_rights_in_others() -> None:
    """With watchNamespace the rights over runs, pods and secrets are bound in that namespace alone."""
    objects = rendered(watchNamespace="ml")
    binding = objects["RoleBinding", "mend-controller"]
    assert binding["metadata"]["namespace"] == "ml"
    assert ("ClusterRoleBinding", "mend-controller") not in objects
    assert "--namespace=ml" in container(objects)["args"]
    assert ("ClusterRoleBinding", "mend-controller") in rendered()


def container(objects: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    """The controller's container."""
    (only,) = objects["Deployment", "mend-controller"]["spec"]["template"]["spec"]["containers"]
    return dict(only)


def test_the_controller_runs_locked_down() -> None:
    """Not root, no capabilities, nothing writable but its volumes: `restricted`, as the namespace asks."""
    objects = rendered()
    pod = objects["Deployment", "mend-controller"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container(objects)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    written = {mount["mountPath"] for mount in container(objects)["volumeMounts"] if not mount.get("readOnly")}
    assert written == {"/var/lib/mend", "/tmp"}


def test_every_volume_is_mounted_and_every_port_is_named() -> None:
    """Mounts refer to volumes, probes and services to ports that exist."""
    objects = rendered(**EVERYTHING)
    pod = objects["Deployment", "mend-controller"]["spec"]["template"]["spec"]
    mounts = {each["name"] for each in container(objects)["volumeMounts"]}
    assert mounts == {each["name"] for each in pod["volumes"]}
    ports = {each["name"] for each in container(objects)["ports"]}
    probes = {container(objects)[f"{name}Probe"]["httpGet"]["port"] for name in ("startup", "liveness", "readiness")}
    service = {each["targetPort"] for each in objects["Service", "mend-controller"]["spec"]["ports"]}
    monitor = {each["port"] for each in objects["ServiceMonitor", "mend-controller"]["spec"]["endpoints"]}
    assert ports == probes == service == monitor


def test_the_command_line_knows_every_flag_that_the_deployment_gives() -> None:
    """A flag that was renamed in the code would be a crash loop in the cluster."""
    from mend.cli import parser

    arguments = container(rendered(watchNamespace="ml"))["args"]
    options = vars(parser().parse_args(arguments))
    assert options["lease_namespace"] == generate.NAMESPACE
    assert options["namespace"] == "ml"


def test_what_may_be_changed_by_name_is_what_is_used() -> None:
    """The role names the leader's Lease and the book of strikes; others could be neither read nor written."""
    from mend.cli import LEASE_NAME
    from mend.strikebook import BOOK_NAME

    named = {rule["resources"][0]: rule["resourceNames"] for rule in rules() if "resourceNames" in rule}
    assert named == {"leases": [LEASE_NAME], "configmaps": [BOOK_NAME]}


def test_labels_select_the_pods_they_are_meant_to() -> None:
    """Service, budget, monitor and deployment select by the label that the pods carry."""
    objects = rendered(**EVERYTHING)
    labels = objects["Deployment", "mend-controller"]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        objects["Deployment", "mend-controller"]["spec"]["selector"]["matchLabels"],
        objects["PodDisruptionBudget", "mend-controller"]["spec"]["selector"]["matchLabels"],
        objects["Service", "mend-controller"]["spec"]["selector"],
    ]
    assert all(each.items() <= labels.items() for each in selectors)


def test_chart_and_package_have_one_version() -> None:
    """The chart's image is that of this release."""
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    image = yaml.safe_load((CHART / "values.yaml").read_text())["image"]
    assert chart["version"] == chart["appVersion"] == version[1] == image.rpartition(":")[2]
