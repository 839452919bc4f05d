"""What the agent asks of Linux about its children: to start and kill them, who dies with whom, and how they ended."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15
_PR_SET_CHILD_SUBREAPER: Final = 36

_libc = ctypes.CDLL(None, use_errno=True)


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """How a process ended: exactly one of the two is set."""

    code: int | None = None
    signal: int | None = None


def _prctl(option: int, argument: int | bytes) -> None:
    if _libc.prctl(option, argument, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def adopt_orphans() -> None:
    """Descendants whose parent dies become children of this process, as they do of PID 1."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def name_process(name: str) -> None:
    """What `ps -o comm` and `top` show; Linux keeps 15 bytes."""
    _prctl(_PR_SET_NAME, name.encode()[:15])


def die_with(parent: int) -> None:
    """Be killed when `parent`, which is this process's parent, dies; exit at once if it is dead already."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the wish was known
        os._exit(0)


def spawn(argv: list[str], environment: Mapping[str, str], output: int) -> int:
    """Start a program in a process group of its own, with its output on that pipe; returns its pid."""
    return os.posix_spawn(
        argv[0],
        argv,
        environment,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, output, 1),
            (os.POSIX_SPAWN_DUP2, output, 2),
        ],
        setpgroup=0,
        setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
    )


def kill_group(leader: int) -> None:
    """SIGKILL everything in the process group of `leader`, while that is still ours (a zombie counts)."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # gone, or changed its user: nothing more to do
        os.killpg(leader, signal.SIGKILL)


def send(pid: int, number: signal.Signals) -> None:
    """Signal one process, if it is still there and ours to signal."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _nothing() -> None:
    """The default of a hook."""


class Reaper:
    """Tells of each watched child's end at once, by pidfd, and buries the orphans that nobody watches."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._watched: dict[int, int] = {}  # pid -> pidfd
        self._idle = asyncio.Event()
        loop.add_signal_handler(signal.SIGCHLD, self.bury_orphans)

    def watch(self, pid: int, on_end: Callable[[Ending], None], before_burial: Callable[[], None] = _nothing) -> bool:
        """Call `on_end` once, when the child `pid` has ended; False if it has, and was buried as an orphan.

        `before_burial` runs while it is still a zombie: its pid, and so its process group, cannot belong to others yet.
        """
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return False

        def ended() -> None:
            self._loop.remove_reader(descriptor)
            before_burial()
            result = os.waitid(os.P_PIDFD, descriptor, os.WEXITED)
            os.close(descriptor)
            del self._watched[pid]
            on_end(_ending(result))
            if not self._watched:
                self._idle.set()
            self.bury_orphans()

        self._watched[pid] = descriptor
        self._loop.add_reader(descriptor, ended)
        return True

    def bury_orphans(self) -> None:
        """Reap every dead child that nobody watches. A watched one ends the search; its own burial resumes it."""
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None or found.si_pid in self._watched:
                return
            os.waitpid(found.si_pid, 0)

    async def all_buried(self, seconds: float) -> bool:
        """Wait until no watched child lives; False if some still do after `seconds`."""
        self._idle = asyncio.Event()
        if not self._watched:
            return True
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Watch nobody any more."""
        self._loop.remove_signal_handler(signal.SIGCHLD)
        for descriptor in self._watched.values():
            self._loop.remove_reader(descriptor)
            os.close(descriptor)
        self._watched.clear()


def _ending(result: os.waitid_result | None) -> Ending:
    assert result is not None, "a readable pidfd is that of an ended process"
    if result.si_code == os.CLD_EXITED:
        return Ending(code=result.si_status)
    return Ending(signal=result.si_status)
