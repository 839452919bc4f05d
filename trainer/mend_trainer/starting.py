"""How a process becomes a rank: a standby that is given its post, or where that cannot be, a cold start."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from mend.environment import ENV_ATTEMPT, ENV_FOOTING, ENV_LAUNCH, ENV_ORDERS_FD, ENV_PAGE, ENV_REPORT_FD, ENV_STACKS
from mend.orders import Launch
from mend.protocol import encode
from mend_trainer.arenas import Arenas
from mend_trainer.command import Command, Program
from mend_trainer.kernel import Ending, Reaper, kill_group, spawn
from mend_trainer.logs import Output
from mend_trainer.pipes import Pipes
from mend_trainer.procfs import OutOfMemoryKills
from mend_trainer.rank import ENV_AGENT_PID, ENV_WORKER_SERVER, Post
from mend_trainer.ranks import Rank
from mend_trainer.standbys import Standbys

_STANDBY_SECONDS: Final = 60.0
# Read by the interpreter, the loader or OpenMP when a process starts: a warm process could not obey a change.
_READ_AT_START: Final = ("PYTHON", "LD_", "OMP_", "KMP_", "MKL_", "GLIBC_", "MALLOC_")


class Tools(msgspec.Struct, frozen=True, kw_only=True):
    """What the agent lends to those who start ranks."""

    loop: asyncio.AbstractEventLoop
    reaper: Reaper
    standbys: Standbys
    output: Output
    oom_kills: OutOfMemoryKills
    arenas: Arenas
    environment: Mapping[str, str]
    command: Command
    argv: tuple[str, ...]
    changed: Callable[[], None]
    staged: Callable[[], None]


async def start(
    rank: Rank,
    launch: Launch,
    store_port: int,
    pipes: Pipes,
    tools: Tools,
    on_end: Callable[[Ending], None],
) -> None:
    """Give `rank` a process, which gets its ends of the `pipes`."""
    given = rank_environment(launch, rank, store_port, tools.arenas)
    command = tools.command
    if not isinstance(command, Program) and _starts_alike(launch.env, tools.environment):
        while standby := await tools.standbys.take(_STANDBY_SECONDS):
            if standby.post(Post(command=command, env=given), pipes):
                standby.on_end = lambda _, ending: on_end(ending)
                rank.pid = standby.pid
                return
    rank.pid = _start_cold(given, pipes, tools)
    tools.reaper.watch(rank.pid, on_end, lambda: kill_group(rank.pid))


def _start_cold(given: Mapping[str, str], pipes: Pipes, tools: Tools) -> int:
    environment = {
        **tools.environment,
        **given,
        ENV_AGENT_PID: str(os.getpid()),
        ENV_REPORT_FD: str(pipes.reports),  # a standby has numbers of its own for these
        ENV_ORDERS_FD: str(pipes.orders),
    }
    os.set_inheritable(pipes.reports, True)
    os.set_inheritable(pipes.orders, True)
    return spawn([sys.executable, "-m", "mend_trainer.rank", *tools.argv], environment, pipes.log)


def rank_environment(launch: Launch, rank: Rank, store_port: int, arenas: Arenas) -> dict[str, str]:
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
        ENV_ATTEMPT: str(launch.attempt),
        ENV_LAUNCH: encode(launch).decode(),
        ENV_PAGE: str(rank.page_path),
        ENV_STACKS: str(rank.stacks_path),
        ENV_FOOTING: str(rank.footing_path),
        **arenas.environment(local),
    }


def _starts_alike(wanted: Mapping[str, str], environment: Mapping[str, str]) -> bool:
    return all(environment.get(name) == value for name, value in wanted.items() if name.startswith(_READ_AT_START))
