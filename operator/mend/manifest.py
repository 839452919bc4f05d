"""The manifest of a checkpoint: what was saved, by whom, where each tensor's bytes lie and what their digests are.

It is written last, by conditional PUT; a checkpoint exists once its manifest does. mend restores from the manifest
alone: tensors are read as raw byte ranges, so that nothing from storage is ever unpickled. DCP's own `.metadata` is
written beside it for other tools.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
import xxhash

from mend.protocol import Ancestor, Message

MANIFEST_VERSION: Final = 1
DIGEST_ALGORITHM: Final = "xxh3-128"
_SEAL: Final = b'{"digest":"%s",'
_NO_DIGEST: Final = b"0" * 32


class StoredObject(Message, frozen=True, kw_only=True):
    """One object of the checkpoint; `key` is relative to the checkpoint's own prefix."""

    key: str
    bytes: int
    etag: str = ""


class Chunk(Message, frozen=True, kw_only=True):
    """One contiguous block of one tensor: where it lies in the tensor and where its raw bytes lie in an object."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    key: str
    start_byte: int  # first raw byte of the tensor's data inside the object
    length_bytes: int
    digest: str  # of the raw bytes, taken at staging


class TensorEntry(Message, frozen=True, kw_only=True):
    """A tensor of the state: its dtype ("float32", "bfloat16", ...), global shape, and the chunks that cover it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class Manifest(Message, frozen=True, kw_only=True, omit_defaults=False):
    """Everything needed to restore, and to know whether one may. Written in full: an omitted version says nothing."""

    version: int = MANIFEST_VERSION
    run: str  # "namespace/name"
    run_uid: str
    step: int  # last completed step
    attempt: int
    lineage: tuple[Ancestor, ...]  # ancestors, oldest first; empty for a run that never restored
    world_size: int
    tokens: int
    created_unix_seconds: float
    objects: tuple[StoredObject, ...]
    tensors: dict[str, TensorEntry]
    values: dict[str, Any] = {}  # the plain (JSON) part of the state: loader position, counters, scheduler
    config_digest: str = ""
    digest_algorithm: str = DIGEST_ALGORITHM


class UnreadableManifest(ValueError):
    """The bytes are no manifest of a version that this mend reads."""


class NewerManifest(UnreadableManifest):
    """The manifest is intact, and made by a newer mend than this one."""


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as JSON whose first field is the digest of everything after it."""
    rest = msgspec.json.encode(manifest)[1:]
    return _SEAL % xxhash.xxh3_128_hexdigest(rest).encode() + rest


def decode_manifest(raw: bytes) -> Manifest:
    """Parse a manifest; raises `UnreadableManifest` with the reason, also when a single bit of it has changed."""
    rest = raw[len(_SEAL % _NO_DIGEST) :]
    if raw != _SEAL % xxhash.xxh3_128_hexdigest(rest).encode() + rest:
        raise UnreadableManifest("its bytes do not have the digest that it begins with: damaged, or no manifest")
    try:
        version = msgspec.json.decode(raw, type=_Versioned).version
        if version > MANIFEST_VERSION:
            raise NewerManifest(
                f"version {version} is newer than {MANIFEST_VERSION}, the newest this mend reads: upgrade mend"
            )
        return msgspec.json.decode(raw, type=Manifest)
    except msgspec.MsgspecError as error:
        raise UnreadableManifest(str(error)) from error


class _Versioned(Message, frozen=True, kw_only=True):
    version: int
