"""How a client for an S3 service is made: endpoint, credentials, authority, and what of botocore's habits stays."""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import dataclass, field
from typing import Any, Final

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError
from botocore.loaders import Loader, create_loader

from mend.store.views import Body

CONNECTIONS: Final = 64  # kept open by a store; a surplus one is made anew for each request
ANSWER_SECONDS: Final = 30
_CONNECT_SECONDS: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """Keys of an S3 service; what is None is looked up where AWS tools look."""

    access_key_id: str | None = None
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    region: str | None = None
    authority: str | None = field(default=None, repr=False)  # PEM certificates to check the service's against


def make_client(endpoint: str | None, credentials: Credentials, authority: str, *, sign_payload: bool) -> Any:
    """boto3's plain client; raises ValueError or BotoCoreError for an endpoint or a region that is none.

    Without `sign_payload` its checksum guards an upload, and a signature only the request around it: SHA-256 would be
    the main cost of saving.
    """
    named = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    trusted = credentials.authority or authority
    core = botocore.session.get_session()
    core.register_component("data_loader", loader := descriptions())
    session = boto3.Session(
        botocore_session=core,
        aws_access_key_id=credentials.access_key_id,
        aws_secret_access_key=credentials.secret_access_key,
        aws_session_token=credentials.session_token,
        region_name=credentials.region,
    )
    loader.search_paths[:] = dict.fromkeys(loader.search_paths)  # each session adds the same
    config = Config(
        s3={"payload_signing_enabled": sign_payload} | ({"addressing_style": "path"} if named else {}),
        connect_timeout=_CONNECT_SECONDS,
        read_timeout=ANSWER_SECONDS,
        retries={"total_max_attempts": 1},  # `until` retries, and knows the deadline
        max_pool_connections=CONNECTIONS,
        tcp_keepalive=True,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    client = session.client(
        "s3",
        endpoint_url=endpoint,
        config=config,
        region_name=None if session.region_name else "us-east-1",
        verify=_authority_path(trusted) if trusted else None,
    )
    client.meta.events.register("before-sign.s3", _drop_expect)
    client.meta.events.register("before-send.s3", _send_slices)
    return client


def prepare() -> None:
    """Read once what every client of this process, and of its forks, needs: 100 ms of CPU in each of them otherwise."""
    with contextlib.suppress(ValueError, BotoCoreError):  # whoever uses such settings will complain
        nobody = Credentials(access_key_id="-", secret_access_key="-")
        make_client("http://localhost", nobody, "", sign_payload=False)


@functools.cache
def descriptions() -> Loader:
    """botocore's descriptions of S3, parsed once for all clients of this process: else each takes 70 ms of CPU."""
    loader = create_loader()
    loader.load_service_model("s3", "service-2")
    return loader


@functools.cache
def _authority_path(pem: str) -> str:
    """The certificates as the file that botocore wants: in memory, gone with the process, no path to leave behind."""
    descriptor = os.memfd_create("mend-authority")
    os.write(descriptor, pem.encode())
    return f"/proc/self/fd/{descriptor}"


def _drop_expect(request: Any, **_: Any) -> None:
    """No `Expect: 100-continue`: services that do not know it cost a second for each part."""
    del request.headers["Expect"]


def _send_slices(request: Any, **_: Any) -> None:
    """The content as it lies, not in a file's small blocks; its length is in the headers already."""
    if isinstance(request.body, Body):
        request.body = request.body.handed_over()
