"""How a session keeps its process when a peer is lost: it notices, waits for the order, and takes up the state."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mend.environment import ENV_ATTEMPT, ENV_FOOTING
from mend.lostpeers import is_of_a_lost_peer
from mend.orders import Launch, Rejoin
from mend.protocol import Message
from mend.states import Ancestor
from mend_trainer.bundle import Bundle, BundleState
from mend_trainer.checkpoint.gang import Gang
from mend_trainer.checkpoint.layout import PER_RANK
from mend_trainer.footing import Footing, FootingPage, read_inherited
from mend_trainer.membership import Membership
from mend_trainer.orders import Orders
from mend_trainer.peers import Handed, agree, footing_of, hand_on, standing, versions
from mend_trainer.plain import NotPlain, split
from mend_trainer.rng import rng_bytes, rng_state_of

_ORDER_SECONDS: Final = 60.0  # a controller that is just being replaced must have its chance
_LOOK_SECONDS: Final = 0.2
_UNCLEAN: Final = -1

_log = logging.getLogger(__name__)


class TakenUp(Message, frozen=True, kw_only=True):
    """The state that was taken up: of which attempt and step."""

    attempt: int
    step: int
    tokens: int
    lineage: tuple[Ancestor, ...]


class Rejoining:
    """One rank's side of tier `rejoin`."""

    def __init__(self, bundle: Bundle, membership: Membership) -> None:
        self._bundle = bundle
        self._membership = membership
        self._orders: Orders | None = None
        path = os.environ.get(ENV_FOOTING)
        self._path = Path(path) if path else None
        self._page = FootingPage(self._path) if self._path is not None else None
        self._versions = _UNCLEAN  # of the model, as the last completed step has left it
        self._left: tuple[int, tuple[Ancestor, ...]] | None = None  # the attempt that was left, and its ancestors
        self._offered = False
        self._keeps = False  # a GPU's state is restored from a checkpoint, and to ask for its values would cost a wait
        self._has_complained = False
        self._modes: list[bool] = []  # whether each module trained, when the last step was completed
        optimizers = bundle.optimizer if isinstance(bundle.optimizer, Sequence) else (bundle.optimizer,)
        for each in optimizers:
            # Version counters do not see writes to `parameter.data`, which optimizers of one's own are fond of.
            each.register_step_pre_hook(self._is_stepping)

    def _is_stepping(self, *_: object) -> None:
        self._versions = _UNCLEAN

    def extended(self) -> AbstractContextManager[None]:
        """Around the making of further process groups."""
        return self._membership.extended()

    def offer(self) -> bool:
        """Whether this rank can be told to rejoin from now on."""
        self._offered = False
        self._keeps = _is_on_cpu(self._bundle.model)
        if self._page is not None and dist.is_initialized() and self._membership.can_renew(self._bundle.model):
            self._orders = self._orders or Orders.from_environment(self._membership.cut)
            self._offered = self._orders is not None
        return self._offered

    def completed(self, step: int, tokens: int) -> None:
        """Keep what this rank needs to go on after `step`. Some 0.1 ms."""
        if not self._offered or not self._keeps or self._page is None:
            return
        self._modes = [module.training for module in self._bundle.model.modules()]
        values = self._values()
        kept = values is not None and self._page.keep(
            Footing(step=step, tokens=tokens, values=values, generators=rng_bytes())
        )
        self._versions = versions(self._bundle.model) if kept else _UNCLEAN
        if not kept and not self._has_complained:
            self._has_complained = True
            _log.warning(
                "what a rank needs beside the weights cannot be kept after each step: a state of scheduler, loader or "
                "others holds tensors or is too large; if a rank is lost, a checkpoint will be restored"
            )

    def _values(self) -> dict[str, object] | None:
        """States of the parts; None if one holds tensors, which may not stay as the last step has left them."""
        found: dict[str, object] = {}
        for name, part in self._bundle.parts.items():
            try:
                found[name], held = split(part.state_dict(), name)
            except NotPlain:
                return None
            if held:
                return None
        return found

    def order_after(self, error: Exception, tell: Callable[[], None], mark: Callable[[], None]) -> Rejoin | None:
        """The order that explains this error, or follows it; None if the error is the training's own, or none comes."""
        if self._orders is None or not self._offered:
            return None
        if (order := self._orders.take(0.0)) is not None:
            return order
        if not is_of_a_lost_peer(type(error).__qualname__, str(error)):
            return None
        tell()
        self._membership.cut()  # a rank that is no neighbour of the lost one waits for this one
        for _ in range(round(_ORDER_SECONDS / _LOOK_SECONDS)):
            if (order := self._orders.take(_LOOK_SECONDS)) is not None:
                return order
            mark()
        return None

    @property
    def is_clean(self) -> bool:
        """Whether the model is still as the last completed step has left it, as far as anything can tell."""
        return self._versions != _UNCLEAN and self._versions == versions(self._bundle.model)

    def renew(self, order: Rejoin, lineage: tuple[Ancestor, ...]) -> None:
        """Leave the attempt of which `lineage` are the ancestors, and join that of the order."""
        model = self._bundle.model
        assert isinstance(model, DistributedDataParallel)
        self._left = int(os.environ[ENV_ATTEMPT]), lineage
        self._membership.cut()
        if not self.is_clean:
            self._versions = _UNCLEAN  # what follows must not hide that the broken step has changed something already
        for module, training in zip(model.modules(), self._modes, strict=False):
            module.training = training  # an evaluation may have been broken off
        os.environ.update(order.env)
        self._membership.renew(model)

    def take_up(self, gang: Gang, launch: Launch, step: int) -> TakenUp | None:
        """Go on from the newest state that all ranks can have exactly, if there is one; a collective."""
        footings = self._footings()
        is_clean = self._left is not None and self._versions != _UNCLEAN and _is_on_cpu(self._bundle.model)
        newest_saved = max((ref.step for ref in launch.restore), default=-1)
        source = agree(gang, standing(step if is_clean else -1, footings), newest_saved)
        if source is None:
            return None
        here = self._bundle.make_room()
        kept = footing_of(footings, source.step)
        mine = None
        if gang.rank == source.rank and self._left is not None:
            attempt, ancestors = self._left
            mine = Handed(
                attempt=attempt,
                tokens=kept.tokens,
                values={**kept.values, "optimizer": here.values["optimizer"]},
                lineage=(*ancestors, Ancestor(attempt=attempt, step=source.step, uid=launch.run_uid)),
            )
        has_it = is_clean and step == source.step
        handed = hand_on(gang, source, here.tensors, mine, has_it=has_it)
        own = {PER_RANK: {str(self._bundle.rank): {"rng": rng_state_of(kept.generators)}}}
        snapshot = BundleState(tensors={**here.tensors, **own}, values=handed.values)
        if has_it:
            self._bundle.put_parts(snapshot)
        else:
            self._bundle.put(snapshot)
        return TakenUp(attempt=handed.attempt, step=source.step, tokens=handed.tokens, lineage=handed.lineage)

    def _footings(self) -> tuple[Footing, ...]:
        """This rank's own, or, in a process that is new, those of the rank that had its place."""
        if self._path is None or self._page is None:
            return ()
        return self._page.read() or read_inherited(self._path)


def _is_on_cpu(model: nn.Module) -> bool:
    """On a GPU the host runs ahead: what a broken collective has left there may have been used already."""
    return all(parameter.device == torch.device("cpu") for parameter in model.parameters())
