"""A plain torch loop, made a mend run by the three lines marked below: run it, kill it, run it again.

python examples/plain_loop.py file:///tmp/plain-loop
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mend.orders import CheckpointPlan
from mend_trainer.session import Session

STEPS = 400


class Waves:
    """Batches drawn one after the other; the state is how many were. A position is all that a loader must remember."""

    def __init__(self) -> None:
        self.drawn = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            generator = torch.Generator().manual_seed(self.drawn)
            self.drawn += 1
            yield torch.rand(64, 1, generator=generator) * 6

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]


def main(checkpoints: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Dropout(0.1), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    loader = Waves()
    plan = CheckpointPlan(uri=checkpoints, interval_steps=50)  # only when no TrainingRun says where to save

    with Session(model=model, optimizer=optimizer, scheduler=scheduler, loader=loader, checkpoint=plan) as session:  # 1
        for step, inputs in session.batches(STEPS):  # 2
            loss = nn.functional.mse_loss(model(inputs), inputs.sin())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            session.completed(loss, tokens=len(inputs))  # 3
            if step % 20 == 0 or step + 1 == STEPS:
                print(f"step {step} loss {session.loss!r}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "file:///tmp/plain-loop")
