"""Any state_dict as plain JSON and a flat dict of tensors, and back exactly: tuples, NaN and integer keys included."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch

_TENSOR: Final = "$tensor"
_TUPLE: Final = "$tuple"
_FLOAT: Final = "$float"  # JSON has neither NaN nor infinities
_ITEMS: Final = "$items"  # nor keys that are no strings


class NotPlain(TypeError):
    """A state holds something that cannot be saved without pickling it."""


def split(tree: Any, where: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """The JSON part of `tree` and its tensors by dotted path; raises `NotPlain` naming the path below `where`."""
    tensors: dict[str, torch.Tensor] = {}
    return _encode(tree, "", where, tensors), tensors


def join(plain: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The tree that `split` took apart."""
    match plain:
        case list():
            return [join(each, tensors) for each in plain]
        case dict() if len(plain) == 1:
            ((key, value),) = plain.items()
            match key:
                case "$tensor":
                    return tensors[value]
                case "$tuple":
                    return tuple(join(each, tensors) for each in value)
                case "$float":
                    return float(value)
                case "$items":
                    return {join(name, tensors): join(each, tensors) for name, each in value}
            return {key: join(value, tensors)}
        case dict():
            return {key: join(value, tensors) for key, value in plain.items()}
    return plain


def keys(plain: Mapping[str, Any]) -> set[Any]:
    """The keys of the dict that `split` made `plain` of, without its tensors."""
    if plain.keys() == {_ITEMS}:
        return {join(name, {}) for name, _ in plain[_ITEMS]}
    return set(plain)


def _encode(value: Any, path: str, where: str, tensors: dict[str, torch.Tensor]) -> Any:
    match value:
        case torch.Tensor():
            tensors[path] = value
            return {_TENSOR: path}
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {_FLOAT: repr(value)}
        case np.generic():
            return _encode(value.item(), path, where, tensors)
        case tuple():
            return {_TUPLE: _encode(list(value), path, where, tensors)}
        case list():
            return [_encode(each, _below(path, n), where, tensors) for n, each in enumerate(value)]
        case Mapping():
            return _encode_mapping(value, path, where, tensors)
    raise NotPlain(
        f"{_below(where, path)}: {type(value).__name__}, expected tensors, numbers, text, lists and dicts: "
        "return plain values from its state_dict()"
    )


def _encode_mapping(value: Mapping[Any, Any], path: str, where: str, tensors: dict[str, torch.Tensor]) -> Any:
    encoded = [(name, _encode(each, _below(path, name), where, tensors)) for name, each in value.items()]
    if all(isinstance(name, str) and not name.startswith("$") for name, _ in encoded):
        return dict(encoded)
    return {_ITEMS: [[_encode(name, path, where, tensors), each] for name, each in encoded]}


def _below(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)
