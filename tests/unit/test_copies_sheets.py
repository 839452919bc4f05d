"""Sheets of copies as they come from the network: what is no snapshot is refused in words, whatever it is."""

from __future__ import annotations

import json
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from mend_trainer.checkpoint.arena import Arena
from mend_trainer.checkpoint.sources import sheet_of
from mend_trainer.copies.sheets import decode_sheet, encode_sheet, size_of
from mend_trainer.copies.wire import Refused
from snapshots_made import a_snapshot

_SHEET = sheet_of(a_snapshot(Arena.create("one")))
assert _SHEET is not None
GOOD = encode_sheet(_SHEET)
PLAIN = json.loads(GOOD[32:])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


def sealed(said: bytes) -> bytes:
    """With the digest that a sheet begins with."""
    return xxhash.xxh3_128_hexdigest(said).encode() + said


def changed(path: tuple[str | int, ...], value: Any) -> bytes:
    """The good sheet with another value in one place."""
    plain = json.loads(json.dumps(PLAIN))
    at = plain
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return sealed(json.dumps(plain).encode())


def paths(value: Any, before: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Of everything in it."""
    pairs: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = list(enumerate(value))
    found = [(*before, key) for key, _ in pairs]
    return found + [path for key, inner in pairs for path in paths(inner, (*before, key))]


def test_a_sheet_comes_back_as_it_went() -> None:
    """What is decoded is what was encoded."""
    assert decode_sheet(GOOD) == _SHEET


@given(st.integers(0, len(GOOD) * 8 - 1))
def test_a_flipped_bit_is_noticed(bit: int) -> None:
    """One bit of a sheet that flips in somebody's memory condemns it."""
    raw = bytearray(GOOD)
    raw[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Refused, match="does not have the digest"):
        decode_sheet(bytes(raw))


@given(st.binary(max_size=200))
def test_bytes_that_are_no_sheet_are_refused(said: bytes) -> None:
    """Whatever has a digest and is no JSON of a sheet is refused."""
    with pytest.raises(Refused, match="no sheet of a snapshot"):
        decode_sheet(sealed(said))


@settings(max_examples=300)
@given(st.sampled_from(paths(PLAIN)), JSON)
def test_a_sheet_with_anything_anywhere_is_refused_or_sound(path: tuple[str | int, ...], value: Any) -> None:
    """Any value in any place either makes a snapshot within all bounds, or is refused; nothing else is raised."""
    try:
        sheet = decode_sheet(changed(path, value))
    except Refused:
        return
    assert 0 <= size_of(sheet) < 1 << 40
    assert len(sheet.digests) == len(sheet.header.blocks)
    assert 0 <= sheet.header.rank < sheet.header.world_size


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("header", "save_id"), "../../x", "save_id"),
        (("header", "rank"), 4, "rank 4 of 4"),
        (("header", "rank"), -1, "rank -1"),
        (("header", "world_size"), 1 << 40, "rank 0 of"),
        (("header", "origin", "attempt"), -1, "out of bounds"),
        (("header", "origin", "step"), 1 << 50, "out of bounds"),
        (("header", "blocks", 0, "sizes"), [1 << 50], "a size that cannot be"),
        (("header", "blocks", 0, "sizes"), [-1], "a size that cannot be"),
        (("header", "blocks", 0, "sizes"), [1, 1], "differ in length"),
        (("header", "blocks", 0, "dtype"), "load", "dtype"),
        (("header", "blocks", 0, "dtype"), "float1000", "dtype"),
        (("header", "blocks", 1, "sizes"), [(1 << 40) - 1], "bytes"),
        (("digests",), [], "0 digests of 4 blocks"),
        (("digests", 1), "Z" * 32, "one that is none"),
        (("header", "origin", "values"), json.loads("[" * 500 + "]" * 500), "object"),
    ],
)
def test_what_cannot_be_is_named(path: tuple[str | int, ...], value: Any, problem: str) -> None:
    """A refusal says what is wrong."""
    with pytest.raises(Refused, match=problem):
        decode_sheet(changed(path, value))


def test_a_sheet_that_is_nested_beyond_reason_is_refused() -> None:
    """Deep nesting ends in a refusal, not in the end of the thread."""
    said = json.dumps(PLAIN).replace('"none": null', '"none": ' + "[" * 100_000 + "]" * 100_000)
    with pytest.raises(Refused, match="no sheet of a snapshot"):
        decode_sheet(sealed(said.encode()))


def test_many_dimensions_cost_nothing() -> None:
    """A shape of a million dimensions is refused before it is multiplied."""
    plain = json.loads(json.dumps(PLAIN))
    long = [1 << 39] * 1_000_000
    plain["header"]["blocks"][0] |= {"sizes": long, "shape": long, "offsets": long}
    with pytest.raises(Refused, match="too long"):
        decode_sheet(sealed(json.dumps(plain).encode()))
