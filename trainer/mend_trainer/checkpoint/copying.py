"""Copies tensors into memory that is ready for them, at the speed of memcpy."""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import torch

from mend.store.parallel import each

_BATCH_BYTES: Final = 16 << 20
_MOST_WORKERS: Final = 8

_log = logging.getLogger(__name__)
_Move = tuple[int, int, int]  # to which address, from which, how many bytes


class Room(NamedTuple):
    """Where one tensor's values go."""

    name: str
    typed: torch.Tensor
    address: int
    bytes: int


@torch.no_grad()
def copy_in(rooms: Sequence[Room], tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy the tensors of the rooms' names into them; back when every byte is there."""
    gpus: set[torch.device] = set()
    moves: list[_Move] = []
    for room in rooms:
        tensor = tensors[room.name]
        if tensor.shape != room.typed.shape:  # copy_ would broadcast
            raise ValueError(f"{room.name}: {tuple(tensor.shape)} where {tuple(room.typed.shape)} was planned")
        if is_plain_memory(tensor):
            moves.append((room.address, tensor.data_ptr(), room.bytes))
        else:
            gpus |= {tensor.device} if tensor.is_cuda else set()
            room.typed.copy_(tensor, non_blocking=tensor.is_cuda)
    # Not copy_: its OpenMP team meets at a barrier for every tensor, ten times slower on a busy machine.
    workers = min(_MOST_WORKERS, torch.get_num_threads())
    each(_copy, list(batches(moves)) if workers > 1 else [moves], workers)
    for gpu in gpus:  # a rank may have its layers on several
        torch.cuda.synchronize(gpu)


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


def address_of(memory: memoryview) -> int:
    """Where these bytes, at least one, lie."""
    return torch.frombuffer(memory, dtype=torch.uint8).data_ptr()


def pin(memory: memoryview) -> bool:
    """Let the GPU copy into this memory by itself; where CUDA refuses, copies go by way of its own buffers."""
    code = int(torch.cuda.cudart().cudaHostRegister(address_of(memory), memory.nbytes, 0))  # type: ignore[no-untyped-call]
    if code:
        _log.warning("CUDA cannot pin the arena (error %d): saves copy at about half the speed", code)
        _take_error()
    return not code


def unpin(memory: memoryview) -> None:
    """Before it is mapped no longer: what is mapped at its address next could not be pinned."""
    if int(torch.cuda.cudart().cudaHostUnregister(address_of(memory))):  # type: ignore[no-untyped-call]
        _take_error()


def _take_error() -> None:
    """CUDA keeps the last error for whoever asks next: the first kernel of the training would be blamed for it."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")


def _copy(moves: Sequence[_Move]) -> None:
    for target, source, length in moves:
        ctypes.memmove(target, source, length)  # without the GIL


def is_plain_memory(tensor: torch.Tensor) -> bool:
    """Whether its bytes, as they lie, are its values in order."""
    return tensor.is_cpu and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
