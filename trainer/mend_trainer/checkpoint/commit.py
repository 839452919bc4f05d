"""The end of a save: all shares are in, so the manifest may be written, by whoever sees them."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence

import msgspec

from mend.keys import DCP_METADATA_NAME, MANIFEST_NAME, announcement_key, parse_folder
from mend.manifest import Manifest, StoredObject, TensorEntry, encode_manifest
from mend.store import NotFound, Store, WrongAnswer
from mend_trainer.checkpoint.arena import Origin
from mend_trainer.checkpoint.dcp import stock_metadata
from mend_trainer.checkpoint.writer import Share, Written


def commit(store: Store, folder: str, origin: Origin, shares: Sequence[Share], key: bytes | None = None) -> Manifest:
    """Check that everything is there, then write `.metadata` for other tools and, last, the manifest.

    With a `key` it is signed. From the same shares everybody writes the same bytes, so it does no harm if two do.
    Raises ValueError if the shares do not cover every tensor, or the `StoreError` that stopped it.
    """
    written = [each for share in shares for each in share.written]
    manifest = Manifest(
        run=origin.run,
        run_uid=origin.run_uid,
        step=origin.step,
        attempt=origin.attempt,
        lineage=origin.lineage,
        world_size=len(shares),
        tokens=origin.tokens,
        created_unix_seconds=origin.created_unix_seconds,
        objects=_stored(store, folder, shares),
        tensors=entries_of(written),
        values=origin.values,
        config_digest=origin.config_digest,
        save_id=parse_folder(folder).save_id,
    )
    store.put(f"{folder}/{DCP_METADATA_NAME}", pickle.dumps(stock_metadata(manifest, written)))
    store.put(announcement_key(folder), b"")  # before the manifest: what is committed is announced
    store.put_if_absent(f"{folder}/{MANIFEST_NAME}", encode_manifest(manifest, key))
    return manifest


def _stored(store: Store, folder: str, shares: Sequence[Share]) -> tuple[StoredObject, ...]:
    """The objects with their ETags as the store lists them: an upload may have been told another one."""
    listed = {entry.key: entry for entry in store.list(f"{folder}/")}
    objects: list[StoredObject] = []
    for share in shares:
        if not share.key:
            continue
        found = listed.get(f"{folder}/{share.key}")
        if found is None:
            raise NotFound(f"{store.uri}/{folder}/{share.key}", "was uploaded, and the store does not list it")
        if found.bytes != share.bytes:
            where = f"{store.uri}/{folder}/{share.key}"
            raise WrongAnswer(where, f"has {found.bytes} bytes of the {share.bytes} that were uploaded")
        stored = StoredObject(key=share.key, bytes=share.bytes, etag=found.etag, frame_digest=share.frame_digest)
        objects.append(stored)
    return tuple(objects)


def entries_of(written: Sequence[Written]) -> dict[str, TensorEntry]:
    """The tensors that these blocks make up; raises ValueError for one that they do not cover."""
    entries: dict[str, TensorEntry] = {}
    for each in sorted(written, key=lambda each: (each.name, each.chunk.offsets)):
        entry = entries.get(each.name) or TensorEntry(dtype=each.dtype, shape=each.shape, chunks=())
        entries[each.name] = msgspec.structs.replace(entry, chunks=(*entry.chunks, each.chunk))
    for name, entry in entries.items():
        covered = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
        if covered != math.prod(entry.shape):
            raise ValueError(f"{name}: {covered} of {math.prod(entry.shape)} elements were written by any rank")
    return entries
