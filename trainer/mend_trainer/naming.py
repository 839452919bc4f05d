"""The live tensors of a model and its optimizers, by the names that torch.distributed.checkpoint gives them.

Those names are the same for plain, compiled, DDP and FSDP2 models, so a checkpoint outlives a change of strategy.
torch's own `get_model_state_dict` and `get_optimizer_state_dict` work them out anew for every tensor at every call,
which takes 20 ms for 300 parameters; here each is worked out once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    _get_fqns,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from mend_trainer.misfit import StateMisfit
from mend_trainer.plain import join, keys, split

_FLAT: Final = StateDictOptions(flatten_optimizer_state_dict=True)
_PARAMETERS: Final = "params"
_MOST_NAMED: Final = 5

Optimizers = Sequence[torch.optim.Optimizer]


class Names:
    """The names of one model's tensors, remembered."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: dict[str, str] = {}

    def weights(self) -> dict[str, Any]:
        """What `get_model_state_dict` returns: the live tensors of the model."""
        # First of all: FSDP2 puts the sharded parameters in place for it, if an evaluation has left whole ones.
        return {self._name(key): value for key, value in self._model.state_dict().items()}

    def parameters(self) -> dict[nn.Parameter, str]:
        """The name of every parameter, one for a shared one."""
        return {parameter: self._name(key) for key, parameter in self._model.named_parameters()}

    def _name(self, key: str) -> str:
        if key not in self._known:
            (self._known[key],) = _get_fqns(self._model, key)
        return self._known[key]


def take_optimizers(names: Names, optimizers: Optimizers) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Kinds, options by group, and states by parameter, of those that have one: as plain values, and live tensors."""
    called = _called(names, optimizers)
    groups: list[dict[str, Any]] = []
    states: dict[str, Any] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            members = [called[parameter] for parameter in group[_PARAMETERS]]
            groups.append({_PARAMETERS: members, "options": _options(group)})
            for name, parameter in zip(members, group[_PARAMETERS], strict=True):
                if state := optimizer.state.get(parameter):
                    states[name] = state
    plain, tensors = split({"groups": groups, "state": states}, "optimizer")
    return {"kinds": _kinds(optimizers), **plain}, tensors


def put_optimizers(
    names: Names,
    model: nn.Module,
    optimizers: Optimizers,
    plain: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Continue from what `take_optimizers` took, whatever groups the parameters are in now.

    Raises `StateMisfit` if it was taken of other optimizers.
    """
    if plain["kinds"] != _kinds(optimizers):
        raise StateMisfit(
            f"optimizer: the checkpoint is of {', '.join(plain['kinds'])}, here it is {', '.join(_kinds(optimizers))}: "
            "use the same one or start a new run"
        )
    called = _called(names, optimizers)
    give_states(model, optimizers)
    options = {name: join(group["options"], tensors) for group in plain["groups"] for name in group[_PARAMETERS]}
    flat: dict[str, Any] = {}
    without: list[tuple[torch.optim.Optimizer, nn.Parameter]] = []
    for optimizer, group, parameter in _members(optimizers):
        name = called[parameter]
        if name not in options:
            raise StateMisfit(
                f"optimizer: {name} is in one of its groups, and was in none when the checkpoint was made: "
                "give the optimizer the same parameters or start a new run"
            )
        # An option that this torch has and that of the checkpoint had not stays as it is.
        flat |= {f"param_groups.{name}.{key}": options[name].get(key, value) for key, value in _options(group).items()}
        state = optimizer.state.get(parameter, {})
        found = plain["state"].get(name)
        if found is None and state:
            without.append((optimizer, parameter))
        elif found is not None:
            _compare(name, found, state)
            state = join(found, tensors)
        flat |= {f"state.{name}.{key}": value for key, value in state.items()}
    set_optimizer_state_dict(model, list(optimizers), flat, options=_FLAT)
    for optimizer, parameter in without:  # it had got no gradient yet when the checkpoint was made
        del optimizer.state[parameter]


def _compare(name: str, found: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    saved = keys(found)
    if saved != set(state):
        raise StateMisfit(
            f"optimizer: for {name} the checkpoint has {_listed(saved)}, here it is {_listed(state)}: "
            "set its options back or start a new run"
        )


def _members(
    optimizers: Optimizers,
) -> Iterator[tuple[torch.optim.Optimizer, dict[str, Any], nn.Parameter]]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group[_PARAMETERS]:
                yield optimizer, group, parameter


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {option: value for option, value in group.items() if option != _PARAMETERS}


def give_states(model: nn.Module, optimizers: Optimizers) -> None:
    """Give optimizers that have no states yet those of a step of zero length: room for what is to be put there."""
    empty = [each for each in optimizers if not each.state]
    if empty:
        get_optimizer_state_dict(model, empty, options=_FLAT)  # no other public way leads there


def _kinds(optimizers: Optimizers) -> list[str]:
    return [type(each).__qualname__ for each in optimizers]


def _called(names: Names, optimizers: Optimizers) -> dict[nn.Parameter, str]:
    called = names.parameters()
    for _, _, parameter in _members(optimizers):
        if parameter not in called:
            raise StateMisfit(
                f"optimizer: it holds a parameter of shape {list(parameter.shape)} that is not the model's, so "
                "there is no name to save it under: make it a part of the model"
            )
    return called


def _listed(state: Iterable[str]) -> str:
    return ", ".join(sorted(state)[:_MOST_NAMED]) or "nothing"
