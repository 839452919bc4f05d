"""Real ranks under DDP: the one that works longer on each step is named with its factor, an even gang names nobody."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from gang_of_ranks import run_ranks
from mend.environment import ENV_PAGE
from mend.heartbeats import AgentState, Heartbeat, RankReport
from mend.stragglers import Paces, stragglers
from mend_trainer.ranks import Rank

STEPS, EACH = 45, 5
WORK_SECONDS = 0.04  # long against what a busy machine adds to it


def train(rank: int, folder: str, extra: dict[int, float]) -> list[RankReport]:
    """A loop as users write it, under a session; what the agent's side of its page said every few steps."""
    import torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from mend_trainer.session import Session

    seen = Rank(rank, Path(folder))
    os.environ[ENV_PAGE] = str(seen.page_path)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    reports = []
    with Session(model=model, optimizer=optimizer) as session:
        for step in session.steps(STEPS):
            time.sleep(WORK_SECONDS + extra.get(rank, 0.0))
            loss = model(torch.ones(4, 32)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            session.completed(loss)
            if step % EACH == 0:
                reports.append(seen.report(time.monotonic()))
    seen.close()
    return reports


def judged(told: list[list[RankReport]]) -> dict[int, float]:
    """What the controller says about the ranks of one worker that told this."""
    paces = Paces(attempt=1)
    for number, reports in enumerate(zip(*told, strict=True)):
        ranks = tuple(replace(each, pid=100 + each.rank) for each in reports)
        beat = Heartbeat(attempt=1, worker=0, agent_id="a", state=AgentState.RUNNING, sequence=number, ranks=ranks)
        paces.add(beat)
    return {each.rank: each.factor for each in stragglers(paces.paces(), 1.3, (), 0.0)}


@pytest.mark.parametrize("extra", [0.5, 1.5])
def test_the_slow_rank_is_named_with_its_factor(tmp_path: Path, extra: float) -> None:
    """Within a fifth of what it really is; the ranks that wait for it are not named."""
    told: list[Any] = run_ranks(3, tmp_path, train, str(tmp_path), {1: extra * WORK_SECONDS})
    assert judged(told) == {1: pytest.approx(1 + extra, rel=0.2)}


def test_an_even_gang_names_nobody(tmp_path: Path) -> None:
    """All wait for each other a little, and nobody more than the others."""
    told: list[Any] = run_ranks(3, tmp_path, train, str(tmp_path), {})
    assert all(reports[-1].waited_seconds > 0 for reports in told), "waiting was measured"
    assert judged(told) == {}
