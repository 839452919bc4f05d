"""Pure: what a container is to be run with, from the pod's spec and the Secrets and ConfigMaps it names.

There is no mount namespace here: a volume is a directory of the pod, and a mount path is only a name for it. So
every mention of a mount path in command, args, env values and workingDir is replaced by the directory it stands for,
and each volume's directory is told in `MEND_LOCAL_VOLUME_<NAME>`. A program that has a mount path built in does not
find it.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

Json = dict[str, Any]

VOLUME_ENV: Final = "MEND_LOCAL_VOLUME_"
_VARIABLE = re.compile(r"\$(\$|\(([-._a-zA-Z][-._a-zA-Z0-9]*)\))")
_SUBSCRIPT = re.compile(r"metadata\.(labels|annotations)\['([^']+)'\]")
_MULTIPLES: Final = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}


class ConfigError(ValueError):
    """The container cannot be made as its spec says; Kubernetes calls it CreateContainerConfigError."""


@dataclass(frozen=True, slots=True)
class Source:
    """A Secret or ConfigMap that a pod names; `optional` ones may be absent."""

    kind: str  # "secrets" or "configmaps"
    name: str
    optional: bool = False


@dataclass(frozen=True, slots=True)
class PodFacts:
    """What the pod does not know of itself before it runs."""

    pod_ip: str
    host_ip: str


@dataclass(frozen=True, slots=True)
class Command:
    """What to execute: `words[0]` is still to be looked up in PATH."""

    words: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False)  # may hold secrets
    cwd: str | None


def sources(pod: Json) -> list[Source]:
    """Every Secret and ConfigMap that the pod's containers and volumes name."""
    found: list[Source] = []
    for container in all_containers(pod):
        for each in container.get("envFrom") or []:
            found += _reference("secrets", each.get("secretRef")) + _reference("configmaps", each.get("configMapRef"))
        for each in container.get("env") or []:
            origin = each.get("valueFrom") or {}
            found += _reference("secrets", origin.get("secretKeyRef"))
            found += _reference("configmaps", origin.get("configMapKeyRef"))
    for volume in pod["spec"].get("volumes") or []:
        found += _reference("secrets", volume.get("secret"), key="secretName")
        found += _reference("configmaps", volume.get("configMap"))
    return list(dict.fromkeys(found))


def _reference(kind: str, reference: Json | None, *, key: str = "name") -> list[Source]:
    return [Source(kind, reference[key], bool(reference.get("optional")))] if reference and reference.get(key) else []


def all_containers(pod: Json) -> list[Json]:
    """Init containers first, as they run."""
    return [*(pod["spec"].get("initContainers") or []), *pod["spec"]["containers"]]


def contents(source: Json) -> dict[str, bytes]:
    """The entries of a Secret or ConfigMap."""
    if source.get("kind") == "Secret":
        return {key: base64.b64decode(value) for key, value in (source.get("data") or {}).items()}
    plain = {key: value.encode() for key, value in (source.get("data") or {}).items()}
    return plain | {key: base64.b64decode(value) for key, value in (source.get("binaryData") or {}).items()}


def command_of(
    container: Json,
    pod: Json,
    facts: PodFacts,
    found: Mapping[Source, Mapping[str, bytes]],
    mounts: Mapping[str, Path],
    base_env: Mapping[str, str],
) -> Command:
    """Everything that a container is started with. Raises `ConfigError` when something it names is missing.

    `found` holds the entries of the sources that exist, `mounts` the directory behind each mount path, and `base_env`
    what the image would bring.
    """
    words = [*(container.get("command") or []), *(container.get("args") or [])]
    if not container.get("command"):
        raise ConfigError(
            f"container {container['name']!r} has no command: mend local runs no image, so it cannot know the image's "
            "entrypoint; write the command in the pod"
        )
    env = dict(base_env) | {"HOSTNAME": pod["metadata"]["name"]} | _volume_env(container, mounts)
    for each in container.get("envFrom") or []:
        env |= _env_from(each, found, container["name"])
    for each in container.get("env") or []:
        value = _env_value(each, pod, facts, found, env, container["name"])
        if value is not None:
            env[each["name"]] = through_mounts(value, mounts)
    cwd = container.get("workingDir")
    return Command(
        words=tuple(through_mounts(expand(word, env), mounts) for word in words),
        env=env,
        cwd=through_mounts(cwd, mounts) if cwd else None,
    )


def expand(text: str, env: Mapping[str, str]) -> str:
    """Replace `$(NAME)` by what `env` holds; unknown names and `$$(NAME)` stay, the latter with one `$`."""

    def value(found: re.Match[str]) -> str:
        return "$" if found[1] == "$" else env.get(found[2], found[0])

    return _VARIABLE.sub(value, text)


def through_mounts(text: str, mounts: Mapping[str, Path]) -> str:
    """Replace each mount path that `text` mentions, as a path or at the head of one, by the real directory."""
    if not mounts:
        return text
    longest_first = sorted(mounts, key=len, reverse=True)
    paths = "|".join(re.escape(path) for path in longest_first)
    # Not in the middle of another path (/a/data for /data, s3://bucket/data), but after --dir= or file://.
    mention = re.compile(rf"(?<![\w./-])(file://)?({paths})(?![\w.-])")
    return mention.sub(lambda found: (found[1] or "") + str(mounts[found[2]]), text)


def _volume_env(container: Json, mounts: Mapping[str, Path]) -> dict[str, str]:
    return {
        VOLUME_ENV + re.sub(r"\W", "_", each["name"]).upper(): str(mounts[mount_path(each)])
        for each in container.get("volumeMounts") or []
    }


def mount_path(mount: Json) -> str:
    """The path of a volumeMount without a slash at its end."""
    return str(mount["mountPath"]).rstrip("/") or "/"


def _env_from(each: Json, found: Mapping[Source, Mapping[str, bytes]], container: str) -> dict[str, str]:
    prefix = each.get("prefix") or ""
    wanted = _reference("secrets", each.get("secretRef")) + _reference("configmaps", each.get("configMapRef"))
    return {
        prefix + key: value.decode(errors="replace")
        for source in wanted
        for key, value in _entries(source, found, container).items()
    }


def _entries(source: Source, found: Mapping[Source, Mapping[str, bytes]], container: str) -> Mapping[str, bytes]:
    if source in found:
        return found[source]
    if source.optional:
        return {}
    kind = {"secrets": "secret", "configmaps": "configmap"}[source.kind]
    raise ConfigError(f'{kind} "{source.name}" not found (container {container!r})')


def _env_value(
    each: Json,
    pod: Json,
    facts: PodFacts,
    found: Mapping[Source, Mapping[str, bytes]],
    env: Mapping[str, str],
    container: str,
) -> str | None:
    origin = each.get("valueFrom")
    if not origin:
        return expand(each.get("value") or "", env)
    if "fieldRef" in origin:
        return _field(origin["fieldRef"]["fieldPath"], pod, facts, each["name"])
    for kind, key in (("secrets", "secretKeyRef"), ("configmaps", "configMapKeyRef")):
        if reference := origin.get(key):
            [source] = _reference(kind, reference)
            value = _entries(source, found, container).get(reference["key"])
            if value is None and not source.optional:
                raise ConfigError(f"couldn't find key {reference['key']} in {kind} {source.name!r} for {each['name']}")
            return None if value is None else value.decode(errors="replace")
    if "resourceFieldRef" in origin:
        return _resource(origin["resourceFieldRef"], pod, container)
    raise ConfigError(f"env {each['name']!r}: valueFrom {sorted(origin)} is not supported by mend local")


def _field(path: str, pod: Json, facts: PodFacts, name: str) -> str:
    metadata, spec = pod["metadata"], pod["spec"]
    plain = {
        "metadata.name": metadata["name"],
        "metadata.namespace": metadata["namespace"],
        "metadata.uid": metadata["uid"],
        "spec.nodeName": spec.get("nodeName", ""),
        "spec.serviceAccountName": spec.get("serviceAccountName", "default"),
        "status.podIP": facts.pod_ip,
        "status.podIPs": facts.pod_ip,
        "status.hostIP": facts.host_ip,
        "status.hostIPs": facts.host_ip,
    }
    if path in plain:
        return str(plain[path])
    if subscript := _SUBSCRIPT.fullmatch(path):
        return str((metadata.get(subscript[1]) or {}).get(subscript[2], ""))
    raise ConfigError(f"env {name!r}: fieldPath {path!r} is not supported; known are {', '.join(sorted(plain))}")


def _resource(reference: Json, pod: Json, container: str) -> str:
    where, _, resource = str(reference["resource"]).partition(".")
    name = reference.get("containerName", container)
    for each in all_containers(pod):
        if each["name"] == name and where in ("limits", "requests"):
            amount = ((each.get("resources") or {}).get(where) or {}).get(resource)
            if amount is not None:
                divisor = quantity(str(reference.get("divisor") or "1")) or 1
                return str(-(-quantity(str(amount)) // divisor))
    raise ConfigError(f"resourceFieldRef {reference['resource']!r} of container {name!r} is not set in its resources")


def quantity(text: str) -> int:
    """A Kubernetes quantity as a whole number, rounded up: "1Gi", "500m", "2e3"."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)(m|k|Ki|[MGT]i?|)", text)
    if not found:
        raise ConfigError(f"quantity {text!r} is none; expected for example 500m, 2 or 1Gi")
    amount = float(found[1]) / 1000 if found[2] == "m" else float(found[1]) * _MULTIPLES[found[2]]
    return math.ceil(amount)


def memory_limit_bytes(container: Json) -> int | None:
    """The container's memory limit."""
    limit = ((container.get("resources") or {}).get("limits") or {}).get("memory")
    return None if limit is None else quantity(str(limit))
