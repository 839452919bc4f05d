"""Transfers are cut into parts, run side by side, and asked again only when that can help."""

from __future__ import annotations

import hashlib
import io
import threading

import pytest
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from hypothesis import given
from hypothesis import strategies as st

from mend.environment import ENV_STORE_REQUESTS
from mend.store import (
    BadCredentials,
    Forbidden,
    Full,
    NoSuchBucket,
    NotFound,
    StoreError,
    Unreachable,
    WrongAnswer,
    open_store,
)
from mend.store.budget import RequestBudget
from mend.store.checksums import BEST, CRC32, Checksum, Checksums
from mend.store.parallel import each
from mend.store.retry import is_transient, until
from mend.store.s3 import PART_BYTES, WORKERS
from mend.store.s3_client import Credentials
from mend.store.s3_errors import translate
from mend.store.uploads import is_same
from mend.store.views import MAX_PARTS, SLICE_BYTES, Body, cut, part_length


@given(st.lists(st.binary(max_size=40), max_size=8), st.integers(1, 50))
def test_parts_joined_are_the_whole(pieces: list[bytes], length: int) -> None:
    """However the pieces are cut, the parts joined give the same bytes, and all but the last have the length."""
    parts = [b"".join(run) for run in cut([memoryview(piece) for piece in pieces], length)]
    assert b"".join(parts) == b"".join(pieces)
    assert all(len(part) == length for part in parts[:-1])
    assert all(parts)


@given(st.lists(st.binary(max_size=40), max_size=8), st.lists(st.integers(0, 30), max_size=20))
def test_a_body_is_the_file_of_its_views(pieces: list[bytes], sizes: list[int]) -> None:
    """However it is read, measured and wound back, a body gives its views' bytes, as do the slices sent."""
    whole = b"".join(pieces)
    body, file = Body([memoryview(piece) for piece in pieces]), io.BytesIO(whole)
    assert b"".join(body.slices) == whole
    assert (body.seek(0, 2), len(body), body.read()) == (len(whole), len(whole), b"")
    body.seek(0)
    for size in sizes:
        assert (body.tell(), body.read(size)) == (file.tell(), file.read(size))
    body.seek(0)
    assert body.read() == whole


def test_a_body_is_sent_in_slices() -> None:
    """No slice is so long that its time limit on a crowded network is the part's."""
    body = Body([memoryview(bytes(3 * SLICE_BYTES + 5))])
    assert [each.nbytes for each in body.slices] == [SLICE_BYTES, SLICE_BYTES, SLICE_BYTES, 5]


@pytest.mark.parametrize(("checksum", "told"), [(CRC32, "y/Q5Jg=="), (BEST, "4waSgw==")])
def test_checksums_are_those_of_their_definitions(checksum: Checksum, told: str) -> None:
    """The check values of CRC-32 and CRC-32C come out, whatever views the bytes lie in."""
    for views in ([b"123456789"], [b"1234", b"", b"56789"]):
        assert checksum.of([memoryview(view) for view in views]) == told


def test_a_checksum_that_is_refused_is_not_tried_again() -> None:
    """A service that refuses the best checksum gets the plain one, from then on without asking; other errors stay."""
    asked: list[str] = []

    def send(checksum: Checksum) -> str:
        asked.append(checksum.name)
        if checksum.name != "CRC32":
            raise WrongAnswer("s3://bucket/key", "no such checksum")
        return "sent"

    def refuse(checksum: Checksum) -> str:
        raise WrongAnswer("s3://bucket/key", "no such object")

    checksums = Checksums()
    with pytest.raises(WrongAnswer, match="no such object"):
        checksums.with_best(refuse)
    assert [checksums.with_best(send), checksums.with_best(send)] == ["sent", "sent"]
    assert asked == ["CRC32C", "CRC32", "CRC32"]


def test_a_part_that_is_there_is_known_by_its_checksum_or_its_digest() -> None:
    """A part counts as there with the right size and checksum, or MD5 where no checksum is told."""
    run = [memoryview(b"12345"), memoryview(b"6789")]
    md5 = hashlib.md5(b"123456789").hexdigest()
    told = {"Size": 9, "ChecksumCRC32": "y/Q5Jg=="}
    assert is_same(told, run, "ChecksumCRC32", "y/Q5Jg==")
    assert not is_same({**told, "ChecksumCRC32": "AAAAAA=="}, run, "ChecksumCRC32", "y/Q5Jg==")
    assert not is_same({**told, "Size": 8}, run, "ChecksumCRC32", "y/Q5Jg==")
    assert is_same({"Size": 9, "ETag": f'"{md5}"'}, run, "ChecksumCRC32", "y/Q5Jg==")
    assert not is_same({"Size": 9, "ETag": '"of-a-key-service"'}, run, "ChecksumCRC32", "y/Q5Jg==")


@pytest.mark.parametrize(
    ("header", "seconds"), [("", 0.0), ("3", 3.0), ("Wed, 21 Oct 2026 07:28:00 GMT", 0.0), ("-1", 0.0)]
)
def test_a_pause_is_read_from_the_answer(header: str, seconds: float) -> None:
    """Retry-After in seconds is kept to; anything else asks for nothing."""
    answer = an_answer(503)
    answer.response["ResponseMetadata"]["HTTPHeaders"] = {"retry-after": header}
    translated = translate(answer, "s3://bucket/key")
    assert isinstance(translated, StoreError)
    assert translated.retry_after_seconds == seconds


@pytest.mark.parametrize("per_second", [0.0, -1.0, float("nan")])
def test_a_budget_of_nothing_is_refused(per_second: float) -> None:
    """A budget must be a number above 0: with none nothing would ever be asked."""
    with pytest.raises(ValueError, match="above 0"):
        RequestBudget(per_second)


def test_a_budget_that_is_no_number_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable, its value and what is expected."""
    monkeypatch.setenv(ENV_STORE_REQUESTS, "many")
    with pytest.raises(ValueError, match="MEND_STORE_REQUESTS_PER_SECOND='many'"):
        open_store("s3://bucket/x")


@given(st.integers(1, 5 << 40))
def test_no_object_has_too_many_parts(total: int) -> None:
    """Parts grow when the usual length would give more of them than S3 takes."""
    assert -(-total // part_length(total, PART_BYTES, WORKERS)) <= MAX_PARTS


@pytest.mark.parametrize(("mebibytes", "length"), [(1, 16), (65, 16), (256, 32), (512, 64), (5000, 64), (1 << 20, 105)])
def test_parts_are_as_long_as_leaves_no_worker_idle(mebibytes: int, length: int) -> None:
    """Objects of a few parts are cut finer, down to 16 MiB; huge ones coarser, for S3's sake."""
    assert -(-part_length(mebibytes << 20, PART_BYTES, 8) // (1 << 20)) == length


def test_results_come_in_the_order_of_the_items() -> None:
    """Work done side by side gives its results in the order of the items."""
    assert each(lambda number: number * number, range(50), workers=4) == [number * number for number in range(50)]


def test_the_first_failure_is_raised_and_nothing_is_begun_after_it() -> None:
    """A failure of one item reaches the caller, and the items not yet begun stay so."""
    begun: list[int] = []
    failed = threading.Event()

    def work(number: int) -> None:
        begun.append(number)
        if number == 0:
            failed.set()
            raise NotFound("s3://bucket/key", "gone")
        failed.wait(30)

    with pytest.raises(NotFound):
        each(work, range(1000), workers=2)
    assert len(begun) < 1000


def an_answer(status: int, code: str = "") -> boto.ClientError:
    """What botocore raises for an answer of that status."""
    error = {"Error": {"Code": code or str(status), "Message": ""}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return boto.ClientError(error, "PutObject")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error",
    [
        *[an_answer(status) for status in (429, 500, 502, 503, 504)],
        an_answer(503, "SlowDown"),
        an_answer(400, "RequestTimeout"),
        an_answer(409, "ConditionalRequestConflict"),
        boto.EndpointConnectionError(endpoint_url="http://store"),
        boto.ConnectTimeoutError(endpoint_url="http://store"),
        boto.ReadTimeoutError(endpoint_url="http://store"),
        boto.ConnectionClosedError(endpoint_url="http://store"),
        boto.IncompleteReadError(actual_bytes=1, expected_bytes=2),
        boto.ResponseStreamingError(error="reset"),
        ResponseParserError("half an answer"),
    ],
)
def test_what_may_pass_is_asked_again(error: Exception) -> None:
    """429, 5xx, timeouts, lost connections and half answers are transient."""
    assert is_transient(translate(error, "s3://bucket/key"))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (an_answer(403), Forbidden),
        (an_answer(403, "AccessDenied"), Forbidden),
        (an_answer(403, "SignatureDoesNotMatch"), BadCredentials),
        (an_answer(403, "InvalidAccessKeyId"), BadCredentials),
        (an_answer(400, "ExpiredToken"), BadCredentials),
        (boto.NoCredentialsError(), BadCredentials),
        (an_answer(404, "NoSuchBucket"), NoSuchBucket),
        (an_answer(404, "NoSuchKey"), NotFound),
        (an_answer(404), WrongAnswer),
        (an_answer(416, "InvalidRange"), NotFound),
        (an_answer(507), Full),
        (an_answer(301, "PermanentRedirect"), WrongAnswer),
        (an_answer(400, "AuthorizationHeaderMalformed"), WrongAnswer),
    ],
)
def test_what_will_not_pass_is_told_at_once(error: Exception, kind: type[StoreError]) -> None:
    """Errors that stay are not asked again, and are of the kind that names the remedy."""
    translated = translate(error, "s3://bucket/key")
    assert type(translated) is kind
    assert not is_transient(translated)
    assert "s3://bucket/key" in str(translated)


def test_asking_ends_at_the_deadline() -> None:
    """A store that stays away is given up at the deadline with its last error."""

    def ask() -> None:
        raise Unreachable("s3://bucket", "no answer", transient=True)

    with pytest.raises(Unreachable, match="no answer"):
        until(0.2, ask)


@pytest.mark.parametrize("uri", ["s3://", "file://", "file://host/path", "/path", "gs://bucket/x", "", "file:///"])
def test_an_address_of_no_store_is_refused(uri: str) -> None:
    """An address that is neither s3:// nor file:/// is refused and quoted."""
    with pytest.raises(ValueError, match="expected s3://"):
        open_store(uri)


def test_secrets_are_not_shown() -> None:
    """Credentials that land in a log line do not show their secret."""
    assert "hush" not in repr(Credentials(access_key_id="me", secret_access_key="hush", session_token="hush"))
