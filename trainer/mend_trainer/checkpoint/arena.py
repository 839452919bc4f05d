"""The copy of the state that a save works from: one flat buffer, allocated and touched once, reused by every save."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Final, NamedTuple

import torch

from mend.store.parallel import each
from mend_trainer.checkpoint.layout import Block, torch_dtype

_ALIGNMENT: Final = 64
_BATCH_BYTES: Final = 16 << 20
_MOST_WORKERS: Final = 8

_Move = tuple[int, int, int]  # to which address, from which, how many bytes


class _Room(NamedTuple):
    name: str
    typed: torch.Tensor
    address: int
    bytes: int


class Arena:
    """Room for the blocks that this rank writes, and for nothing else."""

    def __init__(self, blocks: Sequence[Block], *, pinned: bool) -> None:
        self.blocks = tuple(blocks)
        lengths = [block.bytes for block in blocks]
        ends = list(accumulate(-(-length // _ALIGNMENT) * _ALIGNMENT for length in lengths))
        # Zeroed at once: the page faults of first touch would cost ten times the copy itself.
        flat = torch.zeros(ends[-1] if ends else 0, dtype=torch.uint8, pin_memory=pinned)
        self._raw = [flat[start : start + length] for start, length in zip([0, *ends], lengths, strict=False)]
        self._rooms = [
            _Room(block.name, raw.view(torch_dtype(block.dtype)).view(block.sizes), raw.data_ptr(), block.bytes)
            for raw, block in zip(self._raw, blocks, strict=True)
        ]

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy this rank's tensors in; back when every byte is there."""
        on_gpu = False
        moves: list[_Move] = []
        for room in self._rooms:
            tensor = tensors[room.name]
            if tensor.shape != room.typed.shape:  # copy_ would broadcast
                raise ValueError(f"{room.name}: {tuple(tensor.shape)} where {tuple(room.typed.shape)} was planned")
            if _is_plain_memory(tensor):
                moves.append((room.address, tensor.data_ptr(), room.bytes))
            else:
                on_gpu |= tensor.is_cuda
                room.typed.copy_(tensor, non_blocking=True)
        # Not copy_: its OpenMP team meets at a barrier for every tensor, ten times slower on a busy machine.
        each(_copy, list(batches(moves)), min(_MOST_WORKERS, torch.get_num_threads()))
        if on_gpu:
            torch.cuda.synchronize()

    def raw(self, index: int) -> memoryview:
        """The bytes of the block at `index`."""
        return memoryview(self._raw[index].numpy().data)


def batches(moves: Iterable[_Move]) -> Iterator[list[_Move]]:
    """The same moves in runs of about equal length, large ones cut, small ones together."""
    run: list[_Move] = []
    room = _BATCH_BYTES
    for target, source, length in moves:
        done = 0
        while done < length:
            part = min(room, length - done)
            run.append((target + done, source + done, part))
            done += part
            room -= part
            if not room:
                yield run
                run, room = [], _BATCH_BYTES
    if run:
        yield run


def _copy(moves: Sequence[_Move]) -> None:
    for target, source, length in moves:
        ctypes.memmove(target, source, length)  # without the GIL


def _is_plain_memory(tensor: torch.Tensor) -> bool:
    """Whether its bytes, as they lie, are its values in order."""
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
