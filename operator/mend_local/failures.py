"""What the API server answers when it refuses: errors that turn into Kubernetes `Status` bodies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cause:
    """One bad field: `reason` as in metav1.CauseType, `detail` the sentence that follows the field's name."""

    field: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.field}: {self.detail}" if self.field else self.detail


class ApiFailure(Exception):
    """A refused request; `body` is the Status that the client is to see."""

    def __init__(
        self, code: int, reason: str, message: str, *, details: Object | None = None, headers: Object | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.details = details
        self.headers = headers or {}

    @property
    def body(self) -> Object:
        """The failure as a metav1.Status."""
        body: Object = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        }
        if self.details:
            body["details"] = self.details
        return body


def _about(group: str, kind: str, name: str, **more: Any) -> Object:
    details = {"name": name, "group": group, "kind": kind, **more}
    return {key: value for key, value in details.items() if value != ""}


def _qualified(group: str, noun: str) -> str:
    return f"{noun}.{group}" if group else noun


def not_found(group: str, plural: str, name: str) -> ApiFailure:
    """404 for an object."""
    message = f'{_qualified(group, plural)} "{name}" not found'
    return ApiFailure(404, "NotFound", message, details=_about(group, plural, name))


def no_such_path() -> ApiFailure:
    """404 for a path or a resource type that is not served."""
    return ApiFailure(404, "NotFound", "the server could not find the requested resource")


def already_exists(group: str, plural: str, name: str) -> ApiFailure:
    """409 for a create of what is there."""
    message = f'{_qualified(group, plural)} "{name}" already exists'
    return ApiFailure(409, "AlreadyExists", message, details=_about(group, plural, name))


def conflict(group: str, plural: str, name: str, why: str = "") -> ApiFailure:
    """409 for a stale write or a precondition that does not hold."""
    why = why or "the object has been modified; please apply your changes to the latest version and try again"
    message = f'Operation cannot be fulfilled on {_qualified(group, plural)} "{name}": {why}'
    return ApiFailure(409, "Conflict", message, details=_about(group, plural, name))


def invalid(group: str, kind: str, name: str, causes: Sequence[Cause]) -> ApiFailure:
    """422 with every bad field, worded as Kubernetes words it."""
    listed = ", ".join(str(cause) for cause in causes)
    message = f'{_qualified(group, kind)} "{name}" is invalid: ' + (f"[{listed}]" if len(causes) > 1 else listed)
    shown = [{"reason": cause.reason, "message": cause.detail, "field": cause.field} for cause in causes]
    return ApiFailure(422, "Invalid", message, details=_about(group, kind, name, causes=shown))


def bad_request(message: str) -> ApiFailure:
    """400."""
    return ApiFailure(400, "BadRequest", message)


def unauthorized() -> ApiFailure:
    """401: no token, or one that nobody issued."""
    return ApiFailure(401, "Unauthorized", "Unauthorized")


def forbidden(message: str, group: str = "", plural: str = "", name: str = "", **more: Any) -> ApiFailure:
    """403."""
    return ApiFailure(403, "Forbidden", message, details=_about(group, plural, name, **more))


def expired(message: str) -> ApiFailure:
    """410: the history that was asked for is gone; list again."""
    return ApiFailure(410, "Expired", message)


def not_allowed(verb: str) -> ApiFailure:
    """405 for a verb that the resource does not have."""
    message = f"the server does not allow this method on the requested resource ({verb})"
    return ApiFailure(405, "MethodNotAllowed", message)


def unsupported_media_type(message: str) -> ApiFailure:
    """415 for a body that this server does not read."""
    return ApiFailure(415, "UnsupportedMediaType", message)
