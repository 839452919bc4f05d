"""Pure: how the loss of a run lies against its own recent past, and since when it has been far above.

The past is a window of points, told by its median and its deviation (the median distance from it, scaled to that of a
normal distribution), which a few wild points hardly move. A point beyond the bound is held back and not learnt from;
once one below follows, it was a wild one and joins the past like any other. As many in a row as the rule asks for are
a spike, and it stays one until the attempt ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import Final

from mend.heartbeats import LOSS, Point
from mend.learnt import LossStanding
from mend.spec import LossSpike

KEPT_POINTS: Final = 4096  # of the past, for an attempt that begins further back
_NORMAL: Final = 1.4826  # from the median of distances to a standard deviation
_REFRESHES: Final = 16  # of the median, while a whole window goes by: it need not follow every point


class LossWatch:
    """The loss of one run, point by point. An attempt that begins at an earlier step has the past up to there."""

    def __init__(self) -> None:
        self.attempt = 0
        self._rule = LossSpike()
        self._past: deque[Point] = deque(maxlen=KEPT_POINTS)
        self._above: list[Point] = []
        self._newest: Point | None = None
        self._middle: tuple[float, float] | None = None
        self._until_refresh = 0

    def add(self, attempt: int, points: Iterable[Point], rule: LossSpike) -> None:
        """More points, oldest first. Those of an earlier attempt are void, and those that were heard before.

        What an earlier attempt has done at steps that this one does again is forgotten.
        """
        if attempt < self.attempt:
            return
        if attempt > self.attempt or rule != self._rule:
            self.attempt, self._rule = attempt, rule
            self._above, self._newest, self._middle, self._until_refresh = [], None, None, 0
        for point in points:
            heard = self._newest is not None and point.step <= self._newest.step  # a stream anew tells all again
            if point.name == LOSS and point.loss is not None and not heard:
                while self._past and self._past[-1].step >= point.step:
                    self._past.pop()
                self._take(point, point.loss)

    def standing(self, attempt: int) -> LossStanding | None:
        """Where the newest point of this attempt lies; None while too little is known."""
        point, middle = self._newest, self._middle
        if attempt != self.attempt or point is None or point.loss is None or middle is None:
            return None
        first = self._above[0] if self._above else None
        return LossStanding(
            step=point.step,
            loss=point.loss,
            median=middle[0],
            bound=self._bound(middle),
            deviations=(point.loss - middle[0]) / middle[1] if middle[1] else 0.0,
            above=len(self._above),
            above_since_step=first.step if first is not None else None,
            above_seconds=sum(each.seconds for each in self._above),
        )

    def _take(self, point: Point, loss: float) -> None:
        self._newest = point
        if self._middle is not None and len(self._above) >= self._rule.points:
            self._above.append(point)  # a spike ends with its attempt
            return
        self._refresh()
        if self._middle is not None and loss > self._bound(self._middle):
            self._above.append(point)
            return
        self._past.extend((*self._above, point))
        self._until_refresh -= len(self._above) + 1
        self._above = []

    def _refresh(self) -> None:
        if self._until_refresh > 0 or len(self._past) < self._rule.window:
            return
        losses = [each.loss for each in list(self._past)[-self._rule.window :] if each.loss is not None]
        middle = median(losses)
        self._middle = middle, _NORMAL * median(abs(each - middle) for each in losses)
        self._until_refresh = max(1, self._rule.window // _REFRESHES)

    def _bound(self, middle: tuple[float, float]) -> float:
        """Far beyond the noise, and enough to matter: the loss of a run that hardly varies may not stumble over 1 %."""
        return middle[0] + max(self._rule.deviations * middle[1], self._rule.rise_percent / 100 * abs(middle[0]))
