"""How long a rank waits for its peers in each step: from its own last gradient to the optimizer's step.

In between lies what ranks do together, the sum of the gradients; so whoever waits least is the one the others wait for.
Two hooks that look at nothing: one on the parameter whose gradient comes last, found in the first backward pass, one
before the optimizer's step. They touch neither graph nor gradients, so no bit of the training depends on them.

Nothing is measured where gradients are reduced behind autograd's back (FSDP2: the first hook never fires), nor on a
GPU, where the host runs ahead of the device and its clock says nothing about who waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

_now_ns: Final = time.monotonic_ns


def watch_waiting(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    waited: Callable[[int], None],
) -> None:
    """Calls `waited` with the nanoseconds that each step's wait for other ranks took, as long as the model lives."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    if parameters and parameters[0].device.type == "cpu":
        first = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer[0]
        first.register_step_pre_hook(_Waits(parameters, waited).summed)


class _Waits:
    """The time between the last gradient and the optimizer's step. Until it is known which is last, all are hooked."""

    def __init__(self, parameters: Sequence[nn.Parameter], waited: Callable[[int], None]) -> None:
        self._waited = waited
        self._ready_ns = 0
        self._latest = parameters[0]
        self._hooks = [_on_gradient(each, self.ready) for each in parameters]

    def ready(self, parameter: nn.Parameter) -> None:
        """A gradient is there; the last one of the last micro-batch counts."""
        self._ready_ns = _now_ns()
        self._latest = parameter

    def summed(self, *_: Any) -> None:
        """The optimizer is about to step."""
        if self._ready_ns:
            self._waited(_now_ns() - self._ready_ns)
            self._ready_ns = 0
            if len(self._hooks) > 1:
                self._settle()

    def _settle(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = [_on_gradient(self._latest, self.ready)]


def _on_gradient(parameter: nn.Parameter, call: Callable[[nn.Parameter], None]) -> RemovableHandle:
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(call)  # type: ignore[no-untyped-call]
    return handle
