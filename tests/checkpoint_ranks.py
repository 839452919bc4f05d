"""What the ranks of the checkpoint tests do: train a tiny model, save, restore, and misbehave on command."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mend.orders import CheckpointPlan
from mend.reports import Committed, Report
from mend.states import CheckpointRef
from mend.store import Data, Store, open_store
from mend_trainer.checkpoint import Checkpointer
from mend_trainer.checkpoint.arena import Arena, Header, Origin
from mend_trainer.checkpoint.layout import blocks_of, local_tensors
from saver_thread import with_store

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Trainee:
    """A tiny model under DDP or FSDP2, its optimizer, and dropout that depends on the rank's RNG."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(7)
        self.rank = dist.get_rank()
        # Rows that no world size divides evenly, and one row, of which most ranks hold nothing.
        model = torch.nn.Sequential(
            torch.nn.Linear(6, 15), torch.nn.Dropout(0.3), torch.nn.Tanh(), torch.nn.Linear(15, 1, bias=False)
        )
        self.model: torch.nn.Module = model
        match kind:
            case "ddp":
                self.model = DistributedDataParallel(model)
            case "fsdp":
                mesh = init_device_mesh("cpu", (dist.get_world_size(),))
                for layer in (model[0], model[3]):
                    fully_shard(layer, mesh=mesh)
                fully_shard(model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=2, gamma=0.5)
        torch.manual_seed(100 + self.rank)

    def step(self, number: int) -> float:
        """One step on the data of that number; the loss over all ranks."""
        data = torch.Generator().manual_seed(1000 * number + self.rank)
        inputs, targets = torch.randn(4, 6, generator=data), torch.randn(4, 1, generator=data)
        self.optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(self.model(inputs), targets)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        return float(total)

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Tensors and plain values of everything that the next step depends on."""
        model, optimizer = get_state_dict(self.model, self.optimizer, options=_FLAT)
        tensors = {key: value for key, value in optimizer.items() if isinstance(value, torch.Tensor)}
        plain = {key: value for key, value in optimizer.items() if key not in tensors}
        state = {"model": model, "optimizer": tensors, "ranks": {str(self.rank): {"cpu": torch.get_rng_state()}}}
        return state, {"optimizer": plain, "schedule": self.schedule.state_dict()}

    def take_up(self, state: dict[str, Any], values: dict[str, Any]) -> None:
        """Go on from what was restored."""
        optimizer = {**state["optimizer"], **values["optimizer"]}
        set_state_dict(
            self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=optimizer, options=_FLAT
        )
        self.schedule.load_state_dict(values["schedule"])
        torch.set_rng_state(state["ranks"][str(self.rank)]["cpu"])

    def weights(self) -> dict[str, list[float]]:
        """All weights in full."""
        full = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True))
        return {name: tensor.flatten().tolist() for name, tensor in full.items()}


def a_checkpointer(uri: str, attempt: int, reports: list[Report], store: Store | None = None) -> Checkpointer:
    """A checkpointer of the tests' run."""
    plan = CheckpointPlan(uri=uri)
    return Checkpointer(
        plan,
        run="team/clio",
        run_uid="uid-1",
        attempt=attempt,
        report=reports.append,
        store=store,
        saver=with_store(store or open_store(uri)),
        timeout_seconds=60,
    )


def train(
    rank: int, kind: str, uri: str, attempt: int, first: int, last: int, saves: set[int], restore: list[CheckpointRef]
) -> dict[str, Any]:
    """Train from step `first` to `last`, saving after `saves`; what was seen, for the test to compare."""
    reports: list[Report] = []
    trainee = Trainee(kind)
    keeper = a_checkpointer(uri, attempt, reports)
    restored = None
    if restore:
        state, _ = trainee.state()
        kept = state["model"]
        restored = keeper.restore(restore, state)
        assert restored is not None
        assert state["model"] is kept
        trainee.take_up(state, restored.values)
    losses = []
    for number in range(first, last + 1):
        losses.append(trainee.step(number))
        if number in saves:
            state, values = trainee.state()
            assert keeper.save(number, number * 24, state, values)
            assert keeper.wait(60), reports
            assert keeper.committed_step == number
    return {
        "losses": losses,
        "weights": trainee.weights(),
        "refs": [report.checkpoint for report in reports if isinstance(report, Committed)],
        "reports": reports,
        "restored": restored,
    }


def train_in_memory(
    rank: int, kind: str, environments: list[dict[str, str]], attempt: int, first: int, last: int, restore: str
) -> dict[str, Any]:
    """Train from step `first` to `last` and take a snapshot that stays in memory; no store is there at all."""
    os.environ.update(environments[rank], LOCAL_RANK=str(rank))
    trainee = Trainee(kind)
    keeper = Checkpointer(
        CheckpointPlan(uri="file:///proc/nowhere"),
        run="team/clio",
        run_uid="uid-1",
        attempt=attempt,
        report=lambda report: None,
    )
    restored = None
    if restore:
        state, _ = trainee.state()
        ref = CheckpointRef(uri=f"memory:{restore}", step=first - 1, attempt=attempt - 1)
        restored = keeper.restore([ref], state)
        assert restored is not None
        trainee.take_up(state, restored.values)
    weights = trainee.weights()
    losses = [trainee.step(number) for number in range(first, last + 1)]
    state, values = trainee.state()
    assert keeper.save(last, last * 24, state, values, owed=False)
    return {"taken up": weights, "weights": trainee.weights(), "losses": losses, "restored": restored}


class SpoiltStore:
    """A store whose uploads of shards fail, or wait for ever after saying that they have begun."""

    def __init__(self, store: Store, spoil: str, sign: Path) -> None:
        self._store = store
        self._spoil = spoil
        self._sign = sign

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def put(self, key: str, data: Data) -> str:
        if key.endswith(".distcp") and self._spoil == "raise":
            raise OSError(5, "Input/output error")
        if key.endswith(".distcp") and self._spoil == "hang":
            self._sign.touch()
            threading.Event().wait()
        return self._store.put(key, data)


def save_twice_with_a_fault(rank: int, uri: str, spoil: str, sign: str) -> dict[str, Any]:
    """Save once as it should be, then once more while rank 1's uploads are spoilt, then leave."""
    reports: list[Report] = []
    spoilt = SpoiltStore(open_store(uri), "", Path(sign))
    keeper = a_checkpointer(uri, 1, reports, spoilt)  # type: ignore[arg-type]
    state = {"model": {"w": torch.arange(64.0), "v": torch.ones(3, 5)}, "ranks": {str(rank): {"r": torch.tensor(rank)}}}
    assert keeper.save(1, 1, state, {})
    assert keeper.wait(60)
    spoilt._spoil = spoil if rank == 1 else ""
    state["model"]["w"].add_(1)
    assert keeper.save(2, 2, state, {})
    in_time = keeper.wait(60 if spoil == "raise" else 30)
    again = None
    if spoil == "raise":
        spoilt._spoil = ""
        state["model"]["w"].add_(1)
        assert keeper.save(3, 3, state, {})
        again = keeper.wait(60)
    return {"committed": in_time, "again": again, "step": keeper.committed_step, "reports": reports}


def copy_until_killed(rank: int, path: str) -> None:
    """Take snapshot after snapshot of a state whose numbers are all the step's."""
    arena = Arena.attach(path)
    state = {"model": {"w": torch.zeros(4 << 20, dtype=torch.int64)}}
    blocks = tuple(blocks_of(state))
    step = 0
    while True:
        state["model"]["w"].fill_(step)
        draft = arena.begin(blocks)
        assert draft is not None
        draft.fill(local_tensors(state))
        origin = Origin(
            run="r", run_uid="u", attempt=1, lineage=(), config_digest="", step=step, tokens=step, values={}
        )
        header = Header(save_id=f"{step:016x}", origin=origin, rank=0, world_size=1, blocks=blocks, uri="")
        draft.publish(header, owed=False)
        step += 1


def save_and_wait_to_be_killed(rank: int, uri: str, sign: str) -> None:
    """Save with a saver of one's own, tell when the call has returned, and do nothing more."""
    keeper = Checkpointer(CheckpointPlan(uri=uri), run="team/clio", run_uid="uid-1", attempt=1, report=lambda _: None)
    state = {"model": {"w": torch.arange(64.0), "v": torch.ones(3, 5)}, "ranks": {str(rank): {"r": torch.tensor(rank)}}}
    assert keeper.save(1, 1, state, {})
    Path(f"{sign}-{rank}").touch()
    threading.Event().wait()


def save_while_busy(rank: int, uri: str, sign: str, go_on: str) -> list[bool]:
    """Save while rank 1 alone is still busy with the two saves before."""
    store = open_store(uri)
    keeper = a_checkpointer(uri, 1, [], SlowStore(store, Path(sign), Path(go_on)) if rank == 1 else store)  # type: ignore[arg-type]
    state = {"w": torch.arange(64.0), "ranks": {str(rank): {"r": torch.tensor(rank)}}}
    outcomes = [keeper.save(step, step, state, {}) for step in (1, 2, 3)]
    if rank == 0:
        Path(go_on).touch()
    outcomes += [keeper.wait(60), keeper.save(4, 4, state, {}), keeper.wait(60)]
    return outcomes


class SlowStore:
    """A store whose uploads wait for a file to appear."""

    def __init__(self, store: Store, sign: Path, go_on: Path) -> None:
        self._store = store
        self._sign = sign
        self._go_on = go_on

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def put(self, key: str, data: Data) -> str:
        self._sign.touch()
        pause = threading.Event()
        while not self._go_on.exists():
            pause.wait(0.01)
        return self._store.put(key, data)


def restore_into(rank: int, uri: str, refs: list[CheckpointRef], length: int) -> dict[str, Any]:
    """Restore into zeroed tensors, `length` long."""
    reports: list[Report] = []
    keeper = a_checkpointer(uri, 9, reports)
    state = {"model": {"w": torch.zeros(length), "v": torch.zeros(3, 5)}, "ranks": {str(rank): {"r": torch.tensor(-1)}}}
    restored = keeper.restore(refs, state)
    plain = {name: tensor.flatten().tolist() for name, tensor in state["model"].items()}
    return {"model": plain, "restored": restored, "reports": reports}
