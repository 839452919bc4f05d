"""Sheets as they go over the wire: sealed by a digest, and checked before anything in them is believed."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Final

import msgspec
import xxhash

from mend_trainer.checkpoint.layout import starts
from mend_trainer.checkpoint.sources import Sheet
from mend_trainer.copies.wire import Refused

_SEAL_BYTES: Final = 32
_MOST_RANKS: Final = 1 << 20
_MOST_DIMENSIONS: Final = 64
_LARGEST: Final = 1 << 40  # bytes of a snapshot, elements of a dimension, steps, attempts
_SAVE_ID: Final = re.compile(r"[0-9a-f]{1,32}", re.ASCII)
_DIGEST: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)


_decode = msgspec.json.Decoder(Sheet).decode


def size_of(sheet: Sheet) -> int:
    """How long the snapshot's data is, with what aligns its blocks."""
    blocks = sheet.header.blocks
    return starts(blocks)[-1] + blocks[-1].bytes if blocks else 0


def encode_sheet(sheet: Sheet) -> bytes:
    """Begins with a digest of the rest: a bit that flips in the memory of whoever keeps it is noticed."""
    said = msgspec.json.encode(sheet)
    return xxhash.xxh3_128_hexdigest(said).encode() + said


def decode_sheet(raw: bytes) -> Sheet:
    """Raises `Refused` for anything that is no snapshot which could really be."""
    seal, said = raw[:_SEAL_BYTES], raw[_SEAL_BYTES:]
    if seal != xxhash.xxh3_128_hexdigest(said).encode():
        raise Refused("the sheet does not have the digest that it begins with", HTTPStatus.UNPROCESSABLE_ENTITY)
    try:
        sheet = _decode(said)
        problem = _problem(sheet)
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as error:
        problem = str(error)
    if problem:
        raise Refused(f"no sheet of a snapshot: {problem}", HTTPStatus.UNPROCESSABLE_ENTITY)
    return sheet


def _problem(sheet: Sheet) -> str:
    header = sheet.header
    numbers = (header.origin.attempt, header.origin.step, header.origin.tokens)
    if not _SAVE_ID.fullmatch(header.save_id):
        return f"save_id {header.save_id[:40]!r}: expected up to 32 hexadecimal digits"
    if not 0 <= header.rank < header.world_size <= _MOST_RANKS:
        return f"rank {header.rank} of {header.world_size}"
    if not all(0 <= number < 1 << 62 for number in numbers) or max(numbers[:2]) >= _LARGEST:
        return f"attempt, step, tokens {numbers}: out of bounds"
    if len(sheet.digests) != len(header.blocks) or not all(map(_DIGEST.fullmatch, sheet.digests)):
        return f"{len(sheet.digests)} digests of {len(header.blocks)} blocks, or one that is none"
    for block in header.blocks:
        if not len(block.sizes) == len(block.offsets) == len(block.shape) <= _MOST_DIMENSIONS:
            return f"block {block.name[:80]!r}: shape, offsets and sizes differ in length, or are too long"
        if not all(0 <= size < _LARGEST for size in (*block.sizes, *block.offsets, *block.shape)):
            return f"block {block.name[:80]!r}: a size that cannot be"
    return f"{size_of(sheet)} bytes" if size_of(sheet) >= _LARGEST else ""
