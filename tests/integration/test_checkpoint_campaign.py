"""The checkpoint campaign in its short form: every kind of fault once, at gangs of real agents, savers and ranks.

The long one, at random moments and in random order, is `make bench-checkpoints`.
"""

from __future__ import annotations

import asyncio
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from agents_real import all_gone
from mend.keys import MANIFEST_NAME, checkpoint_key
from mend_trainer.checkpoint.arena import Arena, Snapshot
from s3 import ministack
from saving_faults import DURABLE, KINDS, REQUESTS_OF_A_SAVE, Ground, Plan, When, a_plan
from saving_gang import SavingGang, a_saving_gang
from saving_injection import Result, a_ground, inject
from waiting import eventually

SEED = 7
STOPS = 20
ROUNDS_OF_REQUESTS = 5
ON_RCLONE = {When.RESTORING}  # beside what only a durable store can live through


def the_plans(ground: Ground, workers: int, ranks: int, names: list[str]) -> list[Plan]:
    """One injection of each kind; the same moments, victims and bytes each time."""
    return [
        a_plan(KINDS[name], number, ground, workers, ranks, random.Random(f"{SEED}/{name}"))
        for number, name in enumerate(names)
    ]


async def carried_out(folder: Path, plans: list[Plan]) -> list[Result]:
    """What came of these, one after the other at one gang; nothing in the store is wrong afterwards."""
    async with a_ground(folder, plans[0]) as gang:
        results = []
        for plan in plans:
            results.append(await inject(gang, plan))
            assert not results[-1].broken, results[-1]
        assert gang.wrong_in_store() == []
    return results


def kinds(ground: Ground, whens: set[When]) -> list[str]:
    """Those that meet this part of a checkpoint's life on this ground."""
    return [
        name
        for name, kind in KINDS.items()
        if (ground is Ground.RCLONE) == (kind.grounds == DURABLE or kind.when in ON_RCLONE) and kind.when in whens
    ]


ROUNDS = {
    "while saving, at a store that is right about everything": (Ground.MINISTACK, 1, 2, {When.SAVING}),
    "at rest and in memory, at a store that is right about everything": (Ground.MINISTACK, 2, 1, {When.RESTING}),
    "while restoring, and at a store that dies and ignores conditions": (Ground.RCLONE, 1, 2, set(When)),
}


@pytest.mark.timeout(900)  # a minute on two idle cores
@pytest.mark.parametrize("name", ROUNDS)
async def test_what_is_restored_was_reached(name: str, tmp_path: Path) -> None:
    """After each fault the gang resumes, bit for bit, on its lineage, and nothing that was committed is lost."""
    ground, workers, ranks, whens = ROUNDS[name]
    plans = the_plans(ground, workers, ranks, kinds(ground, whens))
    results = await carried_out(tmp_path, plans)
    done = [each for each in results if not each.skipped]
    assert len(done) >= len(plans) - 1, [each.skipped for each in results]  # a disk to fill needs a mount


def test_every_kind_has_its_round() -> None:
    """None is left out of the short form."""
    done = [name for ground, _, _, whens in ROUNDS.values() for name in kinds(ground, whens)]
    assert sorted(done) == sorted(KINDS)


async def test_the_campaign_notices_what_it_looks_for(tmp_path: Path) -> None:
    """A state that no rank noted is called wrong: the check can fail."""
    with ministack(tmp_path / "server") as server:
        (tmp_path / "gang").mkdir()
        async with a_saving_gang(tmp_path / "gang", server) as gang:
            await gang.saved(2)
            for rank in range(gang.world_size):
                gang.kill(gang.pid_of(rank))
            for path in gang.notes_folder.iterdir():  # as if other bytes had been reached
                path.write_bytes(path.read_bytes().replace(b'"digest":"', b'"digest":"0'))
            gang.forget()
            assert any("a wrong byte" in told for told in await gang.back(in_memory=False))


async def are_stopped_before_digesting(gang: SavingGang, rank: int, savers: list[int]) -> bool:
    """Whether they stand still and the rank's newest snapshot has no digests; it may take several stops to meet one.

    A saver that is stopped with both slots digested leaves no room for a snapshot that it would not digest.
    """
    with gang.lookout() as lookout:

        def is_undigested() -> bool:
            return not max(lookout.seen().arenas[rank], key=lambda slot: slot.state).is_digested

        for _ in range(STOPS):
            gang.kill(*savers, how=signal.SIGSTOP)
            await asyncio.to_thread(lookout.wait, is_undigested, 2.0)
            if is_undigested():
                return True
            gang.kill(*savers, how=signal.SIGCONT)
            await gang.saved()
    return False


async def test_what_turns_out_impossible_leaves_the_gang_training(tmp_path: Path) -> None:
    """No digests are taken of what is in memory, and ranks are dead before that is known: they are launched again."""
    chance = random.Random(SEED)
    plan = replace(a_plan(KINDS["flip-memory"], 0, Ground.MINISTACK, 1, 2, chance), saves=0)
    async with a_ground(tmp_path, plan) as gang:
        pids, savers = [gang.pid_of(rank) for rank in range(gang.world_size)], gang.savers_of(plan.victim)
        assert await are_stopped_before_digesting(gang, plan.victim, savers)
        injection = asyncio.create_task(inject(gang, plan))
        await all_gone(pids)
        gang.kill(*savers, how=signal.SIGCONT)
        assert "no snapshot" in (await injection).skipped
        await gang.saved()


def folder_of(snapshot: Snapshot) -> str:
    """Of its save in the store."""
    origin = snapshot.header.origin
    return checkpoint_key(origin.step, origin.attempt, snapshot.header.save_id)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1)])
async def test_what_is_uploaded_is_what_was_digested(shape: tuple[int, int], tmp_path: Path) -> None:
    """A bit that flips in a snapshot while its upload is held up is in no checkpoint; saving and restoring go on."""
    plan = a_plan(KINDS["flip-memory"], 0, Ground.MINISTACK, *shape, random.Random(SEED))
    async with a_ground(tmp_path, plan) as gang:
        folders = []
        for rank in range(gang.world_size):
            release = gang.proxy.stall(times=1, method="PUT", part=(part := f"__{rank}_0.distcp"))
            before = len(gang.proxy.requests)
            path = await eventually(lambda: next((p for _, p in gang.proxy.requests[before:] if part in p), ""))  # noqa: B023
            folders.append("/".join(path.split("/")[-3:-1]))
            owed = {folder_of(each): each for each in Arena.attach(gang.arena_of(rank)).snapshots()}[folders[-1]]
            owed.data[int(plan.place * len(owed.data))] ^= 4
            release.set()
            await gang.saved(2)
        committed = {each.folder for each in gang.commits()}
        assert committed.isdisjoint(folders)
        assert gang.wrong_in_store() == []
        assert not (await inject(gang, replace(plan, in_memory=True))).broken
        assert gang.broken_promises() == []


@pytest.mark.parametrize("shape", [(1, 2), (2, 1)])
async def test_a_manifest_cut_short_is_nobodys_checkpoint(shape: tuple[int, int], tmp_path: Path) -> None:
    """Its save is given up, an earlier or later one is restored, and nobody was told that it was committed."""
    plan = a_plan(KINDS["kill-upload"], 0, Ground.MINISTACK, *shape, random.Random(SEED))
    async with a_ground(tmp_path, plan) as gang:
        for number in range(ROUNDS_OF_REQUESTS * REQUESTS_OF_A_SAVE):  # two saves may be under way: no number is sure
            result = await inject(gang, replace(plan, number=number, request=number % REQUESTS_OF_A_SAVE))
            assert not result.broken, result
            is_cut = any(path.endswith(MANIFEST_NAME) for path in gang.proxy.cut)
            if is_cut and number + 1 >= REQUESTS_OF_A_SAVE:
                break
        assert is_cut, gang.proxy.cut
        assert gang.damaged
        assert gang.wrong_in_store() == []
