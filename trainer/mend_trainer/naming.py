"""The live tensors of a model and its optimizers, by the names that torch.distributed.checkpoint gives them.

Those names are the same for plain, compiled, DDP and FSDP2 models, so a checkpoint outlives a change of strategy.
torch's own `get_model_state_dict` and `get_optimizer_state_dict` work them out anew for every tensor at every call,
which takes 20 ms for 300 parameters; here each is worked out once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def take_optimizers(names: Names, optimizers: Optimizers) -> dict[str, Any]:
    """Kinds, options by group, and states by parameter, of those that have one; tensors are the live ones."""
    called = _called(names, optimizers)
    groups: list[dict[str, Any]] = []
    states: dict[str, Any] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            members = [called[parameter] for parameter in group[_PARAMETERS]]
            options = {option: value for option, value in group.items() if option != _PARAMETERS}
            groups.append({"parameters": members, "options": options})
            for name, parameter in zip(members, group[_PARAMETERS], strict=True):
                if state := optimizer.state.get(parameter):
                    states[name] = state
    return {"kinds": _kinds(optimizers), "groups": groups, "state": states}


def put_optimizers(names: Names, model: nn.Module, optimizers: Optimizers, saved: Mapping[str, Any]) -> None:
    """Continue from what `take_optimizers` took, whatever groups the parameters are in now.

    Raises `StateMisfit` if it was taken of other optimizers.
    """
    if saved["kinds"] != _kinds(optimizers):
        raise StateMisfit(
            f"optimizer: the checkpoint is of {', '.join(saved['kinds'])}, here it is {', '.join(_kinds(optimizers))}: "
            "use the same one or start a new run"
        )
    called = _called(names, optimizers)
    give_states(model, optimizers)
    options = {name: group["options"] for group in saved["groups"] for name in group["parameters"]}
    flat: dict[str, Any] = {}
    without: list[tuple[torch.optim.Optimizer, nn.Parameter]] = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group[_PARAMETERS]:
                name = called[parameter]
                here = {option: value for option, value in group.items() if option != _PARAMETERS}
                flat |= {f"param_groups.{name}.{option}": value for option, value in _options(name, here, options)}
                state = optimizer.state.get(parameter, {})
                found = saved["state"].get(name)
                if found is None and state:
                    without.append((optimizer, parameter))
                elif found is not None and set(found) != set(state):
                    raise StateMisfit(
                        f"optimizer: for {name} the checkpoint has {_listed(found)}, here it is {_listed(state)}: "
                        "set its options back or start a new run"
                    )
                flat |= {f"state.{name}.{key}": value for key, value in (found or state).items()}
    set_optimizer_state_dict(model, list(optimizers), flat, options=_FLAT)
    for optimizer, parameter in without:  # it had got no gradient yet when the checkpoint was made
        del optimizer.state[parameter]


def _options(name: str, here: Mapping[str, Any], saved: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Any]]:
    """The saved options of a parameter; one that this torch has and that of the checkpoint had not stays as it is."""
    if name not in saved:
        raise StateMisfit(
            f"optimizer: {name} is in one of its groups, and was in none when the checkpoint was made: "
            "give the optimizer the same parameters or start a new run"
        )
    return [(option, saved[name].get(option, value)) for option, value in here.items()]


def give_states(model: nn.Module, optimizers: Optimizers) -> None:
    """Give optimizers that have no states yet those of a step of zero length: room for what is to be put there."""
    empty = [each for each in optimizers if not each.state]
    if empty:
        get_optimizer_state_dict(model, empty, options=_FLAT)  # no other public way leads there


def _kinds(optimizers: Optimizers) -> list[str]:
    return [type(each).__qualname__ for each in optimizers]


def _called(names: Names, optimizers: Optimizers) -> dict[nn.Parameter, str]:
    called = names.parameters()
    for parameter in (
        each for optimizer in optimizers for group in optimizer.param_groups for each in group[_PARAMETERS]
    ):
        if parameter not in called:
            raise StateMisfit(
                f"optimizer: it holds a parameter of shape {list(parameter.shape)} that is not the model's, so "
                "there is no name to save it under: make it a part of the model"
            )
    return called


def _listed(state: Mapping[str, Any]) -> str:
    return ", ".join(sorted(state)[:_MOST_NAMED]) or "nothing"
