"""Loads this rank's part of a checkpoint into its tensors: ranged reads of raw bytes, digests checked on the way."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import torch
import xxhash
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.tensor import DTensor

from mend.manifest import Chunk, Manifest
from mend.store import Changed, NotFound
from mend.store.parallel import each
from mend_trainer.checkpoint.copying import is_plain_memory
from mend_trainer.checkpoint.dcp import Corrupt, check, metadata_of
from mend_trainer.checkpoint.layout import torch_dtype
from mend_trainer.checkpoint.writer import digest_of

_RUN_BYTES: Final = 32 << 20  # small chunks that lie close together are fetched by one request
_GAP_BYTES: Final = 64 << 10
_PIECE_BYTES: Final = 512 << 10  # fits into the cache of one core
_WORKERS: Final = 4

_log = logging.getLogger(__name__)


class Part(NamedTuple):
    """Which part of a chunk goes where."""

    offsets: Sequence[int]  # in the chunk
    sizes: Sequence[int]
    into: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A chunk to fetch, and what to do with it."""

    name: str
    chunk: Chunk
    dtype: torch.dtype
    parts: tuple[Part, ...]

    @property
    def plain_memory(self) -> torch.Tensor | None:
        """The tensor whose bytes are to be those of the chunk, if there is one such."""
        part = self.parts[0]
        is_whole = len(self.parts) == 1 and tuple(part.sizes) == self.chunk.sizes
        return part.into if is_whole and is_plain_memory(part.into) else None


class Readable(Protocol):
    """Objects by key: a store, or the memory of workers. May raise a `mend.store.StoreError`."""

    def get_into(self, key: str, into: memoryview, start: int = 0, if_match: str = "") -> None:
        """Fill `into` with the object's bytes from `start` on; fewer of them is `NotFound`."""
        ...


View = Callable[[str, int, int], memoryview | None]


def _no_view(key: str, start: int, length: int) -> None:
    return None


def load(
    source: Readable,
    folder: str,
    manifest: Manifest,
    tensors: Mapping[str, torch.Tensor],
    mark: Callable[[], None],
    view: View = _no_view,
) -> None:
    """Fill the tensors (or DTensors) of those names, in place and at any world size; `mark` is called on the way.

    `view` shows bytes that lie in this worker's memory, by key, start and length: they are copied once, straight to
    their place, and proven on the way; so a tensor may hold what is corrupt when `Corrupt` is raised for it.

    Raises `Corrupt` if what is stored is not what the manifest says, `StoreError` if it cannot be read just now.
    """
    wanted = _wanted(manifest, tensors)
    etags = {stored.key: stored.etag for stored in manifest.objects}

    def fetch(run: Sequence[Wanted]) -> None:
        views = [view(f"{folder}/{one.chunk.key}", one.chunk.start_byte, one.chunk.length_bytes) for one in run]
        seen = [(one, raw) for one, raw in zip(run, views, strict=True) if raw is not None]
        for one, raw in seen:
            _prove_and_place(source, f"{folder}/{one.chunk.key}", one, raw)
        if not seen:
            read(run)
        mark()

    def read(run: Sequence[Wanted]) -> None:
        key, start = run[0].chunk.key, run[0].chunk.start_byte
        buffer = bytearray(run[-1].chunk.start_byte + run[-1].chunk.length_bytes - start)
        _read(source, f"{folder}/{key}", buffer, start, etags.get(key, ""))
        for one in run:
            offset = one.chunk.start_byte - start
            raw = memoryview(buffer)[offset : offset + one.chunk.length_bytes]
            _prove(source, f"{folder}/{key}", one, raw)
            _place(one, raw)

    each(fetch, runs(wanted), _WORKERS)


def runs(wanted: Sequence[Wanted]) -> list[list[Wanted]]:
    """The chunks in groups that one read each can fetch: neighbours in one object, with little between them."""
    grouped: list[list[Wanted]] = []
    end = 0
    for one in sorted(wanted, key=lambda one: (one.chunk.key, one.chunk.start_byte)):
        last = grouped[-1] if grouped else None
        stop = one.chunk.start_byte + one.chunk.length_bytes
        near = last is not None and last[0].chunk.key == one.chunk.key and 0 <= one.chunk.start_byte - end <= _GAP_BYTES
        if last is not None and near and stop - last[0].chunk.start_byte <= _RUN_BYTES:
            last.append(one)
        else:
            grouped.append([one])
        end = stop
    return grouped


def _wanted(manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> list[Wanted]:
    check(manifest)
    found: list[Wanted] = []
    resharded: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        entry = manifest.tensors.get(name)
        # What nobody has split needs no planner, which would take as long for each tensor as a copy of 200 KB.
        if entry is None or len(entry.chunks) > 1 or isinstance(tensor, DTensor) or tensor.shape != entry.shape:
            resharded[name] = tensor
        elif entry.chunks and entry.chunks[0].length_bytes:
            parts = (Part(entry.chunks[0].offsets, entry.chunks[0].sizes, tensor.detach()),)
            found.append(Wanted(name=name, chunk=entry.chunks[0], dtype=torch_dtype(entry.dtype), parts=parts))
    return found + (_planned(manifest, resharded) if resharded else [])


@torch.no_grad()
def _planned(manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> list[Wanted]:
    """As DCP would have it for tensors that lie in several chunks, or of which this rank has a part."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False, allow_partial_load=True)
    planner.set_up_planner(dict(tensors), metadata_of(manifest))
    chunks = {(name, chunk.offsets): chunk for name in tensors for chunk in _chunks_of(manifest, name)}
    parts: dict[tuple[str, tuple[int, ...]], list[Part]] = {}
    for item in planner.create_local_plan().items:
        index = item.storage_index
        part = Part(item.storage_offsets, item.lengths, planner.resolve_tensor(item).detach())
        parts.setdefault((index.fqn, tuple(index.offset or ())), []).append(part)
    return [
        Wanted(
            name=place[0],
            chunk=chunks[place],
            dtype=torch_dtype(manifest.tensors[place[0]].dtype),
            parts=tuple(found),
        )
        for place, found in parts.items()
        if chunks[place].length_bytes
    ]


def _chunks_of(manifest: Manifest, name: str) -> Sequence[Chunk]:
    return manifest.tensors[name].chunks if name in manifest.tensors else ()


def _read(source: Readable, key: str, buffer: bytearray | memoryview, start: int, etag: str) -> None:
    try:
        try:
            source.get_into(key, memoryview(buffer), start, etag)
        except Changed as changed:
            # A prefix that was copied has new ETags and the old bytes; the digests will tell it from a replacement.
            _log.warning("%s; its digests decide", changed)
            source.get_into(key, memoryview(buffer), start)
    except NotFound as missing:
        raise Corrupt(str(missing)) from missing


def _prove(source: Readable, key: str, one: Wanted, raw: memoryview) -> None:
    """Raise `Corrupt` unless the bytes have their digest; read once more first, for they may be flipped on the way."""
    if digest_of(raw) == one.chunk.digest:
        return
    _log.warning("%s: digest mismatch at byte %d; read once more", key, one.chunk.start_byte)
    _read(source, key, raw, one.chunk.start_byte, "")
    if digest_of(raw) != one.chunk.digest:
        raise Corrupt(_not_what_it_was(one))


def _not_what_it_was(one: Wanted) -> str:
    return f"{one.name} at {one.chunk.offsets}: the bytes in {one.chunk.key} do not have their digest"


def _prove_and_place(source: Readable, key: str, one: Wanted, raw: memoryview) -> None:
    """Copy what is in memory piece by piece, each digested while it is in the cache."""
    target = one.plain_memory
    if target is None:
        if digest_of(raw) != one.chunk.digest:
            raise Corrupt(_not_what_it_was(one))
        _place(one, raw)
        return
    digest = xxhash.xxh3_128()
    into = target.reshape(-1).view(torch.uint8).numpy().data
    for done in range(0, len(into), _PIECE_BYTES):
        # Not from `raw`: where its pages are small, to map each of them takes half as long as to copy it.
        piece = into[done : done + _PIECE_BYTES]
        _read(source, key, piece, one.chunk.start_byte + done, "")
        digest.update(piece)
    if digest.hexdigest() != one.chunk.digest:
        raise Corrupt(_not_what_it_was(one))


def _place(one: Wanted, raw: memoryview) -> None:
    saved = torch.frombuffer(raw, dtype=one.dtype, count=math.prod(one.chunk.sizes)).view(one.chunk.sizes)
    for part in one.parts:
        values = saved
        for dimension, (start, length) in enumerate(zip(part.offsets, part.sizes, strict=True)):
            values = values.narrow(dimension, start, length)
        part.into.copy_(values)
