"""A real agent as a process on a loopback address of its own, and a small client that talks to it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from mend.environment import (
    ENV_GRACE_SECONDS,
    ENV_HEARTBEAT_SECONDS,
    ENV_POD_IP,
    ENV_RANKS_PER_WORKER,
    ENV_RUN,
    ENV_TOKEN,
    ENV_WORKER,
)
from mend.evidence import Evidence, decode_evidence
from mend.heartbeats import Heartbeat, Point, Points, decode_stream
from mend.orders import Ack, Checked, Gather, Launch, Order, decode_ack, decode_checked
from mend.protocol import AGENT_PORT, ORDERS_PATH, STREAM_PATH, encode
from mend_trainer.procfs import descendants

TOKEN = "token-of-the-run"
DEADLINE_SECONDS = 60.0
_addresses = itertools.count(os.getpid() * 64)  # parallel test processes have neighbouring pids


def own_address() -> str:
    """A loopback address that no other agent of this machine's tests uses, most likely."""
    number = next(_addresses) % (128 * 250 * 250)
    return f"127.{64 + number // 62_500}.{number // 250 % 250 + 1}.{number % 250 + 2}"


class AgentProcess:
    """`mend-agent -- COMMAND` as a child of the test, with its output in a file.

    `prefix` is a command that starts it elsewhere, such as in a network of its own, and becomes it.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        *,
        worker: int = 0,
        ranks: int = 2,
        env: Mapping[str, str] = {},
        stdout: int | None = None,
        host: str = "",
        prefix: Sequence[str] = (),
    ) -> None:
        self.host = host or own_address()
        self.worker = worker
        self.ranks = ranks
        self.output_path = folder / f"agent-{worker}-{self.host}.log"
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
            ENV_RUN: "tests/run",
            ENV_WORKER: str(worker),
            ENV_RANKS_PER_WORKER: str(ranks),
            ENV_TOKEN: TOKEN,
            ENV_POD_IP: self.host,
            ENV_HEARTBEAT_SECONDS: "0.1",
            ENV_GRACE_SECONDS: "30",
            **env,
        }
        with self.output_path.open("wb") as output:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "mend_trainer.agent", "--", *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output if stdout is None else stdout,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.url = f"http://{self.host}:{AGENT_PORT}"

    @property
    def pid(self) -> int:
        """Of the agent."""
        return self.process.pid

    @property
    def output(self) -> str:
        """What the agent has printed, its ranks' lines included."""
        return self.output_path.read_text(errors="replace")

    def end(self) -> None:
        """Make sure that it is gone; its ranks go with it."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(DEADLINE_SECONDS)


class AgentClient:
    """Follows the stream of one agent and gives orders to it."""

    def __init__(self, agent: AgentProcess, session: aiohttp.ClientSession) -> None:
        self.agent = agent
        self.heartbeat: Heartbeat | None = None
        self.points: list[Point] = []
        self.lines: list[tuple[float, Heartbeat | Points]] = []
        self.closed = asyncio.Event()
        self._session = session
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._follow())

    async def order(self, order: Order) -> tuple[int, Ack | Evidence | Checked]:
        """HTTP status and answer."""
        async with self._session.post(self.agent.url + ORDERS_PATH, data=encode(order)) as answer:
            body = await answer.read()
            if b'"type":"checked"' in body:
                return answer.status, decode_checked(body)
            gathered = isinstance(order, Gather) and b'"type":"evidence"' in body
            return answer.status, decode_evidence(body) if gathered else decode_ack(body)

    async def gather(self, attempt: int, seconds: float = 10.0) -> Evidence:
        """Evidence, which must be answered."""
        status, answer = await self.order(Gather(attempt=attempt, seconds=seconds))
        assert status == 200, answer
        assert isinstance(answer, Evidence), answer
        return answer

    async def until(
        self, holds: Callable[[Heartbeat], Any], what: str = "", seconds: float = DEADLINE_SECONDS
    ) -> Heartbeat:
        """The first heartbeat from now on, the last known included, of which `holds` is true."""
        deadline = time.monotonic() + seconds
        while True:
            self._news.clear()
            if self.heartbeat is not None and holds(self.heartbeat):
                return self.heartbeat
            left = deadline - time.monotonic()
            try:
                await asyncio.wait_for(self._news.wait(), max(left, 0.001))
            except TimeoutError:
                raise AssertionError(
                    f"not seen within {seconds}s: {what or holds}; last heartbeat: {self.heartbeat}; "
                    f"output of the agent:\n{self.agent.output[-3000:]}"
                ) from None

    async def _follow(self) -> None:
        try:
            while self.agent.process.poll() is None:
                try:
                    await self._read_stream()
                except aiohttp.ClientError:
                    await asyncio.sleep(0.01)  # it is not up yet, or just gone
        finally:
            self.closed.set()
            self._news.set()

    async def _read_stream(self) -> None:
        async with self._session.get(self.agent.url + STREAM_PATH) as stream:
            assert stream.status == 200, stream.status
            async for line in stream.content:
                message = decode_stream(line)
                self.lines.append((time.monotonic(), message))
                if isinstance(message, Heartbeat):
                    self.heartbeat = message
                else:
                    self.points.extend(message.points)
                self._news.set()

    async def left(self, seconds: float = DEADLINE_SECONDS) -> int:
        """The agent's exit code, once it has exited."""
        return await asyncio.to_thread(self.agent.process.wait, seconds)

    async def close(self) -> None:
        """Stop following."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task


@contextlib.asynccontextmanager
async def an_agent(
    command: Sequence[str],
    folder: Path,
    *,
    worker: int = 0,
    ranks: int = 2,
    env: Mapping[str, str] = {},
    stdout: int | None = None,
) -> AsyncIterator[AgentClient]:
    """A real agent for `command` and a client of it; both are gone afterwards. `stdout` replaces the output file."""
    agent = AgentProcess(command, folder, worker=worker, ranks=ranks, env=env, stdout=stdout)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
    # Streams may carry lines of many points, beyond the default limit of a line.
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, read_bufsize=1 << 20) as session:
        client = AgentClient(agent, session)
        try:
            yield client
        finally:
            await client.close()
            agent.end()


_PROGRAMS = Path(__file__).parent / "programs"
LOOP = str(_PROGRAMS / "loop.py")  # a loop under a session
STEPS = str(_PROGRAMS / "steps.py")  # a gang of all_reduce steps, with faults on request


def a_launch(
    attempt: int, master: AgentClient, *, workers: int = 1, worker: int = 0, env: Mapping[str, str] = {}
) -> Launch:
    """The order for one worker of a gang whose first worker is `master`."""
    assert master.heartbeat is not None
    ranks = master.agent.ranks
    return Launch(
        attempt=attempt,
        world_size=ranks * workers,
        first_rank=ranks * worker,
        ranks=ranks,
        workers=workers,
        master_addr=master.agent.host,
        master_port=master.heartbeat.store_port,
        run="tests/run",
        env=dict(env),
    )


async def warm(client: AgentClient) -> Heartbeat:
    """Wait until the agent's store is up and every rank has a standby."""
    return await client.until(lambda beat: beat.store_port and beat.standbys_ready >= client.agent.ranks, "warm")


async def launched(client: AgentClient, attempt: int = 1, **env: str) -> None:
    """Launch all ranks of a gang of one worker."""
    await client.until(lambda beat: beat.store_port, "store")
    status, answer = await client.order(a_launch(attempt, client, env=env))
    assert status == 200, answer
    assert isinstance(answer, Ack), answer
    assert answer.accepted, answer


def at_step(step: int, attempt: int = 1) -> Callable[[Heartbeat], bool]:
    """Every rank of the attempt has completed `step`."""
    return lambda beat: beat.attempt == attempt and bool(beat.ranks) and min(each.step for each in beat.ranks) >= step


def has_exit(rank: int, attempt: int = 1) -> Callable[[Heartbeat], bool]:
    """This rank of the attempt has ended."""
    return lambda beat: beat.attempt == attempt and any(each.rank == rank and each.exit for each in beat.ranks)


def descendants_of(agent: AgentProcess) -> set[int]:
    """All processes below the agent: ranks, standbys, the zygote, the keeper of stores."""
    return descendants([agent.pid])


def named(agent: AgentProcess, name: str) -> list[int]:
    """The agent's descendants that go by this name: mend-zygote, mend-standby, mend-stores, rank-0..."""
    return [pid for pid in descendants_of(agent) if _name_of(pid) == name]


def _name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:  # it has just gone
        return ""


async def all_gone(pids: Iterable[int], seconds: float = DEADLINE_SECONDS) -> None:
    """None of these processes runs any more."""
    deadline = time.monotonic() + seconds
    while alive := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, f"still running: {alive}"
        await asyncio.sleep(0.01)


def is_running(pid: int) -> bool:
    """Whether a process lives; zombies do not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
