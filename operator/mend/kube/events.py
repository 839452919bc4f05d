"""Tells on an object what happened to it, as core/v1 Events (what `kubectl describe` shows).

Recording never waits, never raises and never floods: repeats become a count, each object has an allowance, and what the
API refuses is counted and dropped. An Event is a courtesy; the status and the journal are the record.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, TypeVar

from mend.kube.client import EVENTS, Json, KubeClient
from mend.kube.errors import ApiError, NotFound

K = TypeVar("K")
V = TypeVar("V")

log = logging.getLogger(__name__)

QUEUE_LIMIT: Final = 256
REMEMBERED: Final = 1024  # objects and repeats that are kept in mind
REPEAT_SECONDS: Final = 600.0  # a repeat after that is a new event
BURST: Final = 25  # events at once for one object
REFILL_SECONDS: Final = 10.0  # one more every so often
MESSAGE_LIMIT: Final = 1024  # characters; the API's own limit
NAME_LIMIT: Final = 200


@dataclass(frozen=True, slots=True)
class Regarding:
    """The object that an event is about."""

    api_version: str
    kind: str
    namespace: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class _Note:
    regarding: Regarding
    type: str
    reason: str
    message: str


@dataclass(slots=True)
class _Repeat:
    name: str
    count: int
    at: float


class EventRecorder:
    """Queues events in `record`; `run` sends them until cancelled."""

    def __init__(
        self,
        client: KubeClient,
        *,
        component: str,
        instance: str = "",
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.sent = 0
        self.dropped = 0  # for want of allowance or of room in the queue
        self.failed = 0
        self._client = client
        self._component = component
        self._instance = instance
        self._clock = clock
        self._wall_clock = wall_clock
        self._queue: asyncio.Queue[_Note] = asyncio.Queue(QUEUE_LIMIT)
        self._repeats: OrderedDict[_Note, _Repeat] = OrderedDict()
        self._allowances: OrderedDict[str, tuple[float, float]] = OrderedDict()  # by uid: tokens, and when counted

    def record(self, regarding: Regarding, type: str, reason: str, message: str) -> None:
        """Tells that `reason` (CamelCase) happened; `type` is Normal or Warning."""
        if not self._is_allowed(regarding.uid) or self._queue.full():
            self.dropped += 1
            return
        self._queue.put_nowait(_Note(regarding, type, reason, message[:MESSAGE_LIMIT]))

    async def run(self) -> None:
        """Sends what is recorded, in order, until cancelled."""
        while True:
            await self._deliver(await self._queue.get())
            self._queue.task_done()

    async def flush(self) -> None:
        """Waits until everything recorded so far was sent or dropped; needs `run` to be running."""
        await self._queue.join()

    # ------------------------------------------------------------ sending
    async def _deliver(self, note: _Note) -> None:
        try:
            await self._send(note)
            self.sent += 1
        except ApiError as error:
            self.failed += 1
            log.warning("event %s on %s could not be recorded: %s", note.reason, note.regarding.name, error)

    async def _send(self, note: _Note) -> None:
        now = self._clock()
        known = self._repeats.get(note)
        if known is not None and now - known.at <= REPEAT_SECONDS:
            patch = {"count": known.count + 1, "lastTimestamp": self._timestamp()}
            try:
                await self._client.merge_patch(EVENTS, note.regarding.namespace, known.name, patch)
            except NotFound:
                pass  # the API server forgets events after an hour
            else:
                known.count += 1
                known.at = now
                self._repeats.move_to_end(note)
                return
        made = await self._client.create(EVENTS, note.regarding.namespace, self._event(note))
        _remember(self._repeats, note, _Repeat(made["metadata"]["name"], 1, now))

    def _event(self, note: _Note) -> Json:
        about = note.regarding
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {
                "name": f"{about.name[:NAME_LIMIT]}.{uuid.uuid4().hex[:16]}",
                "namespace": about.namespace,
            },
            "involvedObject": {
                "apiVersion": about.api_version,
                "kind": about.kind,
                "namespace": about.namespace,
                "name": about.name,
                "uid": about.uid,
            },
            "type": note.type,
            "reason": note.reason,
            "message": note.message,
            "count": 1,
            "firstTimestamp": self._timestamp(),
            "lastTimestamp": self._timestamp(),
            "source": {"component": self._component},
            "reportingComponent": self._component,
            "reportingInstance": self._instance,
        }

    def _timestamp(self) -> str:
        return datetime.fromtimestamp(self._wall_clock(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def _is_allowed(self, uid: str) -> bool:
        """Takes one token of the object's bucket, if there is one."""
        now = self._clock()
        tokens, counted_at = self._allowances.get(uid, (float(BURST), now))
        tokens = min(BURST, tokens + (now - counted_at) / REFILL_SECONDS)
        _remember(self._allowances, uid, (tokens - 1.0 if tokens >= 1.0 else tokens, now))
        return tokens >= 1.0


def _remember(memory: OrderedDict[K, V], key: K, value: V) -> None:
    """Puts `value` last and lets go of what was not touched for longest."""
    memory[key] = value
    memory.move_to_end(key)
    if len(memory) > REMEMBERED:
        memory.popitem(last=False)
