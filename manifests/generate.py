"""Makes manifests/ (for `kubectl apply -k`) from the chart, or with --check says where the two differ.

The chart keeps to a small part of Helm's language (docs/decisions/0001-chart-without-helm.md), so that these few lines
render it exactly as Helm does: `{{ .Values.a.b }}`, `.Release.Namespace`, `.Chart.AppVersion`, `.Files.Get "path"`, the
filters `quote`, `toJson` and `fromYaml`, and `if`/`else`/`end` on lines of their own. Anything else is refused.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).resolve().parent.parent
CHART: Final = ROOT / "charts/mend"
NAMESPACE: Final = "mend-system"
HEADER: Final = "# Made from charts/mend by `make manifests`; edit there.\n"

_LINE = re.compile(r"\{\{- (if (?P<path>\.Values\.[\w.]+)|else|end) \}\}")
_INLINE = re.compile(r"\{\{ (?P<source>[^|{}]+?)(?P<filters>( \| \w+)*) \}\}")
_FILE = re.compile(r'\.Files\.Get "(?P<name>[\w./-]+)"')


class UnknownTemplate(ValueError):
    """The chart uses something that only Helm itself could render."""


def render(template: str, context: Mapping[str, Any], files: Path) -> str:
    """One template with its values filled in."""
    return "".join(_INLINE.sub(lambda found: _filled(found, context, files), line) for line in _kept(template, context))


def _kept(template: str, context: Mapping[str, Any]) -> Iterator[str]:
    """The lines whose conditions hold. Conditions nest."""
    shown = [True]
    for line in template.splitlines(keepends=True):
        directive = _LINE.fullmatch(line.strip())
        if directive is None:
            if "{{-" in line or "-}}" in line:
                raise UnknownTemplate(line.strip())
            if all(shown):
                yield line
        elif directive["path"]:
            shown.append(bool(_looked_up(directive["path"], context)))
        elif directive[1] == "else":
            shown[-1] = not shown[-1]
        else:
            shown.pop()
    if len(shown) != 1:
        raise UnknownTemplate("an if without its end")


def _filled(found: re.Match[str], context: Mapping[str, Any], files: Path) -> str:
    named = _FILE.fullmatch(found["source"])
    value = (files / named["name"]).read_text() if named else _looked_up(found["source"], context)
    for each in found["filters"].split(" | ")[1:]:
        value = _filtered(each, value)
    return value if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)


def _looked_up(path: str, context: Mapping[str, Any]) -> Any:
    value: Any = context
    for name in path.split(".")[1:]:
        if not isinstance(value, Mapping) or name not in value:
            raise UnknownTemplate(path)
        value = value[name]
    return value


def _filtered(name: str, value: Any) -> Any:
    match name:
        case "toJson":
            return json.dumps(value, sort_keys=True, separators=(",", ":"))
        case "quote":
            return json.dumps(str(value))
        case "fromYaml":
            return yaml.safe_load(value)
    raise UnknownTemplate(f"filter {name}")


def context(values: Mapping[str, Any], namespace: str = NAMESPACE) -> dict[str, Any]:
    """What templates can refer to: the chart's own values with these laid over them."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    merged = _merged(yaml.safe_load((CHART / "values.yaml").read_text()), values)
    return {"Values": merged, "Release": {"Namespace": namespace}, "Chart": {"AppVersion": chart["appVersion"]}}


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    mixed = {
        name: _merged(below[name], value)
        if isinstance(value, Mapping) and isinstance(below.get(name), Mapping)
        else value
        for name, value in above.items()
    }
    return {**below, **mixed}


def objects(values: Mapping[str, Any], namespace: str = NAMESPACE) -> list[dict[str, Any]]:
    """Everything that `helm template` would give with these values, in the order of the template files."""
    filled = context(values, namespace)
    texts = (render(path.read_text(), filled, CHART) for path in sorted((CHART / "templates").glob("*.yaml")))
    return [each for text in texts for each in yaml.safe_load_all(text) if each]


class _Dumper(yaml.SafeDumper):
    """Long texts as blocks, so that a dashboard can be read and compared."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _document(*many: Mapping[str, Any]) -> str:
    return HEADER + yaml.dump_all(many, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def _kustomization(*resources: str, **more: Any) -> str:
    return _document(
        {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": [*resources], **more}
    )


def manifests() -> dict[str, str]:
    """Every generated file by its path below manifests/."""
    plain = objects({})
    extra = [
        each
        for each in objects({"metrics": {"serviceMonitor": True, "alerts": True, "dashboard": True}})
        if each not in plain
    ]
    rbac = [each for each in plain if "rbac" in each["apiVersion"] or each["kind"] == "ServiceAccount"]
    rest = [each for each in plain if each not in rbac]
    namespace = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": NAMESPACE, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
    }
    crds = sorted((CHART / "crds").glob("*.yaml"))
    return {
        **{f"crds/{path.name}": HEADER + path.read_text() for path in crds},
        "crds/kustomization.yaml": _kustomization(*(path.name for path in crds)),
        "namespace.yaml": _document(namespace),
        "rbac.yaml": _document(*rbac),
        "controller.yaml": _document(*rest),
        "kustomization.yaml": _kustomization("crds", "namespace.yaml", "rbac.yaml", "controller.yaml"),
        "monitoring/kustomization.yaml": _kustomization("monitoring.yaml"),
        "monitoring/monitoring.yaml": _document(*extra),
    }


def differences(folder: Path) -> list[str]:
    """Generated files that are missing, stale, or no longer made."""
    wanted = manifests()
    present = {str(path.relative_to(folder)) for path in folder.rglob("*.yaml")}
    stale = [name for name, text in wanted.items() if name not in present or (folder / name).read_text() != text]
    return sorted({*stale, *(present - wanted.keys())})


def write(folder: Path) -> None:
    """Make all files anew."""
    for stale in (folder / "crds", folder / "monitoring"):
        shutil.rmtree(stale, ignore_errors=True)
    for name, text in manifests().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def main() -> int:
    """Write, or check."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    options.add_argument("--check", action="store_true", help="write nothing; fail if a file differs")
    folder = Path(__file__).resolve().parent
    if not options.parse_args().check:
        write(folder)
        return 0
    stale = differences(folder)
    if stale:
        print("manifests/ differs from the chart; run `make manifests`: " + ", ".join(stale), file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
