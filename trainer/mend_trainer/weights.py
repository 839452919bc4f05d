"""Weights as safetensors files, planned before a byte is read: which tensor goes where, and each file's header."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

# What a header calls each type, and how long one number is. A type that is missing here cannot be exported.
_KINDS: Final[dict[str, tuple[str, int]]] = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}
_ALIGNMENT: Final = 8
INDEX_NAME: Final = "model.safetensors.index.json"


class UnknownType(ValueError):
    """A type that safetensors has no name for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One tensor of the export; `dtype` is torch's name of what is written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Length of its data."""
        return math.prod(self.shape) * _kind(self)[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """One file, whose tensors lie in this order without gaps."""

    name: str
    weights: tuple[Weight, ...]

    @property
    def header(self) -> bytes:
        """What precedes the data."""
        told: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without it transformers refuses the file
        start = 0
        for each in self.weights:
            told[each.name] = {
                "dtype": _kind(each)[0],
                "shape": list(each.shape),
                "data_offsets": [start, start + each.bytes],
            }
            start += each.bytes
        raw = json.dumps(told, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % _ALIGNMENT)
        return len(raw).to_bytes(8, "little") + raw

    @property
    def bytes(self) -> int:
        """Length of the whole file."""
        return len(self.header) + sum(each.bytes for each in self.weights)


def plan_files(weights: Iterable[Weight], most_bytes: int) -> tuple[WeightFile, ...]:
    """The weights in files of at most so many bytes of data, a larger tensor in one of its own.

    Raises `UnknownType`. Within a file wider types come first, so that every tensor is aligned to its own.
    """
    groups: list[list[Weight]] = []
    room = 0
    for each in weights:
        if not groups or each.bytes > room:
            groups.append([])
            room = most_bytes
        groups[-1].append(each)
        room -= each.bytes
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    return tuple(
        WeightFile(name=name, weights=tuple(sorted(group, key=lambda each: -_kind(each)[1])))
        for name, group in zip(names, groups, strict=False)
    )


def index_of(files: Sequence[WeightFile]) -> Mapping[str, Any]:
    """Which file holds which tensor; only several files need it."""
    return {
        "metadata": {"total_size": sum(each.bytes for file in files for each in file.weights)},
        "weight_map": {each.name: file.name for file in files for each in file.weights},
    }


def batches(file: WeightFile, most_bytes: int) -> Iterable[tuple[Weight, ...]]:
    """Its tensors in order, as many at a time as may be in memory together; a larger one alone."""
    held: list[Weight] = []
    for each in file.weights:
        if held and sum(other.bytes for other in held) + each.bytes > most_bytes:
            yield tuple(held)
            held = []
        held.append(each)
    if held:
        yield tuple(held)


def _kind(weight: Weight) -> tuple[str, int]:
    try:
        return _KINDS[weight.dtype]
    except KeyError:
        raise UnknownType(f"{weight.name}: safetensors has no type {weight.dtype}") from None
