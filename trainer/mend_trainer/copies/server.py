"""Serves what lies in a worker's memory to the workers of its run, and takes in copies, one thread a connection.

Plain threads and sockets: bytes are decrypted straight into the arena and encrypted straight from it, without the GIL;
an event loop would copy each of them twice more.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import re
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, Final, Protocol

import msgspec

from mend.states import Held
from mend_trainer.copies.tls import RunTls, WrongPeer
from mend_trainer.copies.wire import (
    BESIDE_HEADER,
    BYTES_NAME,
    COPIES_PATH,
    PIECE_BYTES,
    RANGE_BYTES,
    SHEET_BYTES,
    SILENCE_SECONDS,
    SNAPSHOTS_PATH,
    Refused,
    authorization,
)

log = logging.getLogger(__name__)

_CONNECTIONS: Final = 1024  # when a run restores, all its ranks fetch from here, with a few each
_RANGE: Final = re.compile(r"bytes=(\d{1,18})-(\d{1,18})", re.ASCII)
_SNAPSHOT: Final = re.compile(rf"{SNAPSHOTS_PATH}/([0-9a-f]{{1,32}})/(\d{{1,9}})(?:/({BYTES_NAME}))?", re.ASCII)
_LENGTH: Final = re.compile(r"\d{1,18}", re.ASCII)


class Kept(Protocol):
    """A snapshot that lies whole in memory."""

    @property
    def sheet(self) -> bytes:
        """What has to be known of it, sealed."""

    @property
    def data(self) -> memoryview:
        """Its bytes."""

    def is_whole(self) -> bool:
        """Whether it still is what it was: nobody has begun to overwrite it."""


class Incoming(Protocol):
    """Room for a copy whose bytes are on their way."""

    @property
    def bytes(self) -> int:
        """How many are to come."""

    @property
    def room(self) -> memoryview:
        """Where they go, in this order."""

    def came(self, length: int) -> None:
        """So many bytes are there; raises `Refused` if they are not what the digests say, or nobody wants them now."""

    def publish(self) -> None:
        """All are there: from now on it is a snapshot. Raises `Refused` if it cannot be."""

    def drop(self) -> None:
        """The transfer broke off. Changes nothing once it was published."""


class Shelf(Protocol):
    """What a worker has in memory, and the room for copies."""

    def held(self) -> Sequence[Held]:
        """All that lies whole here."""

    def find(self, save_id: str, rank: int) -> Kept | None:
        """The snapshot of that rank of that save."""

    def take(self, sheet: bytes, beside: str) -> Incoming:
        """Room for the copy that this sheet offers, not in the place of the save `beside`; raises `Refused`."""


class SnapshotServer(ThreadingMixIn, TCPServer):
    """Serves who comes to `listener`, in threads of its own, until closed.

    The listener may be another process's as well: who comes between two savers waits, and the place stays the same.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(
        self, listener: socket.socket, tls: RunTls, token: str, shelf: Shelf, connections: int = _CONNECTIONS
    ) -> None:
        super().__init__(listener.getsockname(), _Conversation, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.tls = tls
        self.expected = authorization(token).encode()
        self.shelf = shelf
        self.connections: set[socket.socket] = set()
        self._room = threading.BoundedSemaphore(connections)
        threading.Thread(target=self.serve_forever, args=(0.1,), name="mend-serve", daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the connection, if there are not too many already."""
        if not self._room.acquire(blocking=False):
            log.warning("%s: refused, %d connections are open", client_address[0], len(self.connections))
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no more threads
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The life of a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """No connection ends the server."""
        if not isinstance(sys.exception(), OSError):  # that one hung up during the first words
            log.exception("%s: a connection failed", client_address[0])

    def close(self) -> None:
        """Serve no more; whoever is being served finds the connection closed."""
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def listen(host: str) -> socket.socket:
    """At a port that the kernel chooses."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, 0), family=family, backlog=_CONNECTIONS)


class _Conversation(BaseHTTPRequestHandler):
    """The requests of one connection."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "mend", ""
    server: SnapshotServer
    connection: ssl.SSLSocket

    timeout = SILENCE_SECONDS
    disable_nagle_algorithm = True
    rbufsize = 64 << 10  # smaller than a piece, which so goes straight to where it belongs

    def setup(self) -> None:
        """Speak TLS from the first byte; the handshake is for later, when its failure can be told."""
        self._incoming: Incoming | None = None
        self.request = self.server.tls.serving.wrap_socket(
            self.request, server_side=True, do_handshake_on_connect=False
        )
        self.server.connections.add(self.request)
        super().setup()

    def handle(self) -> None:
        """Shake hands, then answer until the other end has had enough."""
        try:
            self.connection.do_handshake()
            self.server.tls.check(self.connection)
            super().handle()
        except (WrongPeer, ssl.SSLError) as error:
            log.warning("%s: refused: %s", self.client_address[0], getattr(error, "reason", "") or error)
        except OSError as error:
            log.info("%s: the connection broke: %s", self.client_address[0], error)
        finally:
            self._drop()

    def finish(self) -> None:
        """Close this end; the server knows only the plain socket, which is spent."""
        self.server.connections.discard(self.request)
        super().finish()
        self.request.close()

    # ------------------------------------------------------------ the requests
    def do_GET(self) -> None:
        """A listing, a sheet or a range of bytes."""
        self._answering(self._get)

    def do_POST(self) -> None:
        """An offer."""
        self._answering(self._post)

    def do_PUT(self) -> None:
        """The bytes of what was offered."""
        self._answering(self._put)

    def _answering(self, work: Callable[[], None]) -> None:
        try:
            self._check_token()
            work()
        except Refused as refused:
            self._drop()
            self.close_connection = True  # what follows on it, if anything, is not a request
            self._answer(refused.status, f"{refused}\n".encode())

    def _check_token(self) -> None:
        given = self.headers.get("Authorization", "").encode(errors="replace")
        if not hmac.compare_digest(given, self.server.expected):
            log.warning("%s: refused: the token is missing or wrong", self.client_address[0])
            raise Refused("the run's token is missing or wrong", HTTPStatus.UNAUTHORIZED)

    def _get(self) -> None:
        if self.path == SNAPSHOTS_PATH:
            self._answer(HTTPStatus.OK, msgspec.json.encode(self.server.shelf.held()))
            return
        match = _SNAPSHOT.fullmatch(self.path)
        kept = self.server.shelf.find(match[1], int(match[2])) if match else None
        if match is None or kept is None:
            raise Refused(f"no snapshot at {self.path[:100]} here", HTTPStatus.NOT_FOUND)
        if match[3]:
            self._send_range(kept)
        else:
            self._answer(HTTPStatus.OK, kept.sheet)

    def _send_range(self, kept: Kept) -> None:
        size = len(kept.data)
        match = _RANGE.fullmatch(self.headers.get("Range", ""))
        first, last = (int(match[1]), int(match[2])) if match else (0, -1)
        if not first <= last < size or last - first >= RANGE_BYTES:
            raise Refused(
                f"Range: expected bytes=FIRST-LAST within {size} bytes", HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
            )
        if not kept.is_whole():
            raise Refused("it has been overwritten", HTTPStatus.GONE)
        about = {"Content-Range": f"bytes {first}-{last}/{size}", "Content-Type": "application/octet-stream"}
        self._begin(HTTPStatus.PARTIAL_CONTENT, last + 1 - first, about)
        self.connection.sendall(kept.data[first : last + 1])
        if not kept.is_whole():  # the digests would tell as well; so the reader hears it at once
            self.close_connection = True

    def _post(self) -> None:
        if self.path != COPIES_PATH:
            raise Refused(f"offers go to {COPIES_PATH}", HTTPStatus.NOT_FOUND)
        self._drop()
        sheet = self._read(self._length(SHEET_BYTES))
        self._incoming = self.server.shelf.take(sheet, self.headers.get(BESIDE_HEADER, ""))
        self._answer(HTTPStatus.ACCEPTED, b"")

    def _put(self) -> None:
        incoming = self._incoming
        if self.path != COPIES_PATH or incoming is None:
            raise Refused(f"POST the sheet to {COPIES_PATH} on this connection first")
        if self._length(incoming.bytes) != incoming.bytes:
            raise Refused(f"{incoming.bytes} bytes were offered", HTTPStatus.BAD_REQUEST)
        done = 0
        while done < incoming.bytes:
            piece = incoming.room[done : done + PIECE_BYTES]
            if self.rfile.readinto(piece) < len(piece):
                raise ConnectionResetError("closed in the middle of a copy")
            done += len(piece)
            incoming.came(len(piece))
        incoming.publish()
        self._incoming = None
        self._answer(HTTPStatus.CREATED, b"")

    def _drop(self) -> None:
        if self._incoming is not None:
            self._incoming.drop()
            self._incoming = None

    # ------------------------------------------------------------ reading and answering
    def _length(self, most: int) -> int:
        text = self.headers.get("Content-Length", "")
        if not _LENGTH.fullmatch(text) or int(text) > most:
            raise Refused(
                f"Content-Length: got {text[:40]!r}; expected at most {most}", HTTPStatus.REQUEST_ENTITY_TOO_LARGE
            )
        return int(text)

    def _read(self, length: int) -> bytes:
        found = self.rfile.read(length)
        if len(found) < length:
            raise ConnectionResetError("closed in the middle of a sheet")
        return found

    def _answer(self, status: HTTPStatus, body: bytes) -> None:
        self._begin(status, len(body), {})
        self.connection.sendall(body)

    def _begin(self, status: HTTPStatus, length: int, about: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **about}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not news; what is, is logged where it happens."""
