"""Snapshots of made-up states in real arenas: any rank, step and size, with bytes that follow from them."""

from __future__ import annotations

import random

from mend_trainer.checkpoint.arena import Arena, Header, Origin, Snapshot
from mend_trainer.checkpoint.layout import Block
from mend_trainer.checkpoint.writer import digest_of

RUN_UID = "uid-of-the-run"


def some_bytes(length: int, *, rank: int = 0, attempt: int = 1, step: int = 10) -> bytes:
    """What a block of that length holds in the snapshot of that rank and step."""
    return random.Random(f"{length} {rank} {attempt} {step}").randbytes(length)


def a_snapshot(
    arena: Arena,
    *,
    rank: int = 0,
    attempt: int = 1,
    step: int = 10,
    lengths: tuple[int, ...] = (1000, 70_000, 0, 5),
    world_size: int = 4,
    run_uid: str = RUN_UID,
    digested: bool = True,
) -> Snapshot:
    """A snapshot of blocks of these lengths, published and, unless a saver is to do that, digested."""
    blocks = tuple(_block(number, length) for number, length in enumerate(lengths))
    draft = arena.begin(blocks)
    assert draft is not None
    for number, length in enumerate(lengths):
        draft.raw(number)[:] = some_bytes(length, rank=rank, attempt=attempt, step=step)
    snapshot = draft.publish(a_header(blocks, rank, attempt, step, world_size, run_uid), owed=False)
    if digested:
        snapshot.add_digests([digest_of(draft.raw(number)) for number in range(len(blocks))])
    return snapshot


def a_header(blocks: tuple[Block, ...], rank: int, attempt: int, step: int, world_size: int, run_uid: str) -> Header:
    """As the rank would write it."""
    origin = Origin(
        run="tests/run",
        run_uid=run_uid,
        attempt=attempt,
        lineage=(),
        config_digest="",
        step=step,
        tokens=step * 100,
        values={"loss": 0.1 + step, "names": ["ä", "b"], "none": None},
    )
    return Header(
        save_id=save_id(attempt, step), origin=origin, rank=rank, world_size=world_size, blocks=blocks, uri=""
    )


def save_id(attempt: int, step: int) -> str:
    """Of the save that all ranks made at that step."""
    return f"{attempt:04x}{step:04x}"


def _block(number: int, length: int) -> Block:
    name = f"tensor-{number}"
    return Block(name=name, path=(name,), dtype="uint8", shape=(length,), offsets=(0,), sizes=(length,))


def contents(snapshot: Snapshot) -> list[bytes]:
    """The bytes of its blocks."""
    return [bytes(snapshot.raw(number)) for number in range(len(snapshot.header.blocks))]
