"""What a training loop accumulates over its steps: a smoothed loss, and the best evaluation. A part of the bundle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

_KEPT: Final = 0.98  # of the average, at each step: it looks back over some fifty


class Averages:
    """Exponential average of the loss, and when the best evaluation was; the same on every rank."""

    def __init__(self, device: torch.device) -> None:
        # Summed up where the losses are: nothing waits for a GPU until somebody asks.
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        self._weight = 0.0
        self._best: tuple[float, int] | None = None

    def add(self, loss: torch.Tensor) -> None:
        """The loss of one more step; to be called before `Session.completed`, which may save."""
        self._sum.mul_(_KEPT).add_(loss.detach(), alpha=1 - _KEPT)
        self._weight = _KEPT * self._weight + (1 - _KEPT)

    @property
    def smoothed(self) -> float:
        """The average loss so far; NaN before the first. Waits for the device."""
        return float(self._sum) / self._weight if self._weight else float("nan")

    def evaluated(self, loss: float, step: int) -> bool:
        """An evaluation; whether it is the best so far. One that is done again after a resume changes nothing."""
        is_best = self._best is None or (loss, step) <= self._best
        if is_best:
            self._best = loss, step
        return is_best

    @property
    def best(self) -> tuple[float, int] | None:
        """Loss and step of the best evaluation."""
        return self._best

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"sum": float(self._sum), "weight": self._weight, "best": self._best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._sum.fill_(state["sum"])
        self._weight, self._best = state["weight"], state["best"]
