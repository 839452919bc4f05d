"""The objects of the laptop-sized Kubernetes: versions, history, and what survives a restart."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from mend_local.changelog import ChangeLog, CorruptLog
from mend_local.storage import HistoryGone, Storage


def thing(name: str, **more: Any) -> dict[str, Any]:
    """An object as storage sees it."""
    return {"metadata": {"name": name}, **more}


def names(values: list[dict[str, Any]]) -> list[str]:
    """Names of objects."""
    return [value["metadata"]["name"] for value in values]


def opened(path: Path, **options: Any) -> Storage:
    """A storage that writes to `path`."""
    return Storage(ChangeLog(path, **options))


def test_every_write_gets_the_next_version() -> None:
    """Versions grow by one per write over all resources, deletions included, and are stamped into the object."""
    storage = Storage()
    first = storage.put("a", ("", "x"), thing("x"))
    second = storage.put("b", ("", "y"), thing("y"))
    gone = storage.delete("a", ("", "x"))
    versions = [int(each["metadata"]["resourceVersion"]) for each in (first, second, gone)]
    assert versions == [versions[0], versions[0] + 1, versions[0] + 2]
    assert storage.get("a", ("", "x")) is None


def test_a_list_can_be_had_as_it_was() -> None:
    """The list at an earlier version shows what was there then: later creations, changes and deletions are undone."""
    storage = Storage()
    storage.put("a", ("n", "kept"), thing("kept", state=1))
    storage.put("a", ("n", "deleted"), thing("deleted"))
    then = storage.version
    storage.put("a", ("n", "kept"), thing("kept", state=2))
    storage.put("a", ("n", "kept"), thing("kept", state=3))
    storage.delete("a", ("n", "deleted"))
    storage.put("a", ("n", "new"), thing("new"))
    storage.put("a", ("n", "brief"), thing("brief"))
    storage.delete("a", ("n", "brief"))
    earlier = storage.every_at("a", "", then)
    assert names(earlier) == ["deleted", "kept"]
    assert earlier[1]["state"] == 1
    assert names(storage.every("a")) == ["kept", "new"]


def test_history_is_bounded() -> None:
    """Changes older than the history kept are gone, and asking for them says so instead of leaving any out."""
    storage = Storage(history=3)
    for n in range(5):
        storage.put("a", ("", "x"), thing("x", n=n))
    oldest = storage.version - 3
    assert [change.object["n"] for change in storage.changes_after("a", oldest)] == [2, 3, 4]
    with pytest.raises(HistoryGone):
        storage.changes_after("a", oldest - 1)
    with pytest.raises(HistoryGone):
        storage.every_at("a", "", oldest - 1)


def test_a_resource_that_never_changed_has_a_whole_history() -> None:
    """From any version since the beginning, a resource without changes has none."""
    storage = Storage(history=1)
    storage.put("a", ("", "x"), thing("x"))
    assert storage.changes_after("b", 1) == []


async def test_waiting_for_changes() -> None:
    """A waiter wakes by a change of its resource and of no other, and gives up in time."""
    storage = Storage()
    waiting = asyncio.create_task(storage.changed("a", storage.version, 30))
    await asyncio.sleep(0)
    storage.put("b", ("", "x"), thing("x"))
    assert not await storage.changed("c", storage.version, 0.01)
    assert not waiting.done()
    storage.put("a", ("", "x"), thing("x"))
    assert await waiting


def test_everything_survives_a_restart(tmp_path: Path) -> None:
    """Objects, versions and history are there again after the process was killed, without any orderly end."""
    storage = opened(tmp_path / "log")
    storage.put("a", ("n", "x"), thing("x", n=1))
    then = storage.version
    storage.put("a", ("n", "x"), thing("x", n=2))
    storage.put("a", ("n", "y"), thing("y"))
    storage.delete("a", ("n", "y"))
    again = opened(tmp_path / "log")
    assert again.every("a") == storage.every("a")
    assert again.changes_after("a", then) == storage.changes_after("a", then)
    assert int(again.put("a", ("n", "z"), thing("z"))["metadata"]["resourceVersion"]) > storage.version


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    """A write that a crash cut in the middle never happened; what came before and comes after is kept."""
    path = tmp_path / "log"
    storage = opened(path)
    storage.put("a", ("", "x"), thing("x"))
    storage.put("a", ("", "y"), thing("y"))
    path.write_bytes(path.read_bytes()[:-7])
    again = opened(path)
    assert names(again.every("a")) == ["x"]
    again.put("a", ("", "z"), thing("z"))
    assert names(opened(path).every("a")) == ["x", "z"]


def test_a_damaged_log_is_refused(tmp_path: Path) -> None:
    """Garbage in the middle of the log stops the start with file and line, rather than losing what follows."""
    path = tmp_path / "log"
    storage = opened(path)
    storage.put("a", ("", "x"), thing("x"))
    path.write_bytes(b"garbage\n" + path.read_bytes())
    with pytest.raises(CorruptLog, match="line 1"):
        opened(path)


def test_the_log_is_compacted(tmp_path: Path) -> None:
    """A log that outgrows its limit is rewritten to what is alive; older versions are then gone after a restart."""
    path = tmp_path / "log"
    storage = opened(path, compact_above_bytes=20_000)
    storage.put("a", ("", "first"), thing("first"))
    first = storage.version
    for n in range(300):
        storage.put("a", ("", "x"), thing("x", n=n, text="t" * 200))
    storage.put("b", ("", "y"), thing("y"))
    storage.delete("b", ("", "y"))
    assert path.stat().st_size < 45_000
    again = opened(path, compact_above_bytes=20_000)
    assert again.every("a") == storage.every("a")
    assert again.version > storage.version
    with pytest.raises(HistoryGone):
        again.changes_after("a", first)
    with pytest.raises(HistoryGone):
        again.changes_after("never-seen", first)


def test_discarded_writes_are_lost_by_a_restart(tmp_path: Path) -> None:
    """While writes are discarded (a fault for tests) they are answered, and not there after a restart."""
    log = ChangeLog(tmp_path / "log")
    storage = Storage(log)
    storage.put("a", ("", "kept"), thing("kept"))
    log.discarding = True
    storage.put("a", ("", "lost"), thing("lost"))
    assert names(storage.every("a")) == ["kept", "lost"]
    assert names(opened(tmp_path / "log").every("a")) == ["kept"]


def test_versions_of_lost_writes_are_never_given_out_again(tmp_path: Path) -> None:
    """Who saw a write that a restart has lost is told to list again; who saw only what was kept goes on."""
    log = ChangeLog(tmp_path / "log")
    storage = Storage(log)
    storage.put("a", ("", "kept"), thing("kept"))
    kept = storage.version
    log.discarding = True
    storage.put("a", ("", "lost"), thing("lost"))
    again = opened(tmp_path / "log")
    assert again.changes_after("a", kept) == []
    with pytest.raises(HistoryGone):
        again.changes_after("a", storage.version)
    assert again.put("a", ("", "new"), thing("new"))
    assert names([change.object for change in again.changes_after("a", kept)]) == ["new"]


def test_the_log_can_be_read_by_people(tmp_path: Path) -> None:
    """Each line of the log is one JSON object."""
    storage = opened(tmp_path / "log")
    storage.put("pods", ("n", "x"), thing("x"))
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert json.loads(line)["k"] == ["n", "x"]
