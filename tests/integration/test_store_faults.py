"""A store that answers badly is asked again; one that will not serve says why and what to do."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
import time
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
from mend.store.parallel import each
from mend.store.s3 import S3Store
from s3 import KEY_ID, FaultyProxy, S3Server, free_port, ministack, rclone
from waiting import wait_until


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


def test_an_upload_refused_leaves_nothing(proxy: FaultyProxy, server: S3Server) -> None:
    """A multipart upload that is refused is aborted and leaves neither object nor orphaned parts."""
    store = a_store(proxy.server, "orphans")
    proxy.answer_with(403, times=100, method="PUT", part="partNumber=")
    with pytest.raises(Forbidden, match="s3:PutObject is missing"):
        store.put("large", bytes(6 << 20))
    assert list(store.unfinished()) == []
    assert list(store.list("")) == []


def parts_sent(proxy: FaultyProxy) -> list[str]:
    """The parts that were sent through the proxy, by their numbers in the addresses."""
    return [path for method, path in proxy.requests if method == "PUT" and "partNumber=" in path]


def test_an_upload_that_was_cut_off_is_resumed(proxy: FaultyProxy, server: S3Server) -> None:
    """The next try of a key sends only the parts that an earlier writer, who died or gave up, has not brought there."""
    content = os.urandom(16 << 20)
    proxy.answer_with(500, times=1000, method="PUT", part="partNumber=3")
    with pytest.raises(Unreachable):
        a_store(proxy.server, "resumed", deadline_seconds=0.5).put("large", content)
    (left,) = a_store(server, "resumed").unfinished()
    assert left.key == "large"
    proxy.heal()
    proxy.requests.clear()
    again = a_store(proxy.server, "resumed")
    again.put("large", content)
    sent = parts_sent(proxy)
    assert sent
    assert not [path for path in sent if "partNumber=1" in path or "partNumber=2" in path]
    assert again.get("large") == content
    assert list(again.unfinished()) == []


def test_a_killed_writers_parts_are_taken_over(proxy: FaultyProxy) -> None:
    """When the writer is killed in the middle, the next process sends only what had not arrived."""
    stalled = proxy.stall(1, method="PUT", part="partNumber=3")
    program = (
        "import sys\n"
        "from mend.store import Credentials\n"
        "from mend.store.s3 import S3Store\n"
        "keys = Credentials(access_key_id=sys.argv[2], secret_access_key=sys.argv[3])\n"
        "S3Store('runs', 'killed', sys.argv[1], keys, 30.0, 5 << 20).put('large', bytes(range(256)) * (16 << 12))\n"
    )
    keys = [str(proxy.server.credentials.access_key_id), str(proxy.server.credentials.secret_access_key)]
    with subprocess.Popen([sys.executable, "-c", program, proxy.server.endpoint, *keys]) as writer:
        (upload,) = wait_until(lambda: list(a_store(proxy.server, "killed").unfinished()), "the upload to begin")
        wait_until(lambda: len(parts_sent(proxy)) == 4, "all parts to be on their way")
        writer.kill()
    stalled.set()
    proxy.requests.clear()
    store = a_store(proxy.server, "killed")
    content = bytes(range(256)) * (16 << 12)
    store.put("large", content)
    assert upload.key == "large"
    assert 0 < len(parts_sent(proxy)) < 4
    assert store.get("large") == content


def test_parts_of_other_bytes_are_sent_again(proxy: FaultyProxy) -> None:
    """What lies in an earlier upload counts only with the right size and checksum: the object is the one put last."""
    proxy.answer_with(500, times=1000, method="PUT", part="partNumber=3")
    with pytest.raises(Unreachable):
        a_store(proxy.server, "changed", deadline_seconds=0.5).put("large", os.urandom(16 << 20))
    proxy.heal()
    content = os.urandom(16 << 20)
    store = a_store(proxy.server, "changed")
    store.put("large", content)
    assert store.get("large") == content


def test_an_upload_that_ended_under_ones_hands_is_begun_anew(proxy: FaultyProxy, server: S3Server) -> None:
    """When somebody aborts the upload that is being resumed, the object is written all the same."""
    content = os.urandom(11 << 20)
    store = a_store(proxy.server, "ended")
    proxy.answer_with(500, times=1000, method="PUT", part="partNumber=2")
    with pytest.raises(Unreachable):
        a_store(proxy.server, "ended", deadline_seconds=0.5).put("large", content)
    proxy.heal()
    (left,) = store.unfinished()
    stalled = proxy.stall(1, method="PUT", part="partNumber=2")
    writer = threading.Thread(target=store.put, args=("large", content))
    writer.start()
    wait_until(lambda: stalled_requests(proxy), "a part to be on its way")
    a_store(server, "ended").abandon(left)
    stalled.set()
    writer.join()
    assert a_store(server, "ended").get("large") == content


def stalled_requests(proxy: FaultyProxy) -> list[str]:
    """Second parts that came in since the proxy was healed."""
    return [path for path in parts_sent(proxy)[-1:] if "partNumber=2" in path]


def test_what_nobody_resumes_is_found_and_ended(server: S3Server, tmp_path: Path) -> None:
    """What writers left unfinished is listed under its prefix only, and is gone once abandoned, be it twice."""
    with FaultyProxy(server) as proxy:
        proxy.answer_with(500, times=1000, method="PUT", part="partNumber=2")
        with pytest.raises(Unreachable):
            a_store(proxy.server, "left/mine", deadline_seconds=0.5).put("a/large", bytes(6 << 20))
        with pytest.raises(Unreachable):
            a_store(proxy.server, "left/other", deadline_seconds=0.5).put("b/large", bytes(6 << 20))
    store = a_store(server, "left/mine")
    (left,) = store.unfinished("a/")
    assert (left.key, list(store.unfinished("b/"))) == ("a/large", [])
    store.abandon(left)
    store.abandon(left)
    assert list(store.unfinished()) == []
    assert [each.key for each in a_store(server, "left/other").unfinished()] == ["b/large"]


def test_a_service_that_asks_for_a_pause_gets_it(proxy: FaultyProxy) -> None:
    """A 503 with Retry-After is not asked again before that time has passed."""
    proxy.answer_with(503, times=1, headers={"Retry-After": "1"})
    began = time.monotonic()
    a_store(proxy.server, "pause").put("x", b"1")
    assert time.monotonic() - began >= 1.0


def test_requests_keep_to_their_budget(server: S3Server) -> None:
    """All threads of a store together begin no more requests in a second than it was opened with."""
    with FaultyProxy(server) as proxy:
        store = open_store(server.uri("budget"), proxy.server.endpoint, server.credentials, requests_per_second=20)
        began = time.monotonic()
        each(lambda number: store.put(f"x/{number}", b"1"), range(40), 8)
        assert time.monotonic() - began >= 0.9  # twenty at once, the others a twentieth of a second apart
        assert store.usage.waited_seconds > 0
        assert len(proxy.requests) == store.usage.total >= 40


def test_costs_are_counted_as_they_are_billed(proxy: FaultyProxy) -> None:
    """Requests of each kind, those asked again among them, and bytes in both directions are counted."""
    store = a_store(proxy.server, "costs")
    store.put("first", b"")  # by which it learns which checksum the service takes
    before = store.usage
    proxy.answer_with(503, times=1)
    store.put("small", b"12345")
    store.get("small", 1, 3)
    store.delete(["small"])
    list(store.list(""))
    used = store.usage
    assert used.requests == {"put": before.total + 2, "get": 1, "delete": 1, "list": 1}
    assert (used.again, used.received_bytes, used.sent_bytes) == (1, 3, 10)
    assert len(proxy.requests) == used.total


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


def test_what_a_killed_writer_left_in_a_folder_is_found_and_ended(tmp_path: Path) -> None:
    """A file that was half written when its process died is no object; it is listed as unfinished, and can be ended."""
    program = (
        "import resource, signal, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
        "from mend.store import open_store\n"
        "open_store(sys.argv[1]).put('a/large', bytes(1_000_000))\n"
    )
    uri = f"file://{tmp_path}/run"
    assert subprocess.run([sys.executable, "-c", program, uri]).returncode == -signal.SIGXFSZ
    store = open_store(uri)
    (left,) = store.unfinished("a/")
    assert (left.key, list(store.list("")), list(store.unfinished("b/"))) == ("a/large", [], [])
    store.abandon(left)
    store.abandon(left)
    assert list(store.unfinished()) == []


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
