"""Token shards: a corpus packed once per machine into flat arrays on disk, with an index written last.

Several ranks may ask at once: one packs under a file lock, the others wait and find it ready. A folder appears under
its final name by one rename, so a killed packer leaves nothing that could be taken for shards.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from mend_trainer.data.corpus import Document, find_documents, fingerprint
from mend_trainer.data.vocabulary import ByteVocabulary, Tokens, Vocabulary, train_vocabulary

TRAIN: Final = "train"
HELD_OUT: Final = "held-out"
BYTES: Final = "bytes"

_INDEX: Final = "index.json"
_FORMAT: Final = 1
_HELD_OUT_ONE_IN: Final = 32  # documents; which ones depends on their names alone


class DamagedShards(RuntimeError):
    """The packed tokens on this machine are not what their index says."""


class _Shard(msgspec.Struct, frozen=True, kw_only=True):
    file: str
    tokens: int
    digest: str


class _Index(msgspec.Struct, frozen=True, kw_only=True):
    """What was packed; `digest` covers every token and the vocabulary, not where or when it was packed."""

    format: int
    vocabulary: str
    vocabulary_size: int
    dtype: str
    splits: dict[str, tuple[_Shard, ...]]
    digest: str


@dataclass(frozen=True, slots=True)
class TokenSplit:
    """One split of a packed corpus, memory-mapped: pages that are not read cost nothing, ranks of a node share them."""

    name: str
    digest: str
    parts: tuple[NDArray[Any], ...]
    starts: tuple[int, ...]  # of each part, and the end of the last

    @property
    def tokens(self) -> int:
        """Length in tokens."""
        return self.starts[-1]

    def read(self, start: int, count: int) -> Tokens:
        """`count` tokens from `start`, across shard boundaries."""
        out = np.empty(count, dtype=np.int64)
        done = 0
        part = int(np.searchsorted(self.starts, start, side="right")) - 1
        while done < count:
            piece = self.parts[part][start + done - self.starts[part] :][: count - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
            part += 1
        return out


@dataclass(frozen=True, slots=True)
class PackedCorpus:
    """The splits of a corpus and how many different tokens they hold."""

    folder: Path
    vocabulary_size: int
    digest: str
    splits: dict[str, TokenSplit]

    @property
    def train(self) -> TokenSplit:
        """What is trained on."""
        return self.splits[TRAIN]

    @property
    def held_out(self) -> TokenSplit:
        """Documents that are never trained on."""
        return self.splits[HELD_OUT]


def pack(
    source: str, cache: Path, *, vocabulary: str = BYTES, vocabulary_size: int = 0, shard_tokens: int = 1 << 24
) -> PackedCorpus:
    """The tokens of `source` (see `find_documents`), packed below `cache` now unless they already were.

    `vocabulary` is "bytes" or "bpe", the latter trained to `vocabulary_size` tokens on the text itself.
    """
    documents = find_documents(source)
    wanted = f"{_FORMAT}-{vocabulary}-{vocabulary_size}-{shard_tokens}-{fingerprint(documents)}"
    folder = cache / f"tokens-{xxhash.xxh3_64_hexdigest(wanted.encode())}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if not folder.exists():
                _pack_into(folder, documents, vocabulary, vocabulary_size, shard_tokens)
    return open_shards(folder)


def open_shards(folder: Path) -> PackedCorpus:
    """Map the shards of a packed folder; raises `DamagedShards` if a file is not as long as the index says."""
    try:
        index = msgspec.json.decode((folder / _INDEX).read_bytes(), type=_Index)
    except (OSError, msgspec.MsgspecError) as error:
        raise DamagedShards(f"{folder / _INDEX}: {error}; remove {folder} to have it packed again") from error
    dtype = np.dtype(index.dtype)
    splits = {}
    for name, shards in index.splits.items():
        starts = np.cumsum([0, *(shard.tokens for shard in shards)])
        parts = tuple(_map(folder / shard.file, shard.tokens, dtype) for shard in shards)
        splits[name] = TokenSplit(name, index.digest, parts, tuple(int(start) for start in starts))
    return PackedCorpus(folder, index.vocabulary_size, index.digest, splits)


def _map(path: Path, tokens: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    held = path.stat().st_size if path.exists() else 0
    if held != tokens * dtype.itemsize:
        raise DamagedShards(
            f"{path}: {held} bytes, the index says {tokens * dtype.itemsize}; "
            f"remove {path.parent} to have it packed again"
        )
    return np.memmap(path, dtype=dtype, mode="r", shape=(tokens,))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone on this machine (released by the kernel when the holder dies)."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _pack_into(folder: Path, documents: tuple[Document, ...], vocabulary: str, size: int, shard_tokens: int) -> None:
    for left_behind in folder.parent.glob(f"{folder.name}.partial-*"):
        shutil.rmtree(left_behind)  # its packer died: we hold the lock
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        _write(partial, documents, vocabulary, size, shard_tokens)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk must not stay full because of us
        raise


def _write(folder: Path, documents: tuple[Document, ...], name: str, size: int, shard_tokens: int) -> None:
    splits = _split(documents)
    vocabulary = _vocabulary(name, size, splits[TRAIN])
    vocabulary.save(folder)
    dtype = np.dtype(np.uint16 if vocabulary.size <= 1 << 16 else np.uint32)
    written = {
        split: tuple(_write_split(folder, split, _tokens(vocabulary, chosen, split), dtype, shard_tokens))
        for split, chosen in splits.items()
    }
    everything = xxhash.xxh3_128(f"{_FORMAT} {name} {vocabulary.size} {dtype.name}".encode())
    for split, shards in written.items():
        for shard in shards:
            everything.update(f"{split} {shard.tokens} {shard.digest}".encode())
    index = _Index(
        format=_FORMAT,
        vocabulary=name,
        vocabulary_size=vocabulary.size,
        dtype=dtype.name,
        splits=written,
        digest=everything.hexdigest(),
    )
    _durable(folder / _INDEX, msgspec.json.format(msgspec.json.encode(index)))


def _split(documents: tuple[Document, ...]) -> dict[str, tuple[Document, ...]]:
    """Whole documents are held out, so that no evaluation ever sees the other half of a file that was trained on.

    At least one is, unless there is only one.
    """
    drawn = {each: xxhash.xxh3_64_intdigest(each.name.encode()) for each in documents}
    first = min(documents, key=drawn.__getitem__)
    held_out = {each for each in documents if drawn[each] % _HELD_OUT_ONE_IN == 0 or each is first}
    if len(held_out) == len(documents):
        held_out = {first} if len(documents) > 1 else set()
    return {
        TRAIN: tuple(each for each in documents if each not in held_out),
        HELD_OUT: tuple(each for each in documents if each in held_out),
    }


def _vocabulary(name: str, size: int, documents: Iterable[Document]) -> Vocabulary:
    if name == BYTES:
        return ByteVocabulary()
    return train_vocabulary((document.read() for document in documents), size)


def _tokens(vocabulary: Vocabulary, documents: tuple[Document, ...], split: str) -> Iterator[Tokens]:
    shown = Console(stderr=True)
    for document in track(documents, f"packing {split} text", console=shown, disable=not shown.is_terminal):
        yield vocabulary.encode(document.read())


def _write_split(
    folder: Path, split: str, texts: Iterator[Tokens], dtype: np.dtype[Any], shard_tokens: int
) -> Iterator[_Shard]:
    held: list[Tokens] = []
    count = number = 0
    for text in texts:
        held.append(text)
        count += len(text)
        if count >= shard_tokens:
            yield _write_shard(folder / f"{split}-{number:05d}.bin", held, dtype)
            held, count, number = [], 0, number + 1
    if held:
        yield _write_shard(folder / f"{split}-{number:05d}.bin", held, dtype)


def _write_shard(path: Path, texts: list[Tokens], dtype: np.dtype[Any]) -> _Shard:
    raw = np.concatenate(texts).astype(dtype).tobytes()
    _durable(path, raw)
    return _Shard(file=path.name, tokens=len(raw) // dtype.itemsize, digest=xxhash.xxh3_128_hexdigest(raw))


def _durable(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
