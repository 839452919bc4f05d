"""A session that is given something else than its checkpoint is of: refused by name, before a step is done."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mend.orders import CheckpointPlan
from mend_trainer.averages import Averages
from mend_trainer.misfit import StateMisfit
from mend_trainer.session import Session
from mend_trainer.terms import Terms

CPU = torch.device("cpu")


@pytest.fixture
def plan(tmp_path: Path) -> CheckpointPlan:
    """A prefix of its own."""
    return CheckpointPlan(uri=f"file://{tmp_path}/run", interval_steps=2)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1)


def train(
    plan: CheckpointPlan,
    steps: int,
    optimizer: Callable[[Any], torch.optim.Optimizer] = adamw,
    **others: Any,
) -> dict[int, float]:
    """A little loop from wherever its run was left; losses by step."""
    torch.manual_seed(1)
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    losses: dict[int, float] = {}
    chosen = optimizer(model.parameters())
    with Session(model=model, optimizer=chosen, others=others, checkpoint=plan) as session:
        for step in session.steps(steps):
            hidden = model[0](torch.ones(1, 2))
            # The second layer takes no part in the first steps, as an expert that nothing is routed to.
            loss = (model[1](hidden) if step > 3 else hidden).square().sum()
            chosen.zero_grad()
            loss.backward()
            chosen.step()
            session.completed(loss, tokens=1)
            losses[step] = session.loss
    return losses


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (
            torch.optim.Adam,
            "optimizer: the checkpoint is of AdamW, here it is Adam: use the same one or start a new run",
        ),
        (torch.optim.SGD, "optimizer: the checkpoint is of AdamW, here it is SGD"),
        (
            lambda parameters: torch.optim.AdamW(parameters, amsgrad=True),
            "optimizer: for .* here it is exp_avg, exp_avg_sq, max",
        ),
    ],
)
def test_another_optimizer_is_named(plan: CheckpointPlan, other: Any, told: str) -> None:
    """By its kind, not by hundreds of tensors; and no retry can help."""
    train(plan, 2)
    with pytest.raises(StateMisfit, match=told) as caught:
        train(plan, 4, other)
    assert caught.value.mend_fatal


def test_a_part_that_came_or_went_is_named(plan: CheckpointPlan) -> None:
    """It has no state to go on with, or its state would be lost."""
    train(plan, 2, averages=Averages(CPU))
    with pytest.raises(StateMisfit, match="averages: the checkpoint has a state of it, and nothing here takes it up"):
        train(plan, 4)
    with pytest.raises(StateMisfit, match="mean: the checkpoint has no state of it, only of averages"):
        train(plan, 4, mean=Averages(CPU), averages=Averages(CPU))


def test_other_terms_are_named(plan: CheckpointPlan) -> None:
    """What no tensor would show: here a user's own, in two words."""
    train(plan, 2, terms=Terms({"rope_theta": 1e4}))
    with pytest.raises(StateMisfit, match=r"rope_theta: 10000.0 in the checkpoint, 500000.0 here"):
        train(plan, 4, terms=Terms({"rope_theta": 5e5}))
    assert list(train(plan, 4, terms=Terms({"rope_theta": 5e5}, accept=["rope_theta"]))) == [2, 3]


def test_layers_that_had_no_gradient_yet_resume_exactly(plan: CheckpointPlan, tmp_path: Path) -> None:
    """Their optimizer has no state for them; the run that is resumed before their first step equals an unbroken one."""
    unbroken = train(CheckpointPlan(uri=f"file://{tmp_path}/calm", interval_steps=2), 8)
    assert train(plan, 2) | train(plan, 3) | train(plan, 8) == unbroken


class Reader:
    """Batches 0, 1, 2, ... of a file whose name is part of the position."""

    def __init__(self, name: str) -> None:
        self.name, self.drawn = name, 0

    def __iter__(self) -> Iterator[int]:
        while True:
            self.drawn += 1
            yield self.drawn

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.name, "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["name"] != self.name:
            raise StateMisfit(f"loader: the checkpoint is of {state['name']}, here it is {self.name}")
        self.drawn = state["drawn"]


def test_a_loader_of_ones_own_can_refuse_as_well(plan: CheckpointPlan) -> None:
    """Its error comes through as it is, and mend takes it for what it is."""
    model = nn.Linear(1, 1)

    def session(name: str) -> Session[int]:
        return Session(model=model, optimizer=adamw(model.parameters()), loader=Reader(name), checkpoint=plan)

    with session("a.bin") as first:
        for _ in first.batches(2):
            first.completed(model(torch.ones(1)).sum())
    with pytest.raises(StateMisfit, match=r"the checkpoint is of a\.bin, here it is b\.bin"):
        session("b.bin").__enter__()


def test_terms_are_kept_in_the_manifest(plan: CheckpointPlan) -> None:
    """Plain to read for whoever looks for what a checkpoint was made with."""
    train(plan, 2, terms=Terms({"heads": 4}))
    (manifest,) = Path(plan.uri.removeprefix("file://")).rglob("manifest.json")
    assert json.loads(manifest.read_bytes())["values"]["terms"] == {"heads": 4}
