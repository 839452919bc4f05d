"""How text becomes tokens: the 256 bytes as they are, or a byte-pair vocabulary trained on the text itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]

_END: Final = "<|end|>"
_VOCABULARY_FILE: Final = "tokenizer.json"


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
