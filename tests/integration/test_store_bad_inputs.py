"""What a run is told at its start when its place in the object store is not fit for it, on real servers."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from manifests import a_manifest
from mend.catalog import Catalog
from mend.keys import MANIFEST_NAME, OWNER_KEY, announcement_key, checkpoint_key
from mend.listing import StoreView
from mend.manifest import MANIFEST_VERSION, encode_manifest
from mend.ownership import Owner, PrefixInUse
from mend.prefixes import _open
from mend.spec import Checkpointing
from mend.store import Credentials, Store, StoreError, Unreachable, WrongAnswer, open_store
from mend.store.s3 import S3Store
from mend_local.certificates import credentials as certificates
from s3 import KEY_ID, SECRET, FaultyProxy, S3Server, ministack, rclone

CLIO = Owner(namespace="team", name="clio", uid="uid-1")
DELETE_DENIED = (
    b"<?xml version='1.0'?><DeleteResult><Error><Key>x</Key><Code>AccessDenied</Code>"
    b"<Message>Access Denied</Message></Error></DeleteResult>"
)


@pytest.fixture(scope="module", params=[ministack, rclone])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with request.param(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture
def proxy(server: S3Server) -> Iterator[FaultyProxy]:
    with FaultyProxy(server) as running:
        yield running


def a_store(server: S3Server, prefix: str) -> Store:
    """The prefix, with little patience."""
    return open_store(server.uri(prefix), server.endpoint, server.credentials, deadline_seconds=2.0)


def at_start(server: S3Server, prefix: str) -> StoreView:
    """What a controller that opens the prefix has to show in the run's status."""
    rules = Checkpointing(uri=server.uri(prefix), endpoint=server.endpoint)
    keys = {"AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}
    try:
        return _open(rules, keys, None).view(CLIO)
    except StoreError as error:
        return StoreView(problem=str(error), problem_reason=error.reason)


@pytest.mark.parametrize(
    ("right", "method", "part", "status", "body"),
    [
        ("s3:ListBucket", "GET", "list-type=2", 403, b""),
        ("s3:PutObject", "PUT", "", 403, b""),
        ("s3:GetObject", "GET", "/rights/.mend-probe", 403, b""),
        ("s3:DeleteObject", "POST", "delete", 200, DELETE_DENIED),
    ],
)
def test_the_right_that_is_missing_is_named(
    proxy: FaultyProxy, right: str, method: str, part: str, status: int, body: bytes
) -> None:
    """A bucket that lacks one of the rights is refused at the start, naming this right as policies call it."""
    proxy.refuse(method, part, status, body)
    view = at_start(proxy.server, "rights")
    assert (view.listed, view.problem_reason) == (False, "Forbidden")
    assert f"{right} is missing" in view.problem
    assert "docs/storage.md" in view.problem


def test_parts_need_no_right_of_their_own(proxy: FaultyProxy) -> None:
    """Without the rights to list uploads and parts, large objects are written all the same, only never resumed."""
    proxy.refuse("GET", "uploads")
    store = S3Store(proxy.server.bucket, "unlisted", proxy.server.endpoint, proxy.server.credentials, 5.0, 5 << 20)
    content = bytes(range(256)) * (6 << 12)
    store.put("large", content)
    assert store.get("large") == content


def test_a_region_that_the_service_corrects_is_followed(proxy: FaultyProxy) -> None:
    """A service that names the bucket's region is asked again with a signature for it."""
    body = (
        b"<?xml version='1.0'?><Error><Code>AuthorizationHeaderMalformed</Code>"
        b"<Message>the region 'us-east-1' is wrong</Message><Region>eu-central-1</Region></Error>"
    )
    proxy.answer_with(400, 1 << 30, body=body, unless_signed_for="eu-central-1")
    a_store(proxy.server, "moved").put("x", b"1")
    assert a_store(proxy.server, "moved").get("x") == b"1"


@pytest.mark.parametrize(
    ("status", "code", "headers", "told"),
    [
        (301, b"PermanentRedirect", {"x-amz-bucket-region": "eu-central-1"}, "AWS_REGION=eu-central-1"),
        (400, b"AuthorizationHeaderMalformed", {}, "correct AWS_REGION"),
    ],
)
def test_a_wrong_region_is_told_with_the_right_one(
    proxy: FaultyProxy, status: int, code: bytes, headers: dict[str, str], told: str
) -> None:
    """A bucket of another region is told as such, with its region where the service says it."""
    body = b"<?xml version='1.0'?><Error><Code>" + code + b"</Code><Message>wrong region</Message></Error>"
    proxy.answer_with(status, 1 << 30, body=body, headers=headers)
    view = at_start(proxy.server, "region")
    assert (view.listed, view.problem_reason) == (False, "WrongAnswer")
    assert told in view.problem


def test_tls_where_none_is_spoken_is_told(server: S3Server) -> None:
    """https:// on a port that speaks plain HTTP is told at once, with what to write instead."""
    endpoint = server.endpoint.replace("http:", "https:")
    with pytest.raises(WrongAnswer, match="must begin with http://"):
        open_store(server.uri("x"), endpoint, server.credentials, deadline_seconds=30.0).probe()


def test_plain_http_where_tls_is_spoken_is_told(server: S3Server, tmp_path: Path) -> None:
    """http:// on a port that speaks TLS is unreachable, and the error names the endpoint."""
    with FaultyProxy(server, certificates(tmp_path).server_context()) as proxy:
        endpoint = proxy.server.endpoint.replace("https:", "http:")
        with pytest.raises(Unreachable, match=r"spec\.checkpoint\.endpoint"):
            open_store(server.uri("x"), endpoint, server.credentials, deadline_seconds=0.5).probe()


def test_a_port_that_speaks_something_else_is_told() -> None:
    """An endpoint that answers no HTTP at all is unreachable, and the error names the endpoint."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(b"220 mail.example ESMTP\r\n")

        threading.Thread(target=greet, daemon=True).start()
        keys = Credentials(access_key_id="a", secret_access_key="b")
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(Unreachable, match=r"spec\.checkpoint\.endpoint"):
            open_store("s3://runs/x", endpoint, keys, deadline_seconds=0.5).probe()
        listener.shutdown(socket.SHUT_RDWR)


def test_a_prefix_that_holds_something_else_is_refused(server: S3Server) -> None:
    """A prefix with a data set in it is not claimed, and nothing in it is touched."""
    a_store(server, "taken").put("shards/train-0001.bin", b"tokens")
    view = at_start(server, "taken")
    assert (view.listed, view.problem_reason) == (False, PrefixInUse.reason)
    assert "'shards/'" in view.problem
    assert "empty prefix" in view.problem
    assert [entry.key for entry in a_store(server, "taken").list()] == ["shards/train-0001.bin"]


def test_a_prefix_with_checkpoints_of_a_run_alone_is_taken(server: S3Server) -> None:
    """A run that no controller looked after has no owner: its checkpoints are no reason to refuse."""
    store = a_store(server, "alone")
    store.put(f"{checkpoint_key(5, 1, 'a')}/__0_0.distcp", b"1")
    store.put(".hidden", b"1")
    assert at_start(server, "alone").listed


def test_an_owner_that_is_none_is_refused(server: S3Server) -> None:
    """An owner.json that mend did not write means that the prefix is something else's."""
    a_store(server, "other").put(OWNER_KEY, b'{"name": 3}')
    view = at_start(server, "other")
    assert (view.listed, view.problem_reason) == (False, "PrefixOwned")
    assert "something else" in view.problem


@pytest.mark.parametrize("announced", [True, False])
def test_a_manifest_of_a_newer_version_is_told(server: S3Server, announced: bool) -> None:
    """What a newer mend saved is not passed over: the run waits, and its status says to upgrade."""
    prefix = f"newer-{announced}"
    store, folder = a_store(server, prefix), checkpoint_key(5, 1, "a")
    manifest = a_manifest(version=MANIFEST_VERSION + 1, step=5, tokens=5, created_unix_seconds=1000.0)
    store.put(f"{folder}/{MANIFEST_NAME}", encode_manifest(manifest))
    if announced:
        store.put(announcement_key(folder), b"")
    view = at_start(server, prefix)
    assert (view.listed, view.problem_reason) == (False, "NewerCheckpoint")
    assert "upgrade" in view.problem


def test_of_two_runs_on_one_prefix_the_second_is_told_of_the_first(server: S3Server) -> None:
    """A second run on the prefix is refused with the name of the first."""
    assert at_start(server, "shared").listed
    dora = Owner(namespace="other", name="dora", uid="uid-2")
    view = Catalog(a_store(server, "shared")).view(dora)
    assert (view.listed, view.problem_reason) == (False, "PrefixOwned")
    assert "team/clio" in view.problem
    assert msgspec.json.decode(a_store(server, "shared").get(OWNER_KEY), type=Owner) == CLIO


def test_an_authority_that_nobody_vouches_for_is_told(server: S3Server, tmp_path: Path) -> None:
    """A certificate of an unknown authority is refused, saying where to put the authority's own."""
    tls = certificates(tmp_path).server_context()
    with FaultyProxy(server, tls) as proxy, pytest.raises(Unreachable, match=r"ca\.crt into the Secret"):
        a_store(proxy.server, "x").probe()
