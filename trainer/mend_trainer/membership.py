"""This process's membership in the process group: joined as torchrun's environment says, left when broken, renewed."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mend_trainer.connections import Connections

MOST_RENEWALS: Final = 20  # each leaves the threads and buffers of the groups before behind

_log = logging.getLogger(__name__)


class Membership:
    """What a session needs to go on in another attempt with the same process and the same model."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._connections = Connections()
        self._renewals = 0

    def join(self) -> None:
        """Meet the other ranks at the store that the environment names."""
        is_cuda = self._device.type == "cuda"
        with self._connections.recorded():
            # device_id lets NCCL connect now, in the phase `starting`, instead of within the first step.
            dist.init_process_group("nccl" if is_cuda else "gloo", device_id=self._device if is_cuda else None)
        outlive(dist.group.WORLD)

    @contextmanager
    def extended(self) -> Iterator[None]:
        """Around the making of further groups, so that they are cut with the rest."""
        with self._connections.recorded():
            yield

    def can_renew(self, model: nn.Module) -> bool:
        """Whether this process may stay when a peer is lost.

        DDP can be given another group. FSDP2's shards are tied to theirs, and that of a lost rank is nowhere else.
        """
        return type(model) is DistributedDataParallel and self._renewals < MOST_RENEWALS

    def cut(self) -> None:
        """Break off whatever waits for peers, in any thread. May be called from another one."""
        if self._device.type == "cuda":
            for group in dist.distributed_c10d._world.pg_names:
                group.abort()
        count = self._connections.cut()
        _log.info("cut %d connections to other ranks", count)

    def renew(self, model: DistributedDataParallel) -> None:
        """Leave the broken groups and join anew; `model` reduces over the new one, as a new DDP would.

        Only registries are emptied: see `outlive` for why nothing is destroyed.
        """
        self._renewals += 1
        dist.destroy_process_group()
        self.join()
        assert dist.group.WORLD is not None
        model.process_group = dist.group.WORLD
        model.zero_grad(set_to_none=True)  # with gradient_as_bucket_view they lie in the old reducer's buckets
        _renew_reducer(model)


def _renew_reducer(model: Any) -> None:
    """What DDP's constructor does, without its collectives: no public way leads there.

    Buckets have their first order again, as in a process that is new: all ranks reorder them together (see `rehearse`).
    """
    parameters, sparse = model._build_params_for_reducer()
    names = model._build_debug_param_to_name_mapping(parameters)
    model._ddp_init_helper(parameters, sparse, names, model.static_graph)
    model._has_rebuilt_buckets = False


def outlive(group: object) -> None:
    """Never destroy a process group that DDP uses; the end of the process is the end of it.

    DDP's reducer may hold the last reference to it. It then joins gloo's threads with the GIL held, while one of them
    may want the GIL to let go of the last tensor it reduced: a rank that has done all its work hangs for ever.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
