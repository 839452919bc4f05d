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


class _Watch:
    """The time between the rank's own part of a step and what all do together."""

    def __init__(self, waited: Callable[[int], None]) -> None:
        self._waited = waited
        self._ready_ns = 0

    def gradients_ready(self) -> None:
        """The rank's own part of the step is done; the last of several micro-batches counts."""
        self._ready_ns = _now_ns()

    def gradients_summed(self) -> None:
        """The optimizer is about to step."""
        if self._ready_ns:
            self._waited(_now_ns() - self._ready_ns)
            self._ready_ns = 0


def watch_waiting(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    waited: Callable[[int], None],
) -> None:
    """Calls `waited` with the nanoseconds that each step's wait for other ranks took, as long as the model lives."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    if not parameters or parameters[0].device.type != "cpu":
        return
    watch = _Watch(waited)
    first = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer[0]
    last = _LastGradient(parameters, watch.gradients_ready)

    def summed(*_: Any) -> None:
        last.settle()
        watch.gradients_summed()

    first.register_step_pre_hook(summed)


class _LastGradient:
    """Calls back when the last gradient of a backward pass is there: until it is known which, at each of them."""

    def __init__(self, parameters: Sequence[nn.Parameter], ready: Callable[[], None]) -> None:
        self._ready = ready
        self._latest: nn.Parameter | None = None
        self._hooks = [_on_gradient(each, self._seen) for each in parameters]

    def _seen(self, parameter: nn.Parameter) -> None:
        self._latest = parameter
        self._ready()

    def settle(self) -> None:
        """The first step's backward passes are over: keep the hook of the parameter that came last, and no other."""
        if self._hooks and self._latest is not None:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
            _on_gradient(self._latest, lambda _: self._ready())


def _on_gradient(parameter: nn.Parameter, call: Callable[[nn.Parameter], None]) -> RemovableHandle:
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(call)  # type: ignore[no-untyped-call]
    return handle
