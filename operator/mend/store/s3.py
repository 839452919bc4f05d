"""A bucket of any S3-compatible service as a store: boto3's plain client, parallel parts, a checksum on every upload.

The parts of large objects are cut, sent and retried here and not by boto3's transfer manager: each part is retried on
its own, an upload that was cut off is resumed, the ETag of the whole comes back, and no CRT transfer can be switched on
behind our back (it would ignore the endpoint on some instance types).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from botocore.exceptions import BotoCoreError, ClientError

from mend.store.api import Data, Entry, Probe, Unfinished, pieces, size
from mend.store.asking import Asking
from mend.store.budget import RequestBudget
from mend.store.errors import AlreadyExists, BadAddress, Changed, NotFound, Unreachable, WrongAnswer
from mend.store.parallel import each
from mend.store.probe import probe
from mend.store.s3_client import ANSWER_SECONDS, Credentials, make_client
from mend.store.s3_errors import translate
from mend.store.uploads import Uploads
from mend.store.usage import Usage
from mend.store.views import Body, part_length

PART_BYTES: Final = 64 << 20
WORKERS: Final = 8
_DATA_BYTES: Final = 1 << 20
_DELETE_BATCH: Final = 1000
_SLOWEST_BYTES_PER_SECOND: Final = 1 << 16  # slower than a crowded network ever is: such an answer is stalled


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
        workers: int = WORKERS,
        *,
        authority: str = "",
        requests_per_second: float | None = None,
    ) -> None:
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._bucket = bucket
        self._root = f"{prefix}/" if prefix else ""
        self._part_bytes = part_bytes
        self._workers = workers
        self._ask = Asking(deadline_seconds=deadline_seconds, budget=RequestBudget(requests_per_second))
        keys = credentials or Credentials()
        named = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        in_clear = bool(named) and not str(named).startswith("https:")
        try:
            self._client = make_client(endpoint, keys, authority, sign_payload=in_clear)
            self._sender = make_client(endpoint, keys, authority, sign_payload=False) if in_clear else self._client
        except (ValueError, BotoCoreError, OSError) as error:  # ValueError: botocore's word for no URL
            given = f"endpoint {endpoint!r}, region {keys.region!r}"
            raise BadAddress(self.uri, f"{given}: {error}") from error
        # What is large travels unsigned over plain HTTP as well: its digests are in the manifest, which is signed.
        self._uploads = Uploads(self._sender, self._ask, self._address, self._where, part_bytes, workers)

    @property
    def usage(self) -> Usage:
        return self._ask.meter.read()

    def put(self, key: str, data: Data) -> str:
        views = pieces(data)
        if size(views) > self._part_bytes:
            return self._uploads.put(key, views)
        return self._put_whole(key, views)

    def put_if_absent(self, key: str, data: Data) -> str:
        views = pieces(data)
        try:
            return self._put_whole(key, views, IfNoneMatch="*")
        except AlreadyExists:
            if self.get(key) == b"".join(views):  # written by an earlier try whose answer was lost
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
        length = part_length(into.nbytes, self._part_bytes, self._workers)

        def fetch(offset: int) -> None:
            part = into[offset : offset + length]
            where = self._where(key)
            self._ask("get", where, lambda: self._get_range(key, part, start + offset, if_match), received=part.nbytes)

        if into.nbytes > length:
            # One byte first: what is missing or has changed costs one request and not one for each part. And services
            # that digest an object when it is first asked for, as rclone does, do so once and not side by side.
            self.get(key, start, 1, if_match)
        each(fetch, range(0, into.nbytes, length), self._workers)

    def head(self, key: str) -> Entry:
        """Asked as a listing: the error of a HEAD has no body, so a wrong secret would look like a missing right."""
        for entry in self._page(key, MaxKeys=1)[0]:
            if entry.key == key:
                return entry
        raise NotFound(self._where(key), "no such object")

    def list(self, prefix: str = "", delimiter: str = "", after: str = "") -> Iterator[Entry]:
        options: dict[str, str] | None = {"StartAfter": self._root + after} if after else {}
        while options is not None:
            found, options = self._page(prefix, Delimiter=delimiter, **options)
            yield from (entry for entry in found if entry.key > after)  # not every service knows StartAfter

    def delete(self, keys: Iterable[str]) -> None:
        names = [{"Key": self._root + key} for key in keys]
        for first in range(0, len(names), _DELETE_BATCH):
            self._delete_batch(names[first : first + _DELETE_BATCH])

    def unfinished(self, prefix: str = "") -> Iterator[Unfinished]:
        skip = len(self._root)
        for item in self._uploads.begun(prefix):
            begun = item["Initiated"].timestamp()
            yield Unfinished(key=item["Key"][skip:], begun_unix_seconds=begun, id=item["UploadId"])

    def abandon(self, unfinished: Unfinished) -> None:
        self._uploads.abort(unfinished.key, unfinished.id)

    def probe(self) -> Probe:
        return probe(self)

    def _delete_batch(self, names: Sequence[dict[str, str]]) -> None:
        wanted = {"Objects": names, "Quiet": True}
        ask = self._client.delete_objects
        answer = self._ask("delete", self.uri, lambda: ask(Bucket=self._bucket, Delete=wanted))
        for error in answer.get("Errors", []):
            refused = translate(ClientError({"Error": error}, "DeleteObjects"), f"{self.uri} ({error.get('Key')})")
            if not isinstance(refused, NotFound):
                raise refused

    def _put_whole(self, key: str, views: Sequence[memoryview], **conditions: str) -> str:
        is_data = size(views) >= _DATA_BYTES and not conditions
        ask = (self._sender if is_data else self._client).put_object

        def send(checksum: dict[str, str]) -> Any:
            return self._ask(
                "put",
                self._where(key),
                lambda: ask(**self._address(key), Body=Body(views, self._ask.meter.hand), **checksum, **conditions),
                sent=size(views),
            )

        return etag_of(self._uploads.checksums.with_best(lambda best: send({best.field: best.of(views)})))

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
        ask = self._client.list_objects_v2
        answer = self._ask(
            "list",
            self._where(prefix),
            lambda: ask(Bucket=self._bucket, Prefix=self._root + prefix, **options),
        )
        skip = len(self._root)
        found = [Entry(key=folder["Prefix"][skip:]) for folder in answer.get("CommonPrefixes", [])]
        for item in answer.get("Contents", []):
            modified = item["LastModified"].timestamp()
            etag = item["ETag"].strip('"')
            found.append(Entry(key=item["Key"][skip:], bytes=item["Size"], etag=etag, modified_unix_seconds=modified))
        token = answer.get("NextContinuationToken")
        return sorted(found, key=lambda entry: entry.key), {"ContinuationToken": token} if token else None

    def _address(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._root + key}

    def _where(self, key: str) -> str:
        return f"{self.uri}/{key}" if key else self.uri


def etag_of(answer: dict[str, Any]) -> str:
    """Without the quotes that it travels in."""
    return str(answer["ETag"]).strip('"')


def _fill(into: memoryview, body: Any, where: str) -> None:
    give_up_at = time.monotonic() + ANSWER_SECONDS + into.nbytes / _SLOWEST_BYTES_PER_SECOND
    while into.nbytes:
        read = body.readinto(into[: 1 << 20])
        if not read:
            raise Unreachable(where, f"the answer ended {into.nbytes} bytes early", transient=True)
        into = into[read:]
        if into.nbytes and time.monotonic() > give_up_at:
            raise Unreachable(where, "the answer trickles", transient=True)
