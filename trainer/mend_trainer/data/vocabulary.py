"""How text becomes tokens: the 256 bytes as they are, or a byte-pair vocabulary trained on the text itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]

_END: Final = "<|end|>"
_VOCABULARY_FILE: Final = "tokenizer.json"
_BYTES: Final = 256


class Vocabulary(Protocol):
    """Turns the bytes of one document into token numbers below `size`; the last one marks the document's end."""

    @property
    def size(self) -> int:
        """Number of different tokens."""
        ...

    def encode(self, text: bytes) -> Tokens:
        """The document's tokens with the end mark after them."""
        ...

    def save(self, folder: Path) -> None:
        """Keep what is needed to turn tokens back into text beside the shards."""
        ...


@dataclass(frozen=True, slots=True)
class ByteVocabulary:
    """Every byte is a token, 256 ends a document: nothing to train and nothing to lose."""

    size: int = 257

    def encode(self, text: bytes) -> Tokens:
        """The bytes, and 256."""
        return np.append(np.frombuffer(text, dtype=np.uint8).astype(np.int64), self.size - 1)

    def save(self, folder: Path) -> None:
        """Bytes need no file."""


@dataclass(frozen=True, slots=True)
class TrainedVocabulary:
    """A byte-level byte-pair encoding of the `tokenizers` library."""

    tokenizer: Any

    @property
    def size(self) -> int:
        """Number of different tokens, the end mark among them."""
        return int(self.tokenizer.get_vocab_size())

    def encode(self, text: bytes) -> Tokens:
        """The merged pieces, and the end mark. Bytes that are not UTF-8 become U+FFFD."""
        pieces = self.tokenizer.encode(text.decode("utf-8", errors="replace")).ids
        return np.array([*pieces, self.tokenizer.token_to_id(_END)], dtype=np.int64)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`."""
        self.tokenizer.save(str(folder / _VOCABULARY_FILE))


def train_vocabulary(texts: Iterable[bytes], size: int) -> TrainedVocabulary:
    """Learn `size` pieces from the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # heavy, and bytes need none of it

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.decode("utf-8", errors="replace") for text in texts), trainer)
    return TrainedVocabulary(tokenizer)


def tokenizer_files(folder: Path, longest: int) -> tuple[dict[str, bytes], int]:
    """The vocabulary of a packed corpus as files that `transformers` reads, and the number of its end mark."""
    kept = folder / _VOCABULARY_FILE
    raw = kept.read_bytes() if kept.exists() else msgspec.json.encode(_bytes_as_tokenizer())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _END,
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
    }
    files = {_VOCABULARY_FILE: raw, "tokenizer_config.json": msgspec.json.format(msgspec.json.encode(settings))}
    return files, next(each.id for each in msgspec.json.decode(raw, type=_Added).added_tokens if each.content == _END)


class _AddedToken(msgspec.Struct, frozen=True):
    id: int
    content: str


class _Added(msgspec.Struct, frozen=True):
    """The little that is looked at of a `tokenizer.json`."""

    added_tokens: tuple[_AddedToken, ...]


def _bytes_as_tokenizer() -> dict[str, Any]:
    """The bytes as a byte-pair vocabulary without a single pair, in the format of the `tokenizers` library."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    end = {"id": _BYTES, "content": _END, "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**end, **flags}],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": _byte_names(), "merges": []},
    }


def _byte_names() -> dict[str, int]:
    """The characters by which byte-level vocabularies write bytes: those that can be seen as they are, others above."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (byte for byte in range(_BYTES) if byte not in seen)
    names = {byte: chr(byte) for byte in seen} | {byte: chr(_BYTES + nth) for nth, byte in enumerate(others)}
    return {names[byte]: byte for byte in range(_BYTES)}
