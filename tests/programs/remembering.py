"""A rank of a plain loop under a session that notes, outside of itself, each state that it has reached or restored.

`$NOTES/rank-N` gets a line of JSON for each: attempt, step, a digest of all that the next step depends on, and whether
it was restored. `STEP_SECONDS` and `WIDTH` of the model come from the environment.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash
from torch import nn

from mend.environment import ENV_ATTEMPT
from mend_trainer.session import Session


def main() -> None:
    """Train until it is killed."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(rank)
    width, pause = int(os.environ.get("WIDTH", "64")), float(os.environ.get("STEP_SECONDS", "0.05"))
    model = nn.Linear(width, width)
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    notes = (Path(os.environ["NOTES"]) / f"rank-{rank}").open("a", buffering=1)

    def note(step: int, restored: bool = False) -> None:
        digest = xxhash.xxh3_128(torch.get_rng_state().numpy().tobytes())
        for parameter in model.parameters():
            digest.update(parameter.detach().numpy().tobytes())
            if (momentum := optimizer.state[parameter].get("momentum_buffer")) is not None:
                digest.update(momentum.numpy().tobytes())
        attempt = int(os.environ[ENV_ATTEMPT])
        said = {"attempt": attempt, "step": step, "digest": digest.hexdigest(), "restored": restored}
        notes.write(json.dumps(said) + "\n")

    with Session(model=model, optimizer=optimizer) as session:
        note(session.step, restored=True)
        for step in session.steps(1_000_000):
            time.sleep(pause)
            inputs = torch.rand(4, width)  # of the rank's own generator, whose state is part of the snapshot
            loss = (model(inputs) - inputs).square().mean()
            optimizer.zero_grad()
            loss.backward()
            for parameter in model.parameters():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
            optimizer.step()
            note(step)
            session.completed(loss, tokens=4 * dist.get_world_size())


if __name__ == "__main__":
    main()
