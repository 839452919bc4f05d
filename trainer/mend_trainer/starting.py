"""How a process becomes a rank: a standby that is given its post, or where that cannot be, a cold start."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from mend import protocol
from mend.protocol import Launch
from mend_trainer.command import Command, Program
from mend_trainer.kernel import Ending, Reaper, kill_group, spawn
from mend_trainer.logs import Output
from mend_trainer.procfs import OutOfMemoryKills
from mend_trainer.rank import ENV_AGENT_PID, ENV_WORKER_SERVER, Post
from mend_trainer.ranks import Rank
from mend_trainer.reporting import PIPE_BYTES
from mend_trainer.standbys import Standbys

log = logging.getLogger(__name__)

_STANDBY_SECONDS: Final = 60.0
_F_SETPIPE_SZ: Final = 1031
# Read by the interpreter, the loader or OpenMP when a process starts: a warm process could not obey a change.
_READ_AT_START: Final = ("PYTHON", "LD_", "OMP_", "KMP_", "MKL_", "GLIBC_", "MALLOC_")


class Tools(msgspec.Struct, frozen=True, kw_only=True):
    """What the agent lends to those who start ranks."""

    loop: asyncio.AbstractEventLoop
    reaper: Reaper
    standbys: Standbys
    output: Output
    oom_kills: OutOfMemoryKills
    environment: Mapping[str, str]
    command: Command
    argv: tuple[str, ...]
    changed: Callable[[], None]


async def start(
    rank: Rank,
    launch: Launch,
    store_port: int,
    pipes: tuple[int, int],
    tools: Tools,
    on_end: Callable[[Rank, Ending], None],
) -> None:
    """Give `rank` a process, which writes to the two `pipes` for its log and its reports."""
    given = rank_environment(launch, rank, store_port)
    command = tools.command
    if not isinstance(command, Program) and _starts_alike(launch.env, tools.environment):
        while standby := await tools.standbys.take(_STANDBY_SECONDS):
            if standby.post(Post(command=command, env=given), *pipes):
                standby.on_end = lambda _, ending: on_end(rank, ending)
                rank.pid = standby.pid
                return
    rank.pid = _start_cold(given, *pipes, tools)
    tools.reaper.watch(rank.pid, lambda ending: on_end(rank, ending), lambda: kill_group(rank.pid))


def _start_cold(given: Mapping[str, str], log_pipe: int, reports: int, tools: Tools) -> int:
    environment = {
        **tools.environment,
        **given,
        ENV_AGENT_PID: str(os.getpid()),
        protocol.ENV_REPORT_FD: str(reports),  # a standby has a number of its own for it
    }
    os.set_inheritable(reports, True)
    return spawn([sys.executable, "-m", "mend_trainer.rank", *tools.argv], environment, log_pipe)


def rank_environment(launch: Launch, rank: Rank, store_port: int) -> dict[str, str]:
    """What a rank gets beside its agent's environment: torchrun's variables and mend's own."""
    local = rank.rank - launch.first_rank
    group = launch.first_rank // launch.ranks
    return {
        **launch.env,
        "RANK": str(rank.rank),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(launch.world_size),
        "LOCAL_WORLD_SIZE": str(launch.ranks),
        "GROUP_RANK": str(group),
        "GROUP_WORLD_SIZE": str(launch.workers),
        "ROLE_NAME": "default",
        "ROLE_RANK": str(rank.rank),
        "ROLE_WORLD_SIZE": str(launch.world_size),
        "MASTER_ADDR": launch.master_addr,
        "MASTER_PORT": str(store_port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(launch.attempt),
        "TORCHELASTIC_RUN_ID": launch.run,
        ENV_WORKER_SERVER: str(rank.socket_path),
        protocol.ENV_ATTEMPT: str(launch.attempt),
        protocol.ENV_LAUNCH: protocol.encode(launch).decode(),
        protocol.ENV_PAGE: str(rank.page_path),
        protocol.ENV_STACKS: str(rank.stacks_path),
    }


def _starts_alike(wanted: Mapping[str, str], environment: Mapping[str, str]) -> bool:
    return all(environment.get(name) == value for name, value in wanted.items() if name.startswith(_READ_AT_START))


def report_pipe() -> tuple[int, int]:
    """A pipe for reports, its ends for reading and writing: large, so that a busy agent loses none."""
    read, write = os.pipe2(os.O_CLOEXEC)
    try:
        fcntl.fcntl(read, _F_SETPIPE_SZ, PIPE_BYTES)
    except OSError:
        log.debug("the system grants no larger pipe for reports")
    return read, write
