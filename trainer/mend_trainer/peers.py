"""State from memory to memory: a gang in which some ranks were replaced goes on from where the others are.

All ranks say what they have; all come to the same conclusion; then one of them, whose model is that of a completed
step, sends it to the others. If the conclusion is that nobody has it all, the gang restores a checkpoint instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch

from mend.protocol import Message
from mend.states import Ancestor
from mend_trainer.checkpoint.gang import Gang
from mend_trainer.checkpoint.layout import PER_RANK, leaves
from mend_trainer.footing import Footing


class Standing(Message, frozen=True, kw_only=True):
    """What one rank has: the step whose state its model is in (-1: of none), and its footings by step."""

    step: int = -1
    drawn: dict[int, int] = {}


class Source(Message, frozen=True, kw_only=True):
    """Whose state is taken, and of which step."""

    rank: int
    step: int


class Handed(Message, frozen=True, kw_only=True):
    """What the source sends beside its tensors."""

    attempt: int
    tokens: int
    values: dict[str, Any]
    lineage: tuple[Ancestor, ...]
    tensors: tuple[str, ...] = ()  # names of those that follow, in this order


def choose_source(standings: Sequence[Standing], at_least: int) -> Source | None:
    """The rank with the newest state, if every rank can go on from it exactly; None: restore a checkpoint.

    A rank that was a step behind, or died, has no footing of the newest step. That does not matter if no rank has drawn
    a random number between its last two steps: then its generators would not have moved either.
    """
    newest = max((each.step for each in standings), default=-1)
    if newest < max(at_least, 0):
        return None
    if any(not each.drawn for each in standings):
        return None
    nobody_draws = all(len(set(each.drawn.values())) == 1 for each in standings)
    if not nobody_draws and any(newest not in each.drawn for each in standings):
        return None
    return Source(rank=next(n for n, each in enumerate(standings) if each.step == newest), step=newest)


def agree(gang: Gang, mine: Standing, at_least: int) -> Source | None:
    """`choose_source` of what all ranks have; a collective."""
    said = gang.gather(msgspec.json.encode(mine))
    return choose_source([msgspec.json.decode(each, type=Standing) for each in said], at_least)


def hand_on(gang: Gang, source: Source, tensors: Mapping[str, Any], mine: Handed | None, *, has_it: bool) -> Handed:
    """Fill `tensors` in place with the source's, all but what belongs to one rank alone; a collective.

    `mine` is what the source has to say; the others give None. A rank that `has_it` already keeps its own. A rank may
    have room for more than the source has: states of an optimizer for parameters that have had no gradient yet.
    """
    room = {".".join(path): leaf for path, leaf in leaves(tensors) if path[0] != PER_RANK}
    if mine is not None:
        names = sorted(room, key=lambda name: (str(room[name].dtype), name))
        mine = msgspec.structs.replace(mine, tensors=tuple(names))
    raw = gang.hear(msgspec.json.encode(mine) if mine is not None else b"", source.rank)
    handed = msgspec.json.decode(raw, type=Handed)
    if missing := [name for name in handed.tensors if name not in room]:
        raise RuntimeError(
            f"no room for {', '.join(missing[:5])} of rank {source.rank}: another model than that one's?"
        )
    gang.send_from(source.rank, [room[name] for name in handed.tensors], keep=has_it)
    return handed


def footing_of(footings: Sequence[Footing], step: int) -> Footing:
    """The footing of that step, or of a later or earlier one whose generators are the same."""
    return next((each for each in footings if each.step == step), footings[-1])


def standing(step: int, footings: Sequence[Footing]) -> Standing:
    """What is told of these footings."""
    return Standing(step=step, drawn={each.step: each.drawn for each in footings})


def versions(model: torch.nn.Module) -> int:
    """Changes with every write to a parameter or buffer, by whomever: torch counts them."""
    return sum(each._version for each in (*model.parameters(), *model.buffers()))
