"""Copies between real workers: agents, savers, ranks, killed and stopped; all that comes back is bit for bit."""

from __future__ import annotations

import json
import mmap
import os
import signal
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from agents_real import AgentClient, a_launch, all_gone, an_agent, at_step, descendants_of, named
from mend.environment import ENV_RUN_UID, ENV_TLS_PEM
from mend.heartbeats import Heartbeat
from mend.orders import CheckpointPlan
from mend.selfsigned import self_signed
from mend.states import MEMORY_SCHEME, CheckpointRef, Held, Holder
from mend.store import open_store
from mend_trainer.alone import next_attempt
from mend_trainer.slots import SLOTS, region_start
from waiting import eventually

REMEMBERING = str(Path(__file__).parents[1] / "programs" / "remembering.py")
DATA_REGION = 4
PEM = self_signed("run")


class Run:
    """Two workers of one rank each; the test begins its attempts as a controller would."""

    def __init__(self, folder: Path, plan: CheckpointPlan, stack: AsyncExitStack, env: Mapping[str, str]) -> None:
        self.plan, self.attempt = plan, 0
        self.workers: dict[int, AgentClient] = {}
        self._folder, self._stack, self._env = folder, stack, env

    async def start(self, worker: int) -> AgentClient:
        """A new pod for that worker."""
        folder = self._folder / f"pod-{worker}-{self.attempt}"
        folder.mkdir()
        given = {ENV_TLS_PEM: PEM, ENV_RUN_UID: "uid", "NOTES": str(self._folder), **self._env}
        agent = an_agent(["python", REMEMBERING], folder, worker=worker, ranks=1, env=given)
        client = self.workers[worker] = await self._stack.enter_async_context(agent)
        return client

    async def launch(self, restore: Iterable[CheckpointRef] = (), holders: Iterable[Holder] = ()) -> None:
        """The next attempt on both; each is the other's buddy."""
        for client in self.workers.values():
            await client.until(lambda beat: beat.store_port and beat.saver_port and beat.standbys_ready, "warm")
        self.attempt += 1
        for worker, client in self.workers.items():
            order = msgspec.structs.replace(
                a_launch(self.attempt, self.workers[0], workers=2, worker=worker),
                checkpoint=self.plan,
                restore=tuple(restore),
                holders=tuple(holders),
                buddy=self.url(1 - worker),
                run_uid="uid",
            )
            status, answer = await client.order(order)
            assert status == 200, answer

    def url(self, worker: int) -> str:
        """Where its saver is."""
        return f"https://{self.workers[worker].agent.host}:{self.beat(worker).saver_port}"

    def beat(self, worker: int) -> Heartbeat:
        """The last one."""
        beat = self.workers[worker].heartbeat
        assert beat is not None
        return beat

    def newest(self, *workers: int) -> tuple[Held, list[Holder]] | None:
        """The newest save of which these workers hold all snapshots, and where."""
        saves = {held.save_id: held for worker in workers for held in self.beat(worker).held}
        for held in sorted(saves.values(), key=lambda held: (held.attempt, held.step), reverse=True):
            holders = [
                Holder(save_id=held.save_id, rank=rank, worker=worker, url=self.url(worker))
                for worker in workers
                for each in self.beat(worker).held
                if each.save_id == held.save_id
                for rank in each.ranks
            ]
            if {holder.rank for holder in holders} == {0, 1}:
                return held, holders
        return None

    def kill(self, worker: int) -> None:
        """The pod is gone, with its memory and all its processes."""
        os.kill(self.workers[worker].agent.pid, signal.SIGKILL)

    def notes(self, rank: int) -> list[dict[str, Any]]:
        """What the rank has noted, oldest first."""
        path = self._folder / f"rank-{rank}"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    async def restored(self, rank: int) -> dict[str, Any]:
        """What the rank has begun the present attempt with."""

        def found() -> dict[str, Any] | None:
            notes = [note for note in self.notes(rank) if note["attempt"] == self.attempt and note["restored"]]
            return notes[0] if notes else None

        return await eventually(found, f"rank {rank} in attempt {self.attempt}", 90.0)  # type: ignore[no-any-return]

    async def is_bit_for_bit_what_it_was(self, step: int) -> None:
        """Both ranks have gone on from that step, with exactly the state that they had reached."""
        for rank in range(2):
            restored = await self.restored(rank)
            reached = {note["digest"] for note in self.notes(rank) if note["step"] == step and not note["restored"]}
            assert restored["step"] == step, restored
            assert reached == {restored["digest"]}, f"rank {rank} has gone on from something else"


@asynccontextmanager
async def a_run(folder: Path, *, cap: int = 0, interval: int | None = None, **env: str) -> AsyncIterator[Run]:
    """Both workers are up and train; each holds copies of the other's snapshots."""
    plan = CheckpointPlan(
        uri=f"file://{folder}/store", interval_steps=interval, memory_interval_steps=1, peer_bytes_per_second=cap
    )
    async with AsyncExitStack() as stack:
        run = Run(folder, plan, stack, env)
        for worker in range(2):
            await run.start(worker)
        await run.launch()
        yield run


def in_memory(held: Held) -> CheckpointRef:
    """As the controller names it."""
    return CheckpointRef(uri=f"{MEMORY_SCHEME}{held.save_id}", step=held.step, attempt=held.attempt)


async def each_holds_both(run: Run, step: int = 3) -> None:
    """Each worker alone could give back the whole state of a step since that one."""
    for worker in range(2):
        await run.workers[worker].until(
            lambda beat: any(held.ranks == (0, 1) and held.step >= step for held in beat.held), f"copies of {step}", 90
        )


async def test_a_worker_that_is_lost_comes_back_from_its_buddys_memory(tmp_path: Path) -> None:
    """A pod killed with its memory: the new one gets its state from the buddy, bit for bit, and no store is asked."""
    async with a_run(tmp_path) as run:
        await each_holds_both(run)
        run.kill(0)
        await run.workers[0].left()
        reached = run.notes(1)[-1]["step"]
        before = run.newest(1)
        assert before is not None, run.beat(1).held
        await run.start(0)
        found = run.newest(1)
        assert found is not None
        held, holders = found
        assert held.step >= before[0].step
        await run.launch([in_memory(held)], holders)
        await run.is_bit_for_bit_what_it_was(held.step)
        await run.workers[0].until(at_step(held.step + 5, 2), "training goes on")
        assert run.beat(0).restored == in_memory(held)
        assert reached - held.step <= 20, "the last that was copied, and not much older"
        await each_holds_both(run, held.step + 3)


async def test_copies_outlive_ranks_and_savers(tmp_path: Path) -> None:
    """Savers and ranks of both workers are killed: copies are still held, and served at the same place."""
    async with a_run(tmp_path) as run:
        await each_holds_both(run)
        ports = [run.beat(worker).saver_port for worker in range(2)]
        killed = [
            pid
            for worker in range(2)
            for name in ("mend-saver", f"rank-{worker}")
            for pid in named(run.workers[worker].agent, name)
        ]
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        await all_gone(killed)
        for worker in range(2):
            await eventually(lambda worker=worker: named(run.workers[worker].agent, "mend-saver"), "a new saver", 60)
        found = run.newest(0)
        assert found is not None
        held, holders = found
        await run.launch([in_memory(held)], holders)
        await run.is_bit_for_bit_what_it_was(held.step)
        await each_holds_both(run, held.step + 3)
        assert [run.beat(worker).saver_port for worker in range(2)] == ports


async def test_when_all_copies_are_lost_the_store_is_asked(tmp_path: Path) -> None:
    """Both workers are killed: holders that are gone are passed over, and the run goes on from its checkpoint."""
    async with a_run(tmp_path, interval=10) as run:
        await each_holds_both(run)
        _, (committed,) = await eventually(lambda: _is_committed(run.plan), "a checkpoint", 60)
        found = await eventually(lambda: run.newest(0, 1), "a save in memory")
        for worker in range(2):
            run.kill(worker)
            await run.workers[worker].left()
        for worker in range(2):
            await run.start(worker)
        _, candidates = next_attempt(open_store(run.plan.uri))
        await run.launch([in_memory(found[0]), *candidates], found[1])
        await run.is_bit_for_bit_what_it_was(candidates[0].step)
        assert candidates[0].step >= committed.step


def _is_committed(plan: CheckpointPlan) -> tuple[int, tuple[CheckpointRef, ...]] | None:
    attempt, candidates = next_attempt(open_store(plan.uri))
    return (attempt, tuple(candidates[:1])) if candidates else None


async def test_a_buddy_whose_memory_is_damaged_is_passed_over(tmp_path: Path) -> None:
    """Bits flipped in the buddy's copies are noticed by their digests: the checkpoint is restored instead."""
    async with a_run(tmp_path, interval=10) as run:
        await each_holds_both(run)
        await eventually(lambda: _is_committed(run.plan), "a checkpoint", 60)
        run.kill(0)
        await run.workers[0].left()
        await run.start(0)
        found = run.newest(1)
        assert found is not None
        assert _damage(run.workers[1].agent.pid, "mend-copy-0")
        _, candidates = next_attempt(open_store(run.plan.uri))
        await run.launch([in_memory(found[0]), *candidates], found[1])
        await run.is_bit_for_bit_what_it_was(candidates[0].step)
        _, still = next_attempt(open_store(run.plan.uri))
        assert list(still) == list(candidates), "no checkpoint is condemned for it"


def _damage(agent: int, name: str) -> int:
    """Flip bits in both slots of that arena of the agent; how many."""
    flipped = 0
    for entry in Path(f"/proc/{agent}/fd").iterdir():
        if name not in os.readlink(entry):  # noqa: PTH115 - a memfd is no path
            continue
        with entry.open("r+b") as file:
            for slot in range(SLOTS):
                with mmap.mmap(file.fileno(), 1 << 14, offset=region_start(slot, DATA_REGION)) as data:
                    for place in range(0, 1 << 14, 64):
                        data[place] ^= 1
                        flipped += 1
    return flipped


async def test_a_buddy_that_is_stopped_holds_up_nobody(tmp_path: Path) -> None:
    """The buddy's saver hangs: ranks train on; once it answers again it gets what is newest then."""
    async with a_run(tmp_path) as run:
        await each_holds_both(run)
        (saver,) = named(run.workers[1].agent, "mend-saver")
        os.kill(saver, signal.SIGSTOP)
        step = run.notes(0)[-1]["step"]
        await run.workers[0].until(at_step(step + 60), "training goes on")
        os.kill(saver, signal.SIGCONT)
        await run.workers[1].until(
            lambda beat: any(held.ranks == (0, 1) and held.step > step + 60 for held in beat.held), "newer copies", 90
        )


async def test_a_buddy_killed_in_the_middle_of_a_transfer(tmp_path: Path) -> None:
    """Half a copy dies with the buddy; its state comes back from whose buddy it was, and its successor gets copies."""
    async with a_run(tmp_path, cap=1 << 20, WIDTH="512") as run:
        await each_holds_both(run, 0)
        run.kill(1)  # each copy takes seconds, and the next begins at once
        await run.workers[1].left()
        await run.start(1)
        found = run.newest(0)
        assert found is not None
        await run.launch([in_memory(found[0])], found[1])
        await run.is_bit_for_bit_what_it_was(found[0].step)
        await each_holds_both(run, found[0].step + 1)
        assert descendants_of(run.workers[1].agent)
