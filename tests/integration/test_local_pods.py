"""Pods as real processes: how they start, end, restart and are ended."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from mend_local.addresses import Addresses
from mend_local.memory import find_memory_groups, remove_memory_groups
from mend_local.volumes import SHARED_MEMORY
from pod_host import a_host, a_pod, eventually, python, shell


async def test_a_pod_that_succeeds(tmp_path: Path) -> None:
    """A container that exits with 0 is Completed, and its pod Succeeded with its output kept."""
    async with a_host(tmp_path) as host:
        runner = host.run(a_pod(shell("echo out; echo err >&2")))
        await runner.ended()
        assert runner.status["phase"] == "Succeeded"
        ended = runner.status["containerStatuses"][0]["state"]["terminated"]
        assert (ended["exitCode"], ended["reason"]) == (0, "Completed")
        assert host.log(runner) == ["out", "err"]
        assert host.seen[0]["phase"] == "Running"


async def test_exit_code_and_signal_are_told(tmp_path: Path) -> None:
    """A container's own exit code is shown, and one that a signal ended shows 128 + signal."""
    async with a_host(tmp_path) as host:
        runner = host.run(a_pod(shell("exit 75", "a"), shell("kill -9 $$$$", "b")))
        await runner.ended()
        first, second = (each["state"]["terminated"] for each in runner.status["containerStatuses"])
        assert runner.status["phase"] == "Failed"
        assert (first["exitCode"], first["reason"]) == (75, "Error")
        assert (second["exitCode"], second["signal"]) == (137, 9)


async def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    """A command that is not found is a StartError with exit code 128 that names it, as containerd tells it."""
    async with a_host(tmp_path) as host:
        runner = host.run(a_pod({"name": "main", "image": "x", "command": ["no-such-program"]}))
        await runner.ended()
        ended = runner.status["containerStatuses"][0]["state"]["terminated"]
        assert (ended["exitCode"], ended["reason"]) == (128, "StartError")
        assert 'exec: "no-such-program": executable file not found in $PATH' in ended["message"]


async def test_an_image_that_is_missing(tmp_path: Path) -> None:
    """An image that cannot be pulled leaves the pod Pending in ImagePullBackOff until it is deleted."""
    async with a_host(tmp_path, backoff_seconds=0.05) as host:
        runner = host.run(a_pod({"name": "main", "image": "missing/trainer:1", "command": ["true"]}))
        reasons = lambda: {  # noqa: E731
            each["containerStatuses"][0]["state"].get("waiting", {}).get("reason") for each in host.seen
        }
        await eventually(lambda: {"ErrImagePull", "ImagePullBackOff"} <= reasons(), "both reasons are shown")
        assert runner.status["phase"] == "Pending"
        await asyncio.wait_for(runner.terminate(5), 5)


async def test_a_missing_secret_is_waited_for(tmp_path: Path) -> None:
    """A pod that names a Secret which does not exist says so, and starts once it exists."""
    reference = {"secretKeyRef": {"name": "token", "key": "token"}}
    async with a_host(tmp_path, config_retry_seconds=0.05) as host:
        runner = host.run(a_pod(shell("echo $T", env=[{"name": "T", "valueFrom": reference}])))
        waiting = lambda: runner.status["containerStatuses"][0]["state"].get("waiting", {})  # noqa: E731
        await eventually(lambda: waiting().get("reason") == "CreateContainerConfigError", "the error is shown")
        assert waiting()["message"] == "secret \"token\" not found (container 'main')"
        host.secrets["token"] = {"token": b"s3cret"}
        await asyncio.wait_for(runner.ended(), 30)
        assert host.log(runner) == ["s3cret"]


async def test_a_pod_that_ignores_sigterm(tmp_path: Path) -> None:
    """SIGTERM reaches the main process alone; what ignores it is killed when the grace is over."""
    code = "import signal; signal.signal(15, lambda *_: print('asked')); print('up')\nwhile True: signal.pause()"
    async with a_host(tmp_path) as host:
        runner = host.run(a_pod(python(code)))
        await eventually(lambda: host.log(runner) == ["up"], "it is up")
        ending = asyncio.create_task(runner.terminate(30))
        await eventually(lambda: "asked" in host.log(runner), "it was asked")
        assert not ending.done()
        await runner.terminate(0.05)  # told to hurry
        await ending
        assert runner.status["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 137
        assert host.processes() == []


async def test_grandchildren_do_not_outlive_the_pod(tmp_path: Path) -> None:
    """When the main process exits, all that it forked goes too: other groups, other sessions, and the orphaned."""
    script = "setsid sleep 1000 & (setsid sh -c 'sleep 1000 & sleep 1000' &) ; sleep 1000 & echo up; exit 3"
    async with a_host(tmp_path) as host:
        runner = host.run(a_pod(shell(script)))
        await asyncio.wait_for(runner.ended(), 30)
        assert runner.status["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 3
        assert host.processes() == []


async def test_a_frozen_pod_can_be_thawed_and_killed(tmp_path: Path) -> None:
    """A frozen pod has all its processes stopped, still looks Running, goes on when thawed, and can be killed."""
    async with a_host(tmp_path) as host:
        runner = host.run(a_pod(shell("sleep 1000 & echo up; wait")))
        await eventually(lambda: host.log(runner) == ["up"], "it is up")
        assert runner.signal_all(signal.SIGSTOP) == 2
        members = runner.processes["main"].members
        await eventually(lambda: {each.state for each in members()} == {"T"}, "all are stopped")
        assert runner.status["phase"] == "Running"
        runner.signal_all(signal.SIGCONT)
        await eventually(lambda: {each.state for each in members()} == {"S"}, "all go on")
        runner.signal_all(signal.SIGSTOP)
        await asyncio.wait_for(runner.terminate(0.05), 30)
        assert host.processes() == []


async def test_restarts_back_off(tmp_path: Path) -> None:
    """With OnFailure a failing container is started again: first at once, then in CrashLoopBackOff, until it works."""
    count = "n=$(cat $D/n 2>/dev/null || echo 0); echo $((n+1)) > $D/n; [ $n -ge 3 ]"
    async with a_host(tmp_path, backoff_seconds=0.05) as host:
        env = [{"name": "D", "value": str(tmp_path)}]
        runner = host.run(a_pod(shell(count, env=env), policy="OnFailure"))
        await asyncio.wait_for(runner.ended(), 30)
        status = runner.status["containerStatuses"][0]
        assert runner.status["phase"] == "Succeeded"
        assert status["restartCount"] == 3
        assert status["lastState"]["terminated"]["exitCode"] == 1
        backoffs = [message for reason, message in host.events if reason == "BackOff"]
        assert [message.split()[1] for message in backoffs] == ["0.05s", "0.1s"]


async def test_a_pod_in_back_off_can_be_ended(tmp_path: Path) -> None:
    """Deleting a pod that waits for its next restart does not wait for it."""
    async with a_host(tmp_path, backoff_seconds=1000) as host:
        runner = host.run(a_pod(shell("exit 1"), policy="Always"))
        state = lambda: runner.status["containerStatuses"][0]["state"]  # noqa: E731
        await eventually(lambda: state().get("waiting", {}).get("reason") == "CrashLoopBackOff", "it backs off")
        await asyncio.wait_for(runner.terminate(100), 30)


async def test_init_containers_come_first(tmp_path: Path) -> None:
    """Init containers run one after the other before the others, and share volumes with them."""
    mounts = {"volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}]}
    init = [shell(f"echo {n} >> /scratch/order", f"init-{n}", **mounts) for n in (1, 2)]
    async with a_host(tmp_path) as host:
        pod = a_pod(
            shell("cat /scratch/order; cat $MEND_LOCAL_VOLUME_SCRATCH/order", **mounts),
            initContainers=init,
            volumes=[{"name": "scratch", "emptyDir": {"medium": "Memory"}}],
        )
        runner = host.run(pod)
        await asyncio.wait_for(runner.ended(), 30)
        assert host.log(runner) == ["1", "2", "1", "2"]
        in_memory = list(SHARED_MEMORY.glob(f"*{runner.uid}"))
        assert in_memory
        runner.clean_up()
        assert not any(each.exists() for each in in_memory)


async def test_a_failing_init_container_fails_the_pod(tmp_path: Path) -> None:
    """With Never, an init container that fails fails the pod, and the others are never started."""
    async with a_host(tmp_path) as host:
        runner = host.run(a_pod(shell("echo never"), initContainers=[shell("exit 4", "init")]))
        await asyncio.wait_for(runner.ended(), 30)
        assert runner.status["phase"] == "Failed"
        assert runner.status["initContainerStatuses"][0]["state"]["terminated"]["exitCode"] == 4
        assert runner.status["containerStatuses"][0]["state"]["waiting"]["reason"] == "PodInitializing"
        assert host.log(runner) == []


async def test_deleted_while_starting(tmp_path: Path) -> None:
    """A pod that is ended in the very moment of its start leaves nothing behind."""
    async with a_host(tmp_path) as host:
        runners = [host.run(a_pod(shell("sleep 1000 & wait"), name=f"p-{n}")) for n in range(5)]
        for turns, runner in enumerate(runners):
            for _ in range(turns):
                await asyncio.sleep(0)
            await asyncio.wait_for(runner.terminate(0), 30)
        assert host.processes() == []


async def test_a_flood_of_output_is_bounded(tmp_path: Path) -> None:
    """Output without end keeps the newest lines in bounded space and does not starve the event loop."""
    async with a_host(tmp_path, log_bytes=1_000_000) as host:
        runner = host.run(a_pod(shell("yes flood | head -n 2000000; echo the end")))
        turns = 0
        while not runner.has_ended:
            await asyncio.sleep(0)
            turns += 1
        logs = list((tmp_path / runner.uid / "logs").iterdir())
        assert sum(each.stat().st_size for each in logs) <= 2_500_000
        assert host.log(runner)[-1] == "the end"
        assert turns > 100


async def test_a_memory_limit_is_enforced_where_it_can_be(tmp_path: Path) -> None:
    """A container that takes more memory than its limit is OOMKilled, where control groups can be made."""
    groups = find_memory_groups(f"test-{os.getpid()}")
    code = "x = bytearray(300 * 2**20); print(len(x))"
    try:
        async with a_host(tmp_path, memory=groups) as host:
            runner = host.run(a_pod(python(code, resources={"limits": {"memory": "100Mi"}})))
            await asyncio.wait_for(runner.ended(), 60)
            ended = runner.status["containerStatuses"][0]["state"]["terminated"]
            if groups.root is None:
                assert groups.why_not
                assert ended["reason"] == "Completed"
            else:
                assert (ended["reason"], ended["exitCode"]) == ("OOMKilled", 137)
                assert not list(groups.root.glob("*-main"))
    finally:
        remove_memory_groups(groups)


async def test_pods_have_addresses_of_their_own(tmp_path: Path) -> None:
    """Two pods listen on the same port, each at the address it is told."""
    code = (
        "import os, socket; s = socket.create_server((os.environ['IP'], 17117)); print('up', flush=True);"
        "import signal; signal.pause()"
    )
    env = [{"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]
    addresses = Addresses()
    async with a_host(tmp_path) as host:
        pods = [a_pod(python(code, env=env), name=f"p-{n}") for n in range(2)]
        runners = [host.run(pod, addresses.of(pod["metadata"]["uid"])) for pod in pods]
        await eventually(lambda: all(host.log(each) == ["up"] for each in runners), "both listen")
        assert runners[0].status["podIP"] != runners[1].status["podIP"]
    addresses.close()
