"""The local API server misbehaves on command, stops when told to, and comes back with what it knew."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from mend_local.apiserver import ApiServer
from mend_local.faults import PATH

CONFIGMAPS = "/api/v1/namespaces/default/configmaps"
SOON = 30.0


class Client:
    """Calls one server as its admin."""

    def __init__(self, server: ApiServer, session: aiohttp.ClientSession) -> None:
        self._server = server
        self.session = session

    def send(self, method: str, path: str, body: Any = None, **query: str) -> Any:
        """A request, to be awaited or used as a context manager."""
        return self.session.request(
            method,
            self._server.url + path,
            json=body,
            params=query,
            ssl=self._server.credentials.client_context(),
            headers={"Authorization": f"Bearer {self._server.admin_token}"},
        )

    async def call(self, method: str, path: str, body: Any = None, **query: str) -> tuple[int, Any]:
        """Status code and JSON of an answer."""
        async with self.send(method, path, body, **query) as response:
            return response.status, await response.json(content_type=None)

    async def impose(self, **faults: Any) -> None:
        """Replace the faults in force."""
        code, told = await self.call("PUT", PATH, faults)
        assert code == 200, told


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ApiServer]:
    """A running server."""
    async with ApiServer(tmp_path) as server:
        yield server


@pytest.fixture
async def client(server: ApiServer) -> AsyncIterator[Client]:
    """Its admin."""
    async with aiohttp.ClientSession() as session:
        yield Client(server, session)


def named(name: str) -> dict[str, Any]:
    """A configmap."""
    return {"metadata": {"name": name}}


async def test_errors_and_conflicts_are_used_up(client: Client) -> None:
    """The next N requests fail, the next N writes conflict, only for the resource that is meant, and then no more."""
    await client.impose(errors=2, errorCode=503)
    codes = [(await client.call("GET", CONFIGMAPS))[0] for _ in range(3)]
    assert codes == [503, 503, 200]
    await client.call("POST", CONFIGMAPS, named("x"))
    await client.impose(conflicts=1, resource="configmaps")
    assert (await client.call("PUT", "/api/v1/namespaces/default", {"metadata": {"name": "default"}}))[0] == 200
    assert (await client.call("GET", f"{CONFIGMAPS}/x"))[0] == 200
    code, status = await client.call("PUT", f"{CONFIGMAPS}/x", named("x"))
    assert (code, status["reason"]) == (409, "Conflict")
    assert (await client.call("PUT", f"{CONFIGMAPS}/x", named("x")))[0] == 200


async def test_dropped_watches(client: Client) -> None:
    """Open watches lose their connection; a new one goes on."""
    version = (await client.call("GET", CONFIGMAPS))[1]["metadata"]["resourceVersion"]
    watch = {"watch": "true", "resourceVersion": version}
    async with client.send("GET", CONFIGMAPS, **watch) as response:
        await client.impose(dropWatches=True)
        with pytest.raises(aiohttp.ClientError):
            await asyncio.wait_for(response.content.read(), SOON)
    await client.call("POST", CONFIGMAPS, named("x"))
    async with client.send("GET", CONFIGMAPS, **watch) as response:
        assert b'"ADDED"' in await asyncio.wait_for(response.content.readline(), SOON)


async def test_expired_watches(client: Client) -> None:
    """A watch from a version is answered with 410 as often as asked for, one without a version is not."""
    version = (await client.call("GET", CONFIGMAPS))[1]["metadata"]["resourceVersion"]
    await client.impose(expireWatches=1)
    watch = {"watch": "true", "timeoutSeconds": "1"}
    async with client.send("GET", CONFIGMAPS, **watch) as response:
        assert response.status == 200
    code, status = await client.call("GET", CONFIGMAPS, **watch, resourceVersion=version)
    assert (code, status["reason"]) == (410, "Expired")
    async with client.send("GET", CONFIGMAPS, **watch, resourceVersion=version) as response:
        assert response.status == 200


async def test_forgotten_history_ends_open_watches(client: Client) -> None:
    """A compaction tells open watches that lag behind 410 and lets those that are up to date go on."""
    version = (await client.call("GET", CONFIGMAPS))[1]["metadata"]["resourceVersion"]
    await client.call("POST", CONFIGMAPS, named("x"))
    await client.impose(forgetHistory=True)
    async with client.send("GET", CONFIGMAPS, watch="true", resourceVersion=version) as response:
        assert b'"Expired"' in await asyncio.wait_for(response.content.readline(), SOON)


async def test_a_frozen_server_accepts_and_is_silent(client: Client) -> None:
    """Frozen, the server answers nothing and its watches fall silent; lifted, everything goes on."""
    version = (await client.call("GET", CONFIGMAPS))[1]["metadata"]["resourceVersion"]
    async with client.send("GET", CONFIGMAPS, watch="true", resourceVersion=version) as watching:
        await client.impose(frozen=True)
        creating = asyncio.create_task(client.call("POST", CONFIGMAPS, named("x")))
        done, _ = await asyncio.wait([creating], timeout=0.2)
        assert not done
        await client.impose()
        assert (await asyncio.wait_for(creating, SOON))[0] == 201
        assert b'"ADDED"' in await asyncio.wait_for(watching.content.readline(), SOON)


async def test_delays(client: Client) -> None:
    """Every request is held for as long as asked for."""
    await client.impose(delaySeconds=0.3)
    clock = asyncio.get_running_loop()
    began = clock.time()
    await client.call("GET", CONFIGMAPS)
    assert clock.time() - began >= 0.3


async def test_faults_that_are_none_are_refused(client: Client) -> None:
    """A misspelt fault is a 400 that names it, and changes nothing."""
    code, status = await client.call("PUT", PATH, {"frozn": True})
    assert code == 400
    assert "frozn" in status["message"]
    assert (await client.call("GET", PATH))[1]["frozen"] is False


async def test_faults_are_for_the_admin_only(server: ApiServer, client: Client) -> None:
    """A service account cannot make the server misbehave."""
    account = "/api/v1/namespaces/default/serviceaccounts/default/token"
    token = (await client.call("POST", account, {"spec": {}}))[1]["status"]["token"]
    async with client.session.put(
        server.url + PATH,
        json={"frozen": True},
        ssl=server.credentials.client_context(),
        headers={"Authorization": f"Bearer {token}"},
    ) as response:
        assert response.status == 403


async def test_the_kill_fault_kills(tmp_path: Path) -> None:
    """The kill fault does what the server was given for it."""
    killed = asyncio.Event()
    async with ApiServer(tmp_path, kill=killed.set) as server, aiohttp.ClientSession() as session:
        await Client(server, session).impose(kill=True)
        assert killed.is_set()


async def test_a_restart_keeps_everything(tmp_path: Path) -> None:
    """After a restart on the same state token, certificate and objects are the same, and watches resume."""
    async with aiohttp.ClientSession() as session:
        async with ApiServer(tmp_path) as server:
            client = Client(server, session)
            port = server.port
            version = (await client.call("GET", CONFIGMAPS))[1]["metadata"]["resourceVersion"]
            created = (await client.call("POST", CONFIGMAPS, named("x")))[1]
            account = "/api/v1/namespaces/default/serviceaccounts/default/token"
            robot = (await client.call("POST", account, {"spec": {}}))[1]["status"]["token"]
        async with ApiServer(tmp_path, port=port) as again:
            assert (again.url, again.admin_token) == (server.url, server.admin_token)
            client = Client(again, session)
            assert (await client.call("GET", f"{CONFIGMAPS}/x"))[1] == created
            async with client.send("GET", CONFIGMAPS, watch="true", resourceVersion=version) as response:
                assert b'"x"' in await asyncio.wait_for(response.content.readline(), SOON)
            reviews = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
            async with session.post(
                again.url + reviews,
                json={},
                ssl=again.credentials.client_context(),
                headers={"Authorization": f"Bearer {robot}"},
            ) as response:
                user = (await response.json())["status"]["userInfo"]["username"]
            assert user == "system:serviceaccount:default:default"


async def test_a_stopped_server_lets_its_watches_go(tmp_path: Path) -> None:
    """Stopping does not wait for open watches."""
    async with aiohttp.ClientSession() as session:
        async with ApiServer(tmp_path) as server:
            response = await Client(server, session).send("GET", CONFIGMAPS, watch="true")
        with pytest.raises(aiohttp.ClientError):
            await response.content.read()


async def test_a_taken_port_is_an_error(tmp_path: Path, server: ApiServer) -> None:
    """A second server on the same port does not start, and leaves nothing behind."""
    second = ApiServer(tmp_path / "second", port=server.port)
    with pytest.raises(OSError):
        await second.start()
    second.port = 0
    async with second:
        assert second.port != server.port
