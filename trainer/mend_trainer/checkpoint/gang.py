"""What the ranks tell each other about checkpoints: bytes and numbers over a gloo group of its own, no pickles."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist

_AT_ONCE_BYTES: Final = 64 << 20
_MARK_SECONDS: Final = 0.05


class Gang:
    """The ranks that save and restore together. Without a group: one rank alone.

    A lost peer shows as RuntimeError, after the group's timeout at the latest.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank = dist.get_rank(group) if group else 0
        self.size = dist.get_world_size(group) if group else 1

    def gather(self, message: bytes) -> list[bytes]:
        """Every rank's message, on every rank, in the order of ranks."""
        if self._group is None:
            return [message]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(message)]), group=self._group)
        longest = max(int(length) for length in lengths)
        padded = torch.frombuffer(bytearray(message.ljust(max(longest, 1), b"\0")), dtype=torch.uint8)
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded, group=self._group)
        return [each.numpy()[: int(length)].tobytes() for each, length in zip(gathered, lengths, strict=True)]

    def hear_first(self, message: bytes) -> bytes:
        """Rank 0's message, on every rank."""
        return self.hear(message, 0)

    def hear(self, message: bytes, speaker: int) -> bytes:
        """The message of that rank, on every rank; what the others give is not looked at."""
        if self._group is None:
            return message
        length = torch.tensor([len(message)])
        dist.broadcast(length, group=self._group, group_src=speaker)
        said = bytearray(message if self.rank == speaker else int(length)) or bytearray(1)
        dist.broadcast(torch.frombuffer(said, dtype=torch.uint8), group=self._group, group_src=speaker)
        return bytes(said[: int(length)])

    def send_from(self, sender: int, tensors: Sequence[torch.Tensor], *, keep: bool = False) -> None:
        """That rank's tensors into everybody's, in place, some at a time; who keeps its own only helps to pass on."""
        for some in _bundles(tensors) if self._group is not None else ():
            flat = torch.cat([each.detach().reshape(-1) for each in some])
            dist.broadcast(flat, group=self._group, group_src=sender)
            if keep or self.rank == sender:
                continue
            for each, part in zip(some, torch.split(flat, [each.numel() for each in some]), strict=True):
                each.detach().copy_(part.view(each.shape))

    def maximum(self, numbers: Sequence[int], mark: Callable[[], None] | None = None) -> list[int]:
        """The largest of all ranks' numbers, place by place; `mark` is called while others are waited for."""
        if self._group is None:
            return list(numbers)
        largest = torch.tensor(numbers, dtype=torch.int64)
        work = dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        while mark is not None and not work.is_completed():
            mark()
            time.sleep(_MARK_SECONDS)
        work.wait()
        found: list[int] = largest.tolist()
        return found


def _bundles(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Runs of tensors of one type and device that together are no larger than what is sent at once."""
    some: list[torch.Tensor] = []
    for each in tensors:
        fits = sum(other.nbytes for other in some) + each.nbytes <= _AT_ONCE_BYTES
        if some and not (fits and (each.dtype, each.device) == (some[0].dtype, some[0].device)):
            yield some
            some = []
        some.append(each)
    if some:
        yield some


def make_gang(process_group: dist.ProcessGroup | None, description: str, timeout_seconds: float) -> Gang:
    """A gang over a new gloo group of the same ranks; a collective. Its description shows in the flight recorder."""
    if not dist.is_initialized():
        return Gang(None)
    group = dist.new_group(
        ranks=dist.get_process_group_ranks(process_group) if process_group else None,
        backend="gloo",
        timeout=timedelta(seconds=timeout_seconds),
        use_local_synchronization=process_group is not None,
        group_desc=description,
    )
    assert isinstance(group, dist.ProcessGroup)
    return Gang(group)
