"""A worker whose ranks run a plain loop under a session, launched and hurt by a test in place of the controller."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from agents_real import AgentClient, a_launch, an_agent, warm
from mend.orders import CheckpointPlan
from mend.states import CheckpointRef

_LOOP = Path(__file__).parent / "programs" / "loop.py"


@asynccontextmanager
async def a_worker(folder: Path, **env: str) -> AsyncIterator[AgentClient]:
    """A warm agent whose two ranks run a plain loop under a session."""
    settings = {"GLOO_SOCKET_IFNAME": "lo", "STEP_SECONDS": "0.01", "FAULTS": str(folder), **env}
    async with an_agent(["python", str(_LOOP)], folder, ranks=2, env=settings) as client:
        await warm(client)
        yield client


async def launch(client: AgentClient, attempt: int, plan: CheckpointPlan, *restore: CheckpointRef) -> None:
    """Begin an attempt from these candidates."""
    order = a_launch(attempt, client)
    status, answer = await client.order(msgspec.structs.replace(order, checkpoint=plan, restore=restore, run_uid="uid"))
    assert status == 200, answer


def pid_of_saver(agent: int) -> int | None:
    """The saver among the children of this agent."""
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            said = status.read_text()
        except OSError:
            continue
        if said.startswith("Name:\tmend-saver\n") and f"PPid:\t{agent}\n" in said:
            return int(status.parent.name)
    return None
