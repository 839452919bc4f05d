"""Which rank writes which block of which tensor: pure, and the same answer on every rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Final

import torch
from torch.distributed.tensor import DTensor

from mend.protocol import Message

_ALIGNMENT: Final = 64
PER_RANK: Final = "ranks"  # state[PER_RANK][str(rank)] belongs to one rank alone
Leaf = tuple[tuple[str, ...], torch.Tensor]


class Block(Message, frozen=True, kw_only=True):
    """A contiguous block of a tensor, as one rank holds it."""

    name: str  # the path joined by dots: the name that torch.distributed.checkpoint gives it
    path: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]  # of the whole tensor
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Length of its raw data."""
        return math.prod(self.sizes) * torch_dtype(self.dtype).itemsize


def starts(blocks: Sequence[Block]) -> list[int]:
    """Where each block begins when they lie one after the other in memory."""
    lengths = (-(-block.bytes // _ALIGNMENT) * _ALIGNMENT for block in blocks)
    return list(accumulate(lengths, initial=0))[: len(blocks)]


def leaves(state: Mapping[str, Any]) -> list[Leaf]:
    """Path and tensor of every leaf; raises TypeError for a leaf that is no dense tensor, naming it."""
    found: list[Leaf] = []
    _collect(state, (), found)
    return found


def _collect(state: Mapping[str, Any], above: tuple[str, ...], found: list[Leaf]) -> None:
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized:
            found.append(((*above, str(key)), value))
        elif isinstance(value, Mapping):
            _collect(value, (*above, str(key)), found)
        else:
            kind = f"a {value.layout} tensor" if isinstance(value, torch.Tensor) else type(value).__name__
            raise TypeError(f"state[{key!r}] is {kind}: expected a dense tensor or a dict; plain values go to `values`")


def signature(state: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the layout depends on; equal signatures have equal layouts. Cheap: it is taken at every save."""
    return tuple(
        (path, leaf.dtype, leaf.shape, leaf.device)
        + ((leaf.device_mesh, leaf.placements) if isinstance(leaf, DTensor) else ())
        for path, leaf in leaves(state)
    )


def blocks_of(state: Mapping[str, Any]) -> list[Block]:
    """The blocks that this rank holds; empty shares of a tensor that is not itself empty are left out."""
    blocks: list[Block] = []
    for path, leaf in leaves(state):
        shape = tuple(leaf.shape)
        offsets, sizes = _place(leaf)
        if math.prod(sizes) or not math.prod(shape):
            blocks.append(
                Block(
                    name=".".join(path),
                    path=path,
                    dtype=str(leaf.dtype).removeprefix("torch."),
                    shape=shape,
                    offsets=offsets,
                    sizes=sizes,
                )
            )
    return blocks


def assign(held: Sequence[Sequence[Block]]) -> list[list[Block]]:
    """From what each rank holds, what each writes: every block once, by the holder with least to write so far.

    Raises ValueError if two ranks disagree on the type or shape of a tensor.
    """
    holders: dict[tuple[str, tuple[int, ...], tuple[int, ...]], tuple[Block, list[int]]] = {}
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for rank, blocks in enumerate(held):
        for block in blocks:
            kind = (block.dtype, block.shape)
            if kinds.setdefault(block.name, kind) != kind:
                raise ValueError(f"{block.name}: {kind} on rank {rank}, {kinds[block.name]} on another rank")
            holders.setdefault((block.name, block.offsets, block.sizes), (block, []))[1].append(rank)
    written: list[list[Block]] = [[] for _ in held]
    loads = [0] * len(held)
    # Largest first, so that the loads come out even; the order within an object follows from it and is the same always.
    for block, ranks in sorted(holders.values(), key=lambda entry: (-entry[0].bytes, entry[0].name, entry[0].offsets)):
        writer = min(ranks, key=lambda rank: (loads[rank], rank))
        loads[writer] += block.bytes
        written[writer].append(block)
    return written


@torch.no_grad()
def local_tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """This rank's part of every tensor, by name."""
    return {".".join(path): leaf.to_local() if isinstance(leaf, DTensor) else leaf for path, leaf in leaves(state)}


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of that name; raises ValueError for anything else."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype that this torch knows")
    return found


def _place(leaf: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if not isinstance(leaf, DTensor):
        return (0,) * leaf.dim(), tuple(leaf.shape)
    (chunk,) = leaf.__create_chunk_list__()  # type: ignore[no-untyped-call]
    return tuple(chunk.offsets), tuple(chunk.sizes)
