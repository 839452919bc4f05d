"""What the ranks of the bundle tests do: hold names against torch's, and hand a state on."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)

from checkpoint_ranks import Trainee
from mend_trainer.bundle import Bundle, BundleState
from mend_trainer.checkpoint.gang import make_gang
from mend_trainer.peers import Handed, Source, hand_on

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def names(rank: int, kind: str) -> dict[str, tuple[list[str], list[str]]]:
    """Names of weights and moments: ours, torch's. FSDP2's parameters are whole just now, after an evaluation."""
    trainee = Trainee(kind)
    trainee.step(1)
    with torch.no_grad():
        trainee.model(torch.ones(1, 6))
    taken = Bundle(rank=rank, model=trainee.model, optimizer=trainee.optimizer).take().tensors
    flat = get_optimizer_state_dict(trainee.model, trainee.optimizer, options=_FLAT)
    moments = {name: tensor for name, tensor in flat.items() if name.startswith("state.")}
    assert all(taken["optimizer"][name] is tensor for name, tensor in moments.items())
    return {
        "model": (list(taken["model"]), list(get_model_state_dict(trainee.model))),
        "optimizer": (sorted(taken["optimizer"]), sorted(moments)),
    }


def hand_over(rank: int) -> dict[str, Any]:
    """Rank 0 has trained one of two layers, rank 1 is new and has room for both; then both train both."""
    torch.manual_seed(rank)
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    bundle = Bundle(rank=rank, model=model, optimizer=optimizer)
    if rank == 0:
        model[0](torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    here = bundle.make_room()
    mine = Handed(attempt=1, tokens=5, values=here.values, lineage=()) if rank == 0 else None
    gang = make_gang(None, "mend:agree", 60.0)
    handed = hand_on(gang, Source(rank=0, step=0), here.tensors, mine, has_it=rank == 0)
    if rank == 1:
        bundle.put(BundleState(tensors=here.tensors, values=handed.values))
    model[1](model[0](torch.ones(1, 2))).sum().backward()
    optimizer.step()
    dist.barrier()
    return {"weights": [each.tolist() for each in model.parameters()], "tokens": handed.tokens}
