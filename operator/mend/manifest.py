"""The manifest of a checkpoint: what was saved, by whom, where each tensor's bytes lie and what their digests are.

It is written last, by conditional PUT; a checkpoint exists once its manifest does. mend restores from the manifest
alone: tensors are read as raw byte ranges, so that nothing from storage is ever unpickled. DCP's own `.metadata` is
written beside it for other tools.

With a key it is also signed: a digest tells damage, a signature tells whoever may write to the bucket from the run. Its
key is the run's own, made of the Secret and the run's name, so a manifest of another run proves nothing here.
"""

from __future__ import annotations

import hmac
from typing import Any, Final

import msgspec
import xxhash

from mend.keys import checkpoint_key
from mend.protocol import Message
from mend.states import Ancestor

MANIFEST_VERSION: Final = 1
DIGEST_ALGORITHM: Final = "xxh3-128"
_SEAL: Final = b'{"digest":"%s",'
_NO_DIGEST: Final = b"0" * 32
_SIGNED: Final = b'"signature":"%s",'
_NO_SIGNATURE: Final = b"0" * 64
LEAST_SECRET_BYTES: Final = 16


class StoredObject(Message, frozen=True, kw_only=True):
    """One object of the checkpoint; `key` is relative to the checkpoint's own prefix."""

    key: str
    bytes: int
    etag: str = ""
    frame_digest: str = ""  # of all its bytes that lie in no chunk, in their order; "": it was not taken


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
    save_id: str = ""  # with step and attempt the folder that it belongs in; "" in manifests of before it was told


class UnreadableManifest(ValueError):
    """The bytes are no manifest of a version that this mend reads."""


class NewerManifest(UnreadableManifest):
    """The manifest is intact, and made by a newer mend than this one."""


class Untrusted(UnreadableManifest):
    """The manifest is intact, and nothing shows that this run wrote it: passed over, but not marked as damaged."""


def signing_key(secret: bytes, run: str) -> bytes:
    """The key by which `run` (namespace/name) signs; raises ValueError for a secret that could be guessed."""
    if len(secret) < LEAST_SECRET_BYTES:
        raise ValueError(
            f"the signing key has {len(secret)} bytes; expected {LEAST_SECRET_BYTES} at least (openssl rand -hex 32)"
        )
    return hmac.digest(secret, b"mend: key of a run\n" + run.encode(), "sha256")


def encode_manifest(manifest: Manifest, key: bytes | None = None) -> bytes:
    """The manifest as JSON whose first field is the digest of everything after it, the second, with a key, a signature.

    What is signed has to name its save: else it could be moved to another one of the same step.
    """
    if key is not None and not manifest.save_id:
        raise ValueError("a manifest without save_id is not signed: it could be moved to another save of its step")
    rest = msgspec.json.encode(manifest)[1:]
    if key is not None:
        rest = _SIGNED % _signature(rest, key) + rest
    return _SEAL % xxhash.xxh3_128_hexdigest(rest).encode() + rest


def decode_manifest(raw: bytes, key: bytes | None = None) -> Manifest:
    """Parse a manifest; raises `UnreadableManifest` with the reason, also when a single bit of it has changed.

    With a key, `Untrusted` if it is not signed with it. That is asked before anything in it is believed, its version
    too. Where it lay is for the caller to compare: see `misplacement`.
    """
    rest = raw[len(_SEAL % _NO_DIGEST) :]
    if raw != _SEAL % xxhash.xxh3_128_hexdigest(rest).encode() + rest:
        raise UnreadableManifest("its bytes do not have the digest that it begins with: damaged, or no manifest")
    if key is not None:
        _check_signature(rest, key)
    try:
        version = msgspec.json.decode(raw, type=_Versioned).version
        if version > MANIFEST_VERSION:
            raise NewerManifest(
                f"version {version} is newer than {MANIFEST_VERSION}, the newest this mend reads: upgrade mend"
            )
        return msgspec.json.decode(raw, type=Manifest)
    except msgspec.MsgspecError as error:
        raise UnreadableManifest(str(error)) from error


def misplacement(manifest: Manifest, folder: str) -> str:
    """Why a manifest found in this save's folder (relative to the run's prefix) is not that save's; "" if it is."""
    belongs = checkpoint_key(manifest.step, manifest.attempt, manifest.save_id)
    if folder == belongs or (not manifest.save_id and folder.startswith(belongs)):
        return ""
    named = f", save {manifest.save_id}" if manifest.save_id else ""
    return f"its manifest is that of step {manifest.step} of attempt {manifest.attempt}{named}"


def _check_signature(rest: bytes, key: bytes) -> None:
    head = len(_SIGNED % _NO_SIGNATURE)
    if not rest.startswith(_SIGNED[: _SIGNED.index(b"%")]):
        raise Untrusted("it is not signed, and a signing key is set")
    if not hmac.compare_digest(rest[:head], _SIGNED % _signature(rest[head:], key)):
        raise Untrusted("its signature is not by this run's signing key")


def _signature(rest: bytes, key: bytes) -> bytes:
    return hmac.digest(key, b"mend: manifest\n" + rest, "sha256").hex().encode()


class _Versioned(Message, frozen=True, kw_only=True):
    version: int
