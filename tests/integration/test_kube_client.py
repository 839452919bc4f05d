"""The raw client against a real server: verbs, errors, repeats, rotating tokens, dead connections."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml

from kube_server import NAMESPACE, Cluster, a_cluster, a_secret
from mend.kube import client as client_module
from mend.kube import errors
from mend.kube.client import PODS, SECRETS, KubeClient, Resource, WatchEvent


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """A fresh server."""
    async with a_cluster(tmp_path) as cluster:
        yield cluster


async def test_an_object_lives_from_create_to_delete(cluster: Cluster) -> None:
    """Create, get, replace, patch and delete do what their names say."""
    client = cluster.client
    made = await client.create(SECRETS, NAMESPACE, a_secret("s", a="1"))
    assert (await client.get(SECRETS, NAMESPACE, "s"))["metadata"]["uid"] == made["metadata"]["uid"]
    made["metadata"]["labels"] = {"colour": "red"}
    replaced = await client.replace(SECRETS, made)
    with pytest.raises(errors.Conflict):
        await client.replace(SECRETS, made)
    change = {"metadata": {"labels": {"colour": None, "size": "small"}}}
    patched = await client.merge_patch(SECRETS, NAMESPACE, "s", change)
    assert patched["metadata"]["labels"] == {"size": "small"}
    assert patched["metadata"]["resourceVersion"] != replaced["metadata"]["resourceVersion"]
    await client.delete(SECRETS, NAMESPACE, "s", uid=made["metadata"]["uid"], propagation="Background")
    with pytest.raises(errors.NotFound):
        await client.get(SECRETS, NAMESPACE, "s")


async def test_preconditions_guard_a_delete(cluster: Cluster) -> None:
    """A delete that names another uid or an old version changes nothing."""
    made = await cluster.client.create(SECRETS, NAMESPACE, a_secret("s"))
    with pytest.raises(errors.Conflict):
        await cluster.client.delete(SECRETS, NAMESPACE, "s", uid="another")
    with pytest.raises(errors.Conflict):
        await cluster.client.delete(SECRETS, NAMESPACE, "s", resource_version="1")
    version = made["metadata"]["resourceVersion"]
    await cluster.client.delete(SECRETS, NAMESPACE, "s", resource_version=version, grace_seconds=0)


async def test_errors_have_names(cluster: Cluster) -> None:
    """Taken names, unknown objects, unknown kinds and invalid bodies raise errors that say what was asked."""
    await cluster.client.create(SECRETS, NAMESPACE, a_secret("s"))
    with pytest.raises(errors.AlreadyExists, match="POST /api/v1/namespaces/default/secrets: 409 AlreadyExists"):
        await cluster.client.create(SECRETS, NAMESPACE, a_secret("s"))
    with pytest.raises(errors.NotFound):
        await cluster.client.get(Resource("mend.dev", "v9", "nonsense"), NAMESPACE, "s")
    with pytest.raises(errors.Invalid):
        await cluster.client.create(SECRETS, NAMESPACE, a_secret("Not A Name"))


async def test_lists_come_in_pages(cluster: Cluster) -> None:
    """A list is cut into pages of the wanted size, and selectors reach the server."""
    for number in range(5):
        await cluster.client.create(SECRETS, NAMESPACE, a_secret(f"s{number}", labels={"parity": str(number % 2)}))
    pages = [page async for page in cluster.client.list_pages(SECRETS, NAMESPACE, page_size=2)]
    names = [item["metadata"]["name"] for page in pages for item in page.items if item["metadata"]["name"][0] == "s"]
    assert len(pages) >= 3
    assert sorted(names) == ["s0", "s1", "s2", "s3", "s4"]
    odd = await cluster.client.list_all(SECRETS, NAMESPACE, label_selector="parity=1")
    assert [item["metadata"]["name"] for item in odd.items] == ["s1", "s3"]


async def test_reads_are_repeated_and_writes_are_not(cluster: Cluster) -> None:
    """A read survives 5xx answers; a write of which nobody knows whether it took place is not sent again."""
    await cluster.client.create(SECRETS, NAMESPACE, a_secret("s"))
    await cluster.misbehave(errors=2, errorCode=503)
    await cluster.client.get(SECRETS, NAMESPACE, "s")
    await cluster.misbehave(errors=1, errorCode=500)
    with pytest.raises(errors.ServerError):
        await cluster.client.create(SECRETS, NAMESPACE, a_secret("t"))
    with pytest.raises(errors.NotFound):
        await cluster.client.get(SECRETS, NAMESPACE, "t")


async def test_a_write_refused_with_429_is_sent_again(cluster: Cluster) -> None:
    """Too many requests means that it was not handled: it is safe to repeat."""
    await cluster.misbehave(errors=1, errorCode=429)
    await cluster.client.create(SECRETS, NAMESPACE, a_secret("s"))


async def test_a_server_that_is_down_is_unreachable(cluster: Cluster) -> None:
    """Refused connections raise Unreachable, and say that nothing was sent."""
    await cluster.server.stop()
    with pytest.raises(errors.Unreachable) as error:
        await cluster.client.create(SECRETS, NAMESPACE, a_secret("s"))
    assert not error.value.was_sent


async def test_a_server_that_hangs_is_unreachable(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """No request waits for ever."""
    monkeypatch.setattr(client_module, "REQUEST_SECONDS", 0.2)
    await cluster.misbehave(frozen=True)
    with pytest.raises(errors.Unreachable):
        await cluster.client.create(SECRETS, NAMESPACE, a_secret("s"))
    await cluster.misbehave()
    await cluster.client.create(SECRETS, NAMESPACE, a_secret("t"))


async def test_a_watch_tells_changes_in_order(cluster: Cluster) -> None:
    """A watch from a version tells what came after it, as it happened."""
    start = await cluster.client.list_all(SECRETS, NAMESPACE)
    await cluster.client.create(SECRETS, NAMESPACE, a_secret("s"))
    await cluster.client.merge_patch(SECRETS, NAMESPACE, "s", {"metadata": {"labels": {"size": "big"}}})
    await cluster.client.delete(SECRETS, NAMESPACE, "s")
    found: list[WatchEvent] = []
    async for event in cluster.client.watch(
        SECRETS, NAMESPACE, resource_version=start.resource_version, timeout_seconds=30
    ):
        found.append(event)
        if event.type == "DELETED":
            break
    assert [event.type for event in found if event.type != "BOOKMARK"] == ["ADDED", "MODIFIED", "DELETED"]


async def test_a_watch_from_a_forgotten_version_is_gone(cluster: Cluster) -> None:
    """410 comes as Gone, whether as an answer or inside the stream."""
    start = await cluster.client.list_all(SECRETS, NAMESPACE)
    await cluster.client.create(SECRETS, NAMESPACE, a_secret("s"))
    await cluster.misbehave(expireWatches=1)
    with pytest.raises(errors.Gone):
        async for _ in cluster.client.watch(SECRETS, NAMESPACE, resource_version=start.resource_version):
            pass


async def test_a_silent_watch_ends_in_time(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that died unnoticed ends with Unreachable a little after the watch should have ended."""
    monkeypatch.setattr(client_module, "WATCH_GRACE_SECONDS", 0.1)
    start = await cluster.client.list_all(SECRETS, NAMESPACE)
    await cluster.misbehave(frozen=True)
    with pytest.raises(errors.Unreachable):
        async for _ in cluster.client.watch(
            SECRETS, NAMESPACE, resource_version=start.resource_version, timeout_seconds=1
        ):
            pass


async def test_a_rotated_token_is_taken_up(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cluster a token that expired is replaced by the one that its file holds by then, without a restart."""
    token, ca = tmp_path / "token", tmp_path / "ca.crt"
    config = yaml.safe_load(cluster.kubeconfig.read_text())
    ca.write_bytes(base64.b64decode(config["clusters"][0]["cluster"]["certificate-authority-data"]))
    token.write_text("expired\n")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(cluster.server.port))
    client = await KubeClient.in_cluster(str(token), str(ca))
    try:
        with pytest.raises(errors.Unauthorized):
            await client.list_all(SECRETS, NAMESPACE)
        token.unlink()
        with pytest.raises(errors.Unauthorized):
            await client.list_all(SECRETS, NAMESPACE)
        token.write_text(cluster.server.admin_token + "\n")
        await client.create(SECRETS, NAMESPACE, a_secret("s"))
    finally:
        await client.close()


@pytest.mark.parametrize("text", ["", "not: [yaml", "kind: Config\n"], ids=["empty", "broken", "hollow"])
async def test_credentials_that_are_none_say_so(tmp_path: Path, text: str) -> None:
    """A kubeconfig that cannot be used raises Unauthorized with the reason, not a stack of the loader."""
    path = tmp_path / "kubeconfig"
    path.write_text(text)
    with pytest.raises(errors.Unauthorized, match="cluster credentials"):
        await KubeClient.from_kubeconfig(str(path))


class Logs:
    """What one container printed."""

    async def read(
        self, namespace: str, name: str, container: str, *, tail_lines: int | None, **_: object
    ) -> AsyncIterator[bytes]:
        """The last of ten lines, or an error for any other container."""
        if container != "trainer":
            raise LookupError(f"container {container} is waiting to start")
        for number in range(10 - (tail_lines or 10), 10):
            yield b"line %d\n" % number


async def test_the_tail_of_a_log(tmp_path: Path) -> None:
    """The last lines of a container come as text; a container without a log raises an error that says why."""
    async with a_cluster(tmp_path, logs=Logs()) as cluster:
        containers = [{"name": name, "image": "none"} for name in ("trainer", "other")]
        meta = {"name": "p", "namespace": NAMESPACE}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": {"containers": containers}}
        await cluster.client.create(PODS, NAMESPACE, pod)
        assert await cluster.client.log_tail(NAMESPACE, "p", container="trainer", lines=2) == "line 8\nline 9\n"
        with pytest.raises(errors.ApiError, match="waiting to start"):
            await cluster.client.log_tail(NAMESPACE, "p", container="other")


async def test_many_requests_share_one_client(cluster: Cluster) -> None:
    """Concurrent creates of one name: exactly one wins."""
    results = await asyncio.gather(
        *(cluster.client.create(SECRETS, NAMESPACE, a_secret("s")) for _ in range(10)), return_exceptions=True
    )
    assert sum(isinstance(result, dict) for result in results) == 1
    assert sum(isinstance(result, errors.AlreadyExists) for result in results) == 9
