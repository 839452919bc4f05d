"""What is said of a snapshot beside its bytes: header and digests, sealed, and checked before anything is believed."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Final

import msgspec
import xxhash

from mend.protocol import Message
from mend_trainer.checkpoint.arena import Header, Snapshot
from mend_trainer.checkpoint.layout import starts
from mend_trainer.copies.wire import Refused

_SEAL_BYTES: Final = 32
_MOST_RANKS: Final = 1 << 20
_MOST_DIMENSIONS: Final = 64
_LARGEST: Final = 1 << 40  # bytes of a snapshot, elements of a dimension, steps, attempts
_SAVE_ID: Final = re.compile(r"[0-9a-f]{1,32}", re.ASCII)
_DIGEST: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)


class Offer(Message, frozen=True, kw_only=True):
    """A snapshot without its bytes."""

    header: Header
    digests: tuple[str, ...]  # of the blocks, in their order

    @property
    def bytes(self) -> int:
        """How long its data is, with what aligns the blocks."""
        blocks = self.header.blocks
        return starts(blocks)[-1] + blocks[-1].bytes if blocks else 0


_decode = msgspec.json.Decoder(Offer).decode


def offer_of(snapshot: Snapshot) -> Offer | None:
    """None until the saver has taken the digests, and once it is overwritten."""
    digests = snapshot.digests
    return None if digests is None else Offer(header=snapshot.header, digests=digests)


def encode_offer(offer: Offer) -> bytes:
    """Begins with a digest of the rest: a bit that flips in the memory of whoever keeps it is noticed."""
    said = msgspec.json.encode(offer)
    return xxhash.xxh3_128_hexdigest(said).encode() + said


def decode_offer(raw: bytes) -> Offer:
    """Raises `Refused` for anything that is no snapshot which could really be."""
    seal, said = raw[:_SEAL_BYTES], raw[_SEAL_BYTES:]
    if seal != xxhash.xxh3_128_hexdigest(said).encode():
        raise Refused("the header does not have the digest that it begins with", HTTPStatus.UNPROCESSABLE_ENTITY)
    try:
        offer = _decode(said)
        problem = _problem(offer)
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as error:
        problem = str(error)
    if problem:
        raise Refused(f"no header of a snapshot: {problem}", HTTPStatus.UNPROCESSABLE_ENTITY)
    return offer


def _problem(offer: Offer) -> str:
    header = offer.header
    numbers = (header.origin.attempt, header.origin.step, header.origin.tokens)
    if not _SAVE_ID.fullmatch(header.save_id):
        return f"save_id {header.save_id[:40]!r}: expected up to 32 hexadecimal digits"
    if not 0 <= header.rank < header.world_size <= _MOST_RANKS:
        return f"rank {header.rank} of {header.world_size}"
    if not all(0 <= number < 1 << 62 for number in numbers) or max(numbers[:2]) >= _LARGEST:
        return f"attempt, step, tokens {numbers}: out of bounds"
    if len(offer.digests) != len(header.blocks) or not all(map(_DIGEST.fullmatch, offer.digests)):
        return f"{len(offer.digests)} digests of {len(header.blocks)} blocks, or one that is none"
    for block in header.blocks:
        if not len(block.sizes) == len(block.offsets) == len(block.shape) <= _MOST_DIMENSIONS:
            return f"block {block.name[:80]!r}: shape, offsets and sizes differ in length, or are too long"
        if not all(0 <= size < _LARGEST for size in (*block.sizes, *block.offsets, *block.shape)):
            return f"block {block.name[:80]!r}: a size that cannot be"
    if offer.bytes >= _LARGEST:
        return f"{offer.bytes} bytes"
    return ""
