"""Carries out what `saving_faults.py` has planned, at a real gang, and says which promises that has broken."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from agents_real import all_gone
from lying_proxy import flipped
from mend.heartbeats import Phase
from mend.keys import MANIFEST_NAME
from mend.protocol import Message
from mend_trainer.checkpoint.arena import Arena
from mortal_server import a_mortal_server
from reached import Commit
from s3 import S3Server
from saving_faults import KINDS, Ground, Moment, Plan, When
from saving_gang import Ended, NotBack, SavingGang, a_saving_gang
from saving_phases import SavePhase, phase_of

LATEST_SECONDS: Final = 3.0  # by then a moment that waits for a request has come anyway
OUTAGE_SECONDS: Final = 0.7
SETTLED_SECONDS: Final = 0.3
SHARDS: Final = ".distcp"


class NotPossible(Exception):
    """This cannot be done here; the message says why."""


class Result(Message, frozen=True):
    """What came of one injection: promises that were broken, in sentences; `skipped`: why it was not done."""

    plan: Plan
    broken: tuple[str, ...] = ()
    seconds: float = 0.0
    restored: str = ""  # the uri
    skipped: str = ""
    phase: SavePhase | None = None  # what saving or restoring was doing then; None: at rest, or the moment never came
    is_lost: bool = False  # the gang is not back, and no more can be done with it


async def inject(gang: SavingGang, plan: Plan) -> Result:
    """Do it, bring the gang back, and hold what it took up against what was reached."""
    began, skipped = time.monotonic(), ""
    gang.fault_phase = None
    try:
        await gang.saved(plan.saves)
        try:
            await DO[plan.kind](gang, plan)
        except NotPossible as why:  # told after ranks were killed, maybe
            skipped = str(why)
        except Ended as why:
            gang.note_broken([f"the training broke: {why}"])
        gang.proxy.heal()
        gang.excuse(_folder(path) for path in gang.proxy.spoilt)
        gang.note_broken(await gang.back(in_memory=plan.in_memory))
    except (Ended, NotBack) as why:
        broken = (f"does not resume: {why}",)
        return Result(plan=plan, broken=broken, seconds=_since(began), phase=gang.fault_phase, is_lost=True)
    found = await asyncio.to_thread(lambda: (*gang.broken_promises(), *gang.prune()))
    if skipped and not found:
        return Result(plan=plan, skipped=skipped)
    return Result(plan=plan, broken=found, seconds=_since(began), restored=gang.restored_from, phase=gang.fault_phase)


def _since(began: float) -> float:
    return round(time.monotonic() - began, 3)


@contextlib.asynccontextmanager
async def a_ground(
    folder: Path, plan: Plan, given: S3Server | None = None, **training: Any
) -> AsyncIterator[SavingGang]:
    """A gang of the plan's shape on the plan's ground; `given` is somebody's server. `folder` is there and empty."""
    (folder / "gang").mkdir()
    shape = {"workers": plan.workers, "ranks": plan.ranks, "prefix": f"{folder.name}-{plan.number}", **training}
    if given is not None:
        async with a_saving_gang(folder / "gang", given, **shape) as gang:
            yield gang
        return
    async with (
        a_mortal_server(Ground(plan.ground), folder / "server") as mortal,
        a_saving_gang(folder / "gang", mortal.server, **shape) as gang,
    ):
        gang.mortal = mortal
        yield gang


def _folder(path: str) -> str:
    """The folder of a save, from the path of a request: /BUCKET/PREFIX/step-N/SAVE/NAME."""
    return "/".join(unquote(urlsplit(path).path).split("/")[-3:-1])


# ---------------------------------------------------------------- moments
async def at_the_moment(gang: SavingGang, plan: Plan, act: Callable[[], object], part: str = "/step-") -> None:
    """Do `act` when the plan says, and note what saving or restoring was doing. What gives 0 has met nobody.

    `part`: of the path of requests that count.
    """
    restores = KINDS[plan.kind].when is When.RESTORING
    with gang.lookout() as lookout:

        def strike() -> None:
            phase = phase_of(lookout.seen())
            gang.fault_phase = SavePhase.NOBODY if act() == 0 else phase

        def begins() -> bool:
            if restores:
                return lookout.is_in(plan.victim, Phase.LOADING)
            return lookout.copies(plan.victim) if plan.after else lookout.stops(plan.victim)

        def strike_when_it_begins() -> None:
            lookout.wait(begins, LATEST_SECONDS)
            time.sleep(plan.seconds)
            strike()

        match plan.moment:
            case Moment.CLOCK:
                await asyncio.sleep(plan.seconds)
                await asyncio.to_thread(strike)
            case Moment.PHASE:
                await asyncio.to_thread(strike_when_it_begins)
            case Moment.REQUEST:
                method = "GET" if restores else "PUT"
                trap = gang.proxy.trap(plan.request, strike, method=method, part=part, after=plan.after)
                await asyncio.to_thread(trap.sprung.wait, LATEST_SECONDS)
                await asyncio.to_thread(trap.spring)


async def for_a_while(undo: Callable[[], object]) -> None:
    """Leave things as they are for the length of an outage."""
    await asyncio.sleep(OUTAGE_SECONDS)
    await asyncio.to_thread(undo)


async def all_ranks_dead(gang: SavingGang) -> None:
    """Kill them, and wait until nothing more is committed: what is newest now stays newest."""
    pids = [gang.pid_of(rank) for rank in range(gang.world_size)]
    gang.kill(*pids)
    await all_gone(pids)
    await gang.nothing_owed(SETTLED_SECONDS)


# ---------------------------------------------------------------- processes
async def _kill_rank(gang: SavingGang, plan: Plan) -> None:
    pid = gang.pid_of(plan.victim)
    await at_the_moment(gang, plan, lambda: gang.kill(pid))


async def _kill_ranks(gang: SavingGang, plan: Plan) -> None:
    pids = [gang.pid_of(rank) for rank in range(gang.world_size)]
    await at_the_moment(gang, plan, lambda: gang.kill(*pids))


def _savers(gang: SavingGang, plan: Plan) -> list[int]:
    if not (savers := gang.savers_of(plan.victim)):
        raise NotPossible("no process of its own saves")
    return savers


async def _kill_saver(gang: SavingGang, plan: Plan) -> None:
    savers = _savers(gang, plan)
    await at_the_moment(gang, plan, lambda: gang.kill(*savers))
    await gang.saved()


async def _kill_saver_and_rank(gang: SavingGang, plan: Plan) -> None:
    pids = [*_savers(gang, plan), gang.pid_of(plan.victim)]
    await at_the_moment(gang, plan, lambda: gang.kill(*pids))


async def _pause_saver(gang: SavingGang, plan: Plan) -> None:
    savers = _savers(gang, plan)
    await at_the_moment(gang, plan, lambda: gang.kill(*savers, how=signal.SIGSTOP))
    await for_a_while(lambda: gang.kill(*savers, how=signal.SIGCONT))
    await gang.saved()


async def _kill_agent(gang: SavingGang, plan: Plan) -> None:
    await at_the_moment(gang, plan, lambda: gang.kill_agent(gang.worker_of(plan.victim)))


async def _kill_agents(gang: SavingGang, plan: Plan) -> None:
    await at_the_moment(gang, plan, lambda: [gang.kill_agent(worker) for worker in range(gang.workers)])


async def _kill_upload(gang: SavingGang, plan: Plan) -> None:
    """ministack keeps half of a manifest, as S3 does not, and refuses the whole ever after: that save is given up."""
    await at_the_moment(gang, plan, lambda: gang.proxy.cut_uploads(1, part="/step-"))
    await gang.saved()
    gang.excuse(await asyncio.to_thread(gang.halves, [_folder(path) for path in gang.proxy.cut]))


# ---------------------------------------------------------------- the store
def _mortal(gang: SavingGang) -> Any:
    if gang.mortal is None:
        raise NotPossible("the store is not ours")
    return gang.mortal


async def _kill_store(gang: SavingGang, plan: Plan) -> None:
    mortal = _mortal(gang)
    await at_the_moment(gang, plan, mortal.kill)
    await for_a_while(mortal.start)
    await gang.saved()


async def _pause_store(gang: SavingGang, plan: Plan) -> None:
    mortal = _mortal(gang)
    await at_the_moment(gang, plan, mortal.pause)
    await for_a_while(mortal.go_on)
    await gang.saved()


async def _fill_disk(gang: SavingGang, plan: Plan) -> None:
    mortal = _mortal(gang)
    if not mortal.has_disk:
        raise NotPossible("needs the right to mount a disk of its own")
    await at_the_moment(gang, plan, mortal.fill)
    await for_a_while(mortal.free)
    await gang.saved()


async def _refuse_uploads(gang: SavingGang, plan: Plan) -> None:
    await at_the_moment(gang, plan, lambda: gang.proxy.answer_with(503, times=4, method="PUT"))
    await gang.saved(2)


async def _lose_answers(gang: SavingGang, plan: Plan) -> None:
    await at_the_moment(gang, plan, lambda: gang.proxy.lose_answers(times=3))
    await gang.saved(2)


async def _flip_upload(gang: SavingGang, plan: Plan) -> None:
    await at_the_moment(gang, plan, lambda: gang.proxy.flip_uploads(1, part="/step-", place=plan.place))
    await gang.saved()


async def _send_twice(gang: SavingGang, plan: Plan) -> None:
    await at_the_moment(gang, plan, lambda: gang.proxy.send_twice(6, part="/step-"))
    await gang.saved(2)


async def _replay_uploads(gang: SavingGang, plan: Plan) -> None:
    gang.proxy.keep(8, part="/step-")
    await gang.saved(2)
    await at_the_moment(gang, plan, lambda: None)
    await asyncio.to_thread(gang.proxy.replay)


# ---------------------------------------------------------------- while restoring
async def _restoring(gang: SavingGang, plan: Plan, act: Callable[[], object]) -> None:
    """All ranks are dead and restore again; in the midst of that it happens."""
    await all_ranks_dead(gang)
    await gang.launch(in_memory=plan.in_memory)
    await gang.started()
    await at_the_moment(gang, plan, act)


async def _kill_rank_restoring(gang: SavingGang, plan: Plan) -> None:
    await _restoring(gang, plan, lambda: gang.kill(gang.pid_of(plan.victim)))


async def _kill_ranks_restoring(gang: SavingGang, plan: Plan) -> None:
    await _restoring(gang, plan, lambda: gang.kill(*map(gang.pid_of, range(gang.world_size))))


async def _kill_saver_restoring(gang: SavingGang, plan: Plan) -> None:
    """Who restores from its memory may give up over this, or take another state."""
    savers = _savers(gang, plan)
    await _restoring(gang, plan, lambda: gang.kill(*savers))
    with contextlib.suppress(Ended):
        gang.note_broken(await gang.restored())


async def _kill_agent_restoring(gang: SavingGang, plan: Plan) -> None:
    await _restoring(gang, plan, lambda: gang.kill_agent(gang.worker_of(plan.victim)))


async def _kill_store_restoring(gang: SavingGang, plan: Plan) -> None:
    mortal = _mortal(gang)
    await _restoring(gang, plan, mortal.kill)
    await for_a_while(mortal.start)


async def _reads(gang: SavingGang, plan: Plan, lay: Callable[[], object]) -> None:
    """All ranks restore from a store that answers so; one launch has to be enough."""
    await all_ranks_dead(gang)
    lay()
    await gang.launch(in_memory=False)
    gang.note_broken(await gang.restored())


async def _refuse_reads(gang: SavingGang, plan: Plan) -> None:
    await _reads(gang, plan, lambda: gang.proxy.answer_with(500, times=3, method="GET"))


async def _cut_reads(gang: SavingGang, plan: Plan) -> None:
    await _reads(gang, plan, lambda: gang.proxy.cut_answers(times=3))


async def _flip_read(gang: SavingGang, plan: Plan) -> None:
    part = MANIFEST_NAME if plan.place < 0.25 else SHARDS
    await _reads(gang, plan, lambda: gang.proxy.flip_answers(1, part=part, place=plan.place))


# ---------------------------------------------------------------- at rest
async def _at_rest(gang: SavingGang, plan: Plan, name: str, change: Callable[[bytes], bytes | None]) -> None:
    """Change an object of the newest checkpoint behind everybody's back; None deletes it."""
    newest = (await _rested(gang))[-1]
    key = _pick(gang, newest, name, plan)
    gang.excuse([newest.folder])
    changed = change(gang.store.get(key))
    if changed is None:
        gang.store.delete([key])
    else:
        gang.store.put(key, changed)


async def _rested(gang: SavingGang) -> list[Commit]:
    await all_ranks_dead(gang)
    return gang.sound_commits()


def _pick(gang: SavingGang, commit: Commit, name: str, plan: Plan) -> str:
    keys = [key for key in gang.stored_keys() if key.startswith(f"{commit.folder}/") and key.endswith(name)]
    return keys[int(plan.place * 1000) % len(keys)]


async def _flip_shard(gang: SavingGang, plan: Plan) -> None:
    await _at_rest(gang, plan, SHARDS, lambda raw: flipped(raw, plan.place))


async def _flip_manifest(gang: SavingGang, plan: Plan) -> None:
    await _at_rest(gang, plan, MANIFEST_NAME, lambda raw: flipped(raw, plan.place))


async def _truncate_shard(gang: SavingGang, plan: Plan) -> None:
    await _at_rest(gang, plan, SHARDS, lambda raw: raw[: int(plan.place * len(raw))])


async def _truncate_manifest(gang: SavingGang, plan: Plan) -> None:
    await _at_rest(gang, plan, MANIFEST_NAME, lambda raw: raw[: int(plan.place * len(raw))])


async def _delete_shard(gang: SavingGang, plan: Plan) -> None:
    await _at_rest(gang, plan, SHARDS, lambda raw: None)


async def _delete_manifest(gang: SavingGang, plan: Plan) -> None:
    await _at_rest(gang, plan, MANIFEST_NAME, lambda raw: None)


async def _exchange(gang: SavingGang, plan: Plan, name: str, *, both: bool) -> None:
    """Put an older checkpoint's object in the place of the newest's, and with `both` the other way too."""
    older, newest = (await _rested(gang))[-2:]
    keys = [_pick(gang, commit, name, plan) for commit in (older, newest)]
    first, second = (gang.store.get(key) for key in keys)
    gang.excuse([newest.folder, *([older.folder] if both else [])])
    gang.store.put(keys[1], first)
    if both:
        gang.store.put(keys[0], second)


async def _swap_shards(gang: SavingGang, plan: Plan) -> None:
    await gang.saved()  # a third one, to fall back to
    await _exchange(gang, plan, SHARDS, both=True)


async def _old_shard(gang: SavingGang, plan: Plan) -> None:
    await _exchange(gang, plan, SHARDS, both=False)


async def _old_manifest(gang: SavingGang, plan: Plan) -> None:
    await _exchange(gang, plan, MANIFEST_NAME, both=False)


async def _flip_memory(gang: SavingGang, plan: Plan) -> None:
    """A bit of the newest snapshot, once its digests are taken; then its rank dies, and memory is offered.

    Nothing is excused: if it is owed, its save has sent the byte before, or is refused.
    """
    for rank in range(gang.world_size):
        gang.kill(gang.pid_of(rank), how=signal.SIGSTOP)
    try:
        await asyncio.to_thread(_flip_newest, gang.arena_of(plan.victim), plan.place)
    finally:
        for rank in range(gang.world_size):
            gang.kill(gang.pid_of(rank))


def _flip_newest(path: str, place: float) -> None:
    deadline, arena = time.monotonic() + LATEST_SECONDS, Arena.attach(path)
    while time.monotonic() < deadline:
        newest = arena.snapshots()[-1:]
        if newest and newest[0].digests is not None:
            data = newest[0].data
            data[int(place * len(data))] ^= 4
            return
        time.sleep(0.02)
    raise NotPossible("no snapshot in shared memory whose digests are taken")


DO: Final[Mapping[str, Callable[[SavingGang, Plan], Awaitable[None]]]] = {
    name: globals()[f"_{name.replace('-', '_')}"] for name in KINDS
}
