"""The local object store: right about secrets, conditions and large objects, and it keeps what it was given."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from mend_local.objectstore import ObjectStore, S3Access, StoreKind
from mend_local.processes import owned_by

BIG = os.urandom(1 << 20) * 48


def client(access: S3Access, secret: str | None = None) -> Any:
    """A client of the store, or one with another secret."""
    return boto3.client(
        "s3",
        endpoint_url=access.endpoint,
        region_name=access.region,
        aws_access_key_id=access.access_key_id,
        aws_secret_access_key=secret or access.secret_access_key,
        config=Config(retries={"max_attempts": 8, "mode": "standard"}, s3={"addressing_style": "path"}),
    )


def code_of(error: pytest.ExceptionInfo[ClientError]) -> str:
    """The S3 error code."""
    return str(error.value.response["Error"]["Code"])


@pytest.mark.parametrize("kind", [StoreKind.MINISTACK, StoreKind.RCLONE])
async def test_what_is_stored_survives_a_restart(tmp_path: Path, kind: StoreKind) -> None:
    """Objects, endpoint and credentials are the same after the store was ended and started again."""
    first = ObjectStore(kind, tmp_path, "test/system/store")
    await first.start()
    await asyncio.to_thread(
        client(first.access).put_object, Bucket="mend", Key="runs/a b/manifest.json", Body=b"{}", Metadata={"a": "b"}
    )
    await first.stop()
    again = ObjectStore(kind, tmp_path, "test/system/store")
    await again.start()
    try:
        assert again.access == first.access
        found = await asyncio.to_thread(client(again.access).list_objects_v2, Bucket="mend", Prefix="runs/")
        assert [each["Key"] for each in found["Contents"]] == ["runs/a b/manifest.json"]
    finally:
        await again.stop()


@pytest.mark.parametrize("kind", [StoreKind.MINISTACK, StoreKind.RCLONE])
async def test_a_wrong_secret_is_refused(tmp_path: Path, kind: StoreKind) -> None:
    """A request that is signed with another secret is answered with 403."""
    store = ObjectStore(kind, tmp_path, "test/system/store")
    await store.start()
    try:
        with pytest.raises(ClientError) as refused:
            await asyncio.to_thread(client(store.access, "wrong").put_object, Bucket="mend", Key="a", Body=b"a")
        assert code_of(refused) == "SignatureDoesNotMatch"
    finally:
        await store.stop()


async def test_ministack_is_right_about_conditions_and_large_objects(tmp_path: Path) -> None:
    """A second conditional write is refused; a large object comes and goes whole; a kill -9 loses nothing of it."""
    store = ObjectStore(StoreKind.MINISTACK, tmp_path, "test/system/store")
    await store.start()
    try:
        s3 = client(store.access)
        await asyncio.to_thread(s3.put_object, Bucket="mend", Key="big", Body=BIG, IfNoneMatch="*")
        with pytest.raises(ClientError) as refused:
            await asyncio.to_thread(s3.put_object, Bucket="mend", Key="big", Body=b"other", IfNoneMatch="*")
        assert code_of(refused) == "PreconditionFailed"
        assert store.service.process is not None
        store.service.process.signal(signal.SIGKILL)
        got = await asyncio.to_thread(lambda: s3.get_object(Bucket="mend", Key="big")["Body"].read())
        assert got == BIG
        part = await asyncio.to_thread(
            lambda: s3.get_object(Bucket="mend", Key="big", Range="bytes=5-9")["Body"].read()
        )
        assert part == BIG[5:10]
        assert store.service.restarts == 1
    finally:
        await store.stop()
    assert owned_by("test/system/store") == []
