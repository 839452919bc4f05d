"""How a gang of any size shares a global batch: who takes which samples, and in how many pieces. Pure.

Slices differ by one sample at most, and every rank cuts its own into the same number of pieces: FSDP2's collectives
meet piece by piece. A rank with a sample less than the others may so have an empty piece, for which it computes nothing
that counts.
"""

from __future__ import annotations


def slice_of(global_batch: int, rank: int, world_size: int) -> range:
    """The samples of each global batch that this rank takes, counted from the batch's first."""
    return range(global_batch * rank // world_size, global_batch * (rank + 1) // world_size)


def pieces_of(global_batch: int, world_size: int, micro_batch: int) -> int:
    """Into how many pieces of at most `micro_batch` samples every rank cuts its slice."""
    largest = -(-global_batch // world_size)
    return -(-largest // micro_batch)
