"""Joining the process group, and spreading a model over its ranks: DDP keeps it whole on each, FSDP2 shards it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from mend_trainer.config import ParallelConfig
from mend_trainer.membership import Membership
from mend_trainer.models.llama import build_model, layers_of
from mend_trainer.models.sizes import ModelConfig
from mend_trainer.prepared import put_ready, take_ready


@dataclass(frozen=True, slots=True)
class Place:
    """The place of this rank among all, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device
    membership: Membership | None = None  # None: alone

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all ranks, on every rank."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value


@contextlib.contextmanager
def join_gang(*, deterministic: bool) -> Iterator[Place]:
    """The process group that torchrun's environment describes; a single process without one needs none."""
    if deterministic:
        _be_deterministic()  # first: cuBLAS reads its variable when it is first used
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Place(0, 1, device)
        return
    membership = Membership(device)
    membership.join()
    yield Place(dist.get_rank(), dist.get_world_size(), device, membership)
    dist.destroy_process_group()  # only after success: after an error a group may be stuck, and so would its end


def spread_model(
    model: ModelConfig, parallel: ParallelConfig, place: Place, *, vocabulary_size: int, seed: int
) -> nn.Module:
    """The model as this gang trains it; the same seed gives the same weights for every strategy and world size."""
    sharded = parallel.strategy == "fsdp2" and place.world_size > 1
    ready = None if sharded else take_ready(_key(model, parallel, place.device, vocabulary_size, seed))
    built: nn.Module = ready or build_model(
        model,
        vocabulary_size=vocabulary_size,
        seed=seed,
        device=place.device,
        shard=(lambda fresh: _shard(fresh, parallel, place)) if sharded else None,
        checkpoint_activations=parallel.checkpoint_activations,
    )
    if sharded or place.world_size == 1:
        return built
    return DistributedDataParallel(
        built,
        device_ids=[place.device] if place.device.type == "cuda" else None,
        forward_sync_buffers=False,  # the rotary frequencies are the same everywhere and never change
        gradient_as_bucket_view=True,
        init_sync=False,  # the seed has made them equal, and ranks that rejoin take no part in the making of others
    )


def warm_model(model: ModelConfig, parallel: ParallelConfig, *, vocabulary_size: int, seed: int) -> nn.Module | None:
    """In a standby: the model that `spread_model` will be asked for. None where it has to wait for its place.

    Shards depend on the rank, and a standby must not touch a GPU: its memory belongs to the ranks that train.
    """
    if parallel.strategy == "fsdp2" or torch.cuda.is_available():
        return None
    device = torch.device("cpu")
    alone = Place(0, 1, device)
    built = spread_model(model, parallel, alone, vocabulary_size=vocabulary_size, seed=seed)
    put_ready(_key(model, parallel, device, vocabulary_size, seed), built)
    return built


def _key(model: ModelConfig, parallel: ParallelConfig, device: torch.device, vocabulary_size: int, seed: int) -> object:
    return (model, parallel.checkpoint_activations, str(device), vocabulary_size, seed)


def computing(parallel: ParallelConfig, place: Place) -> AbstractContextManager[Any]:
    """The precision of forward passes. FSDP2 casts by its own policy."""
    if parallel.precision == "float16":
        return torch.autocast(place.device.type, dtype=torch.float16)
    if _is_bfloat16(parallel, place) and parallel.strategy == "ddp":
        return torch.autocast(place.device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def accumulating(model: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
    """Around all micro-batches of a step: DDP reduces gradients with the last one only.

    FSDP2 reduces each, since whole gradients of a large model would not fit.
    """
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


def mesh_shape(world_size: int, shard_ranks: int) -> tuple[int, int]:
    """How many copies of the model there are, and over how many ranks each is sharded.

    The smallest divisor of the world that is no less than asked for: a gang that has lost ranks must go on, and no rank
    of it may need more memory than it was given.
    """
    shards = next((each for each in range(max(shard_ranks, 1), world_size) if world_size % each == 0), world_size)
    return (world_size // shards, shards) if shard_ranks else (1, world_size)


def _mesh(parallel: ParallelConfig, place: Place) -> DeviceMesh:
    replicas, shards = mesh_shape(place.world_size, parallel.shard_ranks)
    if replicas == 1:
        return init_device_mesh(place.device.type, (shards,))
    return init_device_mesh(place.device.type, (replicas, shards), mesh_dim_names=("replicas", "shards"))


def _shard(model: nn.Module, parallel: ParallelConfig, place: Place) -> None:
    policy = MixedPrecisionPolicy()
    if _is_bfloat16(parallel, place):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = _mesh(parallel, place)
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _is_bfloat16(parallel: ParallelConfig, place: Place) -> bool:
    return parallel.precision == "bfloat16" or (parallel.precision == "auto" and place.device.type == "cuda")


def _be_deterministic() -> None:
    """The same numbers in every attempt: on a CPU the split of sums over threads matters, so each rank has one."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # A debugging aid that costs a pass over all memory; mypy cannot see that the module replaces its own class.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.set_num_threads(1)
