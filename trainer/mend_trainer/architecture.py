"""Is this the configuration of the model whose weights these are? Asked of transformers, without memory for a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing here may touch the network

import transformers

Shapes = Mapping[str, tuple[int, ...]]


class UnknownArchitecture(ValueError):
    """transformers cannot build what the configuration names."""


def names_to_write(config: Mapping[str, Any], saved: Shapes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The tensors to write, each once although several names may share it; and what does not fit, in sentences.

    Raises `UnknownArchitecture`.
    """
    wanted = _built(config).state_dict(keep_vars=True)
    problems = [f"{name}: not part of the architecture" for name in saved if name not in wanted]
    written: dict[int, str] = {}
    for name, tensor in wanted.items():
        if name not in saved:
            continue
        if saved[name] != tuple(tensor.shape):
            problems.append(f"{name}: {list(saved[name])} in the checkpoint, {list(tensor.shape)} by the configuration")
        written.setdefault(id(tensor), name)
    missing = dict.fromkeys(name for name, tensor in wanted.items() if id(tensor) not in written)
    problems += [f"{name}: not in the checkpoint" for name in missing]
    return tuple(written.values()), tuple(problems)


def _built(config: Mapping[str, Any]) -> torch.nn.Module:
    """The model on the meta device."""
    kind = config.get("model_type", "")
    name = (config.get("architectures") or [""])[0]
    architecture = getattr(transformers, str(name), None)
    if architecture is None or not hasattr(architecture, "from_pretrained"):
        raise UnknownArchitecture(f"architectures: {name!r} is none that transformers {transformers.__version__} has")
    try:
        parsed = type(transformers.AutoConfig.for_model(kind)).from_dict(dict(config))
        with torch.device("meta"):
            built: torch.nn.Module = architecture(parsed)
    except Exception as error:
        raise UnknownArchitecture(f"{name} cannot be built by its configuration: {error}") from error
    return built
