"""Does a checkpoint belong to this model? Pure comparison of names, shapes and types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from mend.manifest import Manifest, TensorEntry
from mend_trainer.checkpoint.layout import PER_RANK

# A parameter that had got no gradient yet has no state in its optimizer, and another optimizer has others: the bundle
# knows which belong to which, and says so in better words than tensors could.
_STATES: Final = "optimizer.state."


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What one rank finds: `surplus` is a problem only if no rank has a tensor of that name."""

    problems: tuple[str, ...]
    surplus: frozenset[str]
    absent: tuple[str, ...]  # tensors that the checkpoint may lack


def compare(manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> Fit:
    """Hold the tensors of this rank against those of the checkpoint."""
    problems: list[str] = []
    absent: list[str] = []
    for name, tensor in tensors.items():
        entry = manifest.tensors.get(name)
        own = _told(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        if entry is not None and _of(entry) == own:
            continue
        if name.startswith(f"{PER_RANK}.") or (entry is None and name.startswith(_STATES)):
            absent.append(name)
        elif entry is None:
            problems.append(f"{name}: {own} in the model, missing in the checkpoint")
        else:
            problems.append(f"{name}: {_of(entry)} in the checkpoint, {own} in the model")
    surplus = {
        name for name in manifest.tensors if name not in tensors and not name.startswith((f"{PER_RANK}.", _STATES))
    }
    return Fit(problems=tuple(problems), surplus=frozenset(surplus), absent=tuple(absent))


def surplus_problem(manifest: Manifest, name: str) -> str:
    """The sentence for a tensor that no rank has."""
    return f"{name}: {_of(manifest.tensors[name])} in the checkpoint, unknown to the model"


def _of(entry: TensorEntry) -> str:
    return _told(entry.dtype, entry.shape)


def _told(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {list(shape)}"
