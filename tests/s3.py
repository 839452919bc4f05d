"""Real S3-compatible servers on loopback, and a proxy before them that answers badly on command."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from mend.store import Credentials

DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
KEY_ID = "mend-tests"
SECRET = "a-secret-of-the-tests"
SERVER_PORTS = (15_000, 32_000)  # below those that connections and listeners of no port of their own are given


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Server:
    """A running server with one bucket in it."""

    endpoint: str
    bucket: str = "runs"
    pid: int = 0  # of the process that serves; 0: not ours
    credentials: Credentials = field(
        default_factory=lambda: Credentials(access_key_id=KEY_ID, secret_access_key=SECRET)
    )

    def uri(self, prefix: str) -> str:
        """The address of a prefix in the bucket."""
        return f"s3://{self.bucket}/{prefix}"

    def client(self) -> object:
        """A plain client of our own, to look behind mend's back."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.credentials.access_key_id,
            aws_secret_access_key=self.credentials.secret_access_key,
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
        )


def free_port() -> int:
    """A port of loopback that nobody listens on now, of those that the kernel gives to no connection on its own."""
    while True:
        port = random.randrange(*SERVER_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def ministack(folder: Path, port: int = 0) -> Iterator[S3Server]:
    """Right about conditional writes and checksums; takes any credentials; in memory."""
    port = port or free_port()
    env = os.environ | {
        "BIND_HOST": "127.0.0.1",
        "GATEWAY_PORT": str(port),
        "SERVICES": "s3",
        "S3_DATA_DIR": str(folder / "data"),
        "TMPDIR": str(folder),
        "LOG_LEVEL": "ERROR",
    }
    with _running([sys.executable, "-m", "ministack"], env, folder, port) as server:
        yield server


@contextlib.contextmanager
def rclone(folder: Path, port: int = 0) -> Iterator[S3Server]:
    """Durable plain files under `folder`/data; checks the secret; ignores conditional writes."""
    port = port or free_port()
    (folder / "data").mkdir(parents=True, exist_ok=True)
    program = Path(sys.executable).with_name("rclone")
    command = [str(program), "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY_ID},{SECRET}"]
    command += ["--config", str(folder / "rclone.conf"), str(folder / "data")]
    with _running(command, dict(os.environ), folder, port) as server:
        yield server


@contextlib.contextmanager
def _running(command: list[str], env: dict[str, str], folder: Path, port: int) -> Iterator[S3Server]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    server = S3Server(endpoint=f"http://127.0.0.1:{port}", pid=process.pid)
    try:
        _make_bucket(server, process, folder / "server.log")
        yield server
    finally:
        process.kill()
        process.wait()


def _make_bucket(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            server.client().create_bucket(Bucket=server.bucket)  # type: ignore[attr-defined]
            return
        except (BotoCoreError, ClientError) as error:
            if "BucketAlready" in str(error):  # from before it was started again
                return
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the S3 server does not come up: {log.read_text()[-2000:]}") from error
            time.sleep(0.05)


@dataclass(slots=True)
class Fault:
    """How requests that `matches` (method, path) accepts are answered, `times` times."""

    kind: str  # "status", "stall", "cut", "lose"
    matches: Callable[[str, str], bool]
    times: int
    status: int = 503
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    unless_signed_for: str = ""  # requests whose signature is for this region are let through
    release: threading.Event = field(default_factory=threading.Event)


class FaultyProxy:
    """Hands requests on to a server, but for those that a fault is laid on."""

    def __init__(self, target: S3Server, tls: ssl.SSLContext | None = None) -> None:
        """With `tls` it is reached by https only."""
        self.requests: list[tuple[str, str]] = []
        self._target = urlsplit(target.endpoint)
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                if not self.raw_requestline or not self.parse_request():
                    self.close_connection = True
                    return
                proxy.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        if tls is not None:
            self._http.socket = tls.wrap_socket(self._http.socket, server_side=True, do_handshake_on_connect=False)
        endpoint = f"{'https' if tls else 'http'}://127.0.0.1:{self._http.server_address[1]}"
        self.server = S3Server(endpoint=endpoint, bucket=target.bucket)

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.heal()
        self._http.shutdown()
        self._http.server_close()

    def answer_with(
        self,
        status: int,
        times: int,
        method: str = "",
        part: str = "",
        *,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        unless_signed_for: str = "",
    ) -> None:
        """Answer so instead of asking the server."""
        fault = Fault("status", _matcher(method, part), times, status=status, body=body, headers=headers or {})
        fault.unless_signed_for = unless_signed_for
        self._lay(fault)

    def refuse(self, method: str, part: str, status: int = 403, body: bytes = b"") -> None:
        """Answer every such request as S3 answers whoever lacks the right, until healed."""
        self.answer_with(status, 1 << 30, method, part, body=body or DENIED)

    def stall(self, times: int, method: str = "", part: str = "") -> threading.Event:
        """Answer nothing until the event is set, then hang up."""
        fault = Fault("stall", _matcher(method, part), times)
        self._lay(fault)
        return fault.release

    def cut_answers(self, times: int, method: str = "GET", part: str = "") -> None:
        """Send half of the answer's body, then hang up."""
        self._lay(Fault("cut", _matcher(method, part), times))

    def lose_answers(self, times: int, method: str = "PUT", part: str = "") -> None:
        """Let the server do it, then hang up without an answer."""
        self._lay(Fault("lose", _matcher(method, part), times))

    def heal(self) -> None:
        """No more faults; what is stalled is let go."""
        with self._lock:
            faults, self._faults = self._faults, []
        for fault in faults:
            fault.release.set()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """One request."""
        if handler.headers.get("Expect", "").lower() == "100-continue":
            handler.send_response_only(100)
            handler.end_headers()
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        self.requests.append((handler.command, handler.path))
        fault = self._take(handler.command, handler.path, handler.headers.get("Authorization", ""))
        kind = fault.kind if fault else ""
        if fault and kind == "status":
            handler.send_response(fault.status)
            for name, value in ({"Content-Length": str(len(fault.body))} | fault.headers).items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(fault.body)
            return
        handler.close_connection = True
        if fault and kind == "stall":
            fault.release.wait(600)
            return
        self._forward(handler, body, kind)

    def _forward(self, handler: BaseHTTPRequestHandler, body: bytes, kind: str) -> None:
        answer, content = self._ask(handler, body)
        if kind == "lose":
            return
        self._tell(handler, answer, content, len(content) // 2 if kind == "cut" else len(content))

    def _ask(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        """The server's own answer to the request."""
        upstream = self._begin(handler)
        with contextlib.closing(upstream):
            upstream.endheaders(body)
            answer = upstream.getresponse()
            return answer, answer.read()

    def _begin(self, handler: BaseHTTPRequestHandler) -> http.client.HTTPConnection:
        """The request's headers on their way to the server, but for their end."""
        upstream = http.client.HTTPConnection(str(self._target.hostname), self._target.port, timeout=60)
        upstream.putrequest(handler.command, handler.path, skip_host=True, skip_accept_encoding=True)
        for name, value in handler.headers.items():
            if name.lower() != "expect":
                upstream.putheader(name, value)
        return upstream

    def _tell(
        self, handler: BaseHTTPRequestHandler, answer: http.client.HTTPResponse, content: bytes, length: int
    ) -> None:
        """Hand an answer on, or so many bytes of its content."""
        handler.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.send_header("Connection", "close")
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(content[:length])

    def _lay(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def _take(self, method: str, path: str, authorization: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                let_through = fault.unless_signed_for and f"/{fault.unless_signed_for}/s3/" in authorization
                if fault.times > 0 and fault.matches(method, path) and not let_through:
                    fault.times -= 1
                    return fault
        return None


def _matcher(method: str, part: str) -> Callable[[str, str], bool]:
    return lambda asked, path: (not method or asked == method) and part in path
