"""Pure: AWS Signature Version 4 for S3, to sign a request and to check one."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

ALGORITHM: Final = "AWS4-HMAC-SHA256"
UNSIGNED_PAYLOAD: Final = "UNSIGNED-PAYLOAD"
_AUTHORIZATION = re.compile(
    rf"{ALGORITHM} Credential=([^/]+)/(\d{{8}})/([^/]+)/([^/]+)/aws4_request, ?"
    r"SignedHeaders=([a-z0-9;-]+), ?Signature=([0-9a-f]{64})"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Credentials, and the region they are used in."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    region: str = "us-east-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What of a request is signed: `path` and `query` as they are sent, header names in lower case."""

    method: str
    path: str
    query: str = ""
    headers: Mapping[str, str]


def sign(request: Request, keys: Keys) -> str:
    """The Authorization header; the headers must hold host, x-amz-date and x-amz-content-sha256."""
    signed = ";".join(sorted(request.headers))
    day = request.headers["x-amz-date"][:8]
    signature = _signature(request, signed, keys.secret_access_key, day, keys.region, "s3")
    scope = f"{keys.access_key_id}/{day}/{keys.region}/s3/aws4_request"
    return f"{ALGORITHM} Credential={scope}, SignedHeaders={signed}, Signature={signature}"


def refusal(request: Request, keys: Keys) -> tuple[str, str] | None:
    """The S3 error code and message for a request that these keys did not sign; None if they did."""
    found = _AUTHORIZATION.fullmatch(request.headers.get("authorization", ""))
    if not found:
        return "AccessDenied", "Access Denied: the request is not signed."
    key_id, day, region, service, signed, signature = found.groups()
    if key_id != keys.access_key_id:
        return "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records."
    expected = _signature(request, signed, keys.secret_access_key, day, region, service)
    if not hmac.compare_digest(expected, signature):
        return "SignatureDoesNotMatch", "The request signature we calculated does not match the one you provided."
    return None


def _signature(request: Request, signed: str, secret: str, day: str, region: str, service: str) -> str:
    names = signed.split(";")
    canonical = "\n".join(
        [
            request.method,
            request.path,
            "&".join(sorted(each if "=" in each else each + "=" for each in request.query.split("&") if each)),
            *(f"{name}:{' '.join(request.headers.get(name, '').split())}" for name in names),
            "",
            signed,
            request.headers.get("x-amz-content-sha256", UNSIGNED_PAYLOAD),
        ]
    )
    scope = f"{day}/{region}/{service}/aws4_request"
    text = "\n".join(
        [ALGORITHM, request.headers.get("x-amz-date", ""), scope, hashlib.sha256(canonical.encode()).hexdigest()]
    )
    key = f"AWS4{secret}".encode()
    for part in (day, region, service, "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return hmac.digest(key, text.encode(), "sha256").hex()
