"""Transfers are cut into parts, run side by side, and asked again only when that can help."""

from __future__ import annotations

import threading

import pytest
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from hypothesis import given
from hypothesis import strategies as st

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
from mend.store.parallel import each
from mend.store.retry import is_transient, until
from mend.store.s3 import PART_BYTES
from mend.store.s3_client import Credentials
from mend.store.s3_errors import translate
from mend.store.views import MAX_PARTS, cut, part_length


@given(st.lists(st.binary(max_size=40), max_size=8), st.integers(1, 50))
def test_parts_joined_are_the_whole(pieces: list[bytes], length: int) -> None:
    """However the pieces are cut, the parts joined give the same bytes, and all but the last have the length."""
    parts = [b"".join(run) for run in cut([memoryview(piece) for piece in pieces], length)]
    assert b"".join(parts) == b"".join(pieces)
    assert all(len(part) == length for part in parts[:-1])
    assert all(parts)


@given(st.integers(1, 5 << 40))
def test_no_object_has_too_many_parts(total: int) -> None:
    """Parts grow when the usual length would give more of them than S3 takes."""
    assert -(-total // part_length(total, PART_BYTES)) <= MAX_PARTS


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
