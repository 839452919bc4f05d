"""Reads a checkpoint back, every byte of it, and says what is not as its manifest tells; no torch, bounded memory.

Damage is told from doubt. Bytes that are missing or changed condemn a checkpoint; that it is unsigned, or of a newer
mend, is reported and condemns nothing, for the fault may be the reader's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Final

import msgspec
import xxhash

from mend.keys import DCP_METADATA_NAME, MANIFEST_NAME, PINNED_NAME, QUARANTINE_NAME, VERIFIED_NAME
from mend.manifest import (
    DIGEST_ALGORITHM,
    Chunk,
    Manifest,
    NewerManifest,
    StoredObject,
    TensorEntry,
    UnreadableManifest,
    Untrusted,
    decode_manifest,
    misplacement,
)
from mend.protocol import Message
from mend.store import Entry, NotFound, Store
from mend.store.parallel import ahead

READ_BYTES: Final = 8 << 20
WORKERS: Final = 4
MOST_READS: Final = 8  # begun and not yet digested: 64 MiB
SHOWN: Final = 5  # of many problems in one object
_NOT_IN_MANIFEST: Final = frozenset({MANIFEST_NAME, DCP_METADATA_NAME, QUARANTINE_NAME, VERIFIED_NAME, PINNED_NAME})
_ITEM_BYTES: Final[Mapping[str, int]] = {
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    **dict.fromkeys(("float32", "int32", "uint32", "complex32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2"), 1),
    "complex128": 16,
}


class ObjectState(StrEnum):
    """What was found of one object."""

    SOUND = "sound"
    MISSING = "missing"
    TRUNCATED = "truncated"
    CHANGED = "changed"
    SURPLUS = "surplus"  # the manifest knows nothing of it; it harms nobody


class ObjectReport(Message, frozen=True, kw_only=True):
    """One object of a checkpoint; `key` is relative to the checkpoint's folder."""

    key: str
    state: ObjectState
    bytes: int = 0  # as found
    unproven_bytes: int = 0  # around the tensors, in a checkpoint of before they were digested
    detail: str = ""

    @property
    def is_bad(self) -> bool:
        """Whether the checkpoint cannot be trusted because of it."""
        return self.state in (ObjectState.MISSING, ObjectState.TRUNCATED, ObjectState.CHANGED)


class Verification(Message, frozen=True, kw_only=True):
    """What reading a checkpoint back has shown."""

    uri: str
    manifest: Manifest | None = None  # None: it could not be read
    objects: tuple[ObjectReport, ...] = ()
    damage: tuple[str, ...] = ()  # of the manifest itself
    doubts: tuple[str, ...] = ()  # why it may not be used although nothing is damaged
    bytes: int = 0  # proven to be what was saved

    @property
    def problems(self) -> tuple[str, ...]:
        """Everything that is wrong, in words."""
        bad = tuple(f"{each.key}: {each.state}: {each.detail}" for each in self.objects if each.is_bad)
        return (*self.damage, *bad, *self.doubts)

    @property
    def is_sound(self) -> bool:
        """Nothing is wrong."""
        return not self.problems

    @property
    def is_damaged(self) -> bool:
        """What is stored is not what was saved: to be quarantined."""
        return bool(self.damage) or any(each.is_bad for each in self.objects)


class VerifiedNote(Message, frozen=True, kw_only=True, omit_defaults=False):
    """`verified.json`: that a checkpoint was read back. For people and retention; a restore checks digests itself."""

    bytes: int
    verified_unix_seconds: float


# ---------------------------------------------------------------- reading back
def verify(
    store: Store, folder: str, key: bytes | None = None, told: Callable[[int], None] = lambda read_bytes: None
) -> Verification:
    """Read back what lies in this folder; `told` hears of every piece that was read, by its length.

    Raises `StoreError` if it cannot be read just now, which says nothing about the checkpoint.
    """
    uri = f"{store.uri}/{folder}"
    try:
        manifest = decode_manifest(store.get(f"{folder}/{MANIFEST_NAME}"), key)
    except NotFound:
        return Verification(uri=uri, doubts=("it has no manifest: it was never committed, or is deleted",))
    except (Untrusted, NewerManifest) as error:
        return Verification(uri=uri, doubts=(f"its manifest: {error}",))
    except UnreadableManifest as error:
        return Verification(uri=uri, damage=(f"its manifest: {error}",))
    damage = tuple(filter(None, (misplacement(manifest, folder), *contradictions(manifest))))
    if damage:
        return Verification(uri=uri, manifest=manifest, damage=damage)
    if manifest.digest_algorithm != DIGEST_ALGORITHM:
        unknown = f"its digests are {manifest.digest_algorithm}; this mend knows {DIGEST_ALGORITHM} only"
        return Verification(uri=uri, manifest=manifest, doubts=(unknown,))
    listed = {entry.key.removeprefix(f"{folder}/"): entry for entry in store.list(f"{folder}/")}
    objects = _read_back(store, folder, manifest, listed, told)
    found = Verification(
        uri=uri,
        manifest=manifest,
        objects=(*objects, *_surplus(manifest, listed)),
        bytes=sum(each.bytes - each.unproven_bytes for each in objects if not each.is_bad),
    )
    if found.is_damaged and not _is_there(store, f"{folder}/{MANIFEST_NAME}"):  # retention deletes the manifest first
        return Verification(uri=uri, doubts=("it was deleted while it was read",))
    return found


def leave_note(store: Store, folder: str, found: Verification, now: float, *, quarantine: bool = True) -> None:
    """Leave a note of the verification in the store: verified if it is sound, quarantined if it is damaged."""
    if found.is_sound:
        note = VerifiedNote(bytes=found.bytes, verified_unix_seconds=now)
        store.put(f"{folder}/{VERIFIED_NAME}", msgspec.json.encode(note))
    elif found.is_damaged and quarantine:
        mark = {"reason": "; ".join(found.problems), "uri": found.uri}
        store.put(f"{folder}/{QUARANTINE_NAME}", msgspec.json.encode(mark))


def _is_there(store: Store, key: str) -> bool:
    try:
        store.head(key)
    except NotFound:
        return False
    return True


def _surplus(manifest: Manifest, listed: Mapping[str, Entry]) -> Iterator[ObjectReport]:
    known = {each.key for each in manifest.objects} | _NOT_IN_MANIFEST
    for name, entry in listed.items():
        if name not in known:
            detail = "the manifest knows nothing of it"
            yield ObjectReport(key=name, state=ObjectState.SURPLUS, bytes=entry.bytes, detail=detail)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A run of bytes of one object, read by one request."""

    proof: _Proof
    start: int
    length: int


def _read_back(
    store: Store, folder: str, manifest: Manifest, listed: Mapping[str, Entry], told: Callable[[int], None]
) -> list[ObjectReport]:
    proofs = [_Proof.of(each, manifest, listed.get(each.key)) for each in manifest.objects]
    pieces = (
        _Piece(proof, start, min(READ_BYTES, proof.stored.bytes - start))
        for proof in proofs
        if proof.state is ObjectState.SOUND
        for start in range(0, proof.stored.bytes, READ_BYTES)
    )

    def read(name: str, start: int, length: int) -> bytearray:
        raw = bytearray(length)
        store.get_into(f"{folder}/{name}", memoryview(raw), start)
        return raw

    def fetch(piece: _Piece) -> tuple[_Piece, bytearray | None]:
        try:
            return piece, read(piece.proof.stored.key, piece.start, piece.length)
        except NotFound:
            return piece, None

    for piece, raw in ahead(fetch, pieces, WORKERS, MOST_READS):
        if raw is None:
            piece.proof.cut(piece.start)
        else:
            piece.proof.take(memoryview(raw))
            told(len(raw))
    for proof in proofs:
        proof.look_again(partial(read, proof.stored.key))
    return [proof.report() for proof in proofs]


@dataclass(slots=True)
class _Region:
    """Bytes of an object that lie in one chunk, or between two."""

    start: int
    stop: int
    name: str = ""
    chunk: Chunk | None = None


@dataclass(slots=True)
class _Proof:
    """The digests of one object's regions, taken as its bytes come in from front to back."""

    stored: StoredObject
    regions: list[_Region]
    state: ObjectState
    found_bytes: int
    detail: str = ""
    _at: int = 0
    _position: int = 0
    _frame: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)
    _chunk: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)
    _wrong: list[_Region] = field(default_factory=list)

    @classmethod
    def of(cls, stored: StoredObject, manifest: Manifest, entry: Entry | None) -> _Proof:
        """Nothing is read of an object that is not there at its size."""
        regions = regions_of(stored, manifest)
        if entry is None:
            return cls(stored, regions, ObjectState.MISSING, 0, "the store does not list it")
        if entry.bytes != stored.bytes:
            detail = f"{entry.bytes} bytes where {stored.bytes} were saved"
            state = ObjectState.TRUNCATED if entry.bytes < stored.bytes else ObjectState.CHANGED
            return cls(stored, regions, state, entry.bytes, detail)
        return cls(stored, regions, ObjectState.SOUND, entry.bytes)

    def cut(self, start: int) -> None:
        """The object turned out to end before this byte or soon after it."""
        self.state, self.detail = ObjectState.TRUNCATED, f"it could not be read from byte {start} on"

    def take(self, raw: memoryview) -> None:
        """The next bytes of the object."""
        while raw and self.state is ObjectState.SOUND:
            region = self.regions[self._at]
            part = raw[: region.stop - self._position]
            (self._frame if region.chunk is None else self._chunk).update(part)
            raw = raw[len(part) :]
            self._position += len(part)
            if self._position == region.stop:
                self._at += 1
                if region.chunk is not None:
                    if self._chunk.hexdigest() != region.chunk.digest:
                        self._wrong.append(region)
                    self._chunk.reset()

    def look_again(self, read: Callable[[int, int], bytearray]) -> None:
        """What seems changed is read once more, since a bit may be flipped on the way; what stays so, is."""
        if self.state is not ObjectState.SOUND:
            return
        frames = [region for region in self.regions if region.chunk is None]
        try:
            wrong = [r for r in self._wrong if r.chunk and _digest([r], read) != r.chunk.digest]
            framed = self._is_framed(self._frame.hexdigest()) or self._is_framed(_digest(frames, read))
        except NotFound:
            self.cut(0)
            return
        parts = [f"{each.name} at byte {each.start}" for each in wrong] + (
            [] if framed else ["the bytes around tensors"]
        )
        if parts:
            more = f" and {len(parts) - SHOWN} more" if len(parts) > SHOWN else ""
            self.state = ObjectState.CHANGED
            self.detail = f"not what was saved: {', '.join(parts[:SHOWN])}{more}"

    def report(self) -> ObjectReport:
        """What was found."""
        unproven = 0 if self.stored.frame_digest else sum(r.stop - r.start for r in self.regions if r.chunk is None)
        return ObjectReport(
            key=self.stored.key,
            state=self.state,
            bytes=self.found_bytes,
            unproven_bytes=unproven if self.state is ObjectState.SOUND else 0,
            detail=self.detail,
        )

    def _is_framed(self, digest: str) -> bool:
        return self.stored.frame_digest in ("", digest)


def _digest(regions: Iterable[_Region], read: Callable[[int, int], bytearray]) -> str:
    digest = xxhash.xxh3_128()
    for region in regions:
        for start in range(region.start, region.stop, READ_BYTES):
            digest.update(read(start, min(READ_BYTES, region.stop - start)))
    return digest.hexdigest()


# ---------------------------------------------------------------- the manifest by itself
def regions_of(stored: StoredObject, manifest: Manifest) -> list[_Region]:
    """The object from its first byte to its last: chunks, and what lies between them."""
    regions: list[_Region] = []
    position = 0
    for chunk in sorted(_regions(manifest, stored.key), key=lambda each: each.start):
        if chunk.start > position:
            regions.append(_Region(position, chunk.start))
        regions.append(chunk)
        position = chunk.stop
    if position < stored.bytes:
        regions.append(_Region(position, stored.bytes))
    return regions


def _regions(manifest: Manifest, key: str) -> Iterator[_Region]:
    for name, entry in manifest.tensors.items():
        for chunk in entry.chunks:
            if chunk.key == key and chunk.length_bytes:
                yield _Region(chunk.start_byte, chunk.start_byte + chunk.length_bytes, name, chunk)


def contradictions(manifest: Manifest) -> tuple[str, ...]:
    """In what a manifest contradicts itself, although its own digest is right."""
    return tuple(itertools.islice(_contradictions(manifest), SHOWN))


def _contradictions(manifest: Manifest) -> Iterator[str]:
    objects = {each.key: each for each in manifest.objects}
    if len(objects) < len(manifest.objects):
        yield "its manifest names an object twice"
    for name, entry in manifest.tensors.items():
        yield from (f"its manifest: {name}: {problem}" for problem in _misdescribed(entry, objects))
    for each in objects.values():
        inside = sorted((r.start, r.stop, r.name) for r in _regions(manifest, each.key))
        for (_, stop, one), (start, _, other) in itertools.pairwise(inside):
            if start < stop:
                yield f"its manifest: {one} and {other} overlap in {each.key}"


def _misdescribed(entry: TensorEntry, objects: Mapping[str, StoredObject]) -> Iterator[str]:
    whole = math.prod(entry.shape)
    if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != whole:
        yield f"its chunks do not cover the {whole} elements of {entry.shape}"
    for chunk in entry.chunks:
        inside = len(chunk.offsets) == len(chunk.sizes) == len(entry.shape) and all(
            offset >= 0 and size >= 0 and offset + size <= most
            for offset, size, most in zip(chunk.offsets, chunk.sizes, entry.shape, strict=True)
        )
        item_bytes = _ITEM_BYTES.get(entry.dtype)  # of a type that is not known here the length is taken as told
        told = item_bytes is None or chunk.length_bytes == math.prod(chunk.sizes) * item_bytes
        if not inside or not told:
            yield f"the chunk at {chunk.offsets} does not lie in a {entry.dtype} of {entry.shape}"
        stored = objects.get(chunk.key)
        if stored is None or not 0 <= chunk.start_byte <= chunk.start_byte + chunk.length_bytes <= stored.bytes:
            yield f"the chunk at {chunk.offsets} does not lie in an object {chunk.key!r} of the checkpoint"
