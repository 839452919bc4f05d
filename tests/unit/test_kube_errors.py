"""HTTP answers become named errors, and only what is safe and useful is repeated."""

from __future__ import annotations

import pytest

from mend.kube import errors
from mend.kube.errors import ApiError, from_status, is_worth_repeating, unreachable


@pytest.mark.parametrize(
    ("status", "reason", "kind"),
    [
        (400, "BadRequest", errors.Invalid),
        (401, "Unauthorized", errors.Unauthorized),
        (403, "Forbidden", errors.Forbidden),
        (404, "NotFound", errors.NotFound),
        (409, "Conflict", errors.Conflict),
        (409, "AlreadyExists", errors.AlreadyExists),
        (410, "Expired", errors.Gone),
        (422, "Invalid", errors.Invalid),
        (429, "TooManyRequests", errors.TooManyRequests),
        (500, "InternalError", errors.ServerError),
        (504, "Timeout", errors.ServerError),
        (418, "", ApiError),
    ],
)
def test_every_status_has_its_error(status: int, reason: str, kind: type[ApiError]) -> None:
    """Status and reason decide the type; request, status, reason and message are in the text."""
    error = from_status("GET /api/v1/pods", status, {"reason": reason, "message": "because"})
    assert type(error) is kind
    assert str(error) == f"GET /api/v1/pods: {f'{status} {reason}'.strip()}: because"


@pytest.mark.parametrize(
    ("header", "body", "seconds"),
    [
        ("7", {}, 7.0),
        (None, {"details": {"retryAfterSeconds": 3}}, 3.0),
        ("Wed, 21 Oct 2026 07:28:00 GMT", {}, 1.0),
        ("-4", {}, 0.0),
        (None, None, 1.0),
        (None, {"details": "nonsense"}, 1.0),
    ],
)
def test_retry_after_is_taken_from_header_or_details(header: str | None, body: object, seconds: float) -> None:
    """A 429 says how long to wait, in whichever place the server put it; nonsense is one second."""
    error = from_status("GET /", 429, body, header)
    assert isinstance(error, errors.TooManyRequests)
    assert error.retry_after == seconds


@pytest.mark.parametrize(
    ("error", "read", "write"),
    [
        (from_status("x", 429), True, True),
        (from_status("x", 503), True, False),
        (unreachable("x", OSError("reset"), was_sent=True), True, False),
        (unreachable("x", OSError("refused"), was_sent=False), True, True),
        (from_status("x", 409), False, False),
        (from_status("x", 404), False, False),
        (from_status("x", 401), False, False),
        (from_status("x", 410), False, False),
        (ValueError("a bug"), False, False),
    ],
)
def test_writes_are_only_repeated_if_they_did_not_take_place(error: Exception, read: bool, write: bool) -> None:
    """Reads are repeated after anything transient; writes only after 429 or when they were never sent."""
    assert is_worth_repeating(error, is_read=True) is read
    assert is_worth_repeating(error, is_read=False) is write
