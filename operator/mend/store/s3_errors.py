"""What botocore raises, told in the store's own words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from mend.store.errors import (
    AlreadyExists,
    BadCredentials,
    Forbidden,
    Full,
    NoSuchBucket,
    NotFound,
    StoreError,
    Unreachable,
    WrongAnswer,
)

_BY_CODE: Final[dict[str, type[StoreError]]] = {
    "NoSuchBucket": NoSuchBucket,
    "NoSuchKey": NotFound,
    "NoSuchUpload": NotFound,
    "InvalidRange": NotFound,
    "AccessDenied": Forbidden,
    "AllAccessDisabled": Forbidden,
    "AccountProblem": Forbidden,
    "InvalidAccessKeyId": BadCredentials,
    "SignatureDoesNotMatch": BadCredentials,
    "ExpiredToken": BadCredentials,
    "InvalidToken": BadCredentials,
    "TokenRefreshRequired": BadCredentials,
    "RequestTimeTooSkewed": BadCredentials,
    "PreconditionFailed": AlreadyExists,
    "InsufficientStorage": Full,
    "XMinioStorageFull": Full,
    "QuotaExceeded": Full,
    "InvalidBucketName": NoSuchBucket,
}
# For answers without S3's error document. A bare 404 is not among them: S3 says what is missing, a web server does not.
_BY_STATUS: Final[dict[int, type[StoreError]]] = {
    403: Forbidden,
    412: AlreadyExists,
    416: NotFound,
    507: Full,
}
_BUSY_CODES: Final = frozenset(
    {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "OperationAborted", "RequestLimitExceeded"}
    | {"ConditionalRequestConflict", "Throttling", "ThrottlingException", "TooManyRequests", "BadDigest"}
)
_NO_CREDENTIALS: Final = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.NoAuthTokenError,
)


def translate(error: Exception, where: str) -> StoreError:
    """The error of the closed set; transient for 429, 5xx, timeouts, lost connections and half answers."""
    if isinstance(error, boto.ClientError):
        return _from_answer(error.response, where)
    if isinstance(error, _NO_CREDENTIALS):
        return BadCredentials(where, str(error))
    if isinstance(error, boto.ParamValidationError):
        return NoSuchBucket(where, str(error).replace("\n", " "))
    if isinstance(error, boto.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return Unreachable(where, str(error), remedy="name the authority's certificates in AWS_CA_BUNDLE")
    if isinstance(error, ResponseParserError):
        return WrongAnswer(where, "the answer is not S3's, or only half of it", transient=True)
    if isinstance(error, boto.BotoCoreError | HTTPError):
        return Unreachable(where, str(error), transient=True)
    raise error


def _from_answer(answer: Mapping[str, Any], where: str) -> StoreError:
    code = str(answer.get("Error", {}).get("Code", ""))
    message = str(answer.get("Error", {}).get("Message", ""))
    status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    detail = f"HTTP {status} {code}" + (f": {message}" if message and message != code else "")
    known = _BY_CODE.get(code) or (None if code in _BUSY_CODES else _BY_STATUS.get(status))
    if known:
        return known(where, detail)
    if code in _BUSY_CODES or status == 429 or status >= 500:
        return Unreachable(where, detail, transient=True)
    return WrongAnswer(where, detail)
