"""Election on a real server: never two leaders, whatever stops, freezes, conflicts or lies; always one in the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path

import pytest

import candidate
from candidate import LEASE, NAMESPACE, TIMING
from kube_server import Cluster, a_cluster
from mend.kube.client import LEASES, KubeClient
from mend.kube.election import Elector, Fence, NotLeader, StuckLeader, uptime_seconds
from waiting import eventually


class Candidate:
    """One candidate with a client of its own, and the terms it led as (began, last write, ended)."""

    def __init__(self, client: KubeClient, identity: str) -> None:
        self.client = client
        self.elector = Elector(client, namespace=NAMESPACE, name=LEASE, identity=identity, timing=TIMING)
        self.fence: Fence | None = None
        self.writes: list[float] = []
        self.is_working = False
        self.task = asyncio.create_task(self.elector.run(self._lead))

    async def _lead(self, fence: Fence) -> None:
        self.fence = fence
        self.is_working = True
        try:
            while True:
                if fence.is_leader():
                    self.writes.append(uptime_seconds())
                await asyncio.sleep(0.005)
        finally:
            self.is_working = False

    async def stop(self) -> None:
        """A clean exit."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """A fresh server."""
    async with a_cluster(tmp_path) as cluster:
        yield cluster


@contextlib.asynccontextmanager
async def candidates(cluster: Cluster, *identities: str) -> AsyncIterator[list[Candidate]]:
    """Candidates that campaign, the first of them already leading."""
    made: list[Candidate] = []
    try:
        for identity in identities:
            made.append(Candidate(await KubeClient.from_kubeconfig(str(cluster.kubeconfig)), identity))
            await eventually(made[0].elector.is_leader)
        yield made
    finally:
        for one in made:
            await one.stop()
            await one.client.close()


def never_both(one: list[float], other: list[float]) -> bool:
    """Whether the writes of two candidates come in blocks, one for each term: few terms, few changes of the writer."""
    merged = sorted([(at, 1) for at in one] + [(at, 2) for at in other])
    changes = sum(before[1] != after[1] for before, after in pairwise(merged))
    return changes <= 3


async def test_one_leads_and_a_clean_exit_hands_over_at_once(cluster: Cluster) -> None:
    """Of two candidates one leads; when it exits cleanly the other need not wait for the end of the lease."""
    async with candidates(cluster, "one", "two") as (one, two):
        await eventually(lambda: two.elector.leader == "one")
        assert not two.elector.is_leader()
        began = uptime_seconds()
        await one.stop()
        assert not one.elector.is_leader()
        await eventually(two.elector.is_leader)
        print(f"handed over in {uptime_seconds() - began:.2f} s")
        await eventually(lambda: bool(two.writes))
        assert max(one.writes) < min(two.writes)
        lease = await cluster.client.get(LEASES, NAMESPACE, LEASE)
        assert lease["spec"]["holderIdentity"] == "two"
        assert lease["spec"]["leaseTransitions"] == 1


async def test_a_frozen_api_ends_the_term_before_the_lease(cluster: Cluster) -> None:
    """When renewals hang, the leader's work is cancelled before others could lead; after the thaw one leads again."""
    async with candidates(cluster, "one", "two") as (one, two):
        await eventually(lambda: len(one.writes) > 10)
        await cluster.misbehave(frozen=True)
        frozen_at = uptime_seconds()
        await eventually(lambda: not one.is_working)
        assert one.fence is not None
        assert not one.fence.is_leader()
        assert max(one.writes) - frozen_at < TIMING.lease
        await cluster.misbehave()
        await eventually(lambda: one.elector.is_leader() or two.elector.is_leader())
        await eventually(lambda: one.is_working or two.is_working)
        assert never_both(one.writes, two.writes)
        assert not one.task.done()
        assert not two.task.done()


async def test_a_server_that_is_down_lets_no_error_escape(cluster: Cluster) -> None:
    """During an outage nobody leads and nobody crashes; afterwards somebody leads."""
    async with candidates(cluster, "one", "two") as (one, two):
        back = asyncio.Event()
        restarting = asyncio.create_task(cluster.restart(downtime=back))
        await eventually(lambda: not one.elector.is_leader() and one.elector.errors > 0)
        await eventually(lambda: two.elector.errors > 0)
        back.set()
        await restarting
        await eventually(lambda: one.is_working or two.is_working)
        assert never_both(one.writes, two.writes)


async def test_whoever_takes_the_lease_is_respected(cluster: Cluster) -> None:
    """A record that names somebody else ends the term at the next renewal."""
    async with candidates(cluster, "one") as (one,):
        await eventually(lambda: one.is_working)
        await _seize(cluster, "intruder")
        await eventually(lambda: one.elector.leader == "intruder" and not one.is_working)
        assert not one.elector.is_leader()
        await one.stop()
        assert (await cluster.client.get(LEASES, NAMESPACE, LEASE))["spec"]["holderIdentity"] == "intruder"


async def test_conflicts_with_itself_do_not_end_a_term(cluster: Cluster) -> None:
    """A renewal that meets a 409, or a lease that somebody edited, is simply done again, with our own duration."""
    async with candidates(cluster, "one") as (one,):
        fence = one.fence
        edit = {"metadata": {"annotations": {"note": "hello"}}, "spec": {"leaseDurationSeconds": 60}}
        await cluster.client.merge_patch(LEASES, NAMESPACE, LEASE, edit)
        await cluster.misbehave(conflicts=2, resource="leases")
        renewed = await _renew_time(cluster)
        await _until_renewed(cluster, renewed)
        assert one.elector.is_leader()
        assert one.fence is fence
        lease = await cluster.client.get(LEASES, NAMESPACE, LEASE)
        assert lease["spec"]["leaseDurationSeconds"] == TIMING.lease


@pytest.mark.parametrize("stamp", ["1970-01-01T00:00:00.000000Z", "2999-01-01T00:00:00.000000Z"])
async def test_timestamps_of_others_are_not_believed(cluster: Cluster, stamp: str) -> None:
    """A live lease with an ancient time is not taken at once, and a dead one from the future is taken in the end."""
    meta = {"namespace": NAMESPACE, "name": LEASE}
    spec = {"holderIdentity": "ghost", "leaseDurationSeconds": 1, "renewTime": stamp, "acquireTime": stamp}
    body = {"apiVersion": LEASES.api_version, "kind": "Lease", "metadata": meta, "spec": spec}
    await cluster.client.create(LEASES, NAMESPACE, body)
    began = uptime_seconds()
    async with candidates(cluster, "one") as (one,):
        assert uptime_seconds() - began >= 1.0
        assert one.writes or one.elector.is_leader()


async def test_work_that_returns_or_raises_ends_the_campaign(cluster: Cluster) -> None:
    """`run` ends with the work, gives the lease back, and hands on what it raised."""

    async def fail(fence: Fence) -> None:
        raise RuntimeError("a bug")

    elector = Elector(cluster.client, namespace=NAMESPACE, name=LEASE, identity="one", timing=TIMING)
    with pytest.raises(RuntimeError, match="a bug"):
        await elector.run(fail)
    assert (await cluster.client.get(LEASES, NAMESPACE, LEASE))["spec"]["holderIdentity"] == ""


async def test_work_that_notices_first_is_a_loss_and_no_error(cluster: Cluster) -> None:
    """A `NotLeader` out of the work means that the term is over: the campaign goes on."""
    terms: list[int] = []

    async def work(fence: Fence) -> None:
        terms.append(fence.term)
        if len(terms) == 1:
            raise NotLeader("the lease was not renewed in time")

    await Elector(cluster.client, namespace=NAMESPACE, name=LEASE, identity="one", timing=TIMING).run(work)
    assert terms == [0, 1]


async def test_work_that_does_not_end_is_not_waited_for(cluster: Cluster) -> None:
    """Work that swallows its cancellation beyond the lease raises `StuckLeader`: the process has to end."""
    stubborn = asyncio.Event()

    async def work(fence: Fence) -> None:
        while not stubborn.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await stubborn.wait()

    elector = Elector(cluster.client, namespace=NAMESPACE, name=LEASE, identity="one", timing=TIMING)
    running = asyncio.create_task(elector.run(work))
    await eventually(elector.is_leader)
    await _seize(cluster, "intruder")
    with pytest.raises(StuckLeader):
        await asyncio.wait_for(running, 30)
    stubborn.set()


async def test_a_stopped_process_does_not_write_when_it_wakes_late(cluster: Cluster) -> None:
    """A leader that was SIGSTOPped past its lease writes nothing after another one has begun to lead."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(candidate.__file__)),
        str(cluster.kubeconfig),
        "stopped",
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 24,
    )
    told: list[dict[str, float | str]] = []
    reading = asyncio.create_task(_read(process, told))
    try:
        await eventually(lambda: sum(line["what"] == "write" for line in told) > 10, "the process leads")
        async with candidates(cluster) as _:
            other = Candidate(await KubeClient.from_kubeconfig(str(cluster.kubeconfig)), "other")
            await eventually(lambda: other.elector.leader == "stopped")
            os.kill(process.pid, signal.SIGSTOP)
            await eventually(other.elector.is_leader)
            await eventually(lambda: len(other.writes) > 10)
            os.kill(process.pid, signal.SIGCONT)
            await eventually(lambda: told[-1]["what"] == "lost", "the process notices")
            assert max(line["at"] for line in told if line["what"] == "write") < min(other.writes)
            assert other.elector.is_leader()
            await other.stop()
            await other.client.close()
    finally:
        process.kill()
        await process.wait()
        await reading


async def _read(process: asyncio.subprocess.Process, told: list[dict[str, float | str]]) -> None:
    assert process.stdout is not None
    async for line in process.stdout:
        told.append(json.loads(line))


async def _seize(cluster: Cluster, identity: str) -> None:
    """Writes another holder into the record, as a foreign controller would."""
    lease = {"spec": {"holderIdentity": identity, "leaseDurationSeconds": 60}}
    await cluster.client.merge_patch(LEASES, NAMESPACE, LEASE, lease)


async def _renew_time(cluster: Cluster) -> str:
    return str((await cluster.client.get(LEASES, NAMESPACE, LEASE))["spec"]["renewTime"])


async def _until_renewed(cluster: Cluster, since: str) -> None:
    for _ in range(300):
        if await _renew_time(cluster) != since:
            return
        await asyncio.sleep(0.1)
    raise AssertionError("the lease was not renewed")
