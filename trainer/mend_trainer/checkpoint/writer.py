"""One rank's share of a save: its blocks, framed and digested, as one object in the store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

import xxhash

from mend.manifest import Chunk
from mend.protocol import Message
from mend.store import Store
from mend_trainer.checkpoint.arena import Arena
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
    """What one rank wrote, or why it could not."""

    key: str = ""  # of its object, relative to the save; "" if it had nothing to write
    bytes: int = 0
    written: tuple[Written, ...] = ()
    error: str = ""


def write_share(store: Store, folder: str, rank: int, arena: Arena, digests: Sequence[str]) -> Share:
    """Upload the arena's blocks as one object; `digests` are those of the blocks, in their order."""
    if not arena.blocks:
        return Share()
    key = f"__{rank}_0.distcp"
    parts: list[bytes | memoryview] = []
    written: list[Written] = []
    position = 0
    for index, (block, digest) in enumerate(zip(arena.blocks, digests, strict=True)):
        around = frame(block.dtype, block.sizes)
        record_bytes = len(around.head) + block.bytes + len(around.tail)
        padding = -record_bytes % _ALIGNMENT
        parts += [around.head, arena.raw(index), around.tail, bytes(padding)]
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
    return Share(key=key, bytes=position, written=tuple(written))


def digest_all(arena: Arena) -> list[str]:
    """The digests of all blocks, taken from the copy before anything else touches it."""
    return [digest_of(arena.raw(index)) for index in range(len(arena.blocks))]


def digest_of(raw: memoryview) -> str:
    """xxh3-128 of bytes, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(raw)
