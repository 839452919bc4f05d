"""`python -m mend_trainer.nodecheck SECONDS [URL...]`: what this machine can do, measured and told as a line of JSON.

A matrix product and a pass over memory on each device (the CPU where there is no GPU), a stream over loopback, and one
from each of the agents at these URLs. Each is the best of many short ones, by the time of the processor where that does
the work: what the machine can do, whoever else uses it just now. Products have small whole numbers, so that their sums
are exact and a wrong one is seen.
"""

from __future__ import annotations

import http.client
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final
from urllib.parse import urlsplit

import msgspec
import torch

from mend.environment import ENV_TOKEN
from mend.orders import WAY_FIGURE
from mend.protocol import BULK_PATH
from mend_trainer.checking import Finding

ROWS: Final = {"cpu": 256, "cuda": 4096}  # of the matrices
BUFFER_BYTES: Final = {"cpu": 64 << 20, "cuda": 1 << 30}  # twice this is used: beyond most caches, within any limit
LEAST_ROUNDS: Final = 3
SHORTEST_SECONDS: Final = 1e-6  # the processor's clock may not have ticked
CHUNK_BYTES: Final = 1 << 20
CHUNKS: Final = 32  # over loopback, in each round
WAY_TIMEOUT_SECONDS: Final = 3.0


class WrongNumbers(ArithmeticError):
    """A device has miscalculated."""


def measure(seconds: float, neighbours: Sequence[str] = ()) -> Finding:
    """Everything, in about `seconds`."""
    torch.set_num_threads(1)  # what a core can do, however many the pod may use just now
    devices = [f"cuda:{n}" for n in range(torch.cuda.device_count())] or ["cpu"]
    share = seconds / (2 * len(devices) + 1 + len(neighbours))
    figures: dict[str, float] = {}
    try:
        for device in devices:
            figures[f"{device} matrix product"] = products_per_second(device, share)
            figures[f"{device} memory pass"] = bytes_per_second(device, share)
    except WrongNumbers as error:
        return Finding(figures=figures, problem=str(error))
    figures["loopback"] = loopback_bytes_per_second(share)
    ways = [way for url in neighbours if (way := way_bytes_per_second(url, share)) > 0]
    if ways:
        figures[WAY_FIGURE] = max(ways)
    return Finding(figures=figures)


def products_per_second(device: str, seconds: float) -> float:
    """Floating-point operations of a matrix product. Raises `WrongNumbers`."""
    rows = ROWS[torch.device(device).type]
    across, down = torch.arange(rows), torch.arange(rows).unsqueeze(1)
    left, right = (across + down) % 7, (across * down) % 5  # sums stay below 2**24, where floats are exact
    mine, other = left.float().to(device), right.float().to(device)
    product = mine @ other
    if not adds_up(product, left, right):
        raise WrongNumbers(f"gave wrong numbers: a matrix product on {device} does not add up")
    return 2.0 * rows**3 / _best(lambda: torch.mm(mine, other, out=product), device, seconds)


def adds_up(product: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether a product is right, by the sums of its rows and columns: one wrong element changes two of them."""
    told = product.double().cpu()
    by_rows = (left @ right.sum(1, keepdim=True)).double().squeeze(1)
    by_columns = (left.sum(0, keepdim=True) @ right).double().squeeze(0)
    return bool(torch.equal(told.sum(1), by_rows) and torch.equal(told.sum(0), by_columns))


def bytes_per_second(device: str, seconds: float) -> float:
    """Bytes copied from one part of memory to another. Raises `WrongNumbers`."""
    words = BUFFER_BYTES[torch.device(device).type] // 8
    source = torch.arange(words, dtype=torch.int64, device=device)
    target = torch.zeros_like(source)
    took = _best(lambda: target.copy_(source), device, seconds)
    if not torch.equal(source, target):
        raise WrongNumbers(f"gave wrong numbers: a copy in the memory of {device} differs")
    return 8.0 * words / took


def _best(once: Callable[[], object], device: str, seconds: float) -> float:
    """The least seconds that it took."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    best, rounds, deadline = float("inf"), 0, time.monotonic() + seconds
    while rounds < LEAST_ROUNDS or time.monotonic() < deadline:
        began = clock()
        once()
        if device != "cpu":
            torch.cuda.synchronize(device)
        best, rounds = min(best, clock() - began), rounds + 1
    return max(best, SHORTEST_SECONDS)


def loopback_bytes_per_second(seconds: float) -> float:
    """Bytes through a TCP connection of this machine with itself."""
    listener = socket.create_server(("127.0.0.1", 0))
    ours = socket.create_connection(listener.getsockname())
    theirs, _ = listener.accept()
    with listener, ours, theirs:
        return CHUNKS * CHUNK_BYTES / _best(lambda: _stream(ours, theirs), "cpu", seconds)


def _stream(ours: socket.socket, theirs: socket.socket) -> None:
    sender = threading.Thread(target=lambda: ours.sendall(bytes(CHUNKS * CHUNK_BYTES)), daemon=True)
    sender.start()
    left, buffer = CHUNKS * CHUNK_BYTES, bytearray(CHUNK_BYTES)
    while left:
        left -= theirs.recv_into(buffer)
    sender.join()


def way_bytes_per_second(url: str, seconds: float) -> float:
    """Bytes from the agent at `url`; 0 if it sends none, which says nothing about this machine."""
    try:
        return max(_download(url) for _ in _until(seconds))
    except (OSError, http.client.HTTPException, ValueError):
        return 0.0


def _until(seconds: float) -> Iterator[None]:
    """As often as fits, but some times at the least."""
    deadline = time.monotonic() + seconds
    rounds = 0
    while rounds < LEAST_ROUNDS or time.monotonic() < deadline:
        yield
        rounds += 1


def _download(url: str) -> float:
    address = urlsplit(url)
    if address.hostname is None:
        raise ValueError(f"{url}: expected http://HOST:PORT")
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=WAY_TIMEOUT_SECONDS)
    try:
        began = time.perf_counter()
        connection.request("GET", BULK_PATH, headers={"Authorization": f"Bearer {os.environ.get(ENV_TOKEN, '')}"})
        answer = connection.getresponse()
        if answer.status != http.HTTPStatus.OK:
            raise http.client.HTTPException(f"{url} answered {answer.status}")
        received = len(answer.read())
        return received / max(time.perf_counter() - began, SHORTEST_SECONDS)
    finally:
        connection.close()


def main() -> None:
    """Prints what was found."""
    print(msgspec.json.encode(measure(float(sys.argv[1]), sys.argv[2:])).decode(), flush=True)


if __name__ == "__main__":
    main()
