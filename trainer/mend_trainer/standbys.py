"""The agent's side of the zygote: keeps standbys ready, one per rank, and the keeper of stores and the saver alive."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from mend_trainer.arenas import Arenas
from mend_trainer.command import Command, Program
from mend_trainer.kernel import Ending, Reaper, kill_group, spawn
from mend_trainer.logs import Output, RankLog
from mend_trainer.pipes import Pipes
from mend_trainer.procfs import look_at
from mend_trainer.rank import Post
from mend_trainer.savers import MESSAGE_BYTES, Guide, Said, decode_said
from mend_trainer.stillness import Stillness
from mend_trainer.warm import Birth, Nursery, decode_hello, decode_imported

log = logging.getLogger(__name__)

_MESSAGE_BYTES: Final = 1 << 16
_REFILL_AFTER_SECONDS: Final = 1.0  # forks would compete with the ranks that are just starting
_RESTART_SECONDS: Final = (0.5, 30.0)  # first and longest pause before the zygote is started again
_LOOK_SECONDS: Final = 1.0  # between two looks at the saver: a few words of memory


class Standby:
    """One process that waits to become a rank."""

    def __init__(self, channel: socket.socket, on_end: Callable[[Standby, Ending], None]) -> None:
        self.channel = channel
        self.pid = 0
        self.on_end = on_end

    def post(self, post: Post, pipes: Pipes) -> bool:
        """Make it a rank; False when it died in the meantime."""
        try:
            socket.send_fds(self.channel, [msgspec.json.encode(post)], [pipes.log, pipes.reports, pipes.orders])
        except OSError:
            return False
        finally:
            self.channel.close()
        return True


class Standbys:
    """A zygote, its standbys and the keeper. `changed` is called when the number of either changes."""

    def __init__(
        self,
        *,
        loop: asyncio.AbstractEventLoop,
        reaper: Reaper,
        output: Output,
        environment: Mapping[str, str],
        command: Command,
        preload: tuple[str, ...],
        host: str,
        wanted: int,
        arenas: Arenas,
        listener: socket.socket | None,
        changed: Callable[[], None],
        on_said: Callable[[Said], None],
    ) -> None:
        self._arenas, self._on_said = arenas, on_said
        self._loop, self._reaper, self._output = loop, reaper, output
        self._environment, self._command, self._preload, self._host = environment, command, preload, host
        self._wanted = 0 if isinstance(command, Program) else wanted  # other programs start by exec
        self._changed = changed
        self.store_port = 0
        self._ready: deque[Standby] = deque()
        self._born: set[Standby] = set()  # asked for, not yet heard of
        self._zygote: socket.socket | None = None
        self._keeper: Standby | None = None
        self._saver: Standby | None = None
        self._listener = listener  # the saver's; ours too, so that its place outlives it
        self._saver_is_asked_for = False
        self._saver_pause = _RESTART_SECONDS[0]
        self._stillness = Stillness()  # the saver's
        self._looked_at = loop.time()
        self._guide = Guide()
        self._imported = False
        self._restarts = 0
        self._pause = _RESTART_SECONDS[0]
        self._news = asyncio.Event()
        self._closed = False
        self._start()
        self._look_at_saver()

    @property
    def saver_port(self) -> int:
        """Where the saver serves snapshots, whether it is up or not yet; 0: it does not."""
        return int(self._listener.getsockname()[1]) if self._listener is not None and not self._closed else 0

    @property
    def ready(self) -> int:
        """How many could become a rank now."""
        return len(self._ready)

    async def take(self, seconds: float) -> Standby | None:
        """A standby; waits for one while the first zygote is still importing, as nothing else would be faster.

        None when there will be none within `seconds`, or when a zygote has died: then start cold.
        """
        deadline = self._loop.time() + seconds
        while not self._ready:
            is_hopeful = self._zygote is not None and self._wanted and (self._imported or not self._restarts)
            if not is_hopeful or self._loop.time() >= deadline:
                return None
            self._refill()
            try:
                await asyncio.wait_for(self._news.wait(), deadline - self._loop.time())
            except TimeoutError:
                return None
        taken = self._ready.popleft()
        self._loop.call_later(_REFILL_AFTER_SECONDS, self._refill)
        self._tell()
        return taken

    def close(self) -> None:
        """No more standbys: closing their channels ends them, as it ends the zygote."""
        self._closed = True
        self._drop_zygote()
        for standby in (*self._ready, *self._born):
            self._loop.remove_reader(standby.channel)
            standby.channel.close()
        self._ready.clear()
        self._born.clear()
        for child in (self._keeper, self._saver):
            if child is not None:
                kill_group(child.pid)
        if self._saver is not None:
            self._loop.remove_reader(self._saver.channel)
        if self._listener is not None:
            self._listener.close()

    # ------------------------------------------------------------ the zygote
    def _start(self) -> None:
        if self._closed:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        log_read, log_write = os.pipe2(os.O_CLOEXEC)
        nursery = Nursery(
            agent_pid=os.getpid(),
            channel=theirs.fileno(),
            host=self._host,
            command=self._command,
            preload=self._preload,
            polite=self._restarts > 0,
        )
        theirs.set_inheritable(True)
        argv = [sys.executable, "-m", "mend_trainer.warm", msgspec.json.encode(nursery).decode()]
        pid = spawn(argv, self._environment, log_write)
        os.close(log_write)
        theirs.close()
        RankLog(self._loop, log_read, "[standby] ", self._output)
        self._zygote, self._imported = ours, False
        self._reaper.watch(pid, self._zygote_ended)
        self._loop.add_reader(ours, self._hear_zygote)
        if not self.store_port:
            self._ask_for(Birth(role="keeper"), self._keeper_ended)

    def _hear_zygote(self) -> None:
        assert self._zygote is not None
        message = _receive(self._zygote)
        if not message:
            self._loop.remove_reader(self._zygote)  # its end is told by the reaper
            return
        told = decode_imported(message)
        for problem in told.problems:
            log.warning("preloading: %s", problem)
        if not told.usable:
            self._wanted = 0
        log.info("warm after %.1fs", told.seconds)
        self._imported, self._pause = True, _RESTART_SECONDS[0]
        self._ask_for_saver()
        self._refill()
        self._tell()

    def _zygote_ended(self, ending: Ending) -> None:
        self._drop_zygote()
        self._tell()
        if self._closed:
            return
        log.warning("the standbys' parent ended (%s); again in %.1fs, until then ranks start cold", ending, self._pause)
        self._restarts += 1
        self._loop.call_later(self._pause, self._start)
        self._pause = min(2 * self._pause, _RESTART_SECONDS[1])

    def _drop_zygote(self) -> None:
        if self._zygote is not None:
            self._loop.remove_reader(self._zygote)
            self._zygote.close()
        self._zygote, self._imported = None, False

    # ------------------------------------------------------------ its children
    def _refill(self) -> None:
        if self._closed or not self._imported:
            return
        for _ in range(self._wanted - len(self._ready) - len(self._born)):
            self._ask_for(Birth(role="standby"), self._standby_ended)

    def _ask_for(self, birth: Birth, on_end: Callable[[Standby, Ending], None], *more: socket.socket) -> None:
        assert self._zygote is not None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        try:
            socket.send_fds(self._zygote, [msgspec.json.encode(birth)], [each.fileno() for each in (theirs, *more)])
        except OSError:  # it just died; the reaper tells
            ours.close()
            self._saver_is_asked_for = self._saver_is_asked_for and birth.role != "saver"
            return
        finally:
            theirs.close()
        child = Standby(ours, on_end)
        if birth.role == "standby":
            self._born.add(child)
        self._loop.add_reader(ours, self._hear_child, child)

    def _hear_child(self, child: Standby) -> None:
        message = _receive(child.channel)
        self._loop.remove_reader(child.channel)
        was_standby = child in self._born
        self._born.discard(child)
        if not message:  # it died before it was ready
            child.channel.close()
            if child.on_end == self._saver_ended:
                self._saver_ended(child, Ending(signal=signal.SIGKILL))
            self._tell()
            return
        hello = decode_hello(message)
        child.pid = hello.pid
        told = self._reaper.watch(child.pid, lambda ending: child.on_end(child, ending), lambda: kill_group(child.pid))
        if not told:  # adopted, and dead before we looked
            child.on_end(child, Ending(signal=signal.SIGKILL))
        elif was_standby:
            self._ready.append(child)
        elif child.on_end == self._saver_ended:
            self._saver, self._saver_is_asked_for = child, False
            self._loop.add_reader(child.channel, self._hear_saver, child)
            self.guide(self._guide)
        else:
            self._keeper, self.store_port = child, hello.port
        self._tell()

    def _standby_ended(self, standby: Standby, ending: Ending) -> None:
        if standby not in self._ready:
            return
        self._ready.remove(standby)
        standby.channel.close()
        log.warning("a standby ended before its time (%s)", ending)
        self._loop.call_later(_REFILL_AFTER_SECONDS, self._refill)
        self._tell()

    def _keeper_ended(self, keeper: Standby, ending: Ending) -> None:
        keeper.channel.close()
        self._keeper, self.store_port = None, 0
        self._tell()
        if self._closed:
            return
        log.warning("the keeper of stores ended (%s)", ending)
        if self._zygote is not None:
            self._ask_for(Birth(role="keeper"), self._keeper_ended)

    # ------------------------------------------------------------ the saver
    def guide(self, guide: Guide) -> None:
        """Tell the saver, and any that comes after it, what it is to know; it looks at the arenas."""
        self._guide = guide
        if self._saver is not None:
            with contextlib.suppress(OSError):  # stopped, or just dead: it looks, or its successor does
                self._saver.channel.send(msgspec.json.encode(guide))

    def wake_saver(self) -> None:
        """There is something new in the arenas."""
        self.guide(self._guide)

    def _ask_for_saver(self) -> None:
        if self._closed or self._saver is not None or self._saver_is_asked_for or not self._imported:
            return
        self._saver_is_asked_for = True
        birth = Birth(role="saver", arenas=self._arenas.own, copies=self._arenas.copies)
        self._ask_for(birth, self._saver_ended, *([self._listener] if self._listener else []))

    def _hear_saver(self, saver: Standby) -> None:
        try:
            message = saver.channel.recv(MESSAGE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if not message:  # its end is told by the reaper
            self._loop.remove_reader(saver.channel)
            return
        self._saver_pause = _RESTART_SECONDS[0]
        self._on_said(decode_said(message))

    def _look_at_saver(self) -> None:
        """Now and then: whether it hangs. Words in memory tell, so that what hangs need not answer."""
        if self._closed:
            return
        now, before = self._loop.time(), self._looked_at
        self._looked_at = now
        if self._saver is not None:
            self._stillness = self._stillness.seen(self._arenas.signs, now - before)
            if why := self._stillness.why_it_hangs:
                self._replace_saver(self._saver, why)
        self._loop.call_later(_LOOK_SECONDS, self._look_at_saver)

    def _replace_saver(self, saver: Standby, why: str) -> None:
        """Kill it, and wait for nothing: what is stuck in the kernel dies once it leaves it, and does nothing more."""
        found = look_at(saver.pid)
        where = f" in {found.kernel_function}" if found.kernel_function else ""
        log.warning("the saver hangs: %s; process %d, state %s%s, is killed", why, saver.pid, found.state, where)
        self._stillness = self._stillness.of_another(hung=True)
        saver.on_end = _is_done_with
        kill_group(saver.pid)
        self._saver_ended(saver, Ending(signal=signal.SIGKILL))

    def _saver_ended(self, saver: Standby, ending: Ending) -> None:
        if saver.channel.fileno() >= 0:
            self._loop.remove_reader(saver.channel)
            saver.channel.close()
        self._saver, self._saver_is_asked_for = None, False
        if self._closed:
            return
        self._stillness = self._stillness.of_another(hung=False)
        log.warning("the saver ended (%s); again in %.1fs", ending, self._saver_pause)
        self._loop.call_later(self._saver_pause, self._ask_for_saver)
        self._saver_pause = min(2 * self._saver_pause, _RESTART_SECONDS[1])

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
        self._changed()


def _is_done_with(child: Standby, ending: Ending) -> None:
    """Another has taken its place already."""


def _receive(channel: socket.socket) -> bytes:
    """One message; empty when the other end is gone."""
    try:
        return channel.recv(_MESSAGE_BYTES)
    except BlockingIOError:
        raise
    except OSError:
        return b""
