"""A manifest that was changed is never believed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests import a_manifest
from mend.manifest import (
    MANIFEST_VERSION,
    Chunk,
    Manifest,
    NewerManifest,
    StoredObject,
    TensorEntry,
    UnreadableManifest,
    decode_manifest,
    encode_manifest,
)
from mend.states import Ancestor


def one_with_everything(**changes: object) -> Manifest:
    """A small manifest in which no field is empty."""
    chunk = Chunk(offsets=(0, 0), sizes=(2, 3), key="__0_0.distcp", start_byte=704, length_bytes=24, digest="d" * 32)
    fields: dict[str, object] = {
        "step": 12,
        "attempt": 3,
        "lineage": (Ancestor(attempt=1, step=4), Ancestor(attempt=2, step=8)),
        "world_size": 2,
        "tokens": 4096,
        "created_unix_seconds": 1.5,
        "objects": (StoredObject(key="__0_0.distcp", bytes=1600, etag="e"),),
        "tensors": {"model.weight": TensorEntry(dtype="float32", shape=(2, 3), chunks=(chunk,))},
        "values": {"loader": {"position": 7, "seed": 2**70}, "lr": 0.1},
    }
    return a_manifest(**(fields | changes))


def test_a_manifest_survives_encoding() -> None:
    """Decoding what was encoded gives an equal manifest, integers beyond 64 bits included."""
    assert decode_manifest(encode_manifest(one_with_everything())) == one_with_everything()


@settings(max_examples=200)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_flipped_bit_is_noticed(position: float, bit: int) -> None:
    """A manifest with any one bit flipped is refused."""
    raw = bytearray(encode_manifest(one_with_everything()))
    raw[int(position * len(raw))] ^= 1 << bit
    with pytest.raises(UnreadableManifest):
        decode_manifest(bytes(raw))


@pytest.mark.parametrize("raw", [b"", b"{}", b"null", b"\x00" * 64, b"<html>not S3</html>", b'{"digest":"'])
def test_garbage_is_no_manifest(raw: bytes) -> None:
    """Bytes that are no manifest are refused, whatever they are."""
    with pytest.raises(UnreadableManifest):
        decode_manifest(raw)


def test_a_truncated_manifest_is_refused() -> None:
    """A manifest cut at any length is refused."""
    raw = encode_manifest(one_with_everything())
    for length in range(len(raw)):
        with pytest.raises(UnreadableManifest):
            decode_manifest(raw[:length])


def test_a_newer_manifest_asks_for_an_upgrade() -> None:
    """An intact manifest of a newer version is told apart from a damaged one and says what to do."""
    with pytest.raises(NewerManifest, match="upgrade mend"):
        decode_manifest(encode_manifest(one_with_everything(version=MANIFEST_VERSION + 1)))
