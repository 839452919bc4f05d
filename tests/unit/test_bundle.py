"""The bundle holds everything that the next step depends on, and is refused by whatever it does not belong to."""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)

from mend_trainer.averages import Averages
from mend_trainer.bundle import Bundle, BundleState
from mend_trainer.data.loader import Loader
from mend_trainer.data.shards import TokenSplit, pack
from mend_trainer.misfit import StateMisfit
from mend_trainer.plain import join
from mend_trainer.rng import seed_generators

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> TokenSplit:
    """Some text, as bytes."""
    folder = tmp_path_factory.mktemp("text")
    for part in range(4):
        (folder / f"{part}.txt").write_text("".join(f"{number:05d}" for number in range(100 * part, 100 * part + 100)))
    return pack(str(folder), folder / ".cache").train


class Trainee:
    """A training whose every step depends on all that a bundle holds."""

    def __init__(self, split: TokenSplit, seed: int) -> None:
        seed_generators(seed, 0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.Linear(16, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=3, gamma=0.5)
        # So large that the first steps overflow and halve it, and so slow to grow that its count matters.
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3)
        self.loader = Loader(split, sequence_length=8, global_batch=4, seed=3)
        self.averages = Averages(torch.device("cpu"))
        self.bundle = Bundle(
            rank=0,
            model=self.model,
            optimizer=self.optimizer,
            parts={
                "scheduler": self.scheduler,
                "scaler": self.scaler,
                "loader": self.loader,
                "averages": self.averages,
            },
        )

    def step(self) -> dict[str, Any]:
        """What a step leaves behind that one can look at."""
        batch = next(self.loader)
        noise = [random.gauss(0, 1), float(np.random.normal()), float(torch.randn(()))]
        inputs = batch.inputs.float() / 256 + 0.01 * sum(noise)
        self.optimizer.zero_grad()
        loss = self.model(inputs).square().mean()
        self.scaler.scale(30 * loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.averages.add(loss)
        self.averages.evaluated(round(float(loss.detach()), 1), self.loader.position)
        return {
            "loss": float(loss.detach()),
            "noise": noise,
            "scale": self.scaler.get_scale(),
            "rate": self.scheduler.get_last_lr(),
            "smoothed": self.averages.smoothed,
            "best": self.averages.best,
            "weights": [each.tolist() for each in self.model.state_dict().values()],
        }


def stored(state: BundleState) -> BundleState:
    """The same as it comes out of a checkpoint: copies of the tensors, values from JSON."""
    return BundleState(
        tensors=copy.deepcopy(state.tensors), values=json.loads(json.dumps(state.values, allow_nan=False))
    )


def forget(name: str) -> Callable[[BundleState, BundleState], None]:
    """Leaves a part as a fresh process would have it."""

    def leave_out(saved: BundleState, fresh: BundleState) -> None:
        saved.values[name] = fresh.values[name]
        if name in saved.tensors:
            saved.tensors[name] = fresh.tensors[name]

    return leave_out


def forget_weights(saved: BundleState, fresh: BundleState) -> None:
    saved.tensors["model"] = fresh.tensors["model"]


def forget_options(saved: BundleState, fresh: BundleState) -> None:
    saved.values["optimizer"]["groups"] = fresh.values["optimizer"]["groups"]


def forget_moments(saved: BundleState, fresh: BundleState) -> None:
    saved.tensors["optimizer"] = fresh.tensors["optimizer"]


def forget_generator(*names: str) -> Callable[[BundleState, BundleState], None]:
    def leave_out(saved: BundleState, fresh: BundleState) -> None:
        for name in names:
            saved.tensors["ranks"]["0"]["rng"][name] = fresh.tensors["ranks"]["0"]["rng"][name]

    return leave_out


PARTS: dict[str, Callable[[BundleState, BundleState], None]] = {
    "weights": forget_weights,
    "moments of the optimizer": forget_moments,
    "options of the optimizer": forget_options,
    "scheduler": forget("scheduler"),
    "scaler": forget("scaler"),
    "loader": forget("loader"),
    "averages": forget("averages"),
    "python": forget_generator("python"),
    "python's second gaussian": forget_generator("python_gauss"),
    "numpy": forget_generator("numpy", "numpy_gauss"),
    "torch": forget_generator("torch"),
}


def resumed(split: TokenSplit, after: int, leave_out: Callable[[BundleState, BundleState], None] | None) -> list[Any]:
    """Steps of a trainee that goes on where another was after `after` steps, without what is to be forgotten."""
    first = Trainee(split, seed=1)
    for _ in range(after):
        first.step()
    saved = stored(first.bundle.take())
    second = Trainee(split, seed=2)
    fresh = stored(second.bundle.make_room())
    if leave_out is not None:
        leave_out(saved, fresh)
    second.bundle.put(saved)
    return [second.step() for _ in range(6)]


def test_a_bundle_goes_on_exactly(split: TokenSplit) -> None:
    """Put into objects that were made otherwise, every later step is the same to the bit, whenever it was taken."""
    unbroken = Trainee(split, seed=1)
    steps = [unbroken.step() for _ in range(15)]
    for after in (1, 2, 4, 8):
        assert resumed(split, after, None) == steps[after : after + 6]


@pytest.mark.parametrize("part", PARTS)
def test_a_bundle_without_a_part_does_not(split: TokenSplit, part: str) -> None:
    """Nothing in it is there for nothing: what is left out shows soon (after 7 steps a gaussian is kept back)."""
    assert resumed(split, 7, PARTS[part]) != resumed(split, 7, None)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model)  # type: ignore[return-value]


@pytest.mark.parametrize("wrap", [nn.Sequential, compiled])
def test_names_are_those_of_torch(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Any torch user finds the tensors under the names that torch's own state dicts have."""
    inner = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 1))
    inner[2].weight.requires_grad_(False)
    model = wrap(inner)
    optimizer = torch.optim.AdamW(model.parameters())
    inner(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    taken = Bundle(rank=0, model=model, optimizer=optimizer).take().tensors
    theirs = get_model_state_dict(model)
    assert list(taken["model"]) == list(theirs)
    assert all(taken["model"][name].data_ptr() == tensor.data_ptr() for name, tensor in theirs.items())
    flat = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    moments = {name: tensor for name, tensor in flat.items() if name.startswith("state.")}
    assert taken["optimizer"].keys() == moments.keys()
    assert all(taken["optimizer"][name] is tensor for name, tensor in moments.items())


def a_bundle(optimizer: Callable[[Any], torch.optim.Optimizer] = torch.optim.AdamW, **parts: Any) -> Bundle:
    torch.manual_seed(1)
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    return Bundle(rank=0, model=model, optimizer=optimizer(model.parameters()), parts=parts)


def train_a(bundle: Bundle) -> None:
    """A step in which one of the two layers gets no gradient."""
    bundle.model["a"](torch.ones(1, 2)).sum().backward()  # type: ignore[index]
    bundle.optimizer.step()  # type: ignore[union-attr]
    bundle.optimizer.zero_grad()  # type: ignore[union-attr]


def train_both(bundle: Bundle) -> None:
    bundle.model["b"](bundle.model["a"](torch.ones(1, 2))).sum().backward()  # type: ignore[index]
    bundle.optimizer.step()  # type: ignore[union-attr]
    bundle.optimizer.zero_grad()  # type: ignore[union-attr]


def test_a_parameter_without_gradient_so_far_stays_without_state() -> None:
    """Its first step after the restore is its first, with the correction of bias that belongs to it."""
    unbroken = a_bundle()
    train_a(unbroken)
    saved = stored(unbroken.take())
    assert "b.weight" not in saved.values["optimizer"]["state"]
    again = a_bundle()
    moments = again.make_room().tensors["optimizer"] | saved.tensors["optimizer"]
    again.put(BundleState(tensors={**saved.tensors, "optimizer": moments}, values=saved.values))
    for bundle in (unbroken, again):
        train_both(bundle)
    assert all(
        torch.equal(mine, theirs)
        for mine, theirs in zip(again.model.parameters(), unbroken.model.parameters(), strict=True)
    )


def test_groups_may_change() -> None:
    """Options belong to parameters, not to the group's number."""

    def grouped(parameters: Any) -> torch.optim.Optimizer:
        first, *rest = parameters
        return torch.optim.AdamW([{"params": rest}, {"params": [first], "lr": 0.5}])

    def regrouped(parameters: Any) -> torch.optim.Optimizer:
        first, *rest = parameters
        return torch.optim.AdamW([{"params": [first]}, {"params": rest[::-1]}])

    bundle, again = a_bundle(grouped), a_bundle(regrouped)
    for each in (bundle, again):
        train_both(each)
    again.put(stored(bundle.take()))
    assert isinstance(again.optimizer, torch.optim.Optimizer)
    assert [group["lr"] for group in again.optimizer.param_groups] == [0.5, 1e-3]


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (lambda parameters: torch.optim.Adam(parameters), "the checkpoint is of AdamW, here it is Adam: use the same"),
        (lambda parameters: torch.optim.SGD(parameters, lr=0.1), "the checkpoint is of AdamW, here it is SGD"),
        (
            lambda parameters: torch.optim.AdamW(parameters, amsgrad=True),
            "for a.weight the checkpoint has exp_avg, exp_avg_sq, step, here it is exp_avg, exp_avg_sq, max_exp_avg_sq",
        ),
        (
            lambda parameters: torch.optim.AdamW([*parameters, nn.Parameter(torch.ones(3))]),
            r"a parameter of shape \[3\] that is not the model's",
        ),
    ],
)
def test_another_optimizer_is_refused(other: Any, told: str) -> None:
    """Adam's moments would fit AdamW without a word. What differs is named, and that trying again cannot help."""
    bundle = a_bundle()
    train_both(bundle)
    saved = stored(bundle.take())
    with pytest.raises(StateMisfit, match=told) as caught:
        a_bundle(other).put(saved)
    assert caught.value.mend_fatal


def test_a_parameter_that_no_group_had_is_refused() -> None:
    """Frozen when the checkpoint was made and left out of the optimizer, it has no options to go on with."""
    bundle = a_bundle(lambda parameters: torch.optim.SGD(list(parameters)[:2], lr=0.1))
    train_a(bundle)
    with pytest.raises(StateMisfit, match=r"optimizer: b\.weight is in one of its groups, and was in none"):
        a_bundle(lambda parameters: torch.optim.SGD(parameters, lr=0.1)).put(stored(bundle.take()))


def test_parts_that_came_or_went_are_named() -> None:
    """A state that nothing takes up, and a part without a state, are errors and no silence."""
    averages = Averages(torch.device("cpu"))
    with pytest.raises(StateMisfit, match="averages: the checkpoint has no state of it, only of model and optimizer"):
        a_bundle(averages=averages).put(stored(a_bundle().take()))
    with pytest.raises(StateMisfit, match="averages: the checkpoint has a state of it, and nothing here takes it up"):
        a_bundle().put(stored(a_bundle(averages=averages).take()))


def test_taking_costs_a_fraction_of_torchs_own_state_dicts() -> None:
    """The names of 300 tensors are worked out once, not at every save."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(150)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    bundle = Bundle(rank=0, model=model, optimizer=optimizer)
    bundle.take()

    def stock() -> None:
        get_model_state_dict(model)
        get_optimizer_state_dict(model, optimizer, options=_FLAT)

    assert least_seconds(bundle.take) < least_seconds(stock) / 2


def least_seconds(work: Callable[[], object]) -> float:
    """CPU time of the quickest of some."""
    spent = []
    for _ in range(7):
        began = time.process_time()
        work()
        spent.append(time.process_time() - began)
    return min(spent)


def test_what_a_new_rank_draws_depends_on_where_the_run_is(split: TokenSplit) -> None:
    """A rank that the checkpoint knows nothing of repeats nothing that it drew before, and the same if tried again."""
    trainee = Trainee(split, seed=1)
    drawn = []
    for _ in range(2):
        trainee.step()
        state = stored(trainee.bundle.take())
        state.tensors["ranks"] = {"1": {"rng": state.tensors["ranks"]["0"]["rng"]}}
        newcomer = Bundle(rank=1, model=trainee.model, optimizer=trainee.optimizer, parts=trainee.bundle.parts)
        for _ in range(2):
            seed_generators(1, 1)
            newcomer.put(BundleState(tensors=state.tensors, values=state.values, absent=("ranks.1.rng.python",)))
            drawn.append((random.random(), float(np.random.random()), float(torch.rand(()))))
    seed_generators(1, 1)
    first = (random.random(), float(np.random.random()), float(torch.rand(())))
    assert drawn[0] == drawn[1]
    assert drawn[2] == drawn[3]
    assert len({*drawn, first}) == 3


def test_nothing_is_lost_on_the_way_through_json(split: TokenSplit) -> None:
    """What is taken again after it was put equals what was put."""
    trainee = Trainee(split, seed=1)
    trainee.step()
    saved = stored(trainee.bundle.take())
    again = Trainee(split, seed=2)
    again.bundle.put(saved)
    taken = again.bundle.take()
    assert stored(taken).values == saved.values
    assert join(taken.values["averages"], {})["weight"] == pytest.approx(0.02)
