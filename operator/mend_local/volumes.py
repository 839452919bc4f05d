"""The directories behind a pod's volumes: made before its containers start, removed with the pod."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from mend_local.podspec import ConfigError, Json, Source, mount_path

SHARED_MEMORY: Final = Path("/dev/shm")


class Volumes:
    """The volumes of one pod below `root`; those in memory lie in /dev/shm, named by the cluster and the pod's uid."""

    def __init__(self, root: Path, cluster_id: str, uid: str) -> None:
        self._root = root
        self._memory = SHARED_MEMORY / f"mend-local-{cluster_id}-{uid}"
        self._places: dict[str, Path] = {}

    def make(self, pod: Json, found: Mapping[Source, Mapping[str, bytes]]) -> None:
        """Make every volume that is not there yet. Raises `ConfigError` for one that cannot be made."""
        for volume in pod["spec"].get("volumes") or []:
            if volume["name"] not in self._places:
                self._places[volume["name"]] = self._make(volume, found)

    def mounts_of(self, container: Json) -> dict[str, Path]:
        """The directory or file behind each of the container's mount paths."""
        mounts = {}
        for mount in container.get("volumeMounts") or []:
            if mount["name"] not in self._places:
                known = ", ".join(sorted(self._places)) or "none"
                raise ConfigError(f"volumeMounts name {mount['name']!r}; the pod's volumes are: {known}")
            place: Path = self._places[mount["name"]]
            if part := mount.get("subPath"):
                place = place / part
                if not place.exists():
                    place.mkdir(parents=True)
            mounts[mount_path(mount)] = place
        return mounts

    def remove(self) -> None:
        """Remove what was made; host paths stay."""
        shutil.rmtree(self._root, ignore_errors=True)
        shutil.rmtree(self._memory, ignore_errors=True)

    def _make(self, volume: Json, found: Mapping[Source, Mapping[str, bytes]]) -> Path:
        name = volume["name"]
        if "hostPath" in volume:
            return _host_path(volume["hostPath"], name)
        if "emptyDir" in volume:
            in_memory = (volume["emptyDir"] or {}).get("medium") == "Memory"
            place: Path = (self._memory if in_memory and SHARED_MEMORY.is_dir() else self._root) / name
            place.mkdir(parents=True, exist_ok=True)
            return place
        for kind, field, key in (("secrets", "secret", "secretName"), ("configmaps", "configMap", "name")):
            if field in volume:
                reference = volume[field]
                source = Source(kind, reference[key], bool(reference.get("optional")))
                return self._write_entries(name, reference, source, found)
        kinds = ", ".join(sorted(set(volume) - {"name"})) or "nothing"
        raise ConfigError(
            f"volume {name!r} is {kinds}; mend local has emptyDir, hostPath, secret and configMap: use one of them"
        )

    def _write_entries(
        self, name: str, reference: Json, source: Source, found: Mapping[Source, Mapping[str, bytes]]
    ) -> Path:
        if source not in found and not source.optional:
            raise ConfigError(f'{source.kind.removesuffix("s")} "{source.name}" not found (volume {name!r})')
        entries = found.get(source, {})
        items = reference.get("items") or [{"key": key, "path": key} for key in entries]
        place = self._root / name
        place.mkdir(parents=True, exist_ok=True)
        for item in items:
            if item["key"] not in entries:
                raise ConfigError(f"volume {name!r}: {source.name!r} has no key {item['key']!r}")
            target = place / item["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch(mode=0o600)  # before the content: a secret is at no moment readable by others
            target.write_bytes(entries[item["key"]])
        return place


def _host_path(host_path: Json, name: str) -> Path:
    place = Path(host_path["path"])
    kind = host_path.get("type") or ""
    if kind == "DirectoryOrCreate":
        place.mkdir(parents=True, exist_ok=True)
    elif kind == "FileOrCreate":
        place.touch()
    elif kind == "Directory" and not place.is_dir():
        raise ConfigError(f"volume {name!r}: hostPath {place} is no directory")
    elif kind == "File" and not place.is_file():
        raise ConfigError(f"volume {name!r}: hostPath {place} is no file")
    return place


def remove_shared_memory(cluster_id: str) -> None:
    """Remove the volumes in memory that an earlier life of this cluster left behind."""
    for place in SHARED_MEMORY.glob(f"mend-local-{cluster_id}-*"):
        shutil.rmtree(place, ignore_errors=True)
