"""The agent's parts that only think or only read: commands, settings, reports, recorder dumps, cgroups, folders."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mend.environment import (
    ENV_AGENT_PORT,
    ENV_ATTEMPT,
    ENV_GRACE_SECONDS,
    ENV_HEARTBEAT_SECONDS,
    ENV_LAUNCH,
    ENV_RANKS_PER_WORKER,
    ENV_TOKEN,
    ENV_WORKER,
)
from mend.evidence import GroupProgress
from mend.heartbeats import Point, RankError
from mend.orders import Launch, decode_launch
from mend.protocol import AGENT_PORT
from mend.reports import Committed, Measured, Quarantined, Raised, Restored, SaveFailed, Skipped, Staged, decode_report
from mend.states import CheckpointRef
from mend_trainer.arenas import Arenas
from mend_trainer.command import Module, Program, Script, understand
from mend_trainer.evidence import lasting_state
from mend_trainer.procfs import (
    MemoryRoom,
    OutOfMemoryKills,
    ProcessFacts,
    descendants,
    has_handler,
    look_at,
    memory_room,
)
from mend_trainer.ranks import Rank
from mend_trainer.recorder import parse_dump
from mend_trainer.reporting import Reporter
from mend_trainer.runtime import RuntimeFolder
from mend_trainer.settings import BadEnvironment, read_settings
from mend_trainer.starting import rank_environment
from mend_trainer.storekeeper import StoreUnreachable, find_store
from mend_trainer.told import PointHistory, Told, fold, save_report

PYTHON = sys.executable
REF = CheckpointRef(uri="s3://b/p/step-4", step=4, attempt=1)


# ---------------------------------------------------------------- commands
@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([PYTHON, "train.py", "--lr", "1"], Script(path="train.py", arguments=("--lr", "1"))),
        ([PYTHON, "-u", "train.py"], Script(path="train.py")),
        ([PYTHON, "-m", "pkg.train", "-m", "x"], Module(name="pkg.train", arguments=("-m", "x"))),
        ([PYTHON, "-c", "print(1)"], Program(argv=(PYTHON, "-c", "print(1)"))),
        ([PYTHON, "-X", "dev", "t.py"], Program(argv=(PYTHON, "-X", "dev", "t.py"))),
        ([PYTHON], Program(argv=(PYTHON,))),
        (["sh", "-c", "true"], Program(argv=("sh", "-c", "true"))),
        (["no-such-command"], Program(argv=("no-such-command",))),
    ],
)
def test_a_command_is_understood(argv: list[str], expected: object) -> None:
    """Scripts and modules of this Python can run warm; everything else is left to exec."""
    assert understand(argv) == expected


def test_another_python_is_another_program(tmp_path: Path) -> None:
    """A link to the very same interpreter from another folder is another environment: its packages differ."""
    other = tmp_path / "python"
    other.symlink_to(PYTHON)
    assert isinstance(understand([str(other), "t.py"]), Program)


def test_a_console_script_of_this_python_is_a_script(tmp_path: Path) -> None:
    """What pip installs as `mend-train` runs warm as well."""
    script = tmp_path / "mend-train"
    script.write_text(f"#!{PYTHON}\nprint(1)\n")
    script.chmod(0o755)
    assert understand([str(script), "a"]) == Script(path=str(script), arguments=("a",))


# ---------------------------------------------------------------- settings
def test_settings_have_the_defaults_of_the_protocol() -> None:
    """A token and a command are all that an agent must be given."""
    settings = read_settings(["python"], {ENV_TOKEN: "t"})
    assert (settings.host, settings.port, settings.ranks_per_worker) == ("0.0.0.0", AGENT_PORT, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (ENV_WORKER, "-1"),
        (ENV_RANKS_PER_WORKER, "0"),
        (ENV_AGENT_PORT, "http"),
        (ENV_HEARTBEAT_SECONDS, "nan"),
        (ENV_GRACE_SECONDS, ""),
    ],
)
def test_a_bad_setting_names_itself(name: str, value: str) -> None:
    """Variable, value and expectation are in the error."""
    with pytest.raises(BadEnvironment, match=f"{name}: got '{value}'; expected a number of at least"):
        read_settings(["python"], {ENV_TOKEN: "t", name: value})


# ---------------------------------------------------------------- environment of a rank
def test_a_rank_gets_the_environment_of_torchrun(tmp_path: Path) -> None:
    """Local rank 1 of the third of four workers; what the order adds cannot change who the rank is."""
    launch = Launch(
        attempt=7,
        world_size=8,
        first_rank=4,
        ranks=2,
        workers=4,
        master_addr="10.0.0.1",
        master_port=1,
        env={"NCCL_DEBUG": "INFO", "RANK": "99"},
    )
    given = rank_environment(launch, Rank(5, tmp_path), 1234, Arenas(2))
    expected = {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "2",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "1234",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "7",
        "NCCL_DEBUG": "INFO",
        ENV_ATTEMPT: "7",
    }
    assert expected.items() <= given.items()
    assert decode_launch(given[ENV_LAUNCH]) == launch


# ---------------------------------------------------------------- reports
def test_a_commit_ends_the_count_of_failures() -> None:
    """Failures add up until a save works; the checkpoint that worked before stays named."""
    committed = Committed(checkpoint=REF, stall_seconds=0.1, commit_seconds=2.0, bytes=9)
    told = fold(fold(Told(), committed, 1.0), SaveFailed(step=5, error="disk full"), 2.0)
    told = fold(told, SaveFailed(step=6, error="disk full"), 3.0)
    report = save_report(told, 4.0)
    assert report is not None
    assert (report.failures, report.error, report.committed, report.committed_age_seconds) == (
        2,
        "step 6: disk full",
        REF,
        3.0,
    )
    report = save_report(fold(told, committed, 5.0), 5.0)
    assert report is not None
    assert (report.failures, report.error) == (0, "")


def test_restored_and_quarantined_are_remembered_once() -> None:
    """The same bad checkpoint told by two ranks is one."""
    told = fold(Told(), Restored(checkpoint=REF), 0.0)
    for _ in range(2):
        told = fold(told, Quarantined(uri="s3://b/p/bad", reason="digest"), 0.0)
    assert (told.restored, told.quarantined, save_report(told, 0.0)) == (REF, ("s3://b/p/bad",), None)


def test_skipped_saves_are_counted() -> None:
    """A save that could not begin is told with the health of saving, also before any has worked."""
    told = fold(fold(Told(), Skipped(step=4), 0.0), Skipped(step=9), 0.0)
    report = save_report(told, 0.0)
    assert report is not None
    assert (report.skipped, report.committed) == (2, None)


def test_a_save_is_told_from_its_beginning() -> None:
    """So that the controller does not ask for it again while it is written; what only stays in memory is none."""
    told = fold(Told(), Staged(save_id="a", step=4, owed=True), 0.0)
    report = save_report(fold(told, Staged(save_id="b", step=6, owed=False), 1.0), 1.0)
    assert report is not None
    assert (report.begun_step, report.committed) == (4, None)
    assert save_report(fold(Told(), Staged(save_id="b", step=6, owed=False), 1.0), 1.0) is None


def a_point(step: int) -> Point:
    """A point of a curve."""
    return Point(step=step, loss=1.0, tokens=0, seconds=0.1)


@given(st.lists(st.one_of(st.integers(1, 40), st.none())))
def test_each_reader_gets_every_point_once_and_in_order(moves: list[int | None]) -> None:
    """However adding (a number) and reading (None) interleave, readings join up to the points added so far."""
    history, position, added = PointHistory(), 0, 0
    got: list[int] = []
    for move in moves:
        if move is None:
            points, position = history.after(position, 7)
            got.extend(point.step for point in points)
        else:
            for _ in range(move):
                history.add(a_point(added))
                added += 1
    while points := history.after(position, 7)[0]:
        position = history.after(position, 7)[1]
        got.extend(point.step for point in points)
    assert got == list(range(added))


def test_reports_never_block_and_never_mix(tmp_path: Path) -> None:
    """Nobody reads: the pipe fills, reports are dropped and counted; what is read later are whole lines."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    reporter = Reporter(write)
    error = RankError(type="E", message="m" * 3000)
    sent = sum(reporter.send(Raised(error=error)) for _ in range(100))
    assert reporter.dropped == 100 - sent
    received = os.read(read, 1 << 20)
    assert reporter.send(Measured(point=a_point(1)))
    received += os.read(read, 1 << 20)
    lines = received.splitlines()
    assert len(lines) == sent + 1
    assert all(decode_report(line) for line in lines)
    os.close(read)
    assert not reporter.send(Measured(point=a_point(2)))
    os.close(write)


# ---------------------------------------------------------------- flight recorder
def test_a_dump_names_groups_as_all_ranks_do() -> None:
    """Counters come as text keyed by a local number; entries tell the shared name; NCCL's dumps tell the ranks."""
    raw = b"""{"entries": [
        {"pg_id": 0, "process_group": ["0", "default_pg"], "profiling_name": "nccl:all_reduce", "state": "completed"},
        {"pg_id": 0, "process_group": ["0", "default_pg"], "profiling_name": "nccl:broadcast", "input_sizes": [[2]]},
        {"pg_id": 1, "process_group": ["17", "undefined"], "profiling_name": "nccl:all_gather"}],
      "pg_config": {"0": {"name": "0", "desc": "default_pg", "ranks": "[0, 1, 2, 3]"}},
      "pg_status": {
        "0": {"last_completed_collective": "17", "last_enqueued_collective": "18", "last_started_collective": "18"},
        "1": {"last_completed_collective": 3, "last_enqueued_collective": 3, "last_started_collective": -1},
        "2": {"last_completed_collective": "-1", "last_enqueued_collective": "-1"}},
      "version": "2.10"}"""
    assert parse_dump(raw) == (
        GroupProgress(
            name="0:default_pg",
            ranks=(0, 1, 2, 3),
            last_enqueued=18,
            last_started=18,
            last_completed=17,
            last_enqueued_name="nccl:broadcast",
            recent_names=("nccl:all_reduce", "nccl:broadcast"),
        ),
        GroupProgress(
            name="17",
            last_enqueued=3,
            last_completed=3,
            last_enqueued_name="nccl:all_gather",
            recent_names=("nccl:all_gather",),
        ),
    )


def test_a_dump_forgets_the_groups_that_a_rank_has_left() -> None:
    """After a rejoin the broken groups still stand in the recorder: the youngest of a name counts, others are over."""
    raw = b"""{"entries": [
        {"pg_id": 1, "process_group": ["0", "default_pg"], "profiling_name": "gloo:all_reduce"},
        {"pg_id": 3, "process_group": ["0", "default_pg"], "profiling_name": "gloo:all_reduce"}],
      "pg_status": {
        "0": {"last_completed_collective": "7", "last_enqueued_collective": "8"},
        "1": {"last_completed_collective": "899", "last_enqueued_collective": "900"},
        "3": {"last_completed_collective": "12", "last_enqueued_collective": "12"}}}"""
    only = GroupProgress(
        name="0:default_pg",
        last_enqueued=12,
        last_completed=12,
        last_enqueued_name="gloo:all_reduce",
        recent_names=("gloo:all_reduce",),
    )
    assert parse_dump(raw) == (only,)


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b'{"pg_status": 3}', b'{"pg_status": {"0": {"last_enqueued": []'])
def test_a_dump_of_nonsense_is_an_error_that_the_reader_knows(raw: bytes) -> None:
    """Nothing else than `MsgspecError` comes out."""
    with pytest.raises(msgspec.MsgspecError):
        parse_dump(raw)


# ---------------------------------------------------------------- /proc and cgroups
def test_who_computes_is_told_from_who_sleeps() -> None:
    """CPU time grows in one of two looks' reach; the sleeper's place in the kernel has a name where it may be read."""
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    idle = subprocess.Popen(["sleep", "60"])
    try:
        deadline = time.monotonic() + 30
        while look_at(busy.pid).cpu_seconds < 0.2 or look_at(idle.pid).state != "S":
            assert time.monotonic() < deadline
        assert look_at(idle.pid).cpu_seconds < 0.1
        assert look_at(idle.pid).threads == 1
        assert look_at(busy.pid).kernel_function == ""
    finally:
        for child in (busy, idle):
            child.kill()
            child.wait()


@pytest.mark.parametrize(
    ("first", "second", "lasting"),
    [
        ("D", "D", "D"),
        ("D", "S", "S"),
        ("S", "D", "S"),
        ("D", "T", "S"),
        ("T", "T", "T"),
        ("R", "X", "X"),
        ("t", "R", "R"),
    ],
)
def test_only_a_state_that_lasts_is_told(first: str, second: str, lasting: str) -> None:
    """A healthy process writes to a disk, or is looked at by a debugger, for moments: it is not blamed for that."""
    assert lasting_state(ProcessFacts(state=first), ProcessFacts(state=second)) == lasting


def test_a_stopped_process_shows_as_stopped_and_a_dead_one_as_gone() -> None:
    """T after SIGSTOP, X once it is buried."""
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert child.pid in descendants([os.getpid()])
        child.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
        assert look_at(child.pid).state == "T"
        assert not has_handler(child.pid, signal.SIGUSR1)
    finally:
        child.kill()
        child.wait()
    assert look_at(child.pid).state == "X"
    assert look_at(child.pid).cpu_seconds == 0.0
    assert not has_handler(child.pid, signal.SIGUSR1)


VERSION_2 = "low 0\nhigh 0\nmax 31\noom 4\noom_kill {}\noom_group_kill 0\n"
VERSION_1 = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"


@pytest.mark.parametrize(
    ("own", "file", "text"),
    [
        ("0::/\n", "memory.events", VERSION_2),
        ("0::/kubepods/pod7\n", "kubepods/pod7/memory.events", VERSION_2),
        ("0::/../../elsewhere\n", "memory.events", VERSION_2),
        ("5:cpu:/\n4:memory:/kubepods/pod7\n0::/\n", "memory/kubepods/pod7/memory.oom_control", VERSION_1),
        ("4:hugetlb,memory:/not/seen/in/here\n", "memory/memory.oom_control", VERSION_1),
    ],
)
def test_each_oom_kill_is_claimed_once(tmp_path: Path, own: str, file: str, text: str) -> None:
    """Kills before the agent's start count for nobody; each later one explains one dead rank."""
    mount, listing = tmp_path / "mount" / "deep", tmp_path / "cgroup"
    events = mount / file
    events.parent.mkdir(parents=True)
    events.write_text(text.format(3))
    listing.write_text(own)
    kills = OutOfMemoryKills(mount, listing)
    assert not kills.claim()
    events.write_text(text.format(5))
    assert [kills.claim() for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize(
    ("own", "folder", "names"),
    [
        ("0::/kubepods/pod7\n", "kubepods/pod7", ("memory.current", "memory.max", "inactive_file")),
        ("0::/\n", "", ("memory.current", "memory.max", "inactive_file")),
        (
            "4:memory:/kubepods/pod7\n0::/\n",
            "memory/kubepods/pod7",
            ("memory.usage_in_bytes", "memory.limit_in_bytes", "total_inactive_file"),
        ),
    ],
)
def test_the_room_for_memory_is_that_of_the_container(
    tmp_path: Path, own: str, folder: str, names: tuple[str, str, str]
) -> None:
    """Used is what cannot be dropped at once; without a limit nothing is told."""
    listing, group = tmp_path / "cgroup", tmp_path / "mount" / folder
    listing.write_text(own)
    group.mkdir(parents=True)
    (group / names[0]).write_text("900\n")
    (group / names[1]).write_text("2000\n")
    (group / "memory.stat").write_text(f"anon 500\n{names[2]} 300\nactive_file 100\n")
    assert memory_room(tmp_path / "mount", listing) == MemoryRoom(used=600, limit=2000)
    for limitless in ("max\n", f"{(1 << 63) - 4096}\n"):
        (group / names[1]).write_text(limitless)
        assert memory_room(tmp_path / "mount", listing) is None
    assert memory_room(tmp_path / "none", tmp_path / "none") is None


def test_memory_that_a_process_takes_up_is_seen(tmp_path: Path) -> None:
    """Its own pages count, once they are touched."""
    program = "import sys; kept = b'x' * (64 << 20); print(len(kept), flush=True); sys.stdin.read()"
    child = subprocess.Popen([PYTHON, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        assert 64 << 20 < look_at(child.pid).memory_bytes < 200 << 20
    finally:
        child.kill()
        child.communicate()
    assert look_at(child.pid).memory_bytes == 0


def test_without_a_cgroup_nothing_is_oom_killed(tmp_path: Path) -> None:
    """Unreadable counters claim nothing."""
    assert not OutOfMemoryKills(tmp_path, tmp_path / "none").claim()


# ---------------------------------------------------------------- folders
def test_folders_of_the_dead_are_swept_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    """A folder without a lock belonged to an agent that was killed."""
    living = RuntimeFolder(tmp_path)
    dead = tmp_path / "mend-agent-1-dead"
    (dead / "1").mkdir(parents=True)
    RuntimeFolder(tmp_path).remove()
    assert [each.name for each in tmp_path.iterdir()] == [living.path.name]
    living.remove()
    assert not list(tmp_path.iterdir())


def test_an_attempt_begins_with_an_empty_folder(tmp_path: Path) -> None:
    """Sockets and pages of the attempt before are gone."""
    folder = RuntimeFolder(tmp_path)
    (folder.attempt(1) / "rank-0.sock").touch()
    assert not list(folder.attempt(2).iterdir())
    assert [each.name for each in folder.path.iterdir()] == ["2"]
    folder.remove()


# ---------------------------------------------------------------- store
@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([b"4711\n"], 4711),
        ([b"", b"", b"4711\n"], 4711),
        ([b"0\n"], StoreUnreachable),
        ([b"no port\n"], ValueError),
    ],
)
async def test_a_keeper_that_dies_while_asked_is_asked_again(
    answers: list[bytes], expected: int | type[Exception]
) -> None:
    """No answer is no answer; "0" means that the attempt is over; nonsense is an error."""
    left = iter(answers)

    async def keeper(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readline() == b"3\n"
        writer.write(next(left))
        writer.close()

    server = await asyncio.start_server(keeper, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        if isinstance(expected, int):
            assert await find_store("127.0.0.1", port, 3, 30) == expected
        else:
            with pytest.raises(expected):
                await find_store("127.0.0.1", port, 3, 30)


async def test_a_store_that_nobody_keeps_is_named_with_its_address(unused_tcp_port: int) -> None:
    """The error says attempt, address, how long and why."""
    with pytest.raises(StoreUnreachable, match=rf"attempt 3 from 127.0.0.1:{unused_tcp_port} within 0.2s \(.*failed"):
        await find_store("127.0.0.1", unused_tcp_port, 3, 0.2)
