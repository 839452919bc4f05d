"""Copies over real sockets: who is let in, what is taken, what is served, and what becomes of everything else."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from http import HTTPStatus

import msgspec
import pytest

from copies_worker import TOKEN, Worker, a_worker
from mend.states import Holder
from mend.store import NotFound
from mend_trainer.checkpoint.arena import Arena, Snapshot
from mend_trainer.checkpoint.sources import Sheet, data_key, sheet_key, sheet_of
from mend_trainer.copies.client import Connection, Unreachable, pieces_of
from mend_trainer.copies.sheets import encode_sheet, size_of
from mend_trainer.copies.source import PeerSource
from mend_trainer.copies.tls import BadCertificate, RunTls, read_run_tls
from mend_trainer.copies.wire import Refused
from run_secrets import run_pem
from snapshots_made import RUN_UID, a_snapshot, contents, save_id


@pytest.fixture
def tls() -> RunTls:
    """The run's."""
    return read_run_tls(run_pem())


@pytest.fixture
def own() -> Arena:
    """The arena of a rank elsewhere, whose snapshots are sent."""
    return Arena.create("sent")


def give(worker: Worker, snapshot: Snapshot, tls: RunTls, beside: str = "") -> None:
    """Send a copy as it is."""
    sheet = sheet_of(snapshot)
    assert sheet is not None
    connection = Connection(worker.url, tls, TOKEN)
    try:
        connection.send(encode_sheet(sheet), pieces_of(snapshot.data), size_of(sheet), beside=beside)
    finally:
        connection.close()


# ---------------------------------------------------------------- who is let in
def test_a_peer_of_the_run_is_answered(tls: RunTls) -> None:
    """Whoever has the run's certificate and token sees what a worker holds, whatever the clocks say."""
    with a_worker() as worker:
        a_snapshot(worker.own[0], rank=0)
        a_snapshot(worker.own[1], rank=1)
        (held,) = Connection(worker.url, tls, TOKEN).listing()
    assert (held.save_id, held.ranks, held.step, held.world_size) == (save_id(1, 10), (0, 1), 10, 4)


def test_another_certificate_is_refused_by_both_ends(tls: RunTls) -> None:
    """A peer with the certificate of another run gets nothing, and trusts nobody of this one."""
    with a_worker() as worker:
        with pytest.raises(Unreachable, match=r"certificate|CERTIFICATE"):
            Connection(worker.url, read_run_tls(run_pem("another")), TOKEN).listing()
        mixed = RunTls(_trusting(tls, run_pem("another")), _trusting(tls, run_pem("another")), tls.certificate)
        with pytest.raises(Unreachable, match=r"ALERT|alert|UNKNOWN_CA|closed|reset|EOF"):
            Connection(worker.url, mixed, TOKEN).listing()
        assert Connection(worker.url, tls, TOKEN).listing() == ()


def _trusting(tls: RunTls, pem: str) -> ssl.SSLContext:
    """A client that would believe the run's server, but shows another certificate."""
    other = read_run_tls(pem).asking
    other.load_verify_locations(cadata=ssl.DER_cert_to_PEM_cert(tls.certificate))
    return other


def test_no_certificate_and_no_tls_are_refused(tls: RunTls) -> None:
    """Without a certificate of one's own there is no answer, nor without TLS."""
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname = False
    bare.verify_mode = ssl.CERT_NONE
    with a_worker() as worker:
        with pytest.raises(Unreachable, match=r"CERTIFICATE_REQUIRED|closed|reset|EOF"):
            Connection(worker.url, RunTls(bare, bare, tls.certificate), TOKEN).listing()
        with socket.create_connection(("127.0.0.1", worker.port)) as plain:
            plain.sendall(b"GET /v1/snapshots HTTP/1.1\r\n\r\n")
            plain.settimeout(10)
            with contextlib.suppress(ConnectionResetError):
                assert b"HTTP" not in plain.recv(1000)
        assert Connection(worker.url, tls, TOKEN).listing() == ()


def test_older_tls_is_refused(tls: RunTls) -> None:
    """Nothing below TLS 1.3 is spoken."""
    old = read_run_tls(run_pem()).asking
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with a_worker() as worker, pytest.raises(Unreachable, match=r"VERSION|version"):
        Connection(worker.url, RunTls(old, old, tls.certificate), TOKEN).listing()


@pytest.mark.parametrize("token", ["", "wrong", "token-of-the-run", TOKEN[:-1]])
def test_another_token_is_refused(tls: RunTls, token: str) -> None:
    """The certificate alone does not open a worker, and the token that gives orders does not either."""
    with a_worker() as worker, pytest.raises(Refused, match="token is missing or wrong") as refused:
        Connection(worker.url, tls, token).listing()
    assert refused.value.status is HTTPStatus.UNAUTHORIZED


@pytest.mark.parametrize("pem", ["", "nonsense", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"])
def test_a_certificate_that_is_none_is_named(pem: str) -> None:
    """An unusable secret is told by the name of its variable."""
    with pytest.raises(BadCertificate, match="MEND_TLS_PEM"):
        read_run_tls(pem)


# ---------------------------------------------------------------- copies that come
def test_a_copy_is_bit_for_bit_what_was_sent(tls: RunTls, own: Arena) -> None:
    """A copy has the header, the digests and the bytes of the snapshot, and is held from then on."""
    snapshot = a_snapshot(own, rank=3, lengths=(1000, 700_000, 0, 5))
    with a_worker() as worker:
        give(worker, snapshot, tls)
        copy = worker.copy_of(3)
        assert (copy.header, copy.digests) == (snapshot.header, snapshot.digests)
        assert contents(copy) == contents(snapshot)
        assert not copy.is_owed
        assert [held.ranks for held in worker.shelf.held()] == [(3,)]


def test_the_last_two_copies_are_kept(tls: RunTls, own: Arena) -> None:
    """A copy takes the place of the oldest of its rank; the newest whole one is never touched by the next."""
    with a_worker() as worker:
        for step in (10, 20, 30):
            give(worker, a_snapshot(own, step=step), tls)
        assert [held.step for held in worker.shelf.held()] == [30, 20]


def test_a_copy_that_is_kept_is_not_sent_again(tls: RunTls, own: Arena) -> None:
    """A saver that starts anew and offers what is there already is told so before any byte."""
    snapshot = a_snapshot(own)
    with a_worker() as worker:
        give(worker, snapshot, tls)
        with pytest.raises(Refused, match="kept already") as refused:
            give(worker, snapshot, tls)
    assert refused.value.status is HTTPStatus.ALREADY_REPORTED


def test_a_copy_does_not_take_the_place_of_what_the_sender_has_beside_it(tls: RunTls, own: Arena) -> None:
    """While a snapshot that is owed stays in its arena, its copy stays as well, and the newer copies take turns."""
    with a_worker() as worker:
        give(worker, a_snapshot(own, step=10), tls)
        for step in (20, 30):
            give(worker, a_snapshot(own, step=step), tls, beside=save_id(1, 10))
        assert [held.step for held in worker.shelf.held()] == [30, 10]


@pytest.mark.parametrize(("attempt", "step"), [(1, 90), (2, 20)])
def test_an_older_copy_never_replaces_a_newer_one(tls: RunTls, own: Arena, attempt: int, step: int) -> None:
    """Neither an older attempt's copy, however far it came, nor an older step's of the same attempt is taken."""
    with a_worker() as worker:
        give(worker, a_snapshot(own, attempt=2, step=30), tls)
        with pytest.raises(Refused, match="attempt 2 step 30 is kept already"):
            give(worker, a_snapshot(own, attempt=attempt, step=step), tls)
        assert [held.step for held in worker.shelf.held()] == [30]


def test_a_newer_attempt_may_be_at_an_earlier_step(tls: RunTls, own: Arena) -> None:
    """What is newer is decided by the attempt: a run that was rolled back goes on being copied."""
    with a_worker() as worker:
        give(worker, a_snapshot(own, attempt=1, step=90), tls)
        give(worker, a_snapshot(own, attempt=2, step=30), tls)
        assert [(held.attempt, held.step) for held in worker.shelf.held()] == [(2, 30), (1, 90)]


def test_a_copy_of_another_run_is_refused(tls: RunTls, own: Arena) -> None:
    """A worker of the run that had this name before is told whose worker this is."""
    with a_worker() as worker, pytest.raises(Refused, match=f"this is a worker of '{RUN_UID}'"):
        give(worker, a_snapshot(own, run_uid="before"), tls)


def test_a_flipped_bit_on_the_way_is_noticed(tls: RunTls, own: Arena) -> None:
    """A copy whose bytes do not have their digests is refused by the block's name, and the one before it stays."""
    with a_worker() as worker:
        give(worker, a_snapshot(own, step=10), tls)
        flipped = a_snapshot(own, step=20)
        flipped.raw(1)[500] ^= 1
        with pytest.raises(Refused, match="tensor-1: the bytes do not have their digest") as refused:
            give(worker, flipped, tls)
        assert refused.value.status is HTTPStatus.UNPROCESSABLE_ENTITY
        assert [held.step for held in worker.shelf.held()] == [10]
        give(worker, a_snapshot(own, step=30), tls)
        assert [held.step for held in worker.shelf.held()] == [30, 10]


def test_a_transfer_that_breaks_off_leaves_nothing(tls: RunTls, own: Arena) -> None:
    """A sender that dies in the middle leaves a torn slot, which nobody is told of and the next copy takes."""
    with a_worker() as worker:
        give(worker, a_snapshot(own, step=10), tls)

        def dies() -> Iterator[memoryview]:
            yield broken.data[:1000]
            raise ConnectionAbortedError("killed")

        broken = a_snapshot(own, step=20)
        sheet = sheet_of(broken)
        assert sheet is not None
        with pytest.raises(Unreachable):
            Connection(worker.url, tls, TOKEN).send(encode_sheet(sheet), dies(), size_of(sheet))
        assert [held.step for held in worker.shelf.held()] == [10]
        eventually_taken(worker, a_snapshot(own, step=30), tls)
        assert [held.step for held in worker.shelf.held()] == [30, 10]


def eventually_taken(worker: Worker, snapshot: Snapshot, tls: RunTls) -> None:
    """Send it, as the sender does, until the server has noticed the end of the transfer before."""
    for _ in range(1000):
        try:
            return give(worker, snapshot, tls)
        except Refused as refused:
            if refused.status is not HTTPStatus.SERVICE_UNAVAILABLE:
                raise
    raise AssertionError("never taken")


def test_a_newer_attempt_takes_over_from_a_transfer_that_stalls(tls: RunTls, own: Arena) -> None:
    """Two attempts at once: the older one's transfer is ended, and the newer one's copy is what is kept."""
    with a_worker() as worker:
        old = a_snapshot(own, attempt=1, step=50)
        sheet = sheet_of(old)
        assert sheet is not None
        taken = False

        def stalls() -> Iterator[memoryview]:
            nonlocal taken
            yield old.data[:1000]
            newer = a_snapshot(own, attempt=2, step=20)
            with pytest.raises(Refused, match="ask again"):
                give(worker, newer, tls)
            yield old.data[1000:]
            taken = True

        with pytest.raises((Refused, Unreachable)):
            Connection(worker.url, tls, TOKEN).send(encode_sheet(sheet), stalls(), size_of(sheet))
        eventually_taken(worker, a_snapshot(own, attempt=2, step=21), tls)
        assert [(held.attempt, held.step) for held in worker.shelf.held()] == [(2, 21)]


def test_a_copy_that_does_not_fit_is_refused_in_words(tls: RunTls, own: Arena) -> None:
    """Where memory is short nothing is allocated, and the sender learns why."""
    asked: list[int] = []

    def none_left(size: int) -> str:
        asked.append(size)
        return f"{size} bytes more do not fit"

    snapshot = a_snapshot(own)
    with a_worker(room_for=none_left) as worker:
        with pytest.raises(Refused, match="more do not fit") as refused:
            give(worker, snapshot, tls)
        assert refused.value.status is HTTPStatus.INSUFFICIENT_STORAGE
    assert asked == [2 * len(snapshot.data) - 4096]


def test_copies_of_more_ranks_than_there_is_room_for_are_refused(tls: RunTls, own: Arena) -> None:
    """One arena per rank: another rank of the same attempt is refused, one of a newer attempt takes an old one's."""
    with a_worker(copies=1) as worker:
        give(worker, a_snapshot(own, rank=0), tls)
        with pytest.raises(Refused, match="copies of 1 ranks, and all is taken"):
            give(worker, a_snapshot(own, rank=1, step=20), tls)
        give(worker, a_snapshot(own, rank=1, attempt=2, step=20), tls)
        assert [held.ranks for held in worker.shelf.held()] == [(1,), (0,)]


# ---------------------------------------------------------------- what is fetched
def a_source(tls: RunTls, *workers: str) -> PeerSource:
    """Of rank 0's snapshot of step 10, which these are said to hold."""
    return PeerSource(
        [Holder(save_id=SAVE, rank=0, worker=number, url=url) for number, url in enumerate(workers)], tls, TOKEN
    )


SAVE = save_id(1, 10)


def test_a_snapshot_is_fetched_by_ranges(tls: RunTls) -> None:
    """Any range of a snapshot can be had, and its sheet says what the blocks have to be."""
    with a_worker() as worker:
        snapshot = a_snapshot(worker.own[0])
        source = a_source(tls, worker.url)
        assert msgspec.json.decode(source.get(sheet_key(SAVE, 0)), type=Sheet) == sheet_of(snapshot)
        room = bytearray(60_000)
        source.get_into(data_key(SAVE, 0), memoryview(room), 1024)
        source.close()
        assert room == snapshot.data[1024:61_024]


def test_the_next_holder_is_asked_when_one_is_gone_or_lies(tls: RunTls) -> None:
    """A holder that is gone, has nothing or gives wrong bytes is passed over; not found is what nobody has."""
    with a_worker() as gone:
        pass
    with a_worker() as empty, a_worker() as lying, a_worker() as honest:
        a_snapshot(lying.own[0]).raw(1)[100] ^= 4
        snapshot = a_snapshot(honest.own[0])
        room = bytearray(len(snapshot.data))
        places = [gone.url, empty.url, lying.url, honest.url]
        a_source(tls, *places).get_into(data_key(SAVE, 0), memoryview(room))
        assert room == snapshot.data
        with pytest.raises(NotFound, match=r"no snapshot at .*tensor-1: the bytes do not have their digest"):
            a_source(tls, *places[:3]).get_into(data_key(SAVE, 0), memoryview(room))
        with pytest.raises(NotFound, match="no worker is known to hold it"):
            a_source(tls).get(sheet_key(SAVE, 0))


def test_a_holder_that_stops_in_the_middle_is_passed_over(tls: RunTls) -> None:
    """The rest of a range is had from another holder when one closes before its end."""
    with a_worker() as closing, a_worker() as honest:
        snapshots = [a_snapshot(worker.own[0], lengths=(64 << 20,)) for worker in (closing, honest)]
        source = a_source(tls, closing.url, honest.url)
        source.get(sheet_key(SAVE, 0))
        room = bytearray(64 << 20)
        first = snapshots[0].raw(0)[:1]
        threading.Thread(target=lambda: closing.server.close() if _arrives(room, first) else None).start()
        source.get_into(data_key(SAVE, 0), memoryview(room))
        assert room == snapshots[1].data


def _arrives(room: bytearray, first: memoryview) -> bool:
    """Wait until the first byte is there, which is not zero."""
    assert first[0]
    while room[0] != first[0]:
        pass
    return True


def test_a_range_that_is_none_is_refused(tls: RunTls) -> None:
    """What lies beyond the end is not served."""
    with a_worker() as worker:
        snapshot = a_snapshot(worker.own[0])
        with pytest.raises(Refused, match="expected bytes=FIRST-LAST") as refused:
            Connection(worker.url, tls, TOKEN).read_into(
                save_id(1, 10), 0, len(snapshot.data) - 5, memoryview(bytearray(6))
            )
        assert refused.value.status is HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
        with pytest.raises(Refused, match="no snapshot at"):
            Connection(worker.url, tls, TOKEN).sheet(save_id(1, 11), 0)


# ---------------------------------------------------------------- whatever else is said
LET_IN = f"Authorization: Bearer {TOKEN}\r\n"


@pytest.mark.parametrize(
    "said",
    [
        "\r\n",
        "GET\r\n\r\n",
        "GET /v1/snapshots\r\n",
        "GET / HTTP/9.9\r\n\r\n",
        "\x00\xff\r\n\r\n",
        "A" * 100_000 + "\r\n",
        "GET /v1/snapshots HTTP/1.1\r\n" + "x: y\r\n" * 500 + "\r\n",
        f"DELETE /v1/copies HTTP/1.1\r\n{LET_IN}\r\n",
        f"GET /v1/snapshots/../../etc/passwd/0 HTTP/1.1\r\n{LET_IN}\r\n",
        f"GET /v1/snapshots/{'a' * 32}/{'9' * 9}/bytes HTTP/1.1\r\n{LET_IN}Range: bytes=5-1\r\n\r\n",
        f"POST /v1/copies HTTP/1.1\r\n{LET_IN}\r\n",
        f"POST /v1/copies HTTP/1.1\r\n{LET_IN}Content-Length: {10**17}\r\n\r\n",
        f"POST /v1/copies HTTP/1.1\r\n{LET_IN}Content-Length: -1\r\n\r\n",
        f"POST /v1/copies HTTP/1.1\r\n{LET_IN}Content-Length: ²\r\n\r\n",
        f"POST /v1/copies HTTP/1.1\r\n{LET_IN}Content-Length: 3\r\n\r\n{{}}\n",
        f"POST /v1/copies HTTP/1.1\r\n{LET_IN}Content-Length: 1000\r\n\r\nthen gone",
        f"PUT /v1/copies HTTP/1.1\r\n{LET_IN}Content-Length: 3\r\n\r\nabc",
        f"POST /v1/copies HTTP/1.1\r\n{LET_IN}Transfer-Encoding: chunked\r\n\r\nffffffff\r\n",
    ],
)
def test_nonsense_ends_its_own_connection_only(tls: RunTls, said: str) -> None:
    """Whatever is said instead of a request, even by a peer of the run, is answered with words or with the end."""
    with a_worker() as worker:
        with socket.create_connection(("127.0.0.1", worker.port)) as plain, tls.asking.wrap_socket(plain) as secure:
            secure.settimeout(20)
            with contextlib.suppress(OSError):
                secure.sendall(said.encode("utf-8", "surrogateescape"))
                plain_end = secure.unwrap if "gone" in said else lambda: None
                with contextlib.suppress(OSError):
                    plain_end()
                answer = secure.recv(1000)
                assert not answer.startswith((b"HTTP/1.1 2", b"HTTP/1.0 2")), answer
        assert Connection(worker.url, tls, TOKEN).listing() == ()
        assert all(os.fstat(arena.descriptor).st_blocks * 512 == 4096 for arena in worker.copies), "nothing was taken"


def test_more_connections_than_a_worker_needs_are_refused(tls: RunTls) -> None:
    """Threads are bounded: who comes beyond that is sent away, and served once others have left."""
    with a_worker(connections=8) as worker, contextlib.ExitStack() as crowd:
        for _ in range(8):
            crowd.enter_context(socket.create_connection(("127.0.0.1", worker.port)))
        with pytest.raises(Unreachable):
            Connection(worker.url, tls, TOKEN).listing()
        crowd.close()
        for _ in range(1000):  # they leave one after the other
            with contextlib.suppress(Unreachable):
                assert Connection(worker.url, tls, TOKEN).listing() == ()
                return
        raise AssertionError("nobody is served any more")
