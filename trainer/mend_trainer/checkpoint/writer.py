"""One rank's share of a save: its blocks, framed and digested, as one object in the store."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

import msgspec
import xxhash

from mend.manifest import Chunk
from mend.protocol import Message
from mend.store import Store
from mend_trainer.checkpoint.arena import Origin, Snapshot
from mend_trainer.checkpoint.record import frame

_ALIGNMENT = 64  # of records, and so of the raw bytes inside them


class Written(Message, frozen=True, kw_only=True):
    """A block that was written: where its raw bytes lie, and the record around them that other tools read."""

    name: str
    path: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    chunk: Chunk
    record_start: int
    record_bytes: int


class Share(Message, frozen=True, kw_only=True):
    """What one rank contributes to a save, or why it cannot. Once it is in the store it never changes."""

    origin: Origin | None = None  # rank 0's has it whole: whoever commits needs its values
    key: str = ""  # of its object, relative to the save; "" if it had nothing to write
    bytes: int = 0
    frame_digest: str = ""  # of what lies around the blocks
    written: tuple[Written, ...] = ()
    weights: int = 0  # blocks of the model among them
    unchanged: int = 0  # how many of these are as in the save before
    error: str = ""


class UnreadableShare(ValueError):
    """The bytes are no share, or not as they were written."""


def encode_share(share: Share, place: str = "", key: bytes | None = None) -> bytes:
    """The share as JSON behind its digest and, with a key, a signature: what it says goes into the manifest.

    `place`, its key in the store, is signed too: a share belongs to one rank of one save.
    """
    said = msgspec.json.encode(share)
    return b"%s\n%s" % (_seal(said, place, key), said)


def decode_share(raw: bytes, place: str = "", key: bytes | None = None) -> Share:
    """Raises `UnreadableShare`."""
    seal, _, said = raw.partition(b"\n")
    if not hmac.compare_digest(seal, _seal(said, place, key)):
        by_whom = " and the signature by this run's key" if key is not None else ""
        raise UnreadableShare(f"it does not begin with the digest of its bytes{by_whom}")
    try:
        return msgspec.json.decode(said, type=Share)
    except msgspec.MsgspecError as error:
        raise UnreadableShare(str(error)) from error


def _seal(said: bytes, place: str, key: bytes | None) -> bytes:
    digest = digest_of(memoryview(said))
    if key is None:
        return digest.encode()
    signature = hmac.digest(key, b"mend: share\n%s\n%s" % (place.encode(), said), "sha256")
    return f"{digest} {signature.hex()}".encode()


def object_key(rank: int) -> str:
    """Of the object with one rank's blocks, relative to the save."""
    return f"__{rank}_0.distcp"


def write_blocks(store: Store, folder: str, snapshot: Snapshot, digests: Sequence[str]) -> Share:
    """Upload the snapshot's blocks as one object; `digests` are those of the blocks, in their order."""
    blocks = snapshot.header.blocks
    if not blocks:
        return Share()
    key = object_key(snapshot.header.rank)
    parts: list[bytes | memoryview] = []
    written: list[Written] = []
    framing = xxhash.xxh3_128()
    position = 0
    for index, (block, digest) in enumerate(zip(blocks, digests, strict=True)):
        around = frame(block.dtype, block.sizes)
        record_bytes = len(around.head) + block.bytes + len(around.tail)
        padding = -record_bytes % _ALIGNMENT
        parts += [around.head, snapshot.raw(index), around.tail, bytes(padding)]
        for frame_part in (around.head, around.tail, bytes(padding)):
            framing.update(frame_part)
        chunk = Chunk(
            offsets=block.offsets,
            sizes=block.sizes,
            key=key,
            start_byte=position + len(around.head),
            length_bytes=block.bytes,
            digest=digest,
        )
        written.append(
            Written(
                name=block.name,
                path=block.path,
                dtype=block.dtype,
                shape=block.shape,
                chunk=chunk,
                record_start=position,
                record_bytes=record_bytes,
            )
        )
        position += record_bytes + padding
    store.put(str(PurePosixPath(folder, key)), parts)
    return Share(key=key, bytes=position, frame_digest=framing.hexdigest(), written=tuple(written))


def what_changed(snapshot: Snapshot, share: Share) -> str:
    """What is wrong if the snapshot no longer holds the bytes of which its share tells; "" if it does."""
    written = enumerate(share.written)
    changed = [each for index, each in written if digest_of(snapshot.raw(index)) != each.chunk.digest]
    if not changed:
        return ""
    first, more = changed[0], len(changed) - 1
    begin, end = first.chunk.start_byte, first.chunk.start_byte + first.chunk.length_bytes
    return (
        f"{first.name} at {list(first.chunk.offsets)} (bytes {begin} to {end} of {share.key})"
        + f" and {more} more of {len(share.written)} blocks" * (more > 0)
        + ": shared memory no longer holds what was digested after the copy, so this save is given up; the next one "
        "copies anew. If it comes again, the memory of this worker's machine is failing: look for ECC errors in its "
        "kernel's log, and keep the run off it (kubectl cordon)"
    )


def digest_all(snapshot: Snapshot, mark: Callable[[], None] = lambda: None) -> list[str]:
    """The digests of all blocks, taken from the copy before anything else touches it; `mark` is called after each."""
    digests: list[str] = []
    for index in range(len(snapshot.header.blocks)):
        digests.append(digest_of(snapshot.raw(index)))
        mark()
    return digests


def digest_of(raw: memoryview) -> str:
    """xxh3-128 of bytes, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(raw)
