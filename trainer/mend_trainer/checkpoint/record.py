"""The frame that `torch.save` puts around a tensor's bytes, so that other tools can load what mend writes raw."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, cast

import torch
from torch.serialization import skip_data

from mend_trainer.checkpoint.layout import torch_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What comes before and after the raw little-endian bytes of a tensor in a record of `torch.save`."""

    head: bytes
    tail: bytes


@lru_cache(maxsize=4096)
def frame(dtype: str, sizes: tuple[int, ...]) -> Frame:
    """The frame for a contiguous tensor of that type and shape; its data is neither made nor written.

    The CRC in the frame is that of no data, as after `torch.serialization.set_crc32_options(False)`: torch does not
    look at it, and mend has a digest of its own.
    """
    sink = _Sink()
    with skip_data():
        torch.save(torch.empty(sizes, dtype=torch_dtype(dtype)), cast(IO[bytes], sink))
    return Frame(head=b"".join(sink.head), tail=b"".join(sink.tail))


class _Sink:
    """Takes what torch.save writes, and the gap that it leaves for the data by seeking."""

    def __init__(self) -> None:
        self.head: list[bytes] = []
        self.tail: list[bytes] = []
        self._part = self.head

    def write(self, data: bytes) -> int:
        self._part.append(bytes(data))
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> None:
        if whence != os.SEEK_CUR or self._part is self.tail:
            raise NotImplementedError("torch.save no longer leaves exactly one gap for the data")
        self._part = self.tail

    def flush(self) -> None:
        """Nothing is held back."""
