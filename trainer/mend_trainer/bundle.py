"""The bundle: everything that the next step depends on, as tensors and plain values, and put back exactly.

Model and optimizer go through `torch.distributed.checkpoint.state_dict`, which gives plain, DDP and FSDP2 models the
same names, so that a checkpoint outlives a change of strategy or world size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, runtime_checkable

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from mend_trainer.plain import join, split
from mend_trainer.rng import rng_state, set_rng_state

# Flat names ("state.layers.0.weight.exp_avg") survive a change of the parameters' order or grouping.
_FLAT: Final = StateDictOptions(flatten_optimizer_state_dict=True)


@runtime_checkable
class Stateful(Protocol):
    """Anything whose state can be taken and put back: schedulers, loaders, scalers, averages of weights."""

    def state_dict(self) -> dict[str, Any]:
        """The state: plain values and tensors."""
        ...

    def load_state_dict(self, state: Any) -> Any:
        """Put a state back."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleState:
    """A bundle's state: `tensors` nested as the checkpointer takes them, `values` as JSON."""

    tensors: dict[str, Any]
    values: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """The live objects of one rank. `parts` are by name; their states are the same on every rank."""

    rank: int
    model: nn.Module
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
    parts: Mapping[str, Stateful] = field(default_factory=dict)

    def take(self) -> BundleState:
        """The state as it is now. Tensors are the live ones, not copies.

        An optimizer that has not stepped yet is given its states by a step of zero length, so take none from a run
        that starts afresh.
        """
        optimizers = list(self.optimizer) if isinstance(self.optimizer, Sequence) else [self.optimizer]
        optimizer = get_optimizer_state_dict(self.model, optimizers, options=_FLAT)
        plain, moments = split(optimizer, "optimizer")
        values: dict[str, Any] = {"optimizer": plain}
        tensors: dict[str, Any] = {
            "model": get_model_state_dict(self.model),
            "optimizer": moments,
            "ranks": {str(self.rank): {"rng": rng_state()}},
        }
        for name, part in self.parts.items():
            values[name], held = split(part.state_dict(), name)
            if held:
                tensors[name] = held
        return BundleState(tensors=tensors, values=values)

    def put(self, snapshot: BundleState) -> None:
        """Continue from `snapshot`. The generators come last, since what precedes might draw from them."""
        tensors, values = snapshot.tensors, snapshot.values
        optimizers = list(self.optimizer) if isinstance(self.optimizer, Sequence) else [self.optimizer]
        set_model_state_dict(self.model, tensors["model"])
        set_optimizer_state_dict(self.model, optimizers, join(values["optimizer"], tensors["optimizer"]), options=_FLAT)
        self.put_parts(snapshot)

    def put_parts(self, snapshot: BundleState) -> None:
        """As `put`, where model and optimizer are already what they should be."""
        tensors, values = snapshot.tensors, snapshot.values
        for name, part in self.parts.items():
            part.load_state_dict(join(values[name], tensors.get(name, {})))
        set_rng_state(tensors["ranks"][str(self.rank)]["rng"])
