"""Pure: whether a saver hangs, by what its agent sees of it look by look.

One that hangs costs checkpoints. One that is replaced too early costs little: parts that are with the store are not
sent again, digests not taken again. But what can never end before its saver is replaced never ends; so each that hung
is followed by one that is borne for twice as long, until a save is settled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

TURN_SECONDS: Final = 30.0  # it turns twice a second, and at each block that it digests
MOVE_SECONDS: Final = 900.0  # as long as a store is asked that is away; there a request that fails has moved, too
_LOOK_SECONDS: Final = 2.0  # counted at most between two looks: an agent that was frozen has seen nothing
_DOUBLINGS: Final = 5


@dataclass(frozen=True, slots=True)
class Signs:
    """What the arenas of a worker show of its saver. Numbers only grow, and what they are does not matter."""

    turns: int = 0  # of its loop
    moves: int = 0  # of what it saves: bytes and requests
    settled: int = 0
    is_in_debt: bool = False


@dataclass(frozen=True, slots=True)
class Stillness:
    """How long which signs of a saver have not changed. `replaced`: savers that hung since a save was last settled."""

    signs: Signs = Signs()
    turn_seconds: float = 0.0
    move_seconds: float = 0.0
    replaced: int = 0

    def seen(self, signs: Signs, elapsed_seconds: float) -> Stillness:
        """After another look, so many seconds after the last one."""
        before, elapsed = self.signs, min(elapsed_seconds, _LOOK_SECONDS)
        moves = signs.moves != before.moves or not (signs.is_in_debt and before.is_in_debt)
        return Stillness(
            signs=signs,
            turn_seconds=0.0 if signs.turns != before.turns else self.turn_seconds + elapsed,
            move_seconds=0.0 if moves else self.move_seconds + elapsed,
            replaced=0 if signs.settled != before.settled else self.replaced,
        )

    def of_another(self, *, hung: bool) -> Stillness:
        """Of the saver that comes next, since this one hung or died."""
        return Stillness(signs=self.signs, replaced=self.replaced + hung)

    @property
    def why_it_hangs(self) -> str:
        """By which sign it counts as hung; "" if it does not."""
        times = 2 ** min(self.replaced, _DOUBLINGS)
        if self.turn_seconds >= TURN_SECONDS * times:
            return f"its loop has not turned for {self.turn_seconds:.0f}s"
        if self.move_seconds >= MOVE_SECONDS * times:
            return f"nothing that it owes has moved for {self.move_seconds:.0f}s"
        return ""
