"""A rank that trains a small model whose state tells where it has been, and notes each state where no kill can reach.

Data depend on attempt, step and rank, so that no two attempts ever reach the same state, and a state that was not
reached by the attempts it stands on shows. `$NOTES` is the folder of the notes, `$PACE` the seconds of a step.
"""

from __future__ import annotations

import hashlib
import os
import time

import msgspec
import torch
import torch.distributed as dist

from mend.environment import ENV_LAUNCH
from mend.orders import decode_launch
from mend_trainer.session import Session

WIDTH = int(os.environ.get("WIDTH", "160"))


def digest(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Of all that the next step depends on, by other means than mend's."""
    told = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        told.update(name.encode() + tensor.numpy().tobytes())
    for number, state in sorted(optimizer.state_dict()["state"].items()):
        for name, tensor in sorted(state.items()):
            told.update(f"{number}.{name}".encode() + tensor.numpy().tobytes())
    told.update(torch.get_rng_state().numpy().tobytes())
    return told.hexdigest()


class Notes:
    """One line per state, each written by one call to the end of the file."""

    def __init__(self, rank: int, attempt: int) -> None:
        self._rank, self._attempt = rank, attempt
        self._file = os.open(f"{os.environ['NOTES']}/rank-{rank}", os.O_APPEND | os.O_CREAT | os.O_WRONLY)

    def add(self, what: str, step: int, digest: str) -> None:
        """One note, as tests/reached.py reads it."""
        note = {"what": what, "attempt": self._attempt, "rank": self._rank, "step": step, "digest": digest}
        os.write(self._file, msgspec.json.encode(note) + b"\n")


def main() -> None:
    """Train for ever."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, attempt = dist.get_rank(), decode_launch(os.environ[ENV_LAUNCH]).attempt
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Dropout(0.2), torch.nn.Linear(WIDTH, WIDTH))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(100 + rank)
    notes, pace = Notes(rank, attempt), float(os.environ.get("PACE", "0.01"))
    with Session(model=model, optimizer=optimizer) as session:
        notes.add("restored", session.step, digest(model, optimizer))
        for step in session.steps(1 << 40):
            drawn = torch.Generator().manual_seed(1_000_003 * attempt + 101 * step + rank)
            inputs = torch.randn(4, WIDTH, generator=drawn)
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            sums = torch.cat([each.grad.flatten() for each in model.parameters()])
            dist.all_reduce(sums)
            for each, part in zip(
                model.parameters(), sums.split([each.numel() for each in model.parameters()]), strict=True
            ):
                each.grad.copy_(part.view_as(each))
            optimizer.step()
            time.sleep(pace)
            notes.add("reached", step, digest(model, optimizer))
            session.completed(loss)


if __name__ == "__main__":
    main()
