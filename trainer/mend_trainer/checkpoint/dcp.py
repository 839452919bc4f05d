"""The manifest in torch.distributed.checkpoint's terms: for its planner when loading, for other tools when saving."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mend.manifest import Manifest, TensorEntry
from mend_trainer.checkpoint.layout import torch_dtype
from mend_trainer.checkpoint.writer import Written


class Corrupt(Exception):
    """What is stored is not what was saved."""


def check(manifest: Manifest) -> None:
    """Raise `Corrupt` if the manifest contradicts itself."""
    for name, entry in manifest.tensors.items():
        _check(name, entry)


def metadata_of(manifest: Manifest) -> Metadata:
    """What DCP's load planner needs to know; raises `Corrupt` as `check` does."""
    check(manifest)
    return Metadata(state_dict_metadata={name: _described(entry) for name, entry in manifest.tensors.items()})


def stock_metadata(manifest: Manifest, written: Sequence[Written]) -> Metadata:
    """The `.metadata` from which DCP's own FileSystemReader loads; mend itself never reads it."""
    metadata = metadata_of(manifest)
    metadata.planner_data = {each.name: each.path for each in written}
    metadata.storage_data = {
        MetadataIndex(each.name, each.chunk.offsets): _StorageInfo(each.chunk.key, each.record_start, each.record_bytes)
        for each in written
    }
    return metadata


def _check(name: str, entry: TensorEntry) -> None:
    try:
        dtype = torch_dtype(entry.dtype)
    except ValueError as error:
        raise Corrupt(f"{name}: {error}") from error
    for chunk in entry.chunks:
        inside = len(chunk.offsets) == len(chunk.sizes) == len(entry.shape) and all(
            offset >= 0 and size >= 0 and offset + size <= whole
            for offset, size, whole in zip(chunk.offsets, chunk.sizes, entry.shape, strict=True)
        )
        if not inside or chunk.length_bytes != math.prod(chunk.sizes) * dtype.itemsize:
            raise Corrupt(f"{name}: the chunk at {chunk.offsets} does not lie in a {entry.dtype} of {entry.shape}")
    if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.shape):
        raise Corrupt(f"{name}: its chunks do not cover it")


def _described(entry: TensorEntry) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=torch_dtype(entry.dtype)),
        size=torch.Size(entry.shape),
        chunks=[
            ChunkStorageMetadata(offsets=torch.Size(chunk.offsets), sizes=torch.Size(chunk.sizes))
            for chunk in entry.chunks
        ],
    )
