"""The reflector against a scripted API: every way a watch can break, without a server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from mend.backoff import Backoff
from mend.kube.client import PODS, Json, Page, WatchEvent
from mend.kube.errors import ApiError, from_status, unreachable
from mend.kube.reflector import Reflector
from waiting import eventually

QUICK = Backoff(base_seconds=0.001, ceiling_seconds=0.004)
GONE = from_status("WATCH", 410, {"reason": "Expired"})
DOWN = unreachable("GET", ConnectionRefusedError(), was_sent=False)


def a_pod(name: str, version: int, uid: str = "") -> Json:
    """A pod in a version; its uid follows from its name unless given."""
    meta = {"namespace": "default", "name": name, "uid": uid or f"{name}-uid", "resourceVersion": str(version)}
    return {"metadata": meta}


def event(kind: str, obj: Json) -> WatchEvent:
    """A watch event."""
    return WatchEvent(kind, obj)


class ScriptedApi:
    """Answers lists and watches from two scripts; at the end of the watches it stays silent."""

    def __init__(self, lists: list[Any], watches: list[list[Any]]) -> None:
        self.lists = lists
        self.watches = watches
        self.watched_from: list[str] = []

    async def list_pages(self, *_: Any, **__: Any) -> AsyncIterator[Page]:
        """The next list: pages, or an error."""
        answer = self.lists.pop(0) if len(self.lists) > 1 else self.lists[0]
        for page in answer if isinstance(answer, list) else [answer]:
            if isinstance(page, ApiError):
                raise page
            yield page

    async def watch(self, *_: Any, resource_version: str, **__: Any) -> AsyncIterator[WatchEvent]:
        """The next watch: events, then an error or an orderly end."""
        self.watched_from.append(resource_version)
        if not self.watches:
            await asyncio.Event().wait()
        for step in self.watches.pop(0):
            if isinstance(step, ApiError):
                raise step
            yield step


class Told:
    """Runs a reflector over a script and notes what it tells, as (verb, name, uid)."""

    def __init__(self, lists: list[Any], watches: list[list[Any]], **settings: Any) -> None:
        self.api = ScriptedApi(lists, watches)
        self.changes: list[tuple[str, str, str]] = []
        self.reflector = Reflector(
            self.api,  # type: ignore[arg-type]
            PODS,
            on_change=self._note,
            **({"backoff": QUICK} | settings),
        )

    def _note(self, old: Json | None, new: Json | None) -> None:
        verb = "add" if old is None else "delete" if new is None else "change"
        meta = (new or old or {})["metadata"]
        self.changes.append((verb, meta["name"], meta["uid"]))


async def told(lists: list[Any], *watches: list[Any]) -> Told:
    """What a reflector tells over a script. One more, silent watch shows that the script was worked off."""
    run = Told(lists, [*watches])
    task = asyncio.create_task(run.reflector.run())
    await eventually(lambda: len(run.api.watched_from) == len(watches) + 1 or task.done())
    assert not task.done(), task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return run


async def test_first_list_then_changes() -> None:
    """All pages are told as additions, then the events of the watch from the list's version on."""
    run = await told(
        [[Page((a_pod("a", 1),), "5"), Page((a_pod("b", 2),), "5")]],
        [event("MODIFIED", a_pod("a", 6)), event("ADDED", a_pod("c", 7)), event("DELETED", a_pod("b", 8))],
    )
    assert run.changes == [
        ("add", "a", "a-uid"),
        ("add", "b", "b-uid"),
        ("change", "a", "a-uid"),
        ("add", "c", "c-uid"),
        ("delete", "b", "b-uid"),
    ]
    assert run.api.watched_from == ["5", "8"]
    assert run.reflector.synced.is_set()
    assert len(run.reflector.index) == 2


async def test_bookmarks_move_the_version_and_nothing_else() -> None:
    """After a bookmark the next watch begins there."""
    run = await told([Page((), "5")], [event("BOOKMARK", {"metadata": {"resourceVersion": "90"}})])
    assert run.changes == []
    assert run.api.watched_from == ["5", "90"]


async def test_a_broken_connection_resumes_without_a_list() -> None:
    """A lost connection costs one error; the watch goes on from the last version seen."""
    run = await told([Page((), "5")], [event("ADDED", a_pod("a", 6)), DOWN], [DOWN])
    assert run.api.watched_from == ["5", "6", "6"]
    assert (run.reflector.health.lists, run.reflector.health.errors) == (1, 2)


async def test_gone_lists_anew_and_tells_the_difference() -> None:
    """What vanished meanwhile is told as deleted, what came as added, what changed as changed, the rest not at all."""
    run = await told(
        [
            Page((a_pod("same", 1), a_pod("changed", 2), a_pod("vanished", 3)), "5"),
            Page((a_pod("same", 1), a_pod("changed", 7), a_pod("new", 8)), "9"),
        ],
        [GONE],
    )
    assert run.changes[3:] == [
        ("delete", "vanished", "vanished-uid"),
        ("change", "changed", "changed-uid"),
        ("add", "new", "new-uid"),
    ]
    assert run.api.watched_from == ["5", "9"]
    assert run.reflector.health.relists == 1


async def test_any_answered_error_but_busy_lists_anew() -> None:
    """An error of the server means that the version cannot be trusted; being busy does not."""
    broken = from_status("WATCH", 500, {"reason": "InternalError"})
    busy = from_status("WATCH", 429)
    run = await told([Page((), "5"), Page((), "9")], [busy], [broken])
    assert run.api.watched_from == ["5", "5", "9"]


async def test_a_name_made_anew_is_deleted_and_added() -> None:
    """The same name with another uid is another object, in a watch and after a list."""
    run = await told(
        [
            Page((a_pod("a", 1, "one"), a_pod("b", 2, "one")), "5"),
            Page((a_pod("a", 8, "two"), a_pod("b", 6, "two")), "9"),
        ],
        [event("ADDED", a_pod("b", 6, "two")), GONE],
    )
    assert run.changes[2:] == [("delete", "b", "one"), ("add", "b", "two"), ("delete", "a", "one"), ("add", "a", "two")]


async def test_a_list_that_expires_half_way_begins_again() -> None:
    """Nothing is told from a list whose last page never came."""
    run = await told([[Page((a_pod("a", 1),), "5"), GONE], Page((a_pod("b", 2),), "9")])
    assert run.changes == [("add", "b", "b-uid")]
    assert run.reflector.health.errors == 1


async def test_a_server_that_hangs_up_at_once_is_not_called_in_a_loop() -> None:
    """Watches that end as soon as they begin are followed by growing delays."""
    run = Told([Page((), "5")], [[] for _ in range(10_000)], backoff=Backoff(0.02, 0.2))
    assert await _seconds_until(run, lambda: len(run.api.watched_from) >= 8) >= 0.4


async def test_a_long_outage_causes_few_errors() -> None:
    """While nothing answers, errors come ever more slowly, then evenly: never a spin."""
    run = Told([DOWN], [], backoff=Backoff(0.02, 0.2))
    assert await _seconds_until(run, lambda: run.reflector.health.errors >= 8) >= 0.4
    assert run.reflector.silent_seconds() == float("inf")
    assert not run.reflector.synced.is_set()


async def _seconds_until(run: Told, condition: Callable[[], bool]) -> float:
    """How long it ran until `condition`. Eight tries need seven delays: 0.45 s even with the least jitter."""
    task = asyncio.create_task(run.reflector.run())
    began = time.monotonic()
    await eventually(condition)
    took = time.monotonic() - began
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return took
