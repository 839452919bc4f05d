"""What mend relies on in a store, asked of a folder and of two real S3-compatible servers."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mend.store import AlreadyExists, Changed, NotFound, Probe, Store
from mend.store.files import FileStore
from mend.store.s3 import S3Store
from s3 import S3Server, ministack, rclone

PART_BYTES = 5 << 20  # the smallest that S3 takes


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with ministack(tmp_path_factory.mktemp("ministack")) as server:
        yield server


@pytest.fixture(scope="module")
def lax(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with rclone(tmp_path_factory.mktemp("rclone")) as server:
        yield server


def a_bucket(server: S3Server, prefix: str) -> S3Store:
    """A store on the server whose parts are small."""
    return S3Store(server.bucket, prefix, server.endpoint, server.credentials, 30.0, PART_BYTES)


@pytest.fixture(params=["file", "ministack", "rclone"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    prefix = f"of/{request.node.name.replace('[', '-').rstrip(']')}"
    match request.param:
        case "file":
            return FileStore(tmp_path / prefix, 30.0)
        case "ministack":
            return a_bucket(request.getfixturevalue("strict"), prefix)
        case _:
            return a_bucket(request.getfixturevalue("lax"), prefix)


def test_what_was_written_is_read(store: Store) -> None:
    """An object holds its pieces one after another, whole or by range, also into a given buffer."""
    etag = store.put("a/b", [b"12", memoryview(b"345"), bytearray(b"6"), b""])
    assert store.get("a/b") == b"123456"
    assert store.get("a/b", 1, 3, etag) == b"234"
    into = bytearray(2)
    store.get_into("a/b", memoryview(into), 4)
    assert into == b"56"
    assert (store.head("a/b").bytes, store.head("a/b").etag) == (6, etag)


def test_large_objects_travel_in_parts(store: Store) -> None:
    """An object of several parts, the last one short, arrives as it was sent."""
    content = os.urandom(2 * PART_BYTES + 12345)
    store.put("large", [content[:7], content[7 : PART_BYTES + 9], content[PART_BYTES + 9 :]])
    assert store.get("large") == content
    assert store.head("large").bytes == len(content)


def test_listing_is_in_order_and_folds_folders(store: Store) -> None:
    """Listings are in the order of keys, hold only the prefix's own, and with a delimiter name folders once."""
    for key in ("step-2/b", "step-10/a", "step-2/a", "owner.json", "step-2.txt"):
        store.put(key, key.encode())
    assert [entry.key for entry in store.list("step-")] == ["step-10/a", "step-2.txt", "step-2/a", "step-2/b"]
    assert [entry.key for entry in store.list("", delimiter="/")] == ["owner.json", "step-10/", "step-2.txt", "step-2/"]
    assert [(entry.key, entry.bytes) for entry in store.list("step-2/")] == [("step-2/a", 8), ("step-2/b", 8)]
    assert list(store.list("nothing/")) == []


def test_a_listing_may_begin_behind_a_key(store: Store) -> None:
    """With `after` only later keys are listed, folders among them."""
    for key in ("step-1/a", "step-1/b", "step-2/a", "step-3/a"):
        store.put(key, b"1")
    assert [entry.key for entry in store.list("step-", after="step-1/a")] == ["step-1/b", "step-2/a", "step-3/a"]
    assert [entry.key for entry in store.list("step-", delimiter="/", after="step-1/~")] == ["step-2/", "step-3/"]
    assert list(store.list("step-", after="step-4")) == []


def test_what_a_store_was_asked_is_counted(store: Store) -> None:
    """Each store counts its requests and the bytes that went to and fro."""
    store.put("x", b"123")
    store.get("x", 0, 2)
    list(store.list(""))
    store.delete(["x"])
    used = store.usage
    assert set(used.requests) == {"put", "get", "list", "delete"}
    assert used.sent_bytes >= 3
    assert used.received_bytes == 2


def test_deleting_twice_is_the_same_as_once(store: Store) -> None:
    """Deleted objects are gone, and deleting what is not there is no error."""
    store.put("x/1", b"1")
    store.put("x/2", b"2")
    store.delete(["x/1", "never"])
    store.delete(["x/1"])
    assert [entry.key for entry in store.list("")] == ["x/2"]


def test_missing_objects_and_bytes_are_not_found(store: Store) -> None:
    """A missing object is told apart from all other errors, and so is a range that goes beyond the end."""
    with pytest.raises(NotFound):
        store.get("none")
    with pytest.raises(NotFound):
        store.head("none")
    store.put("short", b"abc")
    with pytest.raises(NotFound):
        store.get("short", 2, 5)
    with pytest.raises(NotFound):
        store.get("short", 7, 5)
    assert store.get("short", 1, 0) == b""


def test_a_probe_leaves_nothing_behind(store: Store) -> None:
    """A probe finds out whether conditional writes are honoured, which rclone's server does not, and cleans up."""
    assert store.probe() == Probe(conditional_writes="rclone" not in store.uri)
    assert list(store.list("")) == []


@pytest.mark.parametrize("store", ["file", "ministack"], indirect=True)
def test_of_many_conditional_writers_one_wins(store: Store) -> None:
    """When many write the same key conditionally at once, one succeeds and its bytes stand."""
    outcomes: dict[int, str] = {}

    def write(number: int) -> None:
        try:
            outcomes[number] = store.put_if_absent("manifest", f"writer {number}".encode())
        except AlreadyExists:
            outcomes[number] = ""

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [number for number, etag in outcomes.items() if etag]
    assert len(winners) == 1
    assert store.get("manifest") == f"writer {winners[0]}".encode()
    assert [entry.key for entry in store.list("")] == ["manifest"]


@pytest.mark.parametrize("store", ["file", "ministack"], indirect=True)
def test_a_replaced_object_is_noticed_by_its_etag(store: Store) -> None:
    """A read that names an ETag fails once the object has been replaced."""
    etag = store.put("shard", b"one")
    store.put("shard", b"another")
    with pytest.raises(Changed):
        store.get("shard", 0, 3, etag)
