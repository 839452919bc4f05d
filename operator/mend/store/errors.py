"""What can go wrong with a store: a closed set of errors, each naming the place and the remedy."""

from __future__ import annotations

from typing import ClassVar


class StoreError(Exception):
    """Base of the set. `transient`: trying again may help. `reason`: its CamelCase name for conditions."""

    reason: ClassVar[str] = "StoreError"
    remedy: ClassVar[str] = ""

    def __init__(
        self, where: str, detail: str, *, transient: bool = False, remedy: str = "", retry_after_seconds: float = 0.0
    ) -> None:
        self.where = where
        self.detail = detail
        self.transient = transient
        self.retry_after_seconds = retry_after_seconds  # the pause that the service asked for
        remedy = remedy or self.remedy
        super().__init__(f"{where}: {detail}" + (f" ({remedy})" if remedy else ""))


def of_reason(reason: str) -> type[StoreError]:
    """The kind of error with that reason, for an error that another process has met."""
    return next((kind for kind in StoreError.__subclasses__() if kind.reason == reason), StoreError)


class Unreachable(StoreError):
    """The store does not answer, or not usefully, although it was asked again and again."""

    reason = "Unreachable"
    remedy = "check spec.checkpoint.endpoint, DNS and network policies, and whether the store is up"


class Forbidden(StoreError):
    """The store knows who asks, and refuses."""

    reason = "Forbidden"
    remedy = "allow these credentials to list, get, put and delete under the prefix"


class BadCredentials(StoreError):
    """There are no credentials, or the store does not accept them."""

    reason = "BadCredentials"
    remedy = (
        "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the Secret named by spec.checkpoint.credentialsSecret"
    )


class NoSuchBucket(StoreError):
    """The bucket does not exist."""

    reason = "NoSuchBucket"
    remedy = "create it, or correct spec.checkpoint.uri"


class BadAddress(StoreError):
    """Endpoint or region are none, whatever answers there."""

    reason = "BadAddress"
    remedy = (
        "spec.checkpoint.endpoint must be http://HOST[:PORT] or https://HOST[:PORT], and AWS_REGION in the Secret "
        "named by spec.checkpoint.credentialsSecret a region such as us-east-1"
    )


class NotFound(StoreError):
    """There is no object of that key."""

    reason = "NotFound"


class AlreadyExists(StoreError):
    """A conditional write found another object in its place."""

    reason = "AlreadyExists"


class Changed(StoreError):
    """The object is no longer the one whose ETag was asked for."""

    reason = "Changed"


class Full(StoreError):
    """No space, or no quota, is left."""

    reason = "Full"
    remedy = "free space, raise the quota, or lower spec.checkpoint.keepLast"


class WrongAnswer(StoreError):
    """Whatever answers does not speak the protocol, or not for this bucket's region."""

    reason = "WrongAnswer"
    remedy = "check that spec.checkpoint.endpoint and AWS_REGION are those of the bucket's S3 service"
