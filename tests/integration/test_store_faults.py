"""A store that answers badly is asked again; one that will not serve says why and what to do."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mend.store import (
    BadCredentials,
    Credentials,
    Forbidden,
    Full,
    NoSuchBucket,
    Unreachable,
    WrongAnswer,
    open_store,
)
from mend.store.s3 import S3Store
from s3 import KEY_ID, FaultyProxy, S3Server, free_port, ministack, rclone


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with ministack(tmp_path_factory.mktemp("ministack")) as running:
        yield running


@pytest.fixture
def proxy(server: S3Server) -> Iterator[FaultyProxy]:
    with FaultyProxy(server) as running:
        yield running


def a_store(server: S3Server, prefix: str = "faults", deadline_seconds: float = 30.0) -> S3Store:
    """A store behind the server or proxy, with small parts."""
    return S3Store(server.bucket, prefix, server.endpoint, server.credentials, deadline_seconds, 5 << 20)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_answers_are_asked_again(proxy: FaultyProxy, status: int) -> None:
    """Some 429 or 5xx answers only delay a write and a read."""
    store = a_store(proxy.server)
    proxy.answer_with(status, times=2)
    store.put("busy", b"content")
    proxy.answer_with(status, times=2, method="GET")
    assert store.get("busy", 0, 7) == b"content"


def test_half_an_answer_is_asked_for_again(proxy: FaultyProxy) -> None:
    """An answer cut in the middle, of an object or of a listing, is never taken for the whole."""
    store = a_store(proxy.server, "half")
    content = os.urandom(100_000)
    store.put("cut", content)
    proxy.cut_answers(times=2)
    assert store.get("cut", 0, len(content)) == content
    proxy.cut_answers(times=1)
    assert [entry.key for entry in store.list("")] == ["cut"]


def test_a_write_whose_answer_was_lost_still_counts(proxy: FaultyProxy) -> None:
    """A conditional write that took place although its answer was lost is a success, not "already exists"."""
    store = a_store(proxy.server, "lost")
    proxy.lose_answers(times=1)
    store.put_if_absent("manifest", b"mine")
    assert store.get("manifest") == b"mine"


def test_a_part_that_failed_is_sent_again_alone(proxy: FaultyProxy) -> None:
    """When one part of a large upload fails, only that part is sent again and the object is whole."""
    store = a_store(proxy.server, "parts")
    content = os.urandom(11 << 20)
    proxy.answer_with(500, times=1, method="PUT", part="partNumber=2")
    store.put("large", content)
    sent = [path for method, path in proxy.requests if method == "PUT" and "partNumber=" in path]
    assert len(sent) == 4
    assert store.get("large") == content


def test_an_upload_completed_without_an_answer_is_complete(proxy: FaultyProxy) -> None:
    """When the answer to the completion of a multipart upload is lost, the object is found to be there."""
    store = a_store(proxy.server, "completed")
    content = os.urandom(6 << 20)
    proxy.lose_answers(times=1, method="POST", part="uploadId=")
    store.put("large", content)
    assert store.get("large") == content


def test_an_upload_given_up_leaves_nothing(proxy: FaultyProxy, server: S3Server) -> None:
    """A multipart upload that cannot be finished is aborted and leaves neither object nor orphaned parts."""
    store = a_store(proxy.server, "orphans", deadline_seconds=0.5)
    proxy.answer_with(500, times=100, method="PUT", part="partNumber=")
    with pytest.raises(Unreachable, match="500"):
        store.put("large", bytes(6 << 20))
    uploads = server.client().list_multipart_uploads(Bucket=server.bucket)  # type: ignore[attr-defined]
    assert not uploads.get("Uploads")
    assert list(store.list("")) == []


def test_a_store_that_stays_busy_is_given_up(proxy: FaultyProxy) -> None:
    """Past the deadline a busy store counts as unreachable, and the error says what it last answered."""
    proxy.answer_with(503, times=1000)
    with pytest.raises(Unreachable, match="HTTP 503"):
        a_store(proxy.server, deadline_seconds=0.5).put("x", b"")


def test_nobody_there_is_unreachable() -> None:
    """An endpoint where nobody listens is unreachable, and the error names the setting."""
    keys = Credentials(access_key_id="a", secret_access_key="b")
    store = open_store("s3://runs/x", f"http://127.0.0.1:{free_port()}", keys, deadline_seconds=0.5)
    with pytest.raises(Unreachable, match=r"spec\.checkpoint\.endpoint"):
        store.probe()


def test_address_and_keys_are_found_where_aws_tools_look(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without arguments the endpoint and the keys come from the environment, as the pod of a run gets them."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "from-the-secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    store = open_store(server.uri("environment"))
    store.put("x", b"1")
    assert a_store(server, "environment").get("x") == b"1"


def test_without_keys_the_secret_is_named(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no credentials at all, the error says which variables of which Secret are missing."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(BadCredentials, match="AWS_SECRET_ACCESS_KEY in the Secret"):
        open_store(server.uri("x"), server.endpoint, deadline_seconds=5).probe()


def test_a_refusal_names_the_rights(proxy: FaultyProxy) -> None:
    """Credentials without the right to write are told which rights they lack."""
    proxy.answer_with(403, times=1, method="PUT")
    with pytest.raises(Forbidden, match="list, get, put and delete"):
        a_store(proxy.server).probe()


def test_a_bucket_that_does_not_exist_is_named(server: S3Server) -> None:
    """A bucket that does not exist is named as such, not as a missing object."""
    with pytest.raises(NoSuchBucket, match=r"s3://nowhere/x.*spec.checkpoint.uri"):
        open_store("s3://nowhere/x", server.endpoint, server.credentials).probe()


def test_a_wrong_secret_is_told_apart_from_a_missing_right(tmp_path: Path) -> None:
    """A wrong secret points at the Secret, not at the bucket's policy."""
    with rclone(tmp_path) as server:
        wrong = Credentials(access_key_id=KEY_ID, secret_access_key="wrong")
        with pytest.raises(BadCredentials, match="credentialsSecret"):
            open_store(server.uri("x"), server.endpoint, wrong).probe()


def test_a_full_store_is_told_as_full(proxy: FaultyProxy) -> None:
    """507 is a full store, at once and with the remedy."""
    proxy.answer_with(507, times=1)
    with pytest.raises(Full, match="keepLast"):
        a_store(proxy.server).put("x", b"1")


def test_an_endpoint_that_is_not_s3_is_told(tmp_path: Path) -> None:
    """A web server that is no S3 service is told as such, and the error names the setting to look at."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, args=(0.05,), daemon=True).start()
        endpoint = f"http://127.0.0.1:{web.server_address[1]}"
        with pytest.raises(WrongAnswer, match="endpoint and AWS_REGION"):
            S3Store("runs", "x", endpoint, Credentials(access_key_id="a", secret_access_key="b"), 0.5).probe()
        web.shutdown()


def test_a_full_disk_leaves_no_half_object(tmp_path: Path) -> None:
    """When the disk takes no more, the write fails as full and nothing of it remains."""
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        "from mend.store import Full, open_store\n"
        "store = open_store(sys.argv[1])\n"
        "try: store.put('a/large', bytes(1_000_000))\n"
        "except Full as error: print(error)\n"
    )
    uri = f"file://{tmp_path}/run"
    done = subprocess.run([sys.executable, "-c", program, uri], capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout
    assert list(open_store(uri).list("")) == []
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_disk_without_space_is_told_as_full(tmp_path: Path) -> None:
    """A file system with no space left is told as full, and what fits afterwards is written."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "mend", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        store = open_store(f"file://{disk}/run")
        with pytest.raises(Full, match="No space left"):
            store.put("a/large", bytes(2 << 20))
        store.put("a/small", bytes(1000))
        assert [entry.key for entry in store.list("")] == ["a/small"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_rights_is_forbidden(tmp_path: Path) -> None:
    """A folder that may not be written is told as forbidden."""
    tmp_path.chmod(0o500)
    with pytest.raises(Forbidden, match="read and write access"):
        open_store(f"file://{tmp_path}/run").probe()


def test_a_path_that_is_a_file_is_no_store(tmp_path: Path) -> None:
    """A path that leads through a file cannot be a store, and the error names it."""
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(WrongAnswer, match=str(tmp_path)):
        open_store(f"file://{tmp_path}/file/run").probe()
