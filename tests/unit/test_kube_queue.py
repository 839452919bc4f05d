"""The queue of keys, against a twin that is too simple to be wrong."""

from __future__ import annotations

import asyncio

import hypothesis.strategies as st
from hypothesis import given

from mend.backoff import Backoff
from mend.kube.queue import WorkQueue


class Clock:
    """A clock that only moves when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Twin:
    """What the queue should do, by looking through everything every time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.due: dict[str, tuple[float, int]] = {}
        self.busy: set[str] = set()
        self.order = 0

    def add_after(self, key: str, seconds: float) -> None:
        self.order += 1
        if key not in self.due or self.now + seconds < self.due[key][0]:
            self.due[key] = (self.now + seconds, self.order)

    def ready(self) -> dict[str, float]:
        return {key: at for key, (at, _) in self.due.items() if at <= self.now and key not in self.busy}

    def take(self, key: str) -> None:
        del self.due[key]
        self.busy.add(key)


KEYS = st.sampled_from("abc")
MOVES = st.one_of(
    st.tuples(st.just("add"), KEYS),
    st.tuples(st.just("add_after"), KEYS, st.integers(0, 4)),
    st.tuples(st.just("take")),
    st.tuples(st.just("done"), KEYS),
    st.tuples(st.just("wait"), st.integers(1, 5)),
)


@given(st.lists(MOVES, max_size=60))
def test_queue_equals_its_twin(moves: list[tuple]) -> None:
    """Whatever is asked in whatever order, a key is handed out exactly when the twin has it ready, earliest first."""
    clock, twin = Clock(), Twin()
    queue: WorkQueue[str] = WorkQueue(clock=clock)
    for move in moves:
        match move:
            case ("add", key):
                queue.add(key)
                twin.add_after(key, 0)
            case ("add_after", key, seconds):
                queue.add_after(key, seconds)
                twin.add_after(key, seconds)
            case ("take",):
                ready = twin.ready()
                key = queue.take()
                assert (key is None) == (not ready)
                if key is not None:
                    assert ready[key] == min(ready.values())
                    twin.take(key)
            case ("done", key) if key in twin.busy:
                queue.done(key)
                twin.busy.remove(key)
            case ("wait", seconds):
                clock.now += seconds
                twin.now += seconds
        assert len(queue) == len(twin.due)
        assert queue.depth() == sum(at <= twin.now for at, _ in twin.due.values())


def test_key_added_while_looked_at_is_handed_out_after_done() -> None:
    """A key is never looked at twice at the same time, and no request made meanwhile is lost."""
    queue: WorkQueue[str] = WorkQueue(clock=Clock())
    queue.add("run")
    assert queue.take() == "run"
    queue.add("run")
    assert queue.take() is None
    queue.done("run")
    assert queue.take() == "run"


def test_failures_back_off_until_forgotten() -> None:
    """Each failure in a row doubles the delay up to the ceiling; `forget` starts over."""
    queue: WorkQueue[str] = WorkQueue(clock=Clock(), random=lambda: 1.0, backoff=Backoff(0.1, 1.0))
    delays = []
    for _ in range(6):
        queue.add("run")
        assert queue.take() == "run"
        delays.append(queue.failed("run"))
        queue.done("run")
    assert delays == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    queue.forget("run")
    assert queue.failed("run") == 0.1
    assert queue.retried == 7


def test_latency_is_counted_from_due_to_taken() -> None:
    """The time that a key waited after it became due is what the counters tell."""
    clock = Clock()
    queue: WorkQueue[str] = WorkQueue(clock=clock)
    queue.add_after("run", 2.0)
    clock.now = 5.0
    assert queue.take() == "run"
    assert (queue.last_waited_seconds, queue.waited_seconds, queue.taken) == (3.0, 3.0, 1)


def test_forgotten_wake_ups_do_not_pile_up() -> None:
    """A key that is looked at again and again, each time asking for a wake-up far away, keeps one entry or few."""
    queue: WorkQueue[str] = WorkQueue(clock=Clock())
    for _ in range(1000):
        queue.add("run")
        assert queue.take() == "run"
        queue.add_after("run", 3600)
        queue.done("run")
    assert len(queue._heap) < 100
    assert len(queue) == 1


async def test_get_wakes_for_additions_and_for_due_times() -> None:
    """A waiting `get` returns for a key that is added now and for one whose time comes."""
    queue: WorkQueue[str] = WorkQueue()
    waiting = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    queue.add_after("later", 0.05)
    queue.add("now")
    assert await asyncio.wait_for(waiting, 10) == "now"
    assert await asyncio.wait_for(queue.get(), 10) == "later"


async def test_get_wakes_for_an_earlier_wish() -> None:
    """A wish for sooner replaces one for much later while `get` already sleeps."""
    queue: WorkQueue[str] = WorkQueue()
    queue.add_after("run", 3600)
    waiting = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    queue.add_after("run", 0.01)
    assert await asyncio.wait_for(waiting, 10) == "run"


async def test_takers_never_share_a_key() -> None:
    """Any number of workers on one queue look at every key, and never two at the same one."""
    queue: WorkQueue[int] = WorkQueue()
    active: set[int] = set()
    unseen = set(range(10))
    all_seen = asyncio.Event()

    async def worker() -> None:
        while True:
            key = await queue.get()
            assert key not in active
            active.add(key)
            await asyncio.sleep(0)
            active.remove(key)
            queue.done(key)
            unseen.discard(key)
            if not unseen:
                all_seen.set()

    async with asyncio.TaskGroup() as group:
        workers = [group.create_task(worker()) for _ in range(4)]
        for key in range(20):
            queue.add(key % 10)
        await asyncio.wait_for(all_seen.wait(), 10)
        for task in workers:
            task.cancel()
