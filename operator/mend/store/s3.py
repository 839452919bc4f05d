"""A bucket of any S3-compatible service as a store: boto3's plain client, parallel parts, a CRC on every upload.

The parts of large objects are cut, sent and retried here and not by boto3's transfer manager: each part is retried on
its own, the ETag of the whole comes back, and no CRT transfer can be switched on behind our back (it would ignore the
endpoint on some instance types). The CRC is CRC-32: the one checksum that every compatible service knows.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.loaders import Loader, create_loader
from urllib3.exceptions import HTTPError

from mend.store.api import Data, Entry, Probe, pieces, size
from mend.store.errors import AlreadyExists, BadAddress, Changed, NotFound, StoreError, Unreachable, WrongAnswer
from mend.store.parallel import each
from mend.store.probe import probe
from mend.store.retry import until
from mend.store.s3_errors import translate

PART_BYTES: Final = 64 << 20
MAX_PARTS: Final = 10_000
_WORKERS: Final = 4
_DELETE_BATCH: Final = 1000
_SLOWEST_BYTES_PER_SECOND: Final = 1 << 16  # slower than a crowded network ever is: such an answer is stalled
_CONNECT_SECONDS: Final = 5
_ANSWER_SECONDS: Final = 30

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """Keys of an S3 service; what is None is looked up where AWS tools look."""

    access_key_id: str | None = None
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    region: str | None = None


class S3Store:
    """`s3://bucket/prefix`."""

    def __init__(
        self,
        bucket: str,
        prefix: str,
        endpoint: str | None,
        credentials: Credentials | None,
        deadline_seconds: float,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._bucket = bucket
        self._root = f"{prefix}/" if prefix else ""
        self._deadline_seconds = deadline_seconds
        self._part_bytes = part_bytes
        try:
            self._client = _client(endpoint, credentials or Credentials())
        except (ValueError, BotoCoreError) as error:  # ValueError: botocore's word for an endpoint that is no URL
            given = f"endpoint {endpoint!r}, region {credentials.region if credentials else None!r}"
            raise BadAddress(self.uri, f"{given}: {error}") from error

    def put(self, key: str, data: Data) -> str:
        views = pieces(data)
        if size(views) > self._part_bytes:
            return self._put_parts(key, views)
        return self._put_whole(key, b"".join(views))

    def put_if_absent(self, key: str, data: Data) -> str:
        body = b"".join(pieces(data))
        try:
            return self._put_whole(key, body, IfNoneMatch="*")
        except AlreadyExists:
            if self.get(key) == body:  # written by an earlier try whose answer was lost
                return self.head(key).etag
            raise

    def get(self, key: str, start: int = 0, length: int | None = None, if_match: str = "") -> bytes:
        if length is None:
            length = max(0, self.head(key).bytes - start)
        buffer = bytearray(length)
        self.get_into(key, memoryview(buffer), start, if_match)
        return bytes(buffer)

    def get_into(self, key: str, into: memoryview, start: int = 0, if_match: str = "") -> None:
        into = into.cast("B")

        def fetch(offset: int) -> None:
            part = into[offset : offset + self._part_bytes]
            self._call(key, lambda: self._get_range(key, part, start + offset, if_match))

        each(fetch, range(0, into.nbytes, self._part_bytes), _WORKERS)

    def head(self, key: str) -> Entry:
        """Asked as a listing: the error of a HEAD has no body, so a wrong secret would look like a missing right."""
        for entry in self._page(key, MaxKeys=1)[0]:
            if entry.key == key:
                return entry
        raise NotFound(self._where(key), "no such object")

    def list(self, prefix: str = "", delimiter: str = "") -> Iterator[Entry]:
        token: dict[str, str] | None = {}
        while token is not None:
            found, token = self._page(prefix, Delimiter=delimiter, **token)
            yield from found

    def delete(self, keys: Iterable[str]) -> None:
        names = [{"Key": self._root + key} for key in keys]
        for first in range(0, len(names), _DELETE_BATCH):
            self._delete_batch(names[first : first + _DELETE_BATCH])

    def probe(self) -> Probe:
        return probe(self)

    def _delete_batch(self, names: Sequence[dict[str, str]]) -> None:
        wanted = {"Objects": names, "Quiet": True}
        answer = self._call("", lambda: self._client.delete_objects(Bucket=self._bucket, Delete=wanted))
        for error in answer.get("Errors", []):
            refused = translate(ClientError({"Error": error}, "DeleteObjects"), f"{self.uri} ({error.get('Key')})")
            if not isinstance(refused, NotFound):
                raise refused

    def _put_whole(self, key: str, body: bytes, **conditions: str) -> str:
        answer = self._call(
            key,
            lambda: self._client.put_object(**self._address(key), Body=body, ChecksumCRC32=_crc(body), **conditions),
        )
        return _etag(answer)

    def _put_parts(self, key: str, views: Sequence[memoryview]) -> str:
        address = self._address(key)
        begun = self._call(key, lambda: self._client.create_multipart_upload(**address, ChecksumAlgorithm="CRC32"))
        upload = {**address, "UploadId": begun["UploadId"]}

        def send(part: tuple[int, list[memoryview]]) -> dict[str, Any]:
            number, body = part[0], b"".join(part[1])
            mark = {"PartNumber": number, "ChecksumCRC32": _crc(body)}
            answer = self._call(key, lambda: self._client.upload_part(**upload, **mark, Body=body))
            return {**mark, "ETag": answer["ETag"]}

        with contextlib.ExitStack() as undo:
            undo.callback(self._abort, upload)
            parts = each(
                send, list(enumerate(cut(views, part_length(size(views), self._part_bytes)), start=1)), _WORKERS
            )
            etag = self._complete(key, upload, parts, size(views))
            undo.pop_all()
        return etag

    def _complete(self, key: str, upload: dict[str, str], parts: Sequence[dict[str, Any]], total: int) -> str:
        try:
            answer = self._call(
                key, lambda: self._client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
            )
        except NotFound:  # completed by an earlier try whose answer was lost; the upload is gone, the object is there
            found = self.head(key)
            if found.bytes != total:
                raise
            return found.etag
        return _etag(answer)

    def _abort(self, upload: dict[str, str]) -> None:
        with contextlib.suppress(StoreError):  # the failure that led here matters more
            self._call(upload["Key"], lambda: self._client.abort_multipart_upload(**upload))

    def _get_range(self, key: str, into: memoryview, start: int, if_match: str) -> None:
        wanted = f"bytes={start}-{start + into.nbytes - 1}"
        match = {"IfMatch": f'"{if_match}"'} if if_match else {}
        try:
            answer = self._client.get_object(**self._address(key), Range=wanted, **match)
        except ClientError as error:
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 412:
                raise Changed(self._where(key), f"its ETag is no longer {if_match}") from error
            raise
        with contextlib.closing(answer["Body"]) as body:
            if answer["ContentLength"] != into.nbytes:
                detail = f"{answer['ContentLength']} bytes came where {into.nbytes} from {start} on were wanted"
                kind = NotFound if answer["ContentLength"] < into.nbytes else WrongAnswer
                raise kind(self._where(key), detail)
            _fill(into, body, self._where(key))

    def _page(self, prefix: str, **options: Any) -> tuple[Sequence[Entry], dict[str, str] | None]:
        """One page of a listing, and what asks for the page after it."""
        answer = self._call(
            prefix,
            lambda: self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._root + prefix, **options),
        )
        skip = len(self._root)
        found = [Entry(key=folder["Prefix"][skip:]) for folder in answer.get("CommonPrefixes", [])]
        for item in answer.get("Contents", []):
            modified = item["LastModified"].timestamp()
            etag = item["ETag"].strip('"')
            found.append(Entry(key=item["Key"][skip:], bytes=item["Size"], etag=etag, modified_unix_seconds=modified))
        token = answer.get("NextContinuationToken")
        return sorted(found, key=lambda entry: entry.key), {"ContinuationToken": token} if token else None

    def _call(self, key: str, ask: Callable[[], Answer]) -> Answer:
        def translated() -> Answer:
            try:
                return ask()
            except (ClientError, BotoCoreError, HTTPError) as error:
                raise translate(error, self._where(key)) from error

        return until(self._deadline_seconds, translated)

    def _address(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._root + key}

    def _where(self, key: str) -> str:
        return f"{self.uri}/{key}" if key else self.uri


def part_length(total: int, usual: int) -> int:
    """The length of a part: as usual, or longer where the object would have too many parts."""
    return max(usual, -(-total // MAX_PARTS))


def cut(views: Sequence[memoryview], length: int) -> Iterator[list[memoryview]]:
    """The views' bytes in runs of `length` (the last is shorter), without copying."""
    run: list[memoryview] = []
    room = length
    for view in views:
        while view.nbytes:
            run.append(view[:room])
            room -= run[-1].nbytes
            view = view[run[-1].nbytes :]
            if not room:
                yield run
                run, room = [], length
    if run:
        yield run


def _client(endpoint: str | None, credentials: Credentials) -> Any:
    named = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    options: Any = {"addressing_style": "path"} if named else {}
    if not named or named.startswith("https:"):
        options["payload_signing_enabled"] = False  # TLS and the CRC guard the payload; SHA-256 would be the main cost
    core = botocore.session.get_session()
    core.register_component("data_loader", loader := descriptions())
    session = boto3.Session(
        botocore_session=core,
        aws_access_key_id=credentials.access_key_id,
        aws_secret_access_key=credentials.secret_access_key,
        aws_session_token=credentials.session_token,
        region_name=credentials.region,
    )
    loader.search_paths[:] = dict.fromkeys(loader.search_paths)  # each session adds the same
    config = Config(
        s3=options,
        connect_timeout=_CONNECT_SECONDS,
        read_timeout=_ANSWER_SECONDS,
        retries={"total_max_attempts": 1},  # `until` retries, and knows the deadline
        max_pool_connections=16,
        tcp_keepalive=True,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    region = None if session.region_name else "us-east-1"
    return session.client("s3", endpoint_url=endpoint, config=config, region_name=region)


@functools.cache
def descriptions() -> Loader:
    """botocore's descriptions of S3, parsed once for all clients of this process: else each takes 70 ms of CPU."""
    loader = create_loader()
    loader.load_service_model("s3", "service-2")
    return loader


def _fill(into: memoryview, body: Any, where: str) -> None:
    give_up_at = time.monotonic() + _ANSWER_SECONDS + into.nbytes / _SLOWEST_BYTES_PER_SECOND
    while into.nbytes:
        read = body.readinto(into[: 1 << 20])
        if not read:
            raise Unreachable(where, f"the answer ended {into.nbytes} bytes early", transient=True)
        into = into[read:]
        if into.nbytes and time.monotonic() > give_up_at:
            raise Unreachable(where, "the answer trickles", transient=True)


def _crc(body: bytes) -> str:
    return base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()


def _etag(answer: dict[str, Any]) -> str:
    return str(answer["ETag"]).strip('"')
