"""What taking the state for a save costs the loop beside the copy of its bytes, beside torch's own state dicts.

    python benchmarks/bundle.py [--quick] [--json FILE]

A model of 300 small parameters under AdamW: what is measured is the work per parameter, in CPU time of the rank. Ours
and theirs take turns. The bundle holds generators of random numbers, too, and is made ready for JSON.
"""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Callable

import torch
from figures import Row, arguments, middle, publish, row
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)

from mend_trainer.bundle import Bundle

PARAMETERS, TARGET_MS = 300, 5.0  # a twentieth of a step of 100 ms
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def main() -> int:
    """Run it."""
    options = arguments(__doc__ or "")
    return publish("Taking the state for a save", measure(options), options)


def measure(options: Namespace) -> list[Row]:
    """One row."""
    torch.set_num_threads(1)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(PARAMETERS // 2)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    bundle = Bundle(rank=0, model=model, optimizer=optimizer)

    def ours() -> None:
        json.dumps(bundle.take().values)

    def theirs() -> None:
        get_model_state_dict(model)
        get_optimizer_state_dict(model, optimizer, options=FLAT)

    pairs = [(milliseconds(ours), milliseconds(theirs)) for _ in range(20 if options.quick else 200)]
    mine, stock = zip(*pairs[1:], strict=True)  # the first learns the names, once in a process
    figure = f"Bundle.take and its values as JSON, {PARAMETERS} parameters"
    note = "torch: get_model_state_dict and get_optimizer_state_dict, without values and generators"
    return [row(figure, mine, TARGET_MS, unit="ms", peers={"torch": middle(stock)}, note=note)]


def milliseconds(work: Callable[[], object]) -> float:
    """CPU time of one call."""
    began = time.process_time()
    work()
    return 1000 * (time.process_time() - began)


if __name__ == "__main__":
    raise SystemExit(main())
