"""The scenarios in tests/scenarios: commands for the simulated cluster, `----`, and the story they must lead to."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from world import World, a_spec

SCENARIOS = sorted((Path(__file__).parent.parent / "scenarios").glob("*.txt"))


def blocks(text: str) -> Iterator[tuple[list[str], list[str]]]:
    """Commands and expected lines of each block; blocks are parted by empty lines, `#` begins a comment."""
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line and not line.startswith("#")]
        if lines:
            cut = lines.index("----")
            yield lines[:cut], lines[cut + 1 :]


def a_run(*words: str) -> World:
    """`run workers=2 ranks=2 spares=1 nodes=3 steps=40 user=3 limit=2 deadline=60 rejoins=1 spike=1 ...` as a world.

    `rule=FailRun:ValueError` is a rule on that reason.
    """
    rules = [a_rule(word.removeprefix("rule=")) for word in words if word.startswith("rule=")]
    given = {name: int(value) for name, value in (w.split("=") for w in words if not w.startswith("rule="))}
    budgets = {name: given.pop(name) for name in ("user", "hang", "infrastructure", "preemption") if name in given}
    shape = {name: given.pop(name) for name in ("nodes", "steps", "save_every", "memory", "rejoins") if name in given}
    deadline = given.pop("deadline", None)
    strikes = {"limit": given.pop("limit", 2), "expireAfter": f"{given.pop('expire', 86400)}s"}
    recovery = {
        "budgets": budgets,
        "shrinkAfter": f"{given.pop('shrink', 300)}s",
        "nodeStrikes": strikes,
        "rules": rules,
    }
    numbers = {name: given.pop(name) for name in ("minimum", "spares") if name in given}
    spike = {"rollBack": True, "window": 16, "points": 4} if given.pop("spike", 0) else {}
    health = {"lossSpike": spike}
    spec = a_spec(given.pop("workers", 2), given.pop("ranks", 2), recovery=recovery, health=health, **numbers)
    assert not given, f"unknown words: {given}"
    return World(replace(spec, active_deadline_seconds=deadline), **shape)


def a_rule(text: str) -> dict[str, object]:
    """`ACTION:REASON` as a rule of the spec."""
    action, reason = text.split(":")
    return {"name": reason, "action": action, "onReasons": [reason]}


COMMANDS: dict[str, Callable[..., object]] = {
    "until step": lambda world, step: world.until_step(int(step)),
    "until training": lambda world: world.until_training(),
    "until end": lambda world: world.until_end(),
    "wait": lambda world, seconds: world.run(float(seconds)),
    "kill rank": lambda world, rank: world.harm_rank(int(rank), "kill"),
    "stop rank": lambda world, rank: world.harm_rank(int(rank), "stop"),
    "stick rank": lambda world, rank, *_: world.harm_rank(int(rank), "stuck"),
    "raise in rank": lambda world, rank: world.harm_rank(int(rank), "raise"),
    "skip a collective in rank": lambda world, rank: world.harm_rank(int(rank), "skipping"),
    "hang the saving of rank": lambda world, rank: world.harm_rank(int(rank), "saving"),
    "raise in all ranks": lambda world: world.harm_all("raise"),
    "fill the disk of rank": lambda world, rank: world.harm_rank(int(rank), "disk"),
    "use up the memory in rank": lambda world, rank: world.harm_rank(int(rank), "oom"),
    "hold the GIL in rank": lambda world, rank: world.harm_rank(int(rank), "holding"),
    "hang the data loader of rank": lambda world, rank: world.harm_rank(int(rank), "stuck"),
    "the file system holds ranks": lambda world, *ranks: [world.harm_rank(int(rank), "held") for rank in ranks],
    "lock up the threads of rank": lambda world, rank: world.harm_rank(int(rank), "locked"),
    "let it never end in rank": lambda world, rank: world.harm_rank(int(rank), "spinning"),
    "leave the gang, and die slowly, with rank": lambda world, rank: world.harm_rank(int(rank), "leaving"),
    "pause worker": lambda world, worker: world.pause_worker(int(worker)),
    "break the network, a collective earlier for ranks": lambda world, *ranks: world.break_network(*map(int, ranks)),
    "break the network": lambda world: world.break_network(),
    "let the loss go up": lambda world: world.raise_loss(),
    "repair the network": lambda world: world.repair_network(),
    "kill agent": lambda world, worker: world.kill_agent(int(worker)),
    "lose node of worker": lambda world, worker: world.lose_node(int(worker)),
    "node of worker is ill": lambda world, worker, problem: world.make_node_ill(int(worker), f"condition {problem}"),
    "all nodes are well": lambda world: world.make_nodes_well(),
    "memory is slow under worker": lambda world, worker: world.slow_memory(int(worker)),
    "preempt worker": lambda world, worker: world.preempt(int(worker)),
    "spoil the newest checkpoint": lambda world: world.spoil_newest(),
    "spoil the newest snapshots": lambda world: world.spoil_snapshots(),
    "kill saver of worker": lambda world, worker, seconds: world.kill_saver(int(worker), float(seconds)),
    "digests take": lambda world, seconds: world.slow_savers(float(seconds)),
    "node of worker will go": lambda world, worker, taint: world.announce_end_of_node(int(worker), f"taint {taint}"),
    "storage fails": lambda world: setattr(world.bucket, "available", False),
    "storage works": lambda world: setattr(world.bucket, "available", True),
    "suspend": lambda world: world.suspend(),
    "resume": lambda world: world.suspend(False),
    "scale to": lambda world, replicas: world.scale(int(replicas)),
    "kill the controller for": lambda world, seconds: world.kill_controller(down_for=float(seconds)),
    "kill the controller after its next status": lambda world: world.kill_controller("status"),
    "kill the controller after its next action": lambda world: world.kill_controller("action"),
    "cut the controller off for": lambda world, seconds: world.cut_streams(float(seconds)),
    "wipe the status": lambda world: world.wipe_status(),
}


def obey(world: World, line: str) -> None:
    """One command; its arguments are the words after the longest command that fits."""
    name = max((each for each in COMMANDS if line == each or line.startswith(f"{each} ")), key=len, default=None)
    if name is None:
        raise ValueError(f"{line!r}: no such command; there are {', '.join(sorted(COMMANDS))}")
    COMMANDS[name](world, *line[len(name) :].split())


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_the_story_is_as_told(path: Path) -> None:
    """Each block of commands leads to exactly the lines below it."""
    world, told = None, 0
    for commands, expected in blocks(path.read_text()):
        for line in commands:
            if line.startswith("run"):
                world, told = a_run(*line.split()[1:]), 0
            else:
                assert world is not None
                obey(world, line)
        assert world is not None
        story, told = world.story[told:], len(world.story)
        diff = list(difflib.unified_diff(expected, story, "expected", "told", lineterm="", n=99))
        assert not diff, f"{path.name}, after {commands[-1]!r}:\n" + "\n".join(diff)


def test_there_are_scenarios() -> None:
    """An empty folder would pass unnoticed."""
    assert len(SCENARIOS) >= 10
