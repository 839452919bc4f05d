"""Publishes each completed step on the progress page and the report pipe, without making a device wait.

A loss on a GPU is read one step late: at the end of step k the host waits for the event that closed step k - 1, which
has usually passed, and reads that step's loss. So the host is never more than one step ahead of its device, a page
never claims a step that the device has not done, and the loop is not stopped to look at a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mend.heartbeats import LOSS, Point
from mend.reports import Measured, Report, Stepped
from mend_trainer.progress import ProgressPage


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    step: int
    loss: float | torch.Tensor | None
    tokens: int  # of the run, up to this step
    seconds: float
    event: torch.cuda.Event | None


class Curve:
    """The loss over steps of one rank. Every rank reports its first step; points, only one whose curve is `drawn`."""

    def __init__(self, page: ProgressPage, report: Callable[[Report], object], *, drawn: bool) -> None:
        self._page = page
        self._report = report
        self._drawn = drawn
        self._pending: _Step | None = None
        self.loss = math.nan  # of the last step that was published

    def add(self, step: int, loss: float | torch.Tensor | None, tokens: int, seconds: float) -> None:
        """Step `step` ended after `seconds`, as far as the host knows."""
        event = None
        if isinstance(loss, torch.Tensor):
            # Copied now and looked at later: to read it from the device then would wait for the step that is running.
            loss = loss.detach().to("cpu", non_blocking=True)
        if not isinstance(loss, float) and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self.settle()
        self._pending = _Step(step=step, loss=loss, tokens=tokens, seconds=seconds, event=event)
        if event is None:
            self.settle()

    def settle(self) -> None:
        """Publish the step that is still waiting for its device, if there is one."""
        if (done := self._pending) is None:
            return
        self._pending = None
        if done.event is not None:
            done.event.synchronize()
        loss = None if done.loss is None else float(done.loss)
        self._page.complete_step(done.step, done.tokens, done.seconds, loss)
        if self._page.steps_done == 1:
            self._report(Stepped())
        if loss is None:
            return
        self.loss = loss
        self.measured(LOSS, done.step, loss, done.tokens, done.seconds)

    def measured(self, name: str, step: int, value: float, tokens: int, seconds: float) -> None:
        """A point of this curve or of another, for example an evaluation's."""
        if self._drawn:
            shown = value if math.isfinite(value) else None  # JSON has no NaN; the page says that it was one
            self._report(Measured(point=Point(step=step, loss=shown, tokens=tokens, seconds=seconds, name=name)))
