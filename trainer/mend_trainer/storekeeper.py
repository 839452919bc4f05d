"""Keeps one TCPStore per attempt, and tells who asks for an attempt's store on which port it is.

torch takes the store of a launcher as it finds it: keys of an attempt that broke off would mislead the next one's
rendezvous. A store of its own for each attempt leaves nothing to collide, for any command and any version of torch.
The directory is one line each way over TCP: "ATTEMPT\\n" is answered by "PORT\\n", or "0\\n" for one that is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

_KEPT: Final = 2  # the attempt before may still be ending on other workers
_CLIENT_SECONDS: Final = 0.5
_RETRY_SECONDS: Final = 0.05


class StoreUnreachable(ConnectionError):
    """Nobody could tell where the store of this attempt is."""


class _Shelf:
    """The stores of the newest attempts."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._stores: dict[int, TCPStore] = {}

    def port_of(self, attempt: int) -> int:
        """Port of the attempt's store, made when first asked for; 0 when newer ones have replaced it."""
        store = self._stores.get(attempt)
        if store is None:
            if len(self._stores) >= _KEPT and attempt < min(self._stores):
                return 0
            store = self._stores[attempt] = _make_store(self._host)
            for old in sorted(self._stores)[:-_KEPT]:
                del self._stores[old]
        return int(store.port)


def _make_store(host: str) -> TCPStore:
    from torch._C._distributed_c10d import TCPStore

    listener = _listen(host)
    # The store takes the descriptor over and closes it.
    return TCPStore(
        host_name=host,
        port=listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
        timeout=timedelta(seconds=30),
    )


def _listen(host: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, 0))
    listener.listen(1024)
    return listener


def keep_stores(host: str, announce: Callable[[int], object]) -> None:
    """Serve the directory on `host` for ever; `announce` gets its port."""
    shelf = _Shelf(host)
    listener = _listen(host)
    announce(listener.getsockname()[1])
    while True:
        # torch reports trouble with a store as RuntimeError; no client may end the keeper, and the stores with it.
        with contextlib.suppress(OSError, ValueError, RuntimeError), listener.accept()[0] as client:
            client.settimeout(_CLIENT_SECONDS)
            attempt = int(client.recv(32))
            client.sendall(b"%d\n" % shelf.port_of(attempt))


async def find_store(host: str, port: int, attempt: int, seconds: float) -> int:
    """Ask the directory at `host:port` where the store of `attempt` is; raises `StoreUnreachable`."""
    deadline = asyncio.get_running_loop().time() + seconds
    problem = "no answer"
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                found = await _ask(host, port, attempt)
            if found:
                return found
            raise StoreUnreachable(f"attempt {attempt} is over: {host}:{port} keeps stores of newer attempts only")
        except TimeoutError:
            raise StoreUnreachable(
                f"no TCPStore for attempt {attempt} from {host}:{port} within {seconds:g}s ({problem}); "
                "is the agent of the first worker up and reachable from this pod?"
            ) from None
        except (StoreUnreachable, ValueError):
            raise
        except OSError as error:
            problem = str(error) or type(error).__name__
            await asyncio.sleep(_RETRY_SECONDS)


async def _ask(host: str, port: int, attempt: int) -> int:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(b"%d\n" % attempt)
        if not (line := await reader.readline()):
            raise ConnectionResetError("closed without an answer")
        return int(line)
    finally:
        writer.close()
