"""The object store as controller and ranks see it: `s3://bucket/prefix` on any endpoint, or `file:///path`."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from mend.environment import ENV_STORE_AUTHORITY, ENV_STORE_REQUESTS
from mend.store.api import Buffer, Data, Entry, Probe, Store, Unfinished
from mend.store.errors import (
    AlreadyExists,
    BadAddress,
    BadCredentials,
    Changed,
    Forbidden,
    Full,
    NoSuchBucket,
    NotFound,
    StoreError,
    Unreachable,
    WrongAnswer,
    of_reason,
)
from mend.store.files import FileStore
from mend.store.s3 import S3Store
from mend.store.s3_client import Credentials
from mend.store.usage import Usage

__all__ = [
    "AlreadyExists",
    "BadAddress",
    "BadCredentials",
    "Buffer",
    "Changed",
    "Credentials",
    "Data",
    "Entry",
    "Forbidden",
    "Full",
    "NoSuchBucket",
    "NotFound",
    "Probe",
    "Store",
    "StoreError",
    "Unfinished",
    "Unreachable",
    "Usage",
    "WrongAnswer",
    "of_reason",
    "open_store",
]


def open_store(
    uri: str,
    endpoint: str | None = None,
    credentials: Credentials | None = None,
    *,
    deadline_seconds: float = 60.0,
    requests_per_second: float | None = None,
) -> Store:
    """The store at a prefix. Opens no connection; `probe()` does.

    Credentials and region not given come from where AWS tools look (AWS_* in the environment, profile, web identity),
    the endpoint from AWS_ENDPOINT_URL, the authority's certificates from MEND_STORE_AUTHORITY
    or the file AWS_CA_BUNDLE, and the budget of requests, which all threads of this store share, from
    MEND_STORE_REQUESTS_PER_SECOND. Transient failures are retried until `deadline_seconds` after a call began.

    Raises ValueError for an address that is neither s3://BUCKET[/PREFIX] nor file:///PATH, and for a budget that is no
    number above 0.
    """
    address = urlsplit(uri)
    if "#" in uri or "?" in uri:  # would be cut off silently, and two runs could meet under one prefix
        raise ValueError(f"checkpoint uri {uri!r}: expected no '#' and no '?' in it")
    match address.scheme:
        case "s3" if address.netloc:
            return S3Store(
                address.netloc,
                address.path.strip("/"),
                endpoint,
                credentials,
                deadline_seconds,
                authority=os.environ.get(ENV_STORE_AUTHORITY, ""),
                requests_per_second=requests_per_second or _requests_per_second(),
            )
        case "file" if not address.netloc and address.path.strip("/"):
            return FileStore(Path(address.path.rstrip("/")), deadline_seconds)
        case _:
            raise ValueError(f"checkpoint uri {uri!r}: expected s3://BUCKET[/PREFIX] or file:///PATH")


def _requests_per_second() -> float | None:
    given = os.environ.get(ENV_STORE_REQUESTS, "")
    try:
        return float(given) if given else None
    except ValueError as error:
        raise ValueError(f"{ENV_STORE_REQUESTS}={given!r}: expected requests per second, a number above 0") from error
