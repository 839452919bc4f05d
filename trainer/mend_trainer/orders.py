"""The rank's end of the pipe of orders: hears, in a thread of its own, that it is to go on in another attempt."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Final

import msgspec

from mend.environment import ENV_ATTEMPT, ENV_ORDERS_FD
from mend.orders import Rejoin, decode_rejoin
from mend_trainer.polling import readable

_READ_BYTES: Final = 1 << 16

_log = logging.getLogger(__name__)


class Orders:
    """Orders to rejoin, the newest of which counts. `on_order` is called in the listening thread."""

    def __init__(self, descriptor: int, on_order: Callable[[], None]) -> None:
        self._descriptor = descriptor
        self._on_order = on_order
        self._news = threading.Condition()
        self._order: Rejoin | None = None
        self._reading = threading.Lock()
        self._partial = b""
        threading.Thread(target=self._listen, name="mend-orders", daemon=True).start()

    @classmethod
    def from_environment(cls, on_order: Callable[[], None]) -> Orders | None:
        """The pipe that the agent opened (`MEND_ORDERS_FD`); None outside mend, or in a child of a rank."""
        text = os.environ.get(ENV_ORDERS_FD, "")
        try:
            os.fstat(int(text))
        except (ValueError, OSError):
            return None
        return cls(int(text), on_order)

    def take(self, seconds: float) -> Rejoin | None:
        """The order, once; waits that long for one to come. One that was obeyed already does not count."""
        if readable([self._descriptor], 0.0):
            self._take_in()  # whoever waits need not wait for the thread that listens
        with self._news:
            self._news.wait_for(lambda: self._order is not None, seconds)
            order, self._order = self._order, None
        return order if order is not None and _is_new(order) else None

    def _listen(self) -> None:
        while readable([self._descriptor], None) and self._take_in():
            pass

    def _take_in(self) -> bool:
        """Hear what is in the pipe; False when nobody will write to it any more."""
        with self._reading:
            if not readable([self._descriptor], 0.0):
                return True  # the other thread was quicker
            chunk = self._read()
            *lines, self._partial = (self._partial + chunk).split(b"\n")
        for line in lines:
            self._hear(line)
        return bool(chunk)

    def _read(self) -> bytes:
        try:
            return os.read(self._descriptor, _READ_BYTES)
        except OSError:
            return b""

    def _hear(self, line: bytes) -> None:
        try:
            order = decode_rejoin(line)
        except msgspec.MsgspecError as error:
            _log.warning("no order of this protocol: %s", error)
            return
        if not _is_new(order):
            return
        with self._news:
            self._order = order
            self._news.notify_all()
        self._on_order()


def _is_new(order: Rejoin) -> bool:
    """Orders are said again until they are obeyed: one that came once more meanwhile may have been kept for later."""
    return order.attempt > int(os.environ.get(ENV_ATTEMPT, "0"))
