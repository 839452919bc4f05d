"""Every kind of fault, done to real agents and real gloo ranks, judged by the real thinking: the right incident, and
exactly the guilty named, or nobody where nobody can be."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from injection import KINDS, Ground, InjuredGang, a_gang, inject
from mend.incidents import FailureClass

pytestmark = pytest.mark.timeout(240)
in_one_loop = pytest.mark.asyncio(loop_scope="module")

ON_PLAIN_GROUND = [name for name, kind in KINDS.items() if kind.ground is Ground.PLAIN]
COMPARED = ["sleep", "locks", "hold-gil", "loader", "skip", "reorder", "raise", "raise-all", "raise-late"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gang(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[InjuredGang]:
    """Two workers of two ranks, which are hurt in one way after the other."""
    async with a_gang(tmp_path_factory.mktemp("gang"), workers=2, ranks=2) as gang:
        yield gang


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[InjuredGang]:
    """Two ranks in two workers: there is no majority to go by."""
    async with a_gang(tmp_path_factory.mktemp("pair"), workers=2, ranks=1) as gang:
        yield gang


@in_one_loop
@pytest.mark.parametrize("name", ON_PLAIN_GROUND)
async def test_each_kind_is_what_it_is(gang: InjuredGang, name: str) -> None:
    """Four ranks: the incident is of the right kind and names exactly those who did it."""
    await gang.launch()
    outcome = await inject(KINDS[name], gang, rank=3)
    assert outcome.is_right, outcome


@in_one_loop
@pytest.mark.parametrize("name", ["kill", "sleep", "raise-late", "reorder"])
async def test_the_first_rank_is_found_as_well(gang: InjuredGang, name: str) -> None:
    """Rank 0, which holds the store's worker and is often the one that others wait for, is named when it is guilty."""
    await gang.launch()
    outcome = await inject(KINDS[name], gang, rank=0)
    assert outcome.is_right, outcome


@in_one_loop
@pytest.mark.parametrize("name", COMPARED)
async def test_one_of_two_is_told_from_the_other(pair: InjuredGang, name: str) -> None:
    """Two ranks: the guilty one is named although no majority speaks against it."""
    await pair.launch()
    outcome = await inject(KINDS[name], pair, rank=1)
    assert outcome.is_right, outcome


async def test_memory_that_runs_out(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The OOM killer of a memory cgroup: the rank that ate is named, the kill is no machine's fault but the user's.

    Eating takes seconds, in which the gang stands still for longer than its limit: that is not said to be a hang.
    """
    async with a_gang(tmp_path_factory.mktemp("memory"), ground=Ground.MEMORY, floor="700ms") as gang:
        await gang.launch()
        outcome = await inject(KINDS["oom"], gang, rank=2)
    assert outcome.is_right, outcome
    assert outcome.incident is not None
    assert outcome.incident.failure is FailureClass.USER
    assert "OOM" in outcome.incident.summary


async def test_a_network_that_is_cut(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No packets between two workers: hung, nobody is blamed, a node check is proposed; then all is well again."""
    async with a_gang(tmp_path_factory.mktemp("network"), ground=Ground.NETWORK) as gang:
        await gang.launch()
        outcome = await inject(KINDS["cut-network"], gang, rank=1)
        assert outcome.is_right, outcome
        assert outcome.incident is not None
        assert any("node check" in reason for reason in outcome.incident.verdict.reasons)
        await gang.launch()
        outcome = await inject(KINDS["stop"], gang, rank=1)
        assert outcome.is_right, outcome


async def test_a_clock_that_is_set_back(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The wall clock of agents and ranks goes back by an hour: nothing is seen in it, and what goes wrong then is."""
    async with a_gang(tmp_path_factory.mktemp("clock"), ground=Ground.CLOCK) as gang:
        await gang.launch()
        assert all(map(gang.has_its_clock, gang.ranks()))
        outcome = await inject(KINDS["clock-back"], gang, rank=1)
        assert outcome.is_right, outcome
        assert gang.wall_clock() < time.time() - 3000
        outcome = await inject(KINDS["stop"], gang, rank=1)
        assert outcome.is_right, outcome


def test_every_kind_is_tested_on_some_ground() -> None:
    """A kind that is added for a special ground must be given a test above."""
    assert {kind.name for kind in KINDS.values()} - set(ON_PLAIN_GROUND) == {"oom", "cut-network", "clock-back"}
