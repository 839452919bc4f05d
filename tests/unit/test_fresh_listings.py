"""What was committed with a last breath is found before the next attempt is launched."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from manifests import a_manifest
from mend.keys import MANIFEST_NAME, announcement_key, checkpoint_key
from mend.listing import StoreView
from mend.manifest import encode_manifest
from mend.prefixes import LISTED_AT_LEAST, Prefixes
from mend.spec import Checkpointing
from mend.status import RunStatus
from mend.store import Store, open_store
from waiting import eventually
from world import World, a_spec

RUN = ("team", "clio")
SLOW = 4.0


def test_a_commit_that_nobody_told_of_is_found_before_the_launch() -> None:
    """A worker that is preempted while its stream is cut saves as it goes; the next attempt starts from there."""
    world = World(a_spec()).until_step(13)
    world.listing_seconds = SLOW
    world.cut_streams(3.0, 0)
    world.preempt(0)
    world.until(lambda world: world.status.attempt == 2 and world.status.participants != ())
    saved = world.bucket.newest()
    assert saved is not None
    assert saved.ref.step >= 13
    assert world.status.restore[0] == saved.ref


def test_ranks_that_restart_in_place_do_not_wait_for_a_listing() -> None:
    """The agent of rank 0 has told of every commit: a slow store costs such a recovery nothing."""
    world = World(a_spec()).until_step(15)
    world.listing_seconds = 60.0
    world.harm_rank(1, "kill")
    began = world.now
    world.until(lambda world: world.status.attempt == 2 and world.status.participants != ())
    assert world.now - began < 5.0


def a_prefix(folder: Path) -> tuple[Store, Checkpointing]:
    """An empty prefix in a folder."""
    uri = f"file://{folder}/run"
    return open_store(uri), Checkpointing(uri=uri)


def commit(store: Store, step: int) -> None:
    """One checkpoint of attempt 1."""
    manifest = a_manifest(step=step, world_size=2, tokens=step, created_unix_seconds=1000.0 + step)
    folder = checkpoint_key(step, 1, "a")
    store.put(announcement_key(folder), b"")
    store.put(f"{folder}/{MANIFEST_NAME}", encode_manifest(manifest))


async def test_a_listing_says_what_it_was_made_for(tmp_path: Path) -> None:
    """One that began for an attempt before, or while a pod that may yet save was there, is made anew."""
    store, rules = a_prefix(tmp_path)
    prefixes = Prefixes(cast("Any", None), on_news=lambda run: None)

    async def listed(status: RunStatus) -> Any:
        def look() -> StoreView | None:
            prefixes.want(RUN, "uid-1", rules, status)
            view = prefixes.view(RUN, status, (), 0.0)
            fresh = view.listed_for == status.attempt and set(view.listed_beside) <= set(status.replacing)
            return view if fresh else None

        return await eventually(look)

    try:
        commit(store, 5)
        assert [each.ref.step for each in (await listed(RunStatus(attempt=1))).checkpoints] == [5]
        commit(store, 6)
        going = RunStatus(attempt=2, replacing=("pod-1",))
        prefixes.want(RUN, "uid-1", rules, RunStatus(attempt=1))
        assert [each.ref.step for each in (await listed(going)).checkpoints] == [5, 6]
        assert (await listed(going)).listed_beside == ("pod-1",)
        commit(store, 7)
        gone = await listed(RunStatus(attempt=2))
        assert [each.ref.step for each in gone.checkpoints] == [5, 6, 7]
        assert gone.listed_beside == ()
    finally:
        await prefixes.close()


async def test_what_a_launch_needs_is_listed_first_and_the_rest_in_the_background(tmp_path: Path) -> None:
    """Of many checkpoints the newest are there at once, marked as partial; the older ones follow, and stay."""
    store, rules = a_prefix(tmp_path)
    steps = range(1, 3 * LISTED_AT_LEAST)
    for step in steps:
        commit(store, step)
    views: list[StoreView] = []
    prefixes = Prefixes(cast("Any", None), on_news=lambda run: views.append(prefixes.view(RUN, status, (), 0.0)))
    status = RunStatus(attempt=1)

    def look(status: RunStatus) -> StoreView:
        prefixes.want(RUN, "uid-1", rules, status)
        return prefixes.view(RUN, status, (), 0.0)

    try:
        look(status)
        await eventually(lambda: len(views) >= 2, "the whole listing")
        first = [each.ref.step for each in views[0].checkpoints]
        assert views[0].partial
        assert LISTED_AT_LEAST <= len(first) < len(steps)
        assert first == list(steps)[-len(first) :]
        assert [each.ref.step for each in views[-1].checkpoints] == list(steps)
        commit(store, steps[-1] + 1)
        again = RunStatus(attempt=2, follows=1)
        await eventually(lambda: len(look(again).checkpoints) == len(steps) + 1, "the new one beside all the others")
    finally:
        await prefixes.close()
