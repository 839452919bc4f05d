"""Saving to and loading from a local S3 server beside other clients, and finding the newest among 10,000 checkpoints.

    python benchmarks/store_throughput.py [--quick] [--json FILE]

Every client is a process of its own that is started once and then asked in turn, round by round, so that the machine's
moods hit all alike. The servers are those of `mend local`: rclone, whose files are in memory, and ministack.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from figures import Peer, Row, arguments, middle, publish, row
from peers import FOLDER, Package, PeerUnavailable, python_of

from mend.catalog import Catalog
from mend.keys import MANIFEST_NAME, announcement_key, checkpoint_key
from mend.manifest import Manifest, encode_manifest
from mend.store import Credentials, Store, open_store
from mend.store.parallel import each
from mend_local.objectstore import ObjectStore, S3Access, StoreKind

RAW = Package("s3-raw", ("s3torchconnector==1.5.0", "s3torchconnectorclient==1.5.0", "obstore==0.12.1"), alone=True)
S3FS = Package("s3fs", ("s3fs==2026.9.0",))
PEERS: Mapping[str, Package | None] = {"boto3": None, "s3torchconnector": RAW, "obstore": RAW, "s3fs": S3FS}
Times = dict[str, list[float]]  # by client
SHARE = 0.9  # of the best raw client's throughput
CHECKPOINTS = 10_000
LISTINGS, CPU_SECONDS = 3, 1.0
CLIENT = Path(__file__).with_name("store_client.py")


def main() -> int:
    """Run it."""
    options = arguments(__doc__ or "")
    return publish("Object storage", measure(options), options)


def measure(options: Namespace) -> list[Row]:
    """All rows."""
    return [*throughput(quick=options.quick), *newest_of_many(quick=options.quick)]


def throughput(*, quick: bool) -> list[Row]:
    """Seconds to save and to load one object, by server, and the client's CPU seconds.

    The target is the best raw client's median over 0.9, for the CPU as well. The server shares the machine with its
    client, so a client that spends less leaves it more.
    """
    # ministack works in Python: a short form has to do, and says so by its size.
    sizes = {StoreKind.RCLONE: 256 if quick else 1024, StoreKind.MINISTACK: 64 if quick else 256}
    rounds = 3 if quick else 9
    return [each for kind, mib in sizes.items() for each in _by_server(kind, mib, rounds)]


def newest_of_many(*, quick: bool) -> list[Row]:
    """Pages listed and CPU seconds to find the newest checkpoint among 10,000, by a catalog that knows nothing yet."""
    with _server(StoreKind.RCLONE) as access:
        store = _store(access, "many")
        _fill(store, CHECKPOINTS)
        pages, cpu = [], []
        for _ in range(3 if quick else 11):
            store = _store(access, "many")
            began = time.process_time()
            found, _ = Catalog(store).newest(lambda found: any(not each.quarantined for each in found))
            cpu.append(time.process_time() - began)
            pages.append(float(store.usage.requests["list"]))
            if found[-1].ref.step != CHECKPOINTS:
                raise AssertionError(f"the newest is not of step {CHECKPOINTS}: {found}")
    what = f"newest of {CHECKPOINTS:,} checkpoints"
    note = "one announcement and one manifest each; a new client and a new catalog each time"
    return [
        row(f"{what}: pages listed", pages, LISTINGS, unit="", of=1.0, note=note),
        row(f"{what}: CPU", cpu, CPU_SECONDS, of=1.0, note=note),
    ]


def _by_server(kind: StoreKind, mib: int, rounds: int) -> list[Row]:
    missing: dict[str, Peer] = {}
    took: dict[str, Times] = {"save": defaultdict(list), "load": defaultdict(list)}
    spent: dict[str, Times] = {"save": defaultdict(list), "load": defaultdict(list)}
    with _server(kind) as access, contextlib.ExitStack() as running:
        clients: dict[str, _Client] = {}
        for name, package in {"mend": None, **PEERS}.items():
            try:
                python = python_of(package) if package else Path(sys.executable)
                clients[name] = running.enter_context(_Client(name, python, access, mib << 20))
            except PeerUnavailable as error:
                if name == "mend":
                    raise
                missing[name] = str(error)
        for number in range(rounds + 1):
            for verb, times in took.items():
                for name in _turned(list(clients), number):
                    try:
                        seconds, cpu_seconds = clients[name].ask(verb, f"{name}/{number % 2}")
                    except PeerUnavailable as error:  # a server that it does not get on with
                        if name == "mend":
                            raise
                        missing[name] = str(error)
                        del clients[name]
                        continue
                    if number:  # the first round warms connections and pages
                        times[name].append(seconds)
                        spent[verb][name].append(cpu_seconds)
    shown = {f"{verb} {mib} MiB, {kind}": times for verb, times in took.items()}
    shown |= {f"{verb} {mib} MiB, {kind}: CPU of the client": times for verb, times in spent.items()}
    return [_row(figure, times, missing) for figure, times in shown.items()]


def _row(figure: str, times: dict[str, list[float]], missing: dict[str, Peer]) -> Row:
    ours = times.pop("mend")
    medians = {name: round(middle(samples), 4) for name, samples in times.items() if name not in missing}
    best = min(medians, key=lambda name: medians[name])
    spread = ", ".join(f"{name} {min(samples):.2f}-{max(samples):.2f}" for name, samples in times.items())
    note = f"target: {best}'s median / {SHARE}; from-to: mend {min(ours):.2f}-{max(ours):.2f}, {spread}"
    return row(figure, ours, round(medians[best] / SHARE, 4), peers={**medians, **missing}, note=note)


def _turned(names: list[str], number: int) -> list[str]:
    """Another one begins each round: who comes first has the caches of nobody."""
    at = number % len(names)
    return names[at:] + names[:at]


class _Client:
    """A process of `store_client.py`."""

    def __init__(self, name: str, python: Path, access: S3Access, size: int) -> None:
        self._name = name
        self._command = [str(python), str(CLIENT), name, access.endpoint, access.bucket, str(size)]
        self._env = os.environ | access.as_env()
        self._env.pop("AWS_ENDPOINT_URL", None)

    def __enter__(self) -> _Client:
        FOLDER.mkdir(parents=True, exist_ok=True)
        self._complaints = (FOLDER / f"{self._name}.log").open("w+")
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            self._command, env=self._env, stdin=pipe, stdout=pipe, stderr=self._complaints, text=True
        )
        try:
            self._hear()
        except PeerUnavailable:
            self.__exit__()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._complaints.close()

    def ask(self, verb: str, key: str) -> tuple[float, float]:
        """Seconds that it took, and CPU seconds of the client."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{verb} {key}\n")
        self._process.stdin.flush()
        wall, cpu = self._hear()
        return wall, cpu

    def _hear(self) -> list[float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._complaints.seek(0)
            lines = [line for line in self._complaints.read().splitlines() if "Error" in line or "Exception" in line]
            raise PeerUnavailable(f"fails: {lines[0][-90:] if lines else 'without a word'}")
        found: list[float] = json.loads(line)
        return found


@contextlib.contextmanager
def _server(kind: StoreKind) -> Iterator[S3Access]:
    """A server of its own, its files in memory."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="mend-bench-", dir=memory if memory.is_dir() else None))
    loop = asyncio.new_event_loop()
    try:
        server = ObjectStore(kind, folder, owner=f"benchmark-{os.getpid()}")
        loop.run_until_complete(server.start())
        try:
            yield server.access
        finally:
            loop.run_until_complete(server.stop())
    finally:
        loop.close()
        shutil.rmtree(folder, ignore_errors=True)


def _store(access: S3Access, prefix: str) -> Store:
    keys = Credentials(
        access_key_id=access.access_key_id, secret_access_key=access.secret_access_key, region=access.region
    )
    return open_store(f"s3://{access.bucket}/{prefix}", access.endpoint, keys)


def _fill(store: Store, count: int) -> None:
    def commit(step: int) -> None:
        folder = checkpoint_key(step, 1 + step // 1000, "a")
        manifest = Manifest(
            run="team/clio",
            run_uid="uid",
            step=step,
            attempt=1 + step // 1000,
            lineage=(),
            world_size=1,
            tokens=step,
            created_unix_seconds=float(step),
            objects=(),
            tensors={},
            save_id="a",
        )
        store.put(announcement_key(folder), b"")
        store.put(f"{folder}/{MANIFEST_NAME}", encode_manifest(manifest))

    each(commit, range(1, count + 1), 8)


if __name__ == "__main__":
    raise SystemExit(main())
