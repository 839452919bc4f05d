"""What can go wrong when talking to the Kubernetes API, as exceptions that say what was asked and what was answered.

Translation from HTTP happens here and nowhere else: the rest of mend never sees a status code or an aiohttp error.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any


class ApiError(Exception):
    """The API server answered a request with an error. `reason` is the machine-readable one of `metav1.Status`."""

    def __init__(self, asked: str, status: int = 0, reason: str = "", message: str = "") -> None:
        self.asked = asked
        self.status = status
        self.reason = reason
        self.message = message
        answer = " ".join(part for part in (str(status or ""), reason) if part)
        super().__init__(": ".join(part for part in (asked, answer, message) if part))


class NotFound(ApiError):
    """404: no such object, or no such kind (a CRD that is not installed)."""


class Conflict(ApiError):
    """409: the object changed since it was read, or a precondition (uid, resourceVersion) does not hold."""


class AlreadyExists(ApiError):
    """409 on create: an object of this name is there."""


class Gone(ApiError):
    """410: the resourceVersion or continue token is too old; list again."""


class Unauthorized(ApiError):
    """401: the credentials are missing, wrong or expired."""


class Forbidden(ApiError):
    """403: RBAC or admission says no."""


class Invalid(ApiError):
    """400 or 422: the object does not pass validation; sending it again cannot help."""


class TooManyRequests(ApiError):
    """429: refused before it was handled, to be sent again after `retry_after` seconds."""

    retry_after: float = 1.0


class ServerError(ApiError):
    """5xx: whether a write took place is not known."""


class Unreachable(ApiError):
    """No answer: refused, reset, timed out, TLS. `was_sent` is false if the request certainly never left."""

    was_sent: bool = True


_BY_STATUS: Mapping[int, type[ApiError]] = {
    HTTPStatus.BAD_REQUEST: Invalid,
    HTTPStatus.UNAUTHORIZED: Unauthorized,
    HTTPStatus.FORBIDDEN: Forbidden,
    HTTPStatus.NOT_FOUND: NotFound,
    HTTPStatus.CONFLICT: Conflict,
    HTTPStatus.GONE: Gone,
    HTTPStatus.UNPROCESSABLE_ENTITY: Invalid,
    HTTPStatus.TOO_MANY_REQUESTS: TooManyRequests,
}


def from_status(asked: str, status: int, body: Any = None, retry_after: str | None = None) -> ApiError:
    """The error for an HTTP answer, or an `ERROR` event, whose body is a `metav1.Status` or anything else."""
    told = body if isinstance(body, dict) else {}
    reason, message = str(told.get("reason") or ""), str(told.get("message") or "")
    kind = _BY_STATUS.get(status, ServerError if status >= HTTPStatus.INTERNAL_SERVER_ERROR else ApiError)
    if kind is Conflict and reason == "AlreadyExists":
        kind = AlreadyExists
    error = kind(asked, status, reason, message)
    if isinstance(error, TooManyRequests):
        details = told.get("details")
        hint = retry_after or (details.get("retryAfterSeconds") if isinstance(details, dict) else None)
        error.retry_after = _seconds(hint, default=TooManyRequests.retry_after)
    return error


def unreachable(asked: str, cause: BaseException, *, was_sent: bool) -> Unreachable:
    """The error for a request that got no answer."""
    error = Unreachable(asked, message=str(cause) or type(cause).__name__)
    error.was_sent = was_sent
    return error


def is_worth_repeating(error: BaseException, *, is_read: bool) -> bool:
    """Whether sending the same request again can help and can do no harm.

    A write is only repeated if it certainly did not take place: refused with 429, or never sent.
    """
    match error:
        case TooManyRequests():
            return True
        case Unreachable():
            return is_read or not error.was_sent
        case ServerError():
            return is_read
        case _:
            return False


def _seconds(value: Any, default: float) -> float:
    """A `Retry-After` in seconds; its other form, a date, is not used by API servers."""
    try:
        return max(float(value), 0.0)
    except (TypeError, ValueError):
        return default
