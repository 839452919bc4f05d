"""The loader: fixed-length sequences in a shuffled order, whose whole position is one number, the samples consumed.

Sample g of the run is sequence `permutation(epoch)[g mod n]` of epoch `g div n`; ranks take consecutive slices of
each global batch. The order depends on seed and data alone: no restart and no other world size repeats or skips one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mend_trainer.data.shards import TokenSplit
from mend_trainer.data.shuffle import Permutation
from mend_trainer.data.slices import slice_of
from mend_trainer.misfit import StateMisfit


class PositionMisfit(StateMisfit):
    """A saved position is one in other data, or in another order of them. Trying again cannot help."""


@dataclass(frozen=True, slots=True)
class Batch:
    """This rank's slice of one global batch: int64 tensors of shape (samples, sequence length)."""

    inputs: torch.Tensor
    targets: torch.Tensor  # the inputs, one token later

    def __len__(self) -> int:
        return len(self.inputs)


class Loader:
    """Endless batches; `state_dict` and `load_state_dict` make it resumable after the last batch taken."""

    def __init__(
        self,
        split: TokenSplit,
        *,
        sequence_length: int,
        global_batch: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accept: Collection[str] = (),
    ) -> None:
        """`accept` names what may differ from a saved position: "global_batch", for one that is changed on purpose."""
        self.sequences = (split.tokens - 1) // sequence_length  # the last token is only ever a target
        if self.sequences < 1:
            raise ValueError(
                f"split {split.name!r} holds {split.tokens} tokens, too few for one sequence of {sequence_length}: "
                "take more text or a shorter data.sequence_length"
            )
        if global_batch < world_size:
            raise ValueError(
                f"global_batch: {global_batch}, expected at least one sample for each of the {world_size} ranks"
            )
        self._split = split
        self._sequence_length = sequence_length
        self._global_batch = global_batch
        self._seed = seed
        self._accept = frozenset(accept)
        self._slice = slice_of(global_batch, rank, world_size)
        self._position = 0
        self._permutation = (0, Permutation(self.sequences, seed, 0))

    @property
    def position(self) -> int:
        """Samples that the whole run has consumed."""
        return self._position

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        rows = np.stack([self._sample(self._position + offset) for offset in self._slice])
        self._position += self._global_batch
        tokens = torch.from_numpy(rows)
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def sequence_of(self, sample: int) -> int:
        """Which sequence of the data the run's sample number `sample` is."""
        epoch, index = divmod(sample, self.sequences)
        if self._permutation[0] != epoch:
            self._permutation = (epoch, Permutation(self.sequences, self._seed, epoch))
        return self._permutation[1][index]

    def state_dict(self) -> dict[str, Any]:
        """The position and what it is a position in, as JSON values; the same on every rank."""
        epoch, index = divmod(self._position, self.sequences)
        return {
            "position": self._position,
            "epoch": epoch,
            "sample": index,
            "seed": self._seed,
            "sequence_length": self._sequence_length,
            "global_batch": self._global_batch,
            "split": self._split.name,
            "digest": self._split.digest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the last sample of `state`; raises `PositionMisfit` if it is of other data."""
        mine = self.state_dict()
        remedies = {
            "digest": "the text or the vocabulary changed; train on the same data or start a new run",
            "sequence_length": "set data.sequence_length back or start a new run",
            "seed": "set the seed back or start a new run",
            "split": "load the split that was saved",
            "global_batch": "it stays the same at every world size; set it back, or accept the change",
        }
        for field, remedy in remedies.items():
            if state.get(field) != mine[field] and field not in self._accept:
                raise PositionMisfit(
                    f"data position: the checkpoint has {field} {state.get(field)!r}, "
                    f"here it is {mine[field]!r}: {remedy}"
                )
        self._position = int(state["position"])

    def _sample(self, sample: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return self._split.read(self.sequence_of(sample) * self._sequence_length, self._sequence_length + 1)
