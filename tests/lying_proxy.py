"""A proxy before an S3 server that lies: flips bits, sends twice, sends again later, and lets the test in between.

What it answers badly is in `tests/s3.py`; here is what nobody notices from the answer.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Mapping
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler

from reached import State
from s3 import Fault, FaultyProxy, S3Server, _matcher

_OF_A_SAVE = re.compile(r"/step-(\d{12})/(\d{6,})-[^/]+/([^/?]+)$")


class Trap:
    """Something to do when the n-th request of a kind comes by, before the server sees it or after it has answered."""

    def __init__(
        self, matches: Callable[[str, str], bool], number: int, act: Callable[[], object], after: bool
    ) -> None:
        self.sprung = threading.Event()
        self._matches, self._number, self._act, self._after = matches, number, act, after
        self._lock = threading.Lock()
        self._begun = False
        self._seen = 0
        self._error: Exception | None = None

    def come_by(self, method: str, path: str, after: bool) -> None:
        """One request, before or after the server had it."""
        if after != self._after or not self._matches(method, path):
            return
        with self._lock:
            self._seen += 1
            hit = self._seen == self._number + 1
        if hit:
            self.spring()

    def spring(self) -> None:
        """Do it, once; back when it is done. Raises what it raised, to everybody who comes."""
        with self._lock:
            first, self._begun = not self._begun, True
        if first:
            try:
                self._act()
            except Exception as error:  # noqa: BLE001 - in a server's thread, where nobody would hear of it
                self._error = error
            finally:
                self.sprung.set()
        self.sprung.wait()
        if self._error is not None:
            raise self._error


class LyingProxy(FaultyProxy):
    """As `FaultyProxy`, with lies.

    `spoilt` has the paths whose bytes were changed on their way into the server, `cut` those of uploads cut short.
    """

    def __init__(self, target: S3Server) -> None:
        super().__init__(target)
        self.spoilt: list[str] = []
        self.cut: list[str] = []
        self._traps: list[Trap] = []
        self._uploads: dict[State, dict[str, bool]] = {}
        self._recorded: dict[str, tuple[BaseHTTPRequestHandler, bytes]] = {}

    def uploads(self, save: State) -> Mapping[str, bool]:
        """The objects of a save that were begun to be uploaded, by name, and whether the server has answered."""
        return self._uploads.get(save, {})

    def flip_answers(self, times: int, part: str = "", place: float = 0.5) -> None:
        """Flip one bit of the answer's body, at that share of its length."""
        self._lay(Fault(f"flip {place}", _matcher("GET", part), times))

    def flip_uploads(self, times: int, part: str = "", place: float = 0.5) -> None:
        """Flip one bit of what is uploaded."""
        self._lay(Fault(f"flip-up {place}", _matcher("PUT", part), times))

    def cut_uploads(self, times: int, part: str = "") -> None:
        """Hand half of what is uploaded on, then hang up on both."""
        self._lay(Fault("cut-up", _matcher("PUT", part), times))

    def send_twice(self, times: int, method: str = "PUT", part: str = "") -> None:
        """Hand the request on twice."""
        self._lay(Fault("twice", _matcher(method, part), times))

    def keep(self, times: int, part: str = "") -> None:
        """Remember uploads, for `replay`."""
        self._lay(Fault("keep", _matcher("PUT", part), times))

    def replay(self) -> int:
        """Send what was kept once more, in the opposite order; how many requests that were."""
        kept, self._recorded = list(self._recorded.values()), {}
        for handler, body in reversed(kept):
            with contextlib.suppress(OSError, HTTPException):
                self._ask(handler, body)
        return len(kept)

    def trap(self, number: int, act: Callable[[], object], *, method: str, part: str = "", after: bool = False) -> Trap:
        """Do `act` when the request of that number comes by, counted from now and from 0."""
        trap = Trap(_matcher(method, part), number, act, after)
        self._traps.append(trap)
        return trap

    def heal(self) -> None:
        """As the other's; traps that have not sprung are taken away."""
        self._traps = []
        super().heal()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """One request, with whoever waits for it let in before and after."""
        path = handler.path
        self._note_upload(handler, answered=False)
        for trap in self._traps:
            trap.come_by(handler.command, path, after=False)
        with contextlib.suppress(OSError, HTTPException):  # whoever asked is dead, or the server is
            super().answer(handler)
            self._note_upload(handler, answered=True)
        for trap in self._traps:
            trap.come_by(handler.command, path, after=True)

    def _note_upload(self, handler: BaseHTTPRequestHandler, *, answered: bool) -> None:
        if handler.command == "PUT" and (found := _OF_A_SAVE.search(handler.path)):
            save = State(int(found[1]), int(found[2]))
            self._uploads.setdefault(save, {})[found[3]] = answered

    def _forward(self, handler: BaseHTTPRequestHandler, body: bytes, kind: str) -> None:
        word, _, place = kind.partition(" ")
        match word:
            case "flip-up":
                self.spoilt.append(handler.path)
                super()._forward(handler, flipped(body, float(place)), "")
            case "flip":
                answer, content = self._ask(handler, body)
                self._tell(handler, answer, flipped(content, float(place)), len(content))
            case "cut-up":
                self.cut.append(handler.path)
                self._ask_by_halves(handler, body)
            case "twice":
                self._ask(handler, body)
                super()._forward(handler, body, "")
            case "keep":
                self._recorded[handler.path] = (handler, body)
                super()._forward(handler, body, "")
            case _:
                super()._forward(handler, body, kind)

    def _ask_by_halves(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        upstream = self._begin(handler)
        with contextlib.closing(upstream):
            upstream.endheaders(body[: len(body) // 2])


def flipped(raw: bytes, place: float, bit: int = 2) -> bytes:
    """The same bytes but for one bit, at that share of their length."""
    if not raw:
        return raw
    changed = bytearray(raw)
    changed[min(len(raw) - 1, int(place * len(raw)))] ^= 1 << bit
    return bytes(changed)
