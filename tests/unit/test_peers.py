"""Whose state a gang goes on from when some of its ranks were replaced."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mend.environment import ENV_ATTEMPT, ENV_FOOTING, ENV_ORDERS_FD
from mend.orders import Rejoin
from mend.protocol import encode
from mend_trainer.bundle import Bundle
from mend_trainer.connections import Connections
from mend_trainer.footing import Footing, FootingPage, create_footing, read_inherited
from mend_trainer.membership import Membership
from mend_trainer.orders import Orders
from mend_trainer.peers import Source, Standing, choose_source
from mend_trainer.rejoining import Rejoining

SAME, OTHER = 7, 8


def a_survivor(step: int, *, draws: bool = True) -> Standing:
    """Its model is that of `step`; it drew random numbers in the last step, or did not."""
    return Standing(step=step, drawn={step - 1: SAME, step: OTHER if draws else SAME})


def a_newcomer(step: int, *, draws: bool = True) -> Standing:
    """In the place of a rank whose last completed step was this one."""
    return Standing(step=-1, drawn={step - 1: SAME, step: OTHER if draws else SAME})


CASES: dict[str, tuple[list[Standing], int, Source | None]] = {
    "all completed the same step": ([a_survivor(9), a_newcomer(9), a_survivor(9)], 4, Source(rank=0, step=9)),
    "the first is the new one": ([a_newcomer(9), a_survivor(9)], 4, Source(rank=1, step=9)),
    "the newest state counts": ([a_survivor(8, draws=False), a_survivor(9, draws=False)], 4, Source(rank=1, step=9)),
    "the lost rank was a step behind, and draws": ([a_survivor(9), a_newcomer(8)], 4, None),
    "a step behind, but nobody draws": (
        [a_survivor(9, draws=False), a_newcomer(8, draws=False)],
        4,
        Source(rank=0, step=9),
    ),
    "a survivor a step behind, and draws": ([a_survivor(9), a_survivor(8)], 4, None),
    "nobody's model is whole": ([a_newcomer(9), a_newcomer(9)], 4, None),
    "the footing of the lost rank is lost": ([a_survivor(9), Standing()], 4, None),
    "a newer checkpoint is there": ([a_survivor(9), a_newcomer(9)], 10, None),
    "no step was ever completed": ([Standing(), Standing()], -1, None),
    "no checkpoint yet": ([a_survivor(3), a_newcomer(3)], -1, Source(rank=0, step=3)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_source(case: str) -> None:
    """A state is taken only if every rank can go on from it exactly."""
    standings, newest_saved, source = CASES[case]
    assert choose_source(standings, newest_saved) == source


def a_footing(step: int, size: int = 100) -> Footing:
    """Of a step, with generators of so many bytes."""
    return Footing(step=step, tokens=step * 10, values={"loader": {"at": step}}, generators={"torch": b"x" * size})


def test_the_last_two_steps_are_kept(tmp_path: Path) -> None:
    """Each step is written over the older of two; what is too large is refused and leaves both."""
    create_footing(tmp_path / "footing")
    page = FootingPage(tmp_path / "footing")
    assert page.read() == ()
    for step in range(5):
        assert page.keep(a_footing(step))
    assert page.read() == (a_footing(3), a_footing(4))
    assert not page.keep(a_footing(5, size=1 << 20))
    assert FootingPage(tmp_path / "footing").read() == (a_footing(3), a_footing(4))


def test_a_torn_footing_is_none(tmp_path: Path) -> None:
    """Of a step that was being written when the rank was killed, nothing is believed; the one before is whole."""
    path = tmp_path / "footing"
    create_footing(path)
    page = FootingPage(path)
    page.keep(a_footing(1))
    page.keep(a_footing(2))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 + 40] ^= 1
    path.write_bytes(raw)
    assert FootingPage(path).read() == (a_footing(1),)


def test_a_new_rank_inherits(tmp_path: Path) -> None:
    """Who takes a place finds what the rank before has kept there, though its own page is empty."""
    path = tmp_path / "footing"
    create_footing(path)
    FootingPage(path).keep(a_footing(3))
    create_footing(path)
    assert FootingPage(path).read() == ()
    assert read_inherited(path) == (a_footing(3),)


class Home(torch.optim.SGD):
    """An optimizer of one's own, which writes past torch's version counters."""

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(1.0)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, Home])
def test_a_step_that_was_not_completed_makes_a_model_unclean(
    optimizer: type[torch.optim.Optimizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever optimizer has stepped, and whatever wrote to a buffer: only a completed step makes the model clean."""
    create_footing(tmp_path / "footing")
    read, write = os.pipe()
    monkeypatch.setenv(ENV_FOOTING, str(tmp_path / "footing"))
    monkeypatch.setenv(ENV_ORDERS_FD, str(read))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), init_sync=False)
        steps = optimizer(model.parameters(), lr=0.1)  # type: ignore[call-arg]
        mine = Rejoining(Bundle(rank=0, model=model, optimizer=steps), Membership(torch.device("cpu")))
        assert mine.offer()
        assert not mine.is_clean
        for number in range(2):
            mine.completed(number, 0)
            assert mine.is_clean
            model(torch.ones(3, 2)).sum().backward()
            assert not mine.is_clean  # the buffers of the norm
            mine.completed(number, 0)
            steps.step()
            assert not mine.is_clean
    finally:
        dist.destroy_process_group()
        os.close(write)


def test_what_was_opened_meanwhile_is_cut_and_nothing_else() -> None:
    """Connections that were recorded break on both ends; others, and sockets that listen, stay."""
    connections = Connections()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        with socket.create_connection(address) as mine, server.accept()[0] as other:
            with connections.recorded():
                recorded = socket.create_connection(address)
                listening = socket.create_server(("127.0.0.1", 0))
            with recorded, server.accept()[0] as peer, listening:
                assert connections.cut() == 1
                assert (recorded.recv(1), peer.recv(1)) == (b"", b"")
                assert connections.cut() == 0
                socket.create_connection(listening.getsockname()).close()
            mine.sendall(b"x")
            assert other.recv(1) == b"x"


def test_a_number_that_a_file_has_taken_over_is_left_alone() -> None:
    """A recorded socket may be closed, and its number be a file's by the time all are cut: not even looked at."""
    connections = Connections()
    with connections.recorded():
        mine, other = socket.socketpair()
    taken = mine.detach()
    with open(os.devnull, "rb") as file, other:  # noqa: PTH123 - a descriptor is what is wanted
        os.dup2(file.fileno(), taken)
        assert connections.cut() == 1  # the other one
        os.close(taken)


def test_an_order_that_was_obeyed_is_not_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orders are repeated: a copy that came while the first was being obeyed must not lead back into that attempt."""
    read, write = os.pipe()
    heard = threading.Semaphore(0)
    monkeypatch.setenv(ENV_ATTEMPT, "1")
    try:
        orders = Orders(read, heard.release)
        os.write(write, encode(Rejoin(attempt=2, env={})) + b"\n")
        assert heard.acquire(timeout=20)
        assert orders.take(0.0) is not None
        os.write(write, encode(Rejoin(attempt=2, env={})) + b"\n")
        assert heard.acquire(timeout=20)
        monkeypatch.setenv(ENV_ATTEMPT, "2")  # it goes on in attempt 2, then a peer is lost
        assert orders.take(0.0) is None
        os.write(write, encode(Rejoin(attempt=3, env={})) + b"\n")
        order = orders.take(20.0)
        assert order is not None
        assert order.attempt == 3
    finally:
        os.close(write)
