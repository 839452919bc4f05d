"""One way to bring bytes to an S3 service and back, in a process of its own that is told when: `store_throughput.py`.

    python store_client.py CLIENT ENDPOINT BUCKET BYTES

It reads lines `save KEY` and `load KEY`, and answers each with the seconds and the CPU seconds that it took. Keys are
in the environment. Every client has the same bytes in memory before, and ends with them in memory; mend has them as it
gets them from a saver, in pieces, and reads them into a buffer that is there.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

PIECE_BYTES = 6_000_001  # of mend's state: no piece ends where a part does
RANGE_BYTES = 64 << 20
REGION = "us-east-1"

Save = Callable[[str], object]
Load = Callable[[str], Any]


def main() -> None:
    """Serve the orders on stdin."""
    name, endpoint, bucket, size = sys.argv[1:]
    content = os.urandom(int(size))
    save, load = CLIENTS[name](endpoint, bucket, content)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        verb, key = line.split()
        wall, cpu = time.perf_counter(), time.process_time()
        found = save(key) if verb == "save" else load(key)
        took = time.perf_counter() - wall, time.process_time() - cpu
        if verb == "load" and memoryview(found).cast("B") != content:
            raise SystemExit(f"{name} has read other bytes than were written")
        del found
        print(json.dumps(took), flush=True)


def mend(endpoint: str, bucket: str, content: bytes) -> tuple[Save, Load]:
    """mend's own store, with its defaults."""
    from mend.store import open_store

    store = open_store(f"s3://{bucket}/mend", endpoint)
    whole = memoryview(content)
    pieces = [whole[at : at + PIECE_BYTES] for at in range(0, len(content), PIECE_BYTES)]
    into = memoryview(bytearray(len(content)))

    def load(key: str) -> memoryview:
        store.get_into(key, into)
        return into

    return lambda key: store.put(key, pieces), load


def boto3(endpoint: str, bucket: str, content: bytes) -> tuple[Save, Load]:
    """boto3 as it comes: upload_fileobj and download_fileobj."""
    import boto3
    from botocore.config import Config

    config = Config(s3={"addressing_style": "path"})
    client = boto3.client("s3", endpoint_url=endpoint, region_name=REGION, config=config)

    def load(key: str) -> memoryview:
        into = io.BytesIO()
        client.download_fileobj(bucket, key, into)
        return into.getbuffer()

    return lambda key: client.upload_fileobj(io.BytesIO(content), bucket, key), load


def s3torchconnector(endpoint: str, bucket: str, content: bytes) -> tuple[Save, Load]:
    """AWS's connector for torch (the CRT), as its checkpoints use it."""
    from s3torchconnector import S3Checkpoint, S3ClientConfig

    config = S3ClientConfig(force_path_style=True)
    checkpoint = S3Checkpoint(region=REGION, endpoint=endpoint, s3client_config=config)

    def save(key: str) -> None:
        with checkpoint.writer(f"s3://{bucket}/{key}") as writer:
            writer.write(content)

    def load(key: str) -> bytes:
        with checkpoint.reader(f"s3://{bucket}/{key}") as reader:
            found: bytes = reader.read()
        return found

    return save, load


def obstore(endpoint: str, bucket: str, content: bytes) -> tuple[Save, Load]:
    """Rust's object_store: multipart by itself; ranges side by side where the server's answers please it."""
    import obstore
    from obstore.exceptions import GenericError
    from obstore.store import S3Store

    secrets = {
        "access_key_id": os.environ["AWS_ACCESS_KEY_ID"],
        "secret_access_key": os.environ["AWS_SECRET_ACCESS_KEY"],
    }
    store = S3Store(
        bucket,
        endpoint=endpoint,
        region=REGION,
        virtual_hosted_style_request=False,
        client_options={"allow_http": True, "timeout": "300s"},
        **secrets,
    )
    into = memoryview(bytearray(len(content)))
    threads = ThreadPoolExecutor(8)

    def fetch(key: str, at: int) -> None:
        length = min(RANGE_BYTES, len(content) - at)
        into[at : at + length] = memoryview(obstore.get_range(store, key, start=at, length=length))

    def load(key: str) -> memoryview:
        try:
            list(threads.map(lambda at: fetch(key, at), range(0, len(content), RANGE_BYTES)))
        except GenericError:  # it does not take rclone's word for a range
            return memoryview(obstore.get(store, key).bytes())
        return into

    return lambda key: obstore.put(store, key, content, chunk_size=16 << 20, max_concurrency=8), load


def s3fs(endpoint: str, bucket: str, content: bytes) -> tuple[Save, Load]:
    """fsspec's file system for S3: its files for writing, as torch's FsspecWriter uses them, its cat for reading."""
    import s3fs

    files = s3fs.S3FileSystem(endpoint_url=endpoint, client_kwargs={"region_name": REGION})

    def save(key: str) -> None:
        with files.open(f"{bucket}/{key}", "wb") as file:
            file.write(content)

    return save, lambda key: files.cat_file(f"{bucket}/{key}")


CLIENTS: dict[str, Callable[[str, str, bytes], tuple[Save, Load]]] = {
    "mend": mend,
    "boto3": boto3,
    "s3torchconnector": s3torchconnector,
    "obstore": obstore,
    "s3fs": s3fs,
}

if __name__ == "__main__":
    main()
