"""Checkpoints as the saver writes them, made of a few bytes without torch."""

from __future__ import annotations

from typing import Any

import xxhash

from manifests import a_manifest
from mend.keys import DCP_METADATA_NAME, MANIFEST_NAME, checkpoint_key
from mend.manifest import Chunk, StoredObject, TensorEntry, encode_manifest
from mend.store import Store

HEAD, TAIL = b"PK\x03\x04 a record begins" * 8, b"and ends PK\x05\x06" * 4
MODEL, OPTIMIZER = "model.weight", "optimizer.state.weight.exp_avg"


def save(
    store: Store,
    step: int,
    attempt: int = 1,
    save_id: str = "a",
    *,
    ranks: int = 2,
    model: bytes = b"",
    key: bytes | None = None,
    framed: bool = True,
    committed: bool = True,
    **changes: Any,
) -> str:
    """A checkpoint of one object per rank, each with a chunk of the model and one of the optimizer; its folder.

    The model's bytes follow from the step, unless they are given: 4 x `ranks` bfloat16 numbers.
    """
    folder = checkpoint_key(step, attempt, save_id)
    model = model or xxhash.xxh3_128_digest(b"%d" % step) * ranks
    objects: list[StoredObject] = []
    chunks: dict[str, list[Chunk]] = {MODEL: [], OPTIMIZER: []}
    for rank in range(ranks):
        name, pieces, position = f"__{rank}_0.distcp", [], 0
        for tensor in (MODEL, OPTIMIZER):
            raw = model[rank * 8 : rank * 8 + 8] if tensor == MODEL else b"%08d" % (100 * step + rank)
            pieces += [HEAD, raw, TAIL]
            chunks[tensor].append(
                Chunk(
                    offsets=(4 * rank,),
                    sizes=(4,),
                    key=name,
                    start_byte=position + len(HEAD),
                    length_bytes=8,
                    digest=xxhash.xxh3_128_hexdigest(raw),
                )
            )
            position += len(HEAD) + 8 + len(TAIL)
        etag = store.put(f"{folder}/{name}", pieces)
        frame = xxhash.xxh3_128_hexdigest((HEAD + TAIL) * 2) if framed else ""
        objects.append(StoredObject(key=name, bytes=position, etag=etag, frame_digest=frame))
    store.put(f"{folder}/{DCP_METADATA_NAME}", b"a pickle for others")
    fields: dict[str, Any] = {
        "step": step,
        "attempt": attempt,
        "save_id": save_id,
        "world_size": ranks,
        "tokens": 10 * step,
        "created_unix_seconds": 1000.0 + step,
        "objects": tuple(objects),
        "tensors": {
            name: TensorEntry(dtype="bfloat16", shape=(4 * ranks,), chunks=tuple(each)) for name, each in chunks.items()
        },
    }
    if committed:
        store.put(f"{folder}/{MANIFEST_NAME}", encode_manifest(a_manifest(**(fields | changes)), key))
    return folder
