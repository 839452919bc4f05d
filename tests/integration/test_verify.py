"""A checkpoint read back from real stores: whatever was done to it is found, and named."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import xxhash

from mend.keys import MANIFEST_NAME, QUARANTINE_NAME, VERIFIED_NAME
from mend.manifest import Manifest, decode_manifest, encode_manifest, signing_key
from mend.store import Store, Unreachable, open_store
from mend.store.files import FileStore
from mend.verify import MOST_READS, READ_BYTES, ObjectState, VerifiedNote, leave_note, verify
from s3 import FaultyProxy, S3Server, ministack
from stored_checkpoint import HEAD, MODEL, TAIL, save

FIRST = "__0_0.distcp"
KEY = signing_key(b"a secret of the tests, long enough", "team/clio")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with ministack(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest) -> Store:
    if request.param == "file":
        return open_store(f"file://{request.getfixturevalue('tmp_path')}/run")
    running: S3Server = request.getfixturevalue("server")
    return open_store(running.uri(request.node.name), running.endpoint, running.credentials)


def rewritten(store: Store, key: str, change: Callable[[bytearray], bytes | bytearray]) -> None:
    """The object with other bytes, of which the store thinks nothing."""
    store.put(key, bytes(change(bytearray(store.get(key)))))


def flipped(position: int) -> Callable[[bytearray], bytearray]:
    """One bit of that byte is another one."""

    def flip(raw: bytearray) -> bytearray:
        raw[position] ^= 4
        return raw

    return flip


def with_manifest(store: Store, folder: str, **changes: object) -> None:
    """The manifest says something else, and its own digest is right."""
    key = f"{folder}/{MANIFEST_NAME}"
    store.put(key, encode_manifest(msgspec.structs.replace(decode_manifest(store.get(key)), **changes)))


def test_a_sound_checkpoint_is_read_to_its_last_byte(store: Store) -> None:
    """Every byte of every object is read once, and all of them are proven."""
    folder = save(store, 5)
    read: list[int] = []
    found = verify(store, folder, told=read.append)
    assert found.is_sound, found.problems
    sizes = [entry.bytes for entry in store.list(f"{folder}/__")]
    assert sum(read) == found.bytes == sum(sizes)
    assert [each.state for each in found.objects] == [ObjectState.SOUND] * 2


@pytest.mark.parametrize("place", ["head", "payload", "tail"])
def test_a_flipped_bit_is_found_wherever_it_is(store: Store, place: str) -> None:
    """In the tensors and in what other tools read around them, at every bit of a record's regions."""
    folder = save(store, 5)
    begins, ends = {
        "head": (0, len(HEAD)),
        "payload": (len(HEAD), len(HEAD) + 8),
        "tail": (len(HEAD) + 8, len(HEAD) + 8 + len(TAIL)),
    }[place]
    key = f"{folder}/{FIRST}"
    whole = store.get(key)
    for position in range(begins, ends, 1 if place == "payload" else 29):
        rewritten(store, key, flipped(position))
        found = verify(store, folder)
        assert [each.state for each in found.objects] == [ObjectState.CHANGED, ObjectState.SOUND], position
        named = f"{MODEL} at byte {len(HEAD)}" if place == "payload" else "the bytes around tensors"
        assert named in found.problems[0]
        assert found.is_damaged
        store.put(key, whole)
    assert verify(store, folder).is_sound


def test_what_is_missing_cut_or_longer_is_named(store: Store) -> None:
    """An object that is not there at its size condemns the checkpoint, and is not read."""
    folder = save(store, 5, ranks=4)
    store.delete([f"{folder}/{FIRST}"])
    rewritten(store, f"{folder}/__1_0.distcp", lambda raw: raw[:-1])
    rewritten(store, f"{folder}/__2_0.distcp", lambda raw: raw + b"x")
    read: list[int] = []
    found = verify(store, folder, told=read.append)
    states = [ObjectState.MISSING, ObjectState.TRUNCATED, ObjectState.CHANGED, ObjectState.SOUND]
    assert [each.state for each in found.objects] == states
    assert len(read) == 1
    assert len(found.problems) == 3


def test_the_object_of_another_step_is_found(store: Store) -> None:
    """A shard of another step has the right size and a right form, and is not what was saved."""
    folder, other = save(store, 5), save(store, 6)
    store.put(f"{folder}/{FIRST}", store.get(f"{other}/{FIRST}"))
    assert verify(store, folder).is_damaged
    assert verify(store, other).is_sound


def test_the_manifest_of_another_save_is_found(store: Store) -> None:
    """Of another step, or of another save of the same one."""
    folder, other, twin = save(store, 5), save(store, 6), save(store, 5, save_id="b")
    for taken in (other, twin):
        store.put(f"{folder}/{MANIFEST_NAME}", store.get(f"{taken}/{MANIFEST_NAME}"))
        found = verify(store, folder)
        assert found.is_damaged
        assert "its manifest is that of step" in found.problems[0]


def test_every_flipped_bit_of_the_manifest_is_found(tmp_path: Path) -> None:
    """A damaged manifest condemns the checkpoint; nothing else is believed of it."""
    store = open_store(f"file://{tmp_path}/run")
    folder = save(store, 5)
    whole = store.get(f"{folder}/{MANIFEST_NAME}")
    for position in range(0, len(whole), 7):
        rewritten(store, f"{folder}/{MANIFEST_NAME}", flipped(position))
        found = verify(store, folder)
        assert found.is_damaged, position
        assert found.manifest is None
        store.put(f"{folder}/{MANIFEST_NAME}", whole)


def test_a_manifest_that_contradicts_itself_is_found(store: Store) -> None:
    """Chunks outside their object or their tensor, overlapping ones, and tensors that are not covered."""
    folder = save(store, 5)
    good = decode_manifest(store.get(f"{folder}/{MANIFEST_NAME}"))
    entry = good.tensors[MODEL]
    first, second = entry.chunks
    for chunks in (
        (first,),
        (first, msgspec.structs.replace(second, start_byte=10**6)),
        (first, msgspec.structs.replace(second, key="elsewhere")),
        (first, msgspec.structs.replace(second, offsets=(6,))),
        (first, msgspec.structs.replace(second, length_bytes=7)),
        (first, msgspec.structs.replace(second, key=FIRST, start_byte=first.start_byte + 4)),
    ):
        changed = msgspec.structs.replace(entry, chunks=chunks)
        with_manifest(store, folder, tensors={**good.tensors, MODEL: changed})
        assert verify(store, folder).damage, chunks


def test_surplus_objects_are_told_and_harm_nobody(store: Store) -> None:
    """What the manifest does not know is reported, and the checkpoint is as good as before."""
    folder = save(store, 5)
    store.put(f"{folder}/stray", b"who put this here")
    found = verify(store, folder)
    assert found.is_sound
    assert [(each.key, each.state) for each in found.objects][-1] == ("stray", ObjectState.SURPLUS)


def test_bytes_that_nobody_digested_count_as_unproven(store: Store) -> None:
    """A checkpoint from before frames were digested is sound as far as it can be told, and the rest is counted."""
    folder = save(store, 5, framed=False)
    rewritten(store, f"{folder}/{FIRST}", flipped(3))
    found = verify(store, folder)
    assert found.is_sound
    assert found.objects[0].unproven_bytes == 2 * len(HEAD + TAIL)
    assert found.bytes == 2 * 16


def test_what_was_never_committed_is_doubted_and_not_condemned(store: Store) -> None:
    """A folder without a manifest may be a save in flight."""
    folder = save(store, 5, committed=False)
    found = verify(store, folder)
    assert not found.is_sound
    assert not found.is_damaged


def test_unsigned_and_foreign_manifests_are_doubted_and_not_condemned(store: Store) -> None:
    """With a key, only what this run signed is sound; a wrong key condemns nothing."""
    signed, unsigned = save(store, 5, key=KEY), save(store, 6)
    assert verify(store, signed, KEY).is_sound
    foreign = signing_key(b"a secret of the tests, long enough", "team/dora")
    for folder, key in ((unsigned, KEY), (signed, foreign)):
        found = verify(store, folder, key)
        assert not found.is_sound
        assert not found.is_damaged


def test_notes_say_what_was_found(store: Store) -> None:
    """A sound checkpoint is noted as verified, a damaged one is quarantined."""
    sound, damaged, doubted = save(store, 5), save(store, 6), save(store, 7, committed=False)
    store.delete([f"{damaged}/{FIRST}"])
    for folder in (sound, damaged, doubted):
        leave_note(store, folder, verify(store, folder), now=77.0)
    note = msgspec.json.decode(store.get(f"{sound}/{VERIFIED_NAME}"), type=VerifiedNote)
    assert (note.bytes, note.verified_unix_seconds) == (32 + 4 * len(HEAD + TAIL), 77.0)
    assert b"missing" in store.get(f"{damaged}/{QUARANTINE_NAME}")
    kept = {key for key in (entry.key for entry in store.list("")) if key.endswith((QUARANTINE_NAME, VERIFIED_NAME))}
    assert kept == {f"{sound}/{VERIFIED_NAME}", f"{damaged}/{QUARANTINE_NAME}"}
    assert verify(store, sound).is_sound  # its own notes are no surplus


def test_a_bit_that_flips_on_the_way_condemns_nothing(tmp_path: Path) -> None:
    """What reads differently the second time was damaged in the wire or the memory, not at rest."""

    class Flipping(FileStore):
        left = 1

        def get_into(self, key: str, into: memoryview, start: int = 0, if_match: str = "") -> None:
            super().get_into(key, into, start, if_match)
            if key.endswith(".distcp") and self.left:
                self.left -= 1
                into[(len(HEAD) + 3) % len(into)] ^= 1

    store = open_store(f"file://{tmp_path}/run")
    folder = save(store, 5)
    assert isinstance(store, FileStore)
    assert verify(Flipping(store.root, 5.0), folder).is_sound
    twice = Flipping(store.root, 5.0)
    twice.left = 100
    assert verify(twice, folder).is_damaged


def test_what_is_deleted_meanwhile_is_no_damage(tmp_path: Path) -> None:
    """Retention may take a checkpoint while it is read; nobody is told of corruption then."""

    class Pruned(FileStore):
        def get_into(self, key: str, into: memoryview, start: int = 0, if_match: str = "") -> None:
            if key.endswith(".distcp"):
                self.delete([entry.key for entry in self.list("step-")])
            super().get_into(key, into, start, if_match)

    store = open_store(f"file://{tmp_path}/run")
    folder = save(store, 5)
    assert isinstance(store, FileStore)
    found = verify(Pruned(store.root, 5.0), folder)
    assert not found.is_damaged
    assert "deleted while it was read" in found.problems[0]


def test_a_store_that_fails_says_nothing_of_the_checkpoint(server: S3Server) -> None:
    """Half answers are asked for again; a store that stays away raises, and marks nothing."""
    with FaultyProxy(server) as proxy:
        uri = server.uri("faulty")
        store = open_store(uri, proxy.server.endpoint, server.credentials, deadline_seconds=0.2)
        folder = save(store, 5)
        proxy.cut_answers(2, part=FIRST)
        proxy.answer_with(503, 2, method="GET", part="__1_0")
        assert verify(store, folder).is_sound
        proxy.answer_with(503, 1000, method="GET", part="__1_0")
        with pytest.raises(Unreachable):
            verify(store, folder)
        proxy.heal()
        assert verify(store, folder).is_sound


def test_memory_stays_bounded_however_large_an_object_is(tmp_path: Path) -> None:
    """A chunk that is larger than all reads in flight is digested as it streams by."""
    store = open_store(f"file://{tmp_path}/run")
    folder = save(store, 5, ranks=1)
    payload = bytes(3 * MOST_READS * READ_BYTES)
    key = f"{folder}/{FIRST}"
    good: Manifest = decode_manifest(store.get(f"{folder}/{MANIFEST_NAME}"))
    chunk = msgspec.structs.replace(
        good.tensors[MODEL].chunks[0],
        sizes=(len(payload) // 2,),
        start_byte=0,
        length_bytes=len(payload),
        digest=xxhash.xxh3_128_hexdigest(payload),
    )
    store.put(key, payload)
    entry = msgspec.structs.replace(good.tensors[MODEL], shape=(len(payload) // 2,), chunks=(chunk,))
    stored = msgspec.structs.replace(good.objects[0], bytes=len(payload), frame_digest="")
    with_manifest(store, folder, tensors={MODEL: entry}, objects=(stored,))
    size = len(payload)
    del payload
    tracemalloc.start()
    assert verify(store, folder).is_sound
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size * 2 / 3
