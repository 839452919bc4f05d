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
# The right that a refused operation needs, as policies call it; what is not here is called like its operation.
_RIGHTS: Final = {
    "ListObjectsV2": "ListBucket",
    "DeleteObjects": "DeleteObject",
    "CreateMultipartUpload": "PutObject",
    "UploadPart": "PutObject",
    "CompleteMultipartUpload": "PutObject",
    "ListMultipartUploads": "ListBucketMultipartUploads",
    "ListParts": "ListMultipartUploadParts",
}
_WRONG_REGION: Final = frozenset(
    {"PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
)
_NO_TLS: Final = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "UNKNOWN_PROTOCOL")
_IDENTITY: Final = (
    "check AWS_ROLE_ARN, AWS_WEB_IDENTITY_TOKEN_FILE and what the role's trust policy says of the service account"
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
        return _from_answer(error.response, where, error.operation_name)
    if isinstance(error, FileNotFoundError | PermissionError):  # of the token's file: nothing else is read
        return BadCredentials(where, str(error), remedy=_IDENTITY)
    if isinstance(error, _NO_CREDENTIALS):
        return BadCredentials(where, str(error))
    if isinstance(error, boto.ParamValidationError):
        return NoSuchBucket(where, str(error).replace("\n", " "))
    if isinstance(error, boto.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        remedy = (
            "put the authority's certificate as ca.crt into the Secret named by spec.checkpoint.credentialsSecret, "
            "or name a file with it in AWS_CA_BUNDLE"
        )
        return Unreachable(where, str(error), remedy=remedy)
    if isinstance(error, boto.SSLError) and any(sign in str(error) for sign in _NO_TLS):
        remedy = "if the service speaks plain HTTP on that port, spec.checkpoint.endpoint must begin with http://"
        return WrongAnswer(where, f"what answers there does not speak TLS: {error}", remedy=remedy)
    if isinstance(error, ResponseParserError):
        return WrongAnswer(where, "the answer is not S3's, or only half of it", transient=True)
    if isinstance(error, boto.BotoCoreError | HTTPError):
        return Unreachable(where, str(error), transient=True)
    raise error


def _from_answer(answer: Mapping[str, Any], where: str, operation: str) -> StoreError:
    code = str(answer.get("Error", {}).get("Code", ""))
    message = str(answer.get("Error", {}).get("Message", ""))
    facts = answer.get("ResponseMetadata", {})
    status = int(facts.get("HTTPStatusCode", 0))
    headers = facts.get("HTTPHeaders", {})
    detail = f"{operation}: HTTP {status} {code}" + (f": {message}" if message and message != code else "")
    known = _BY_CODE.get(code) or (None if code in _BUSY_CODES else _BY_STATUS.get(status))
    if operation.startswith("AssumeRole") and (known or status < 500):
        return BadCredentials(where, detail, remedy=_IDENTITY)
    if known is Forbidden:
        right = f"s3:{_RIGHTS.get(operation, operation)}"
        remedy = f"{Forbidden.remedy}; {right} is missing: docs/storage.md has the policy"
        return Forbidden(where, detail, remedy=remedy)
    if known:
        return known(where, detail)
    if code in _BUSY_CODES or status == 429 or (status >= 500 and status != 501):  # 501: there is no such verb
        asked = retry_after_seconds(headers.get("retry-after", ""))
        return Unreachable(where, detail, transient=True, retry_after_seconds=asked)
    if code in _WRONG_REGION or status in (301, 307):
        region = headers.get("x-amz-bucket-region") or answer.get("Error", {}).get("Region") or ""
        remedy = f"the bucket is in region {region}: set AWS_REGION={region} in" if region else "correct AWS_REGION in"
        return WrongAnswer(where, detail, remedy=f"{remedy} the Secret named by spec.checkpoint.credentialsSecret")
    return WrongAnswer(where, detail)


def retry_after_seconds(header: str) -> float:
    """The pause that a Retry-After header asks for; one that gives a date, which S3 does not, asks for none."""
    return float(header) if header.isascii() and header.isdigit() else 0.0
