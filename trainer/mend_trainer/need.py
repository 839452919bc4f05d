"""What the snapshots of a worker will need, told before training: from the model, and what its optimizers will keep."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mend_trainer.podmemory import PodMemory
from mend_trainer.slots import SLOTS

_GUESS: Final = 2  # states that an optimizer keeps of each parameter, where it does not show


class MemoryTooSmall(RuntimeError):
    """The pod would be killed for its memory once it saves. Trying again cannot help."""

    mend_fatal = True


def needed_bytes(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], *, world: int, ranks_here: int, copies: bool
) -> int:
    """For two snapshots of each rank of this worker, and two copies of as many of another's if it is a buddy."""
    state = [*model.state_dict().values(), *(each for one in optimizers for each in _states_of(one))]
    share = sum(_share_bytes(tensor, world) for tensor in state if isinstance(tensor, torch.Tensor))
    return math.ceil(share) * SLOTS * ranks_here * (2 if copies else 1)


def check(needed: int, present: int, pod: PodMemory) -> None:
    """Raise `MemoryTooSmall` unless what is needed beyond what is present fits."""
    free = pod.free_bytes
    if free is None or needed - present <= free:
        return
    least = pod.used_bytes + needed - present
    raise MemoryTooSmall(
        f"resources.limits.memory: {_told(pod.limit_bytes)}, of which {_told(pod.used_bytes)} are in use before "
        f"the first step; snapshots of this worker need {_told(needed)}, of which {_told(present)} are there. Set "
        f"it to {_told(least)} and what the steps themselves need, or spread the run over more workers"
    )


def _share_bytes(tensor: torch.Tensor, world: int) -> float:
    """What each rank copies of it: replicas are shared out."""
    return tensor.to_local().nbytes if isinstance(tensor, DTensor) else tensor.nbytes / world


def _states_of(optimizer: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    """Its states; before its first step, as many tensors of each parameter as it will keep."""
    if optimizer.state:
        return [each for kept in optimizer.state.values() for each in kept.values() if isinstance(each, torch.Tensor)]
    count = _states_per_parameter(optimizer)
    return [each for group in optimizer.param_groups for each in group["params"] * count]


def _states_per_parameter(optimizer: torch.optim.Optimizer) -> int:
    """Found out by a step of another optimizer of its kind, on a parameter of two numbers."""
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.zeros(2)
    try:
        other = type(optimizer)([parameter], **optimizer.defaults)
        other.step()
    except Exception:  # noqa: BLE001 - it may want more than its defaults, or a GPU
        return _GUESS
    kept = other.state[parameter].values()
    return sum(isinstance(each, torch.Tensor) and each.shape == parameter.shape for each in kept)


def _told(count: int) -> str:
    return f"{count / 2**20:.0f}Mi"
