"""Who did it: tables of evidence as it is found for each kind of fault, and the verdict that it bears."""

from __future__ import annotations

import pytest

from mend import collectives, culprit, stacks
from mend.evidence import GroupProgress, RankEvidence
from mend.exitcodes import ExitCode
from mend.heartbeats import Phase, RankError, RankExit, RankReport

STACK = """Thread 0x1 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 320 in wait

Current thread 0x2 (most recent call first):
  File "/app/train.py", line 12 in step
  File "/app/train.py", line 90 in main
"""
LIBRARY = STACK.replace("/app/train.py", "/usr/lib/python3/site-packages/torch/distributed/distributed_c10d.py", 1)
WAITING = STACK.replace('"/app/train.py", line 12 in step', '"/torch/distributed.py", line 9 in all_reduce')


def group(
    entered: int, done: int, op: str = "gloo:all_reduce", *, name: str = "dp", ranks: tuple[int, ...] = (0, 1, 2, 3)
) -> GroupProgress:
    """A process group's counters in one rank."""
    return GroupProgress(name=name, ranks=ranks, last_enqueued=entered, last_completed=done, last_enqueued_name=op)


def rank(number: int, *groups: GroupProgress, state: str = "S", answers: bool = True, **more: object) -> RankEvidence:
    """Evidence about one rank; by default it sleeps and its recorder answers."""
    given = {"phase": Phase.COLLECTIVE, **more}
    return RankEvidence(rank=number, process_state=state, groups=groups, recorder_answered=answers, **given)


def waiting(*numbers: int) -> list[RankEvidence]:
    """Ranks that wait in collective 18 of the group of all."""
    return [rank(number, group(18, 17)) for number in numbers]


def habitual(number: int, last: str, *, rounds: int = 5, **more: object) -> RankEvidence:
    """One of two ranks that reduced and gathered in turns, and is stuck in `last`."""
    names = (*("gloo:all_reduce", "gloo:all_gather") * rounds, last)
    stuck = GroupProgress(
        name="dp",
        ranks=(0, 1),
        last_enqueued=len(names),
        last_completed=len(names) - 1,
        last_enqueued_name=last,
        recent_names=names,
    )
    return rank(number, stuck, **more)


HANGS: dict[str, tuple[list[RankEvidence], tuple[int, ...], str]] = {
    "SIGSTOP: the kernel says it": (
        [*waiting(0, 1, 3), rank(2, state="T", answers=False)],
        (2,),
        "rank 2 is stopped (state T)",
    ),
    "SIGSTOP of two": (
        [*waiting(0, 1), rank(2, state="T", answers=False), rank(3, state="T", answers=False)],
        (2, 3),
        "rank 3 is stopped (state T)",
    ),
    "SIGSTOP of all, as a freezer does": (
        [rank(n, state="T", answers=False) for n in range(4)],
        (0, 1, 2, 3),
        "rank 0 is stopped (state T)",
    ),
    "a deadlock of its own, while the recorder has missed the end of the collective before": (
        [rank(0, group(58, 57), stack=STACK, phase=Phase.STEP), rank(1, group(59, 58), stack=LIBRARY)],
        (0,),
        "rank 0: 1 others wait in collective 59 of group dp, it has entered only 58 (at train.py:12 in step)",
    ),
    "a ring that broke: the one behind waits for data too": (
        [rank(0, group(58, 57), stack=LIBRARY), rank(1, group(59, 58), stack=LIBRARY)],
        (),
        culprit.SYMMETRIC.reasons[0],
    ),
    "a zombie that nobody buried": (
        [*waiting(0, 1, 2), rank(3, state="Z", answers=False)],
        (3,),
        "rank 3 is dead (state Z)",
    ),
    "a driver that does not return": (
        [*waiting(0, 1, 2), rank(3, state="D", answers=False)],
        (3,),
        "rank 3 hangs in the kernel (state D: disk, driver or network file system)",
    ),
    "a file system that all hang in": (
        [rank(n, state="D", answers=False) for n in range(4)],
        (),
        "ranks 0, 1, 2, 3 hang in the kernel together (state D)",
    ),
    "a file system that most hang in while loading": (
        [*[rank(n, state="D", phase=Phase.LOADING) for n in (0, 1, 2)], rank(3, group(1, 0))],
        (),
        "ranks 0, 1, 2 hang in the kernel together (state D)",
    ),
    "a file system that two hang in while the others wait for them": (
        [*waiting(0, 1), *[rank(n, group(17, 17), state="D", phase=Phase.DATA) for n in (2, 3)]],
        (),
        "ranks 2, 3 hang in the kernel together (state D)",
    ),
    "a rank that lags, and two others that only wait for a disk": (
        [rank(0, group(18, 17)), *[rank(n, group(18, 17), state="D") for n in (1, 2)], rank(3, group(17, 17))],
        (3,),
        "rank 3: 3 others wait in collective 18 of group dp, it has entered only 17",
    ),
    "a sleep outside any collective": (
        [*waiting(0, 1, 3), rank(2, group(17, 17), stack=STACK, phase=Phase.STEP)],
        (2,),
        "rank 2: 3 others wait in collective 18 of group dp, it has entered only 17 (at train.py:12 in step)",
    ),
    "a C extension that holds the GIL: the C++ server answers all the same": (
        [*waiting(0, 2, 3), rank(1, group(17, 17), state="R", stack="")],
        (1,),
        "rank 1: 3 others wait in collective 18 of group dp, it has entered only 17",
    ),
    "a loader that waits for data": (
        [*waiting(1, 2, 3), rank(0, group(17, 17), phase=Phase.DATA)],
        (0,),
        "rank 0: 3 others wait in collective 18 of group dp, it has entered only 17",
    ),
    "stuck before its first collective": (
        [*[rank(n, group(1, 0)) for n in (0, 1, 2)], rank(3)],
        (3,),
        "rank 3: 3 others wait in collective 1 of group dp, it has entered none there",
    ),
    "two ranks, one lags": (
        [rank(0, group(18, 17, ranks=(0, 1))), rank(1, group(17, 17, ranks=(0, 1)))],
        (1,),
        "rank 1: 1 others wait in collective 18 of group dp, it has entered only 17",
    ),
    "the one that lags waits itself: only the last in the chain is blamed": (
        [
            rank(0, group(18, 17), group(5, 4, name="tp", ranks=(0, 1))),
            rank(1, group(18, 17), group(5, 4, name="tp", ranks=(0, 1))),
            rank(2, group(17, 17), group(5, 4, name="tp2", ranks=(2, 3))),
            rank(3, group(17, 17), group(4, 4, name="tp2", ranks=(2, 3))),
        ],
        (3,),
        "rank 3: 3 others wait in collective 18 of group dp, it has entered only 17",
    ),
    "another collective than the rest": (
        [*waiting(0, 1, 2), rank(3, group(18, 17, "gloo:broadcast"))],
        (3,),
        "rank 3 entered gloo:broadcast where the others entered gloo:all_reduce",
    ),
    "half call one, half another: a bug in the code, no rank's fault": (
        [*waiting(0, 1), *[rank(n, group(18, 17, "gloo:broadcast")) for n in (2, 3)]],
        (),
        "the ranks entered different collectives, gloo:all_reduce or gloo:broadcast",
    ),
    "one ran ahead: the majority is not blamed": (
        [rank(0, group(18, 17)), *[rank(n, group(17, 17)) for n in (1, 2, 3)]],
        (),
        "the evidence does not say who",
    ),
    "a ring that breaks: two are left one collective behind, and wait as well": (
        [*[rank(n, group(19, 18)) for n in (0, 1)], *waiting(2, 3)],
        (),
        "all ranks wait equally in the same collective",
    ),
    "a rank that lags behind a broken ring is still the one that is awaited": (
        [rank(0, group(19, 18)), *waiting(1, 2), rank(3, group(17, 17))],
        (3,),
        "rank 3: 3 others wait in collective 19 of group dp, it has entered only 17",
    ),
    "one of two left the order that both had kept": (
        [habitual(0, "gloo:all_reduce"), habitual(1, "gloo:all_gather")],
        (1,),
        "rank 1 entered gloo:all_gather where its collectives so far foretell gloo:all_reduce",
    ),
    "one of two left the order, but to evaluate: who is right cannot be said": (
        [habitual(0, "gloo:all_reduce"), habitual(1, "gloo:all_gather", phase=Phase.EVALUATING)],
        (),
        "the ranks entered different collectives",
    ),
    "one of two, and too little was seen to know an order": (
        [habitual(0, "gloo:all_reduce", rounds=1), habitual(1, "gloo:all_gather", rounds=1)],
        (),
        "the ranks entered different collectives",
    ),
    "a held GIL is said": (
        [*waiting(0, 1, 3), rank(2, group(17, 17), stack=STACK, python_answers=False)],
        (2,),
        "rank 2: 3 others wait in collective 18 of group dp, it has entered only 17 "
        "(at train.py:12 in step, the GIL is held)",
    ),
    "a busy rank is said to be busy": (
        [*waiting(0, 1, 3), rank(2, group(17, 17), cpu_share=0.97)],
        (2,),
        "rank 2: 3 others wait in collective 18 of group dp, it has entered only 17 (busy: 97% of a CPU)",
    ),
    "a switch: all wait equally": (waiting(0, 1, 2, 3), (), "all ranks wait equally in the same collective"),
    "sends and receives are counted by their two ends only": (
        [
            rank(0, group(21, 20, "nccl:send 0->1")),
            rank(1, group(21, 20, "nccl:recv 1<-0")),
            rank(2, group(15, 15)),
            rank(3, group(15, 15)),
        ],
        (),
        "the evidence does not say who",
    ),
    "a recorder that is mute while all others wait": (
        [*waiting(0, 1, 2), rank(3, answers=False)],
        (3,),
        "rank 3 does not answer while the others wait",
    ),
    "no recorder at all, one is saving": (
        [*[rank(n, answers=False) for n in (0, 1, 2)], rank(3, answers=False, phase=Phase.SAVING)],
        (3,),
        "rank 3 is in phase saving while the others are in the step",
    ),
    "no recorder, only stacks": (
        [*[rank(n, answers=False, stack=WAITING) for n in (0, 1, 2)], rank(3, answers=False, stack=STACK)],
        (3,),
        "rank 3 is outside any collective while the others wait in one (at train.py:12 in step)",
    ),
    "nothing at all": ([rank(n, answers=False) for n in range(4)], (), "the evidence does not say who"),
}


@pytest.mark.parametrize("kind", HANGS)
def test_culprit_of_a_hang(kind: str) -> None:
    """Each kind of hang leaves evidence that names the guilty rank, or nobody."""
    evidence, guilty, reason = HANGS[kind]
    verdict = culprit.of_hang(evidence, len(evidence))
    assert verdict.ranks == guilty
    assert any(each.startswith(reason) for each in verdict.reasons)
    assert (verdict.confidence > 0) == bool(guilty)


def test_ranks_of_one_worker_hang_in_its_kernel() -> None:
    """Two in state D on one worker may have its disk or driver to blame; one on each of two, only what both share."""
    stuck = [*waiting(0, 1), *[rank(n, group(17, 17), state="D", phase=Phase.STEP) for n in (2, 3)]]
    assert culprit.of_hang(stuck, 4, ranks_per_worker=2).ranks == (2, 3)
    assert not culprit.of_hang(stuck, 4, ranks_per_worker=1).is_known


def test_ranks_that_could_be_asked_are_not_compared_without_the_others() -> None:
    """Of two that answered, the slower may be as healthy as the faster: the guilty one may not have been asked."""
    verdict = culprit.of_hang([rank(0, group(18, 17)), rank(1, group(17, 17))], 4)
    assert not verdict.is_known
    assert verdict.reasons == ("only 2 of 4 ranks could be asked, and these cannot say",)


def test_a_stopped_rank_is_named_even_if_others_could_not_be_asked() -> None:
    """What the kernel says about one process needs no comparison."""
    assert culprit.of_hang([rank(1, state="T", answers=False)], 4).ranks == (1,)


def ended(
    number: int, *, code: int | None = None, signal: int | None = None, error: str = "", age: float = 0.1
) -> RankReport:
    """A rank that has ended; `error` is 'Type: message'."""
    kind, _, message = error.partition(": ")
    return RankReport(
        rank=number,
        pid=number,
        exit=RankExit(code=code, signal=signal, age_seconds=age) if code is not None or signal is not None else None,
        error=RankError(type=kind, message=message, age_seconds=age) if error else None,
    )


def aborted(number: int) -> RankReport:
    """A rank that NCCL's watchdog has ended because a collective did not."""
    said = "[rank0]:[E] [PG ID 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=18, OpType=ALLREDUCE)"
    return RankReport(rank=number, pid=number, exit=RankExit(signal=6, log_tail=(said,), age_seconds=1.0))


CUT_OFF = "DistNetworkError: Connection closed by peer [10.0.0.7]:1234"
GLOO = "RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:7878"
CRASHES: dict[str, tuple[list[RankReport], tuple[int, ...]]] = {
    "kill -9, and three innocents complain": (
        [ended(0, code=1, error=CUT_OFF), ended(1, signal=9), ended(2, code=1, error=GLOO), ended(3, error=GLOO)],
        (1,),
    ),
    "an exception": ([ended(2, code=1, error="ValueError: bad sample"), ended(0, code=1, error=GLOO)], (2,)),
    "the same exception everywhere": ([ended(n, code=1, error="ValueError: bad sample") for n in range(3)], (0, 1, 2)),
    "exit without a word": ([ended(3, code=3)], (3,)),
    "two are killed": ([ended(0, signal=9), ended(1, signal=9)], (0, 1)),
    "one raised, and its end killed another": (
        [ended(0, code=1, error="ValueError: bad", age=2.0), ended(1, signal=6, age=1.0)],
        (0,),
    ),
    "the first to fail draws another kind of failure with it": (
        [ended(0, code=1, error="KeyError: 'x'", age=0.2), ended(2, code=1, error="ValueError: bad", age=0.9)],
        (2,),
    ),
    "two kinds of exception at once: the earlier is named": (
        [ended(0, code=1, error="KeyError: 'x'", age=0.21), ended(2, code=1, error="ValueError: bad", age=0.22)],
        (2,),
    ),
    "torch's own watchdog aborts those that wait for one that was killed": (
        [*[aborted(n) for n in (0, 1, 3)], ended(2, signal=9, age=0.05)],
        (2,),
    ),
    "an abort of the user's own": ([ended(1, signal=6), ended(0, code=1, error=GLOO)], (1,)),
    "only innocents": ([ended(0, code=1, error=CUT_OFF), ended(1, code=1, error=GLOO)], ()),
    "an agent that found no store": ([ended(0, code=ExitCode.AGENT_FAILED, error="OSError: no store")], ()),
    "a store that has nothing readable": ([ended(n, code=ExitCode.STORAGE) for n in range(4)], ()),
    "a store that takes nothing": ([ended(n, code=ExitCode.UNSAVED) for n in range(4)], ()),
}


@pytest.mark.parametrize("kind", CRASHES)
def test_culprit_of_a_crash(kind: str) -> None:
    """Those whose end is a symptom of another's are not blamed."""
    ranks, guilty = CRASHES[kind]
    assert culprit.of_crash(ranks).ranks == guilty


def test_failures_that_are_too_close_to_be_put_in_order_are_doubted() -> None:
    """Ages come over two networks: a hundredth of a second apart, who was first is not beyond doubt."""
    close = culprit.of_crash([ended(0, error="KeyError: x", age=0.21), ended(2, error="ValueError: y", age=0.22)])
    clear = culprit.of_crash([ended(0, error="KeyError: x", age=0.21), ended(2, error="ValueError: y", age=0.92)])
    assert (close.ranks, clear.ranks) == ((2,), (2,))
    assert close.confidence < 0.7 < clear.confidence
    assert "rank 0 raised KeyError: x 0.71 s after rank 2" in clear.reasons


def test_who_left_the_others_is_found_among_the_living() -> None:
    """All but one were cut off: the one that lives and waits for nobody did it; one that waits itself did not."""
    left = culprit.of_abandonment([rank(3, group(17, 17), stack=STACK, phase=Phase.STEP)], 1)
    assert left.ranks == (3,)
    assert left.reasons[0].startswith("rank 3 has cut off its peers")
    for living in (rank(3, group(18, 17)), rank(3, answers=False), rank(3, group(17, 17), phase=Phase.SAVING)):
        assert not culprit.of_abandonment([living], 1).is_known
    assert not culprit.of_abandonment([rank(2, group(17, 17)), rank(3, group(17, 17))], 2).is_known
    assert not culprit.of_abandonment([rank(3, group(17, 17), phase=Phase.STEP)], 2).is_known


def test_a_symmetric_stall_proposes_node_checks() -> None:
    """Nobody is blamed; what to look at is said."""
    verdict = culprit.of_hang(waiting(0, 1, 2, 3), 4)
    assert not verdict.is_known
    assert any("node check on every worker" in reason for reason in verdict.reasons)


@pytest.mark.parametrize(
    ("names", "next_one"),
    [
        ((), ""),
        (("a",), ""),
        (("a", "a", "a"), "a"),
        (("a", "b") * 3, "a"),
        (("a", "b") * 3 + ("a",), "b"),
        (tuple("abcd"), ""),
    ],
)
def test_what_a_sequence_foretells(names: tuple[str, ...], next_one: str) -> None:
    """Nothing, before it has come round three times."""
    assert collectives.foretell(names) == next_one


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (ended(0, signal=9), "was killed by SIGKILL"),
        (ended(0, signal=64), "was killed by signal 64"),
        (ended(0, code=3), "exited with code 3"),
        (ended(0, code=1, error="ValueError: bad\nsample"), "raised ValueError: bad"),
        (ended(0, code=1, error="KeyboardInterrupt"), "raised KeyboardInterrupt"),
        (
            RankReport(rank=0, pid=1, exit=RankExit(signal=9, oom_killed=True)),
            "was killed for using too much memory (OOM)",
        ),
    ],
)
def test_an_end_in_words(report: RankReport, words: str) -> None:
    """How a rank ended, as a person would say it."""
    assert culprit.how_it_ended(report) == words


def test_top_frame_of_the_main_thread() -> None:
    """faulthandler prints the main thread last; its innermost frame comes first."""
    assert stacks.top_frame(STACK) == "train.py:12 in step"
    assert stacks.top_frame("") == ""
    assert stacks.top_frame("Current thread 0x1 (most recent call first):") == ""
    assert stacks.top_frame("Thread 0x1:\n  <no Python frame>") == ""


def test_a_frame_of_the_users_own_is_shown_rather_than_a_librarys() -> None:
    """Where a person would look first; a library's if there is no other."""
    queue = 'Current thread 0x2:\n  File "/usr/lib/python3.11/threading.py", line 327 in wait\n'
    assert stacks.own_frame(queue + '  File "/app/loader.py", line 64 in step\n') == "loader.py:64 in step"
    assert stacks.own_frame(queue) == "threading.py:327 in wait"
