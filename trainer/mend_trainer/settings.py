"""The agent's environment, read once and checked: every bad value names its variable and what is expected."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import msgspec

from mend.environment import (
    ENV_AGENT_PORT,
    ENV_GRACE_SECONDS,
    ENV_HEARTBEAT_SECONDS,
    ENV_POD_IP,
    ENV_PRELOAD,
    ENV_RANKS_PER_WORKER,
    ENV_RUN,
    ENV_TOKEN,
    ENV_WORKER,
)
from mend.protocol import AGENT_PORT

_Number = TypeVar("_Number", int, float)


class BadEnvironment(ValueError):
    """The agent cannot work like this. `problems` holds one sentence per bad variable."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the pod tells its agent."""

    command: tuple[str, ...]
    run: str
    worker: int
    ranks_per_worker: int
    token: str
    host: str
    port: int
    heartbeat_seconds: float
    grace_seconds: float
    preload: tuple[str, ...]


def read_settings(command: Sequence[str], environment: Mapping[str, str] = os.environ) -> Settings:
    """Parse the command line and the environment; raises `BadEnvironment` with every problem found."""
    problems: list[str] = []

    def number(name: str, parse: Callable[[str], _Number], default: _Number, least: _Number) -> _Number:
        text = environment.get(name)
        if text is None:
            return default
        try:
            value = parse(text)
        except ValueError:
            value = None
        if value is None or not value >= least:
            problems.append(f"{name}: got {text!r}; expected a number of at least {least}")
            return default
        return value

    if not command:
        problems.append("command: missing; expected `mend-agent -- COMMAND [ARGS...]`, what starts one rank")
    token = environment.get(ENV_TOKEN, "")
    if not token:
        problems.append(f"{ENV_TOKEN}: missing; expected the token from the run's Secret")
    preload = environment.get(ENV_PRELOAD, "")
    settings = Settings(
        command=tuple(command),
        run=environment.get(ENV_RUN, ""),
        worker=number(ENV_WORKER, int, 0, 0),
        ranks_per_worker=number(ENV_RANKS_PER_WORKER, int, 1, 1),
        token=token,
        host=environment.get(ENV_POD_IP) or "0.0.0.0",
        port=number(ENV_AGENT_PORT, int, AGENT_PORT, 1),
        heartbeat_seconds=number(ENV_HEARTBEAT_SECONDS, float, 0.3, 0.01),
        grace_seconds=number(ENV_GRACE_SECONDS, float, 30.0, 0.0),
        preload=tuple(name.strip() for name in preload.split(",") if name.strip()),
    )
    if problems:
        raise BadEnvironment(problems)
    return settings
