"""Large objects go up in parts, side by side; a part that fails is sent again alone, an upload cut off is resumed.

A writer that died has left its parts with the service. The next try of the same key finds the upload, and sends what is
not there yet with the right size and checksum. What nobody resumes is found by `begun` and ended by `abort`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mend.store.api import size
from mend.store.asking import Asking
from mend.store.checksums import FIELDS, Checksum, Checksums
from mend.store.errors import NotFound, StoreError, WrongAnswer
from mend.store.parallel import each
from mend.store.views import Body, cut, part_length

Part = tuple[int, list[memoryview]]  # its number, from 1, and what it consists of
Sent = Mapping[int, Mapping[str, Any]]  # what the service tells of parts, by their numbers


class Uploads:
    """The multipart uploads of one store. `address` gives bucket and key of an object, `where` its name in errors."""

    def __init__(
        self,
        client: Any,
        ask: Asking,
        address: Callable[[str], dict[str, str]],
        where: Callable[[str], str],
        part_bytes: int,
        workers: int,
    ) -> None:
        self.checksums = Checksums()
        self._client = client
        self._ask = ask
        self._address = address
        self._where = where
        self._part_bytes = part_bytes
        self._workers = workers

    def put(self, key: str, views: Sequence[memoryview]) -> str:
        """Send an object of more than one part; its ETag."""
        length = part_length(size(views), self._part_bytes, self._workers)
        parts = list(enumerate(cut(views, length), start=1))
        return self.checksums.with_best(lambda checksum: self._put(key, parts, checksum))

    def begun(self, prefix: str) -> Iterator[dict[str, Any]]:
        """The uploads under a prefix that were neither completed nor aborted, as the service tells."""
        address = self._address(prefix)
        options: dict[str, Any] = {"Bucket": address["Bucket"], "Prefix": address["Key"]}
        more = True
        while more:
            ask = functools.partial(self._client.list_multipart_uploads, **options)
            answer = self._ask("list", self._where(prefix), ask)
            yield from answer.get("Uploads", [])
            more = bool(answer.get("IsTruncated"))
            options |= {
                "KeyMarker": answer.get("NextKeyMarker", ""),
                "UploadIdMarker": answer.get("NextUploadIdMarker", ""),
            }

    def abort(self, key: str, upload_id: str) -> None:
        """End an upload and delete its parts; one that is not there counts as ended."""
        upload = {**self._address(key), "UploadId": upload_id}
        with contextlib.suppress(NotFound):
            self._ask("delete", self._where(key), lambda: self._client.abort_multipart_upload(**upload))

    def _put(self, key: str, parts: Sequence[Part], checksum: Checksum) -> str:
        upload_id, there = self._earlier(key, checksum)
        if upload_id:
            # It may have ended meanwhile, or be of other bytes: what it was is no reason not to write the object.
            with contextlib.suppress(NotFound, WrongAnswer):
                return self._send(key, upload_id, parts, there, checksum)
        ask = self._client.create_multipart_upload
        begun = self._ask("put", self._where(key), lambda: ask(**self._address(key), ChecksumAlgorithm=checksum.name))
        return self._send(key, begun["UploadId"], parts, {}, checksum)

    def _earlier(self, key: str, checksum: Checksum) -> tuple[str, Sent]:
        """The newest upload of this key that an earlier try has begun, and its parts; "" if none can be resumed."""
        full_key = self._address(key)["Key"]
        try:
            found = [each for each in self.begun(key) if each["Key"] == full_key]
            for upload_id in [each["UploadId"] for each in sorted(found, key=lambda each: each["Initiated"])][-1:]:
                parts = self._parts_of(key, upload_id)
                others = {field for part in parts.values() for field in part} & (FIELDS - {checksum.field})
                return ("", {}) if others else (upload_id, parts)
        except StoreError as error:
            if error.transient:
                raise
        return "", {}  # none, or the service does not tell

    def _parts_of(self, key: str, upload_id: str) -> Sent:
        """What an upload consists of so far, by the parts' numbers."""
        upload = {**self._address(key), "UploadId": upload_id}
        found: dict[int, Mapping[str, Any]] = {}
        marker = 0
        while True:
            ask = functools.partial(self._client.list_parts, **upload, PartNumberMarker=marker)
            answer = self._ask("list", self._where(key), ask)
            found |= {part["PartNumber"]: part for part in answer.get("Parts", [])}
            if not answer.get("IsTruncated"):
                return found
            marker = int(answer["NextPartNumberMarker"])

    def _send(
        self,
        key: str,
        upload_id: str,
        parts: Sequence[Part],
        there: Sent,
        checksum: Checksum,
    ) -> str:
        upload = {**self._address(key), "UploadId": upload_id}

        def send(part: Part) -> dict[str, Any]:
            number, run = part
            mark = {"PartNumber": number, checksum.field: checksum.of(run)}
            if number in there and is_same(there[number], run, checksum.field, str(mark[checksum.field])):
                return {**mark, "ETag": there[number]["ETag"]}
            ask = self._client.upload_part
            address, hand = self._where(key), self._ask.meter.hand
            answer = self._ask("put", address, lambda: ask(**upload, **mark, Body=Body(run, hand)), sent=size(run))
            return {**mark, "ETag": answer["ETag"]}

        try:
            return self._complete(key, upload, each(send, parts, self._workers), sum(size(run) for _, run in parts))
        except StoreError as error:
            if not error.transient:  # else the parts wait for the next try
                with contextlib.suppress(StoreError):  # the failure that led here matters more
                    self.abort(key, upload_id)
            raise

    def _complete(self, key: str, upload: dict[str, str], parts: Sequence[dict[str, Any]], total: int) -> str:
        ask = self._client.complete_multipart_upload
        try:
            answer = self._ask("put", self._where(key), lambda: ask(**upload, MultipartUpload={"Parts": parts}))
        except NotFound:  # completed by an earlier try whose answer was lost; the upload is gone, the object is there
            found = self._ask("list", self._where(key), lambda: self._find(key))
            if found is None or found["Size"] != total:
                raise
            answer = found
        return str(answer["ETag"]).strip('"')

    def _find(self, key: str) -> dict[str, Any] | None:
        """The object as a listing shows it."""
        address = self._address(key)
        answer = self._client.list_objects_v2(Bucket=address["Bucket"], Prefix=address["Key"], MaxKeys=1)
        return next((item for item in answer.get("Contents", []) if item["Key"] == address["Key"]), None)


def is_same(part: Mapping[str, Any], run: Sequence[memoryview], field: str, checksum: str) -> bool:
    """Whether a part that is there holds these bytes: by its checksum, or, where none is told, by its MD5."""
    if part["Size"] != size(run):
        return False
    if part.get(field):
        return bool(part[field] == checksum)
    digest = hashlib.md5(usedforsecurity=False)
    for view in run:
        digest.update(view)
    return str(part["ETag"]).strip('"') == digest.hexdigest()
