"""A gang of real agents, savers and ranks that saves all the time, to be hurt; only the controller is played.

What it may restore is asked of mend's own catalog and `restore`; what it did restore is held against what was noted
outside of it (`reached.py`). Ranks reach the store through a proxy that can lie; the catalog does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import Any

import xxhash

from agents_real import AgentProcess, named
from gang_of_agents import RUN, GangOfAgents
from lying_proxy import LyingProxy
from mend.catalog import Catalog
from mend.dial import AgentError
from mend.environment import ENV_TLS_PEM
from mend.heartbeats import Heartbeat, RankReport
from mend.keys import MANIFEST_NAME, QUARANTINE_NAME
from mend.listing import StoredCheckpoint
from mend.manifest import UnreadableManifest, decode_manifest
from mend.observation import AgentView
from mend.orders import CheckpointPlan
from mend.ownership import Owner
from mend.restore import WorkerMemory, expendable, holders, planned, saves_in_memory
from mend.selfsigned import self_signed
from mend.spec import Checkpointing
from mend.states import Ancestor, CheckpointRef, Holder
from mend.status import RunStatus
from mend.store import Store, StoreError, open_store
from mortal_server import MortalServer
from reached import FRESH, Commit, History, Notebook, broken_by, commits, floor
from s3 import S3Server
from saving_lookout import Lookout, arena_path
from saving_phases import SavePhase

PROGRAM = Path(__file__).parent / "programs" / "reaching.py"
UID = "uid-of-the-run"
TLS_PEM = self_signed("tests/run")
SAVER = "mend-saver"  # the name of its process
SAVE_EVERY_STEPS = 3
PATIENCE_SECONDS = 60.0
TRIES = 3  # launches until a gang has to be back, once nothing is wrong any more


class NotBack(AssertionError):
    """The gang does not train again although nothing is wrong any more."""


class Ended(Exception):
    """A rank or an agent ended where it was waited for."""


class SavingGang(GangOfAgents):
    """One run under one prefix: its agents, what was promised to it, and what it made of that."""

    def __init__(
        self, folder: Path, direct: S3Server, proxy: LyingProxy, prefix: str, workers: int, ranks: int
    ) -> None:
        super().__init__(folder, workers, ranks)
        self.proxy = proxy
        self.damaged: set[str] = set()  # folders of checkpoints that were damaged on purpose
        self.save_every_steps = SAVE_EVERY_STEPS
        self.pace_seconds = 0.01  # of a step, beside its work; counts for agents that are yet to be started
        self.memory_interval_steps: int | None = None
        self._spoilt: set[str] = set()  # of what lay in memory
        self._broken: list[str] = []
        self._seen: set[str] = set()  # folders that were committed when last looked at
        self._reported: set[str] = set()  # uris that it was told of as committed
        self._marked: set[str] = set()  # those of which it was told that they are quarantined
        self.restored_from = ""  # the uri that the present attempt took up
        self.fault_phase: SavePhase | None = None  # where saving or restoring was when the present fault came
        self.mortal: MortalServer | None = None
        self._client: Any = direct.client()
        self._direct, self._prefix = direct, prefix
        self._uri = direct.uri(prefix)
        self.store: Store = open_store(self._uri, direct.endpoint, direct.credentials, deadline_seconds=20.0)
        self._catalog = Catalog(self.store)
        self._owner = Owner(namespace=RUN[0], name=RUN[1], uid=UID)
        self._lineages: dict[int, tuple[Ancestor, ...]] = {}
        self.notes_folder = folder / "notes"
        self.notes_folder.mkdir()
        self._notebook, self._history = Notebook(self.notes_folder), History()

    # ------------------------------------------------------------ seeing
    def ranks(self) -> list[RankReport]:
        """Ranks of the present attempt, as their agents tell of them."""
        beats = [view.heartbeat for view in self.views() if view.heartbeat is not None]
        found = [rank for beat in beats if beat.attempt == self.attempt for rank in beat.ranks]
        return sorted(found, key=lambda rank: rank.rank)

    def pid_of(self, rank: int) -> int:
        """Its process; 0 if it has none."""
        return next((each.pid for each in self.ranks() if each.rank == rank and each.exit is None), 0)

    def savers_of(self, rank: int) -> list[int]:
        """Processes that save for this rank's worker."""
        return named(self.agents[self.worker_of(rank)], SAVER)

    def arena_of(self, rank: int) -> str:
        """The shared memory of this rank's place."""
        return str(arena_path(self.agents[self.worker_of(rank)].pid, rank % self.ranks_per_worker))

    @contextlib.contextmanager
    def lookout(self) -> Iterator[Lookout]:
        """A close look at the present attempt."""
        ranks = range(self.world_size)
        agents = [self.agents[self.worker_of(rank)].pid for rank in ranks]
        places = [rank % self.ranks_per_worker for rank in ranks]
        lookout = Lookout(self.attempt, agents, places, self.proxy.uploads)
        try:
            yield lookout
        finally:
            lookout.close()

    def history(self) -> History:
        """Everything that was noted so far."""
        self._history.add(self._notebook.news())
        return self._history

    def forget(self) -> None:
        """Read all notes anew."""
        self._notebook, self._history = Notebook(self.notes_folder), History()

    def stored_keys(self) -> list[str]:
        """Every key under the prefix, asked for behind mend's back."""
        found = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._direct.bucket, Prefix=f"{self._prefix}/"
        )
        return [each["Key"].removeprefix(f"{self._prefix}/") for page in found for each in page.get("Contents", ())]

    def commits(self) -> list[Commit]:
        """The committed checkpoints, by their keys alone."""
        return commits(self.stored_keys())

    def sound_commits(self) -> list[Commit]:
        """Those of the present line that nobody has damaged, oldest first."""
        history, attempt = self.history(), self.attempt + 1
        found = [each for each in self.commits() if each.folder not in self.damaged]
        return [each for each in found if history.is_on_line(each.state, attempt)]

    def excuse(self, folders: Iterable[str]) -> None:
        """These were damaged on purpose: nothing is promised of them any more."""
        self.damaged.update(folders)

    def halves(self, folders: Iterable[str]) -> list[str]:
        """Of these, those whose manifest cannot be read; not what was told of as committed: that has to be."""
        wanted = {folder for folder in folders if f"{self._uri}/{folder}" not in self._reported}
        return [each.folder for each in self.commits() if each.folder in wanted and not self._is_readable(each)]

    def _is_readable(self, commit: Commit) -> bool:
        try:
            decode_manifest(self.store.get(f"{commit.folder}/{MANIFEST_NAME}"))
        except UnreadableManifest:
            return False
        return True

    def note_broken(self, broken: Iterable[str]) -> None:
        """Promises that were broken before the gang was back."""
        self._broken += broken

    def broken_promises(self) -> list[str]:
        """What was noted, and checkpoints that nobody damaged and that are gone, or called damaged."""
        keys = set(self.stored_keys())
        here = {each.folder for each in commits(keys)}
        told, self._broken = self._broken, []
        lost = self._seen - here - self.damaged
        self._seen = (self._seen | here) - lost
        fine = sorted(here - self.damaged - self._marked)
        marked = [folder for folder in fine if f"{folder}/{QUARANTINE_NAME}" in keys]
        self._marked.update(marked)
        return [
            *told,
            *(f"{folder}: was committed, and its manifest is gone: lost" for folder in sorted(lost)),
            *(f"{folder}: quarantined, although nobody damaged it: {self._why(folder)}" for folder in marked),
        ]

    def _why(self, folder: str) -> str:
        return self.store.get(f"{folder}/{QUARANTINE_NAME}").decode(errors="replace")

    def wrong_in_store(self, folders: Container[str] | None = None) -> list[str]:
        """Bytes of committed checkpoints that nobody damaged and that have not their digests; of these, or of all."""
        wanted = [each for each in self.commits() if folders is None or each.folder in folders]
        return [wrong for each in wanted if each.folder not in self.damaged for wrong in self._wrong(each)]

    def _wrong(self, commit: Commit) -> Iterator[str]:
        try:
            yield from self._wrong_bytes(commit)
        except (StoreError, UnreadableManifest) as error:
            yield f"{commit.folder}: was committed and cannot be read: {error}"

    def _wrong_bytes(self, commit: Commit) -> Iterator[str]:
        manifest = decode_manifest(self.store.get(f"{commit.folder}/{MANIFEST_NAME}"))
        objects = {each.key: self.store.get(f"{commit.folder}/{each.key}") for each in manifest.objects}
        for name, entry in manifest.tensors.items():
            for chunk in entry.chunks:
                raw = objects[chunk.key][chunk.start_byte : chunk.start_byte + chunk.length_bytes]
                if xxhash.xxh3_128_hexdigest(raw) != chunk.digest:
                    yield f"{commit.folder}: {name} at {chunk.offsets} was committed with wrong bytes"

    def committed_step(self) -> int:
        """The newest that the present attempt has told of."""
        return max((ref.step for ref in self._committed() if ref.attempt == self.attempt), default=FRESH)

    def _committed(self) -> list[CheckpointRef]:
        saves = [view.heartbeat.save for view in self.views() if view.heartbeat and view.heartbeat.save]
        return [save.committed for save in saves if save.committed is not None]

    # ------------------------------------------------------------ life
    async def launch(self, *, in_memory: bool) -> None:
        """The next attempt, from what mend says it may start from; agents that were killed are made anew."""
        await self._until(self._are_all_back, "agents with a store and standbys", while_all_live=False)
        began = time.monotonic()  # what workers hold is no news: as a controller does, each is heard once more
        await self._until(lambda: self._are_heard_since(began), "a heartbeat of every agent", while_all_live=False)
        history, attempt = self.history(), self.attempt + 1
        least = floor(history, await asyncio.to_thread(self.commits), attempt, self.damaged)
        if least is not None:
            history.floors[attempt] = least
        checkpoints = await asyncio.to_thread(self._checkpoints)
        memories = self._memories() if in_memory else []
        able = planned(UID, self._status(history, attempt), checkpoints, memories, range(self.workers), self._spoilt)
        store_port = self.begin_attempt()
        saves = [save for save in saves_in_memory(memories) if save.state in {each.state for each in able}]
        urls = {memory.worker: memory.url for memory in memories}
        refs = tuple(each.state.ref for each in able)
        orders = (self._launch_on(view, store_port, refs, holders(view.worker, saves, urls)) for view in self.views())
        await asyncio.gather(*orders)

    def _memories(self) -> list[WorkerMemory]:
        """What lies in the memory of workers, as their agents tell."""
        beats = [(view.worker, view.heartbeat) for view in self.views() if view.connected and view.heartbeat]
        self._spoilt |= {uri for _, beat in beats for uri in beat.quarantined}
        return [WorkerMemory(worker, beat.held, self._saver_url(worker, beat)) for worker, beat in beats]

    def _saver_url(self, worker: int, beat: Heartbeat) -> str:
        return f"https://{self.agents[worker].host}:{beat.saver_port}" if beat.saver_port else ""

    def _checkpoints(self) -> tuple[StoredCheckpoint, ...]:
        view = self._catalog.view(self._owner)
        assert view.listed, view.problem
        return view.checkpoints

    def _status(self, history: History, attempt: int) -> RunStatus:
        """What a controller would remember of the run before this attempt."""
        base = history.base(attempt)
        lineage: tuple[Ancestor, ...] = ()
        for number in sorted(history.line(base)):
            parent = history.parent(number)
            lineage = () if parent is None else (
                *self._lineages.get(parent.attempt, ()), Ancestor(attempt=parent.attempt, step=parent.step, uid=UID)
            )  # fmt: skip
            self._lineages[number] = lineage
        return RunStatus(attempt=base or 0, lineage=lineage)

    async def _launch_on(
        self, view: AgentView, store_port: int, refs: tuple[CheckpointRef, ...], where: tuple[Holder, ...]
    ) -> None:
        plan = CheckpointPlan(
            uri=self._uri,
            endpoint=self.proxy.server.endpoint,
            interval_steps=self.save_every_steps,
            memory_interval_steps=self.memory_interval_steps,
        )
        buddy = self._buddy_of(view.worker)
        with contextlib.suppress(AgentError):  # it was killed meanwhile: the next launch will tell
            await self.launch_on(
                view, store_port, run_uid=UID, restore=refs, checkpoint=plan, holders=where, buddy=buddy
            )

    def _buddy_of(self, worker: int) -> str:
        """Where the snapshots of this worker are copied: the next one's saver."""
        buddy = (worker + 1) % self.workers
        beat = next((view.heartbeat for view in self.views() if view.worker == buddy), None)
        return self._saver_url(buddy, beat) if beat is not None and buddy != worker else ""

    async def started(self) -> None:
        """Wait until every rank of the attempt has a process."""
        ranks = range(self.world_size)
        await self._until(lambda: all(map(self.pid_of, ranks)), f"attempt {self.attempt} with a process for every rank")

    async def nothing_owed(self, quiet_seconds: float) -> None:
        """Wait until nothing more can be committed of ranks that are dead; what lacks a share is not waited for long.

        A save whose other half was lost will never be: it is left alone once nothing was committed for a while.
        """
        quiet_since, before = time.monotonic(), frozenset[Commit]()
        with self.lookout() as lookout:
            while time.monotonic() - quiet_since < quiet_seconds:
                now = frozenset(await asyncio.to_thread(self.commits))
                if lookout.seen().owed <= {each.state for each in now}:
                    return
                if now != before:
                    quiet_since, before = time.monotonic(), now
                await asyncio.sleep(0.02)

    async def restored(self) -> list[str]:
        """Wait until every rank has taken up a state; the promises that this has broken."""
        await self._until(self._all_restored, f"attempt {self.attempt} with a state on every rank")
        return broken_by(self.history(), self.attempt)

    def _all_restored(self) -> bool:
        return len(self.history().restored(self.attempt)) == self.world_size

    async def back(self, *, in_memory: bool) -> list[str]:
        """Launch until all ranks train again, which has to be soon; the promises that were broken on the way."""
        for _ in range(TRIES):
            await self.launch(in_memory=in_memory)
            try:
                broken = await self.restored()
                await self.saved()
                self.restored_from = self._told_of_restoring()
            except Ended as ended:
                why = str(ended)
                continue
            return broken
        raise NotBack(f"not back after {TRIES} launches: {why}")

    def _told_of_restoring(self) -> str:
        """The uri that rank 0 has named."""
        beats = [view.heartbeat for view in self.views() if view.heartbeat is not None]
        told = [beat.restored.uri for beat in beats if beat.attempt == self.attempt and beat.restored is not None]
        return next(iter(told), "")

    async def saved(self, more: int = 1, seconds: float = PATIENCE_SECONDS) -> None:
        """Wait until the present attempt has committed that many more checkpoints than it had."""
        for _ in range(more):
            before = self.committed_step()
            await self._until(lambda before=before: self.committed_step() > before, "another checkpoint", seconds)

    async def _until(
        self,
        holds: Callable[[], Any],
        what: str,
        seconds: float = PATIENCE_SECONDS,
        *,
        while_all_live: bool = True,
    ) -> None:
        deadline = time.monotonic() + seconds
        while True:
            self._reported.update(ref.uri for ref in self._committed())
            if holds():
                return
            if while_all_live:
                self._raise_if_ended(what)
            if time.monotonic() > deadline:
                raise NotBack(f"not within {seconds:g} s: {what}; {self._told()}")
            self.news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.news.wait(), 0.02)

    def _raise_if_ended(self, what: str) -> None:
        if ended := [each for each in self.ranks() if each.exit is not None or each.error is not None]:
            raise Ended(f"{what}: rank {ended[0].rank} ended: {ended[0].exit} {ended[0].error}")
        if gone := [agent for agent in self.agents.values() if agent.process.poll() is not None]:
            raise Ended(f"{what}: an agent ended: {gone[0].output[-500:]}")

    def _told(self) -> str:
        ranks = ", ".join(f"{rank.rank}:{rank.phase}@{rank.step}" for rank in self.ranks())
        saves = [view.heartbeat.save for view in self.views() if view.heartbeat]
        tails = "\n".join(agent.output[-1500:] for agent in self.agents.values())
        return f"ranks {ranks}; saves {saves}; agents said:\n{tails}"

    def prune(self) -> list[str]:
        """Throw away what mend's retention no longer wants; what is wrong with it, so that nothing goes unread."""
        status = self._status(self.history(), self.attempt + 1)
        rules = Checkpointing(uri=self._uri, keep_last=4)
        uris = [each.ref.uri for each in expendable(UID, status, rules, self._checkpoints())]
        gone = {uri.removeprefix(f"{self._uri}/") for uri in uris}
        wrong = self.wrong_in_store(gone)
        self._catalog.prune(uris)
        self._seen -= gone
        return wrong

    # ------------------------------------------------------------ agents
    def kill(self, *pids: int, how: signal.Signals = signal.SIGKILL) -> int:
        """A signal to processes that may be gone already; how many were there to get it."""
        return sum(_send(pid, how) for pid in pids if pid)

    def kill_agent(self, worker: int) -> None:
        """SIGKILL to it, and so to all that it started."""
        self.agents[worker].end()

    def _are_all_back(self) -> bool:
        self.start_missing_agents()
        return self.are_all_ready()

    def _are_heard_since(self, began: float) -> bool:
        return self._are_all_back() and all(v.silent_seconds < time.monotonic() - began for v in self.views())

    def an_agent(self, worker: int) -> AgentProcess:
        """One that can reach the store."""
        keys = self._direct.credentials
        env = {
            "NOTES": str(self.notes_folder),
            "PACE": str(self.pace_seconds),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "AWS_ACCESS_KEY_ID": keys.access_key_id or "",
            "AWS_SECRET_ACCESS_KEY": keys.secret_access_key or "",
            "AWS_REGION": keys.region or "us-east-1",
            ENV_TLS_PEM: TLS_PEM,
        }
        command = [sys.executable, str(PROGRAM)]
        return AgentProcess(command, self.folder, worker=worker, ranks=self.ranks_per_worker, env=env)


def _send(pid: int, how: signal.Signals) -> bool:
    try:
        os.kill(pid, how)
    except ProcessLookupError:
        return False
    return True


@contextlib.asynccontextmanager
async def a_saving_gang(
    folder: Path,
    direct: S3Server,
    *,
    prefix: str = "run",
    workers: int = 1,
    ranks: int = 2,
    pace_seconds: float = 0.01,
    save_every_steps: int = SAVE_EVERY_STEPS,
) -> AsyncIterator[SavingGang]:
    """A gang that trains and has committed its first checkpoint. `folder` is there and empty."""
    with LyingProxy(direct) as proxy:
        gang = SavingGang(folder, direct, proxy, prefix, workers, ranks)
        gang.pace_seconds, gang.save_every_steps = pace_seconds, save_every_steps
        try:
            await gang.back(in_memory=False)
            yield gang
        finally:
            await gang.close()
