"""Processes in sessions of their own: started, recognised beyond doubt, signalled, and ended to the last descendant.

A PID alone proves nothing, since the kernel hands it out again. Two facts do: the PID with the time the process
started (`Identity`), and the owner mark that every process inherits in its environment (`OWNER_ENV`). A leader is
reaped only after everything in its session is gone, because an unreaped PID cannot be handed out again and so keeps
its process group and session unmistakable.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

OWNER_ENV: Final = "MEND_LOCAL_OWNER"
END_SECONDS: Final = 10.0  # SIGKILL takes this long at most, but for a process in uninterruptible sleep


@dataclass(frozen=True, slots=True)
class Identity:
    """One process and no other: its PID and when it started, in clock ticks since boot."""

    pid: int
    started_ticks: int


@dataclass(frozen=True, slots=True)
class Seen:
    """A process as /proc shows it; `state` is R, S, D, T, Z and so on."""

    identity: Identity
    parent: int
    session: int
    state: str

    @property
    def is_dead(self) -> bool:
        """It has ended and only waits to be reaped."""
        return self.state in "ZX"


def look_at(pid: int) -> Seen | None:
    """What /proc tells about one process; None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The command's name is in parentheses and may hold anything, parentheses too: count from the last one.
    fields = stat[stat.rfind(b")") + 2 :].split()
    return Seen(
        identity=Identity(pid, int(fields[19])), parent=int(fields[1]), session=int(fields[3]), state=fields[0].decode()
    )


def is_running(identity: Identity) -> bool:
    """Whether this very process exists and has not ended."""
    seen = look_at(identity.pid)
    return seen is not None and seen.identity == identity and not seen.is_dead


def all_processes() -> Iterator[Seen]:
    """Every process that /proc shows."""
    for place in Path("/proc").iterdir():
        if place.name.isdigit() and (seen := look_at(int(place.name))):
            yield seen


def owner_of(pid: int) -> str:
    """The owner mark in the process's environment; "" without one, or when it may not be read."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return ""
    mark = OWNER_ENV.encode() + b"="
    return next((each[len(mark) :].decode() for each in environment.split(b"\0") if each.startswith(mark)), "")


def owned_by(prefix: str) -> list[Seen]:
    """Living processes whose owner mark begins with `prefix`, except this one."""
    mine = os.getpid()
    return [
        each
        for each in all_processes()
        if each.identity.pid != mine and not each.is_dead and owner_of(each.identity.pid).startswith(prefix)
    ]


def send(identity: Identity, number: int) -> bool:
    """Signal this very process; False if it is gone. A pidfd excludes that its PID was handed out meanwhile."""
    try:
        handle = os.pidfd_open(identity.pid)
    except OSError:
        return False
    try:
        seen = look_at(identity.pid)
        if seen is None or seen.identity != identity:
            return False
        signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True


def end_recorded(record: Path, *, deadline_seconds: float = END_SECONDS) -> list[Seen]:
    """SIGKILL the process that `Process.record` wrote down and all that came from it, if it is still that process.

    This finds what has wiped its environment, and with it the owner mark.
    """
    try:
        written = json.loads(record.read_text())
        leader = Identity(written["pid"], written["started_ticks"])
    except (OSError, ValueError, KeyError, TypeError):
        return []  # never started, or we died while writing it: the owner mark still tells
    if written.get("boot") != _boot_id() or not is_running(leader):
        return []
    return _end(lambda: family_of(leader.pid) if is_running(leader) else [], deadline_seconds)


def family_of(leader: int) -> list[Seen]:
    """The living processes of the session that `leader` leads, and of its descendants."""
    seen = [each for each in all_processes() if not each.is_dead]
    family = {leader}
    for each in sorted(seen, key=lambda one: one.identity.started_ticks):  # parents before children
        if each.parent in family or each.session == leader:
            family.add(each.identity.pid)
    return [each for each in seen if each.identity.pid in family]


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def end_owned(prefix: str, *, deadline_seconds: float = END_SECONDS) -> list[Seen]:
    """SIGKILL all that `owned_by` finds, until it finds nothing; returns those that were ended."""
    return _end(lambda: owned_by(prefix), deadline_seconds)


def _end(find: Callable[[], list[Seen]], deadline_seconds: float) -> list[Seen]:
    ended: dict[Identity, Seen] = {}
    deadline = time.monotonic() + deadline_seconds
    while found := find():  # again and again: what was being forked during one look is seen by the next
        for each in found:
            if send(each.identity, signal.SIGKILL):
                ended[each.identity] = each
        if time.monotonic() > deadline:
            pids = ", ".join(f"{each.identity.pid} (state {each.state})" for each in found)
            raise TimeoutError(f"processes {pids} are still there {deadline_seconds:g} s after SIGKILL")
        time.sleep(0.002)
    return list(ended.values())


class Process:
    """A child that leads a session of its own, with all that it forks."""

    def __init__(self, child: subprocess.Popen[bytes], owner: str) -> None:
        seen = look_at(child.pid)
        assert seen is not None, "a child that nobody has reaped is in /proc"
        self.identity = seen.identity
        self.owner = owner
        self._child = child
        self._exited = asyncio.get_running_loop().create_future()
        self._handle = os.pidfd_open(child.pid)
        asyncio.get_running_loop().add_reader(self._handle, self._on_exit)

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        *,
        owner: str,
        env: Mapping[str, str],
        cwd: Path,
        output: int,
        cgroup: Path | None = None,
        pass_fds: Sequence[int] = (),
    ) -> Process:
        """Start `command` (its first word a path) with stdout and stderr at the descriptor `output`.

        Raises OSError when it cannot be executed. It enters `cgroup` before it runs.
        """
        words = list(command)
        if cgroup is not None:  # a shell enters the group and then becomes the command: no moment outside of it
            script = 'echo $$ > "$0" && exec "$@"'
            words = ["/bin/sh", "-c", script, str(cgroup / "cgroup.procs"), *words]
        child = subprocess.Popen(
            words,
            env={**env, OWNER_ENV: owner},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=pass_fds,
        )
        return cls(child, owner)

    def _on_exit(self) -> None:
        asyncio.get_running_loop().remove_reader(self._handle)
        if not self._exited.done():
            self._exited.set_result(None)

    @property
    def has_exited(self) -> bool:
        """The leader has ended; what it forked may live on until `reap`."""
        return self._exited.done()

    async def exited(self) -> None:
        """Wait until the leader has ended."""
        await asyncio.shield(self._exited)

    def signal(self, number: int) -> None:
        """Signal the leader alone, as Kubernetes signals a container's PID 1."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, number)

    def signal_all(self, number: int) -> None:
        """Signal the leader and everything that came from it."""
        for each in self.members():
            send(each.identity, number)

    def members(self) -> list[Seen]:
        """The living processes of this session, of its descendants, and those that carry its owner mark."""
        # By identity: a process that went to sleep between the two looks is one process, seen in two states.
        found = {each.identity: each for each in family_of(self.identity.pid) + owned_by(self.owner)}
        return list(found.values())

    def record(self, path: Path) -> None:
        """Write down which process this is, for `end_recorded` in a later life."""
        facts = {"pid": self.identity.pid, "started_ticks": self.identity.started_ticks, "boot": _boot_id()}
        path.write_text(json.dumps(facts))

    async def reap(self) -> int:
        """Kill all that is left, then collect the leader: its exit code, or minus the signal that ended it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.identity.pid, signal.SIGKILL)
        await asyncio.to_thread(_end, self.members, END_SECONDS)
        await self.exited()
        os.close(self._handle)
        return self._child.wait()
