"""Copies of snapshots to a buddy: how fast they are over TLS, and what they cost the training beside them.

Everything is on this machine, over loopback: a worker sends its own copies and takes in another's, so its cores bear
both ends, as here. Rounds of all kinds take turns. `checkpoint.py` shows these rows among the others.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection as Pipe
from typing import Any, Final

import with_tests  # noqa: F401
from figures import Row, arguments, publish, row

from mend.states import Holder
from mend.store.parallel import each
from mend_trainer.checkpoint.arena import Arena, Snapshot
from mend_trainer.checkpoint.layout import Block
from mend_trainer.checkpoint.sources import data_key, sheet_of
from mend_trainer.checkpoint.writer import digest_of
from mend_trainer.copies.client import Connection, pieces_of, spans
from mend_trainer.copies.sender import Sender
from mend_trainer.copies.server import SnapshotServer, listen
from mend_trainer.copies.sheets import encode_sheet, size_of
from mend_trainer.copies.shelf import ArenaShelf
from mend_trainer.copies.source import PeerSource
from mend_trainer.copies.tls import read_run_tls
from run_secrets import run_pem
from snapshots_made import RUN_UID, a_header, save_id

MIB: Final = 1 << 20
TOKEN: Final = "token"
BLOCK_BYTES: Final = 16 * MIB
CAP: Final = 32 * MIB
NICENESS: Final = 10  # of a saver
TRAINERS: Final = 2


def rows(quick: bool) -> list[Row]:
    """All figures of copies."""
    return [*speed(quick), *slowdown(quick)]


# ---------------------------------------------------------------- how fast
def speed(quick: bool) -> list[Row]:
    """Seconds per GiB, to give a copy and to fetch one, beside plain TCP and memcpy of the same bytes."""
    size, rounds = (128 * MIB, 3) if quick else (512 * MIB, 9)
    arena = Arena.create("own")
    seconds: dict[str, list[float]] = {"give": [], "fetch": [], "tcp": [], "memcpy": []}
    target = bytearray(size)
    with _process(_keep) as keeper, _process(_swallow, size) as swallower:
        url, port = keeper.recv(), swallower.recv()
        tls = read_run_tls(run_pem_of(keeper))
        for number in range(rounds + 2):  # the first two fill both slots on both sides
            snapshot = _a_snapshot(arena, number, size)
            taken = {
                "give": _timed(_give, url, tls, snapshot),
                "fetch": _timed(_fetch, url, tls, snapshot, memoryview(target)),
                "tcp": _timed(_send_plainly, port, snapshot.data),
                "memcpy": _timed(_copy, target, snapshot.data),
            }
            if number >= 2:
                for kind, spent in taken.items():
                    seconds[kind].append(spent * (1 << 30) / size)
    beside: dict[str, Any] = {
        "plain TCP": round(statistics.median(seconds["tcp"]), 4),
        "memcpy": round(statistics.median(seconds["memcpy"]), 4),
    }
    note = "both ends on this machine, digests checked"
    return [
        row("copy of a snapshot to the buddy over TLS, per GiB", seconds["give"], 2.0, peers=beside, note=note),
        row("snapshot fetched from a holder over TLS, per GiB", seconds["fetch"], 2.0, peers=beside, note=note),
    ]


def _give(url: str, tls: Any, snapshot: Snapshot) -> None:
    sheet = sheet_of(snapshot)
    assert sheet is not None
    connection = Connection(url, tls, TOKEN)
    connection.send(encode_sheet(sheet), pieces_of(snapshot.data), size_of(sheet))
    connection.close()


def _fetch(url: str, tls: Any, snapshot: Snapshot, target: memoryview) -> None:
    """As a rank restores: block by block, a few at a time, each proven."""
    save, rank = snapshot.header.save_id, snapshot.header.rank
    source = PeerSource([Holder(save_id=save, rank=rank, worker=1, url=url)], tls, TOKEN)

    def fetch(span: tuple[int, int]) -> None:
        source.get_into(data_key(save, rank), target[span[0] : span[1]], span[0])

    each(fetch, spans(len(target), BLOCK_BYTES), 4)
    source.close()


def _send_plainly(port: int, data: memoryview) -> None:
    with socket.create_connection(("127.0.0.1", port)) as plain:
        plain.sendall(data)
        assert plain.recv(1) == b"k"


def _copy(target: bytearray, data: memoryview) -> None:
    target[:] = data


# ---------------------------------------------------------------- what it costs the training
def slowdown(quick: bool) -> list[Row]:
    """How much longer steps are while copies go out and come in, with the cap and without."""
    size, rounds, seconds = (64 * MIB, 3, 2.0) if quick else (256 * MIB, 8, 5.0)
    steps: dict[str, list[float]] = {"idle": [], "capped": [], "uncapped": []}
    with _process(_keep) as keeper, _process(_send, size) as sender, _trainers() as trainers:
        url = keeper.recv()
        sender.send((url, run_pem_of(keeper)))
        sender.recv()
        for _ in range(rounds):
            for kind, rate in (("idle", -1), ("capped", CAP), ("uncapped", 0)):
                sender.send(rate)
                for trainer in trainers:
                    trainer.send(seconds)
                steps[kind].append(statistics.median(step for trainer in trainers for step in trainer.recv()))
    idle = statistics.median(steps["idle"])
    share = {kind: [100 * (step / idle - 1) for step in steps[kind]] for kind in steps}
    return [
        row(
            f"steps longer while copies go at {CAP // MIB} MiB/s, {TRAINERS} ranks",
            share["capped"],
            5.0,
            unit="%",
            peers={"without a cap": round(statistics.median(share["uncapped"]), 2)},
            note=f"spread of idle rounds: {min(share['idle']):.1f}..{max(share['idle']):.1f} %",
        )
    ]


@contextmanager
def _trainers() -> Iterator[list[Pipe]]:
    with _process(_train) as first, _process(_train) as second:
        yield [first, second]


def _train(pipe: Pipe) -> None:
    """Steps of some 20 ms on one core, for as long as it is told; their lengths."""
    import torch

    torch.set_num_threads(1)
    matrix = torch.randn(256, 256)
    while True:
        try:
            ends_at = time.monotonic() + pipe.recv()
        except EOFError:
            return
        lengths = []
        while time.monotonic() < ends_at:
            began = time.perf_counter()
            for _ in range(40):
                torch.mm(matrix, matrix)
            lengths.append(time.perf_counter() - began)
        pipe.send(lengths)


def _send(pipe: Pipe, size: int) -> None:
    """A saver whose rank takes a snapshot whenever the one before has gone, at the rate that it is told (-1: none)."""
    os.nice(NICENESS)
    url, pem = pipe.recv()
    sender = Sender(read_run_tls(pem), TOKEN)
    arena = Arena.create("own")
    snapshots = [_a_snapshot(arena, number, size) for number in range(2)]
    pipe.send("ready")
    number, rate = 2, -1
    while True:
        if pipe.poll(0.01):
            try:
                rate = pipe.recv()
            except EOFError:
                return
            sender.follow("" if rate < 0 else url, max(0, rate))
        if rate >= 0 and sender.is_idle:
            snapshots[number % 2] = _a_snapshot(arena, number, size)
            sender.offer(snapshots[number % 2])
            number += 1


# ---------------------------------------------------------------- the processes
def _keep(pipe: Pipe) -> None:
    """A saver that takes in copies."""
    os.nice(NICENESS)
    copies = [Arena.create(f"copies-{number}") for number in range(1)]
    pem = run_pem()
    listener = listen("127.0.0.1")
    SnapshotServer(listener, read_run_tls(pem), TOKEN, ArenaShelf([], copies, run_uid=RUN_UID))
    pipe.send(f"https://127.0.0.1:{listener.getsockname()[1]}")
    pipe.send(pem)
    _until_closed(pipe)


def run_pem_of(keeper: Pipe) -> str:
    """The certificate that it made."""
    return str(keeper.recv())


def _swallow(pipe: Pipe, size: int) -> None:
    """Takes in bytes over plain TCP."""
    os.nice(NICENESS)
    room = memoryview(bytearray(size))
    listener = socket.create_server(("127.0.0.1", 0))
    pipe.send(listener.getsockname()[1])

    def swallow() -> None:
        while True:
            plain, _ = listener.accept()
            done = 0
            while done < size:
                done += plain.recv_into(room[done : done + MIB])
            plain.sendall(b"k")
            plain.close()

    threading.Thread(target=swallow, daemon=True).start()
    _until_closed(pipe)


def _until_closed(pipe: Pipe) -> None:
    try:
        pipe.recv()
    except EOFError:
        return


@contextmanager
def _process(target: Callable[..., None], *more: Any) -> Iterator[Pipe]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *more), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join(5)
        process.kill()
        process.join()


def _a_snapshot(arena: Arena, number: int, size: int) -> Snapshot:
    """Of whatever the slot holds: what the bytes are does not matter, only that they are proven."""
    blocks = tuple(
        Block(
            name=f"t{start}",
            path=(f"t{start}",),
            dtype="uint8",
            shape=(end - start,),
            offsets=(0,),
            sizes=(end - start,),
        )
        for start, end in spans(size, BLOCK_BYTES)
    )
    draft = arena.begin(blocks)
    assert draft is not None
    draft.data[:1024] = os.urandom(1024)
    header = a_header(blocks, 0, 1, number, 1, RUN_UID)
    assert header.save_id == save_id(1, number)
    snapshot = draft.publish(header, owed=False)
    snapshot.add_digests([digest_of(draft.raw(index)) for index in range(len(blocks))])
    return snapshot


def _timed(work: Callable[..., None], *given: Any) -> float:
    began = time.perf_counter()
    work(*given)
    return time.perf_counter() - began


if __name__ == "__main__":
    options = arguments(__doc__ or "")
    sys.exit(publish("Copies of snapshots to a buddy", rows(options.quick), options))
