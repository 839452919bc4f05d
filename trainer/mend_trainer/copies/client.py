"""One connection to another worker's saver: asks for what it holds, or gives it a copy."""

from __future__ import annotations

import http.client
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import Final
from urllib.parse import urlsplit

import msgspec

from mend.states import Held
from mend_trainer.copies.tls import RunTls
from mend_trainer.copies.wire import (
    BESIDE_HEADER,
    BYTES_NAME,
    CONNECT_SECONDS,
    COPIES_PATH,
    IDLE_SECONDS,
    LISTING_BYTES,
    PIECE_BYTES,
    SHEET_BYTES,
    SILENCE_SECONDS,
    SNAPSHOTS_PATH,
    Refused,
    authorization,
    snapshot_path,
)

_REASON_BYTES: Final = 1000
_decode_listing = msgspec.json.Decoder(tuple[Held, ...]).decode


class Unreachable(ConnectionError):
    """No answer, or none that can be understood: nothing is known about what lies there."""

    @property
    def was_silent(self) -> bool:
        """Whether nothing was heard at all, for as long as one waits."""
        return isinstance(self.__cause__, TimeoutError)


class Connection:
    """Requests to the saver at `url`, one after the other. Each raises `Unreachable` or `Refused`."""

    def __init__(self, url: str, tls: RunTls, token: str) -> None:
        self.url = url
        self._tls, self._token = tls, token
        self._used_at = time.monotonic()
        host, port = _place(url)
        self._http = http.client.HTTPSConnection(
            host, port, timeout=CONNECT_SECONDS, context=tls.asking, blocksize=PIECE_BYTES
        )

    def listing(self) -> tuple[Held, ...]:
        """What lies whole there."""
        with self._translated():
            try:
                return _decode_listing(self._get(SNAPSHOTS_PATH, LISTING_BYTES))
            except msgspec.MsgspecError as error:
                raise Unreachable(f"{self.url}: its listing: {error}") from error

    def sheet(self, save_id: str, rank: int) -> bytes:
        """What has to be known of a snapshot, sealed."""
        with self._translated():
            return self._get(snapshot_path(save_id, rank), SHEET_BYTES)

    def read_into(self, save_id: str, rank: int, start: int, room: memoryview) -> None:
        """The snapshot's bytes from `start` on, as many as there is room for."""
        if not len(room):
            return
        wanted = f"bytes={start}-{start + len(room) - 1}"
        with self._translated():
            answer = self._ask("GET", snapshot_path(save_id, rank, BYTES_NAME), {"Range": wanted})
            self._expect(answer, HTTPStatus.PARTIAL_CONTENT)
            if answer.length != len(room):
                raise Unreachable(f"{self.url}: {answer.length} bytes where {len(room)} were asked for")
            done = 0
            while done < len(room):
                length = answer.readinto(room[done : done + PIECE_BYTES])
                if not length:
                    raise Unreachable(f"{self.url}: closed after {done} of {len(room)} bytes")
                done += length

    def send(
        self,
        sheet: bytes,
        pieces: Iterator[memoryview],
        size: int,
        *,
        beside: str = "",
        before_answer: Callable[[], None] = lambda: None,
    ) -> None:
        """Give it a copy; `pieces` make up its `size` bytes, and may take their time.

        The copy of the save `beside` is not the one that makes room for it.
        """
        with self._translated():
            about = {BESIDE_HEADER: beside} if beside else {}
            self._expect(self._ask("POST", COPIES_PATH, about, sheet), HTTPStatus.ACCEPTED).read()
            self._put(pieces, size)
            before_answer()
            self._expect(self._http.getresponse(), HTTPStatus.CREATED).read()

    @property
    def is_fresh(self) -> bool:
        """Whether the other end still waits for requests on it, most likely."""
        return time.monotonic() - self._used_at < IDLE_SECONDS

    def close(self) -> None:
        """Done with it."""
        self._http.close()

    # ------------------------------------------------------------ one request
    def _put(self, pieces: Iterator[memoryview], size: int) -> None:
        self._begin("PUT", COPIES_PATH, {"Content-Length": str(size)})
        try:
            for piece in pieces:
                self._http.send(piece)
        except (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
            self._expect(self._http.getresponse(), HTTPStatus.CREATED)  # it may have said why
            raise

    def _get(self, path: str, most: int) -> bytes:
        answer = self._expect(self._ask("GET", path, {}), HTTPStatus.OK)
        body = answer.read(most + 1)
        if len(body) > most:
            raise Unreachable(f"{self.url}: more than {most} bytes at {path}")
        return body

    def _ask(self, method: str, path: str, about: dict[str, str], body: bytes = b"") -> http.client.HTTPResponse:
        self._begin(method, path, {**about, "Content-Length": str(len(body))})
        if body:
            self._http.send(body)
        return self._http.getresponse()

    def _begin(self, method: str, path: str, about: dict[str, str]) -> None:
        if self._http.sock is None:
            self._connect()
        self._http.putrequest(method, path, skip_accept_encoding=True)
        for name, value in {"Authorization": authorization(self._token), **about}.items():
            self._http.putheader(name, value)
        self._http.endheaders()

    def _connect(self) -> None:
        self._http.connect()
        assert isinstance(self._http.sock, ssl.SSLSocket)
        self._http.sock.settimeout(SILENCE_SECONDS)
        self._tls.check(self._http.sock)

    def _expect(self, answer: http.client.HTTPResponse, status: HTTPStatus) -> http.client.HTTPResponse:
        if answer.status != status:
            reason = answer.read(_REASON_BYTES).decode(errors="replace").strip() or answer.reason
            self.close()
            raise Refused(f"{self.url}: {reason}", _status(answer.status))
        return answer

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
            self._used_at = time.monotonic()
        except Unreachable:
            self.close()
            raise
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise Unreachable(f"{self.url}: {getattr(error, 'reason', '') or error or type(error).__name__}") from error


def _place(url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port or parts.scheme != "https":
        raise Unreachable(f"{url!r} is no place of a saver; expected https://HOST:PORT")
    return host, port


def pieces_of(data: memoryview, length: int = PIECE_BYTES) -> Iterator[memoryview]:
    """The same bytes, so many at a time."""
    return (data[start : start + length] for start in range(0, len(data), length))


def _status(number: int) -> HTTPStatus:
    try:
        return HTTPStatus(number)
    except ValueError:
        return HTTPStatus.BAD_GATEWAY


def spans(size: int, length: int) -> Sequence[tuple[int, int]]:
    """First byte and end of the ranges of at most `length` that make up `size` bytes."""
    return [(start, min(size, start + length)) for start in range(0, size, length)]
