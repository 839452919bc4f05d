"""One leader among the controllers that are up, by a Lease; whoever cannot prove to be it, is not.

The leader counts from the moment it *sent* its last successful renewal; the others from when they *saw* the record
change, which is later. The leader gives up after `renew_deadline`, the others take over after `lease`, which is longer.
Only lengths of time on each one's own monotonic clock are compared, so skewed clocks do no harm, and a leader whose
API hangs or which was stopped for a while finds its `Fence` closed before its next write.
"""

from __future__ import annotations

import asyncio
import logging
import random as _random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from mend.kube.client import LEASES, Json, KubeClient
from mend.kube.errors import AlreadyExists, ApiError, Conflict, NotFound

log = logging.getLogger(__name__)

RELEASE_SECONDS: Final = 2.0


def uptime_seconds() -> float:
    """A clock that no one can set and that, unlike `time.monotonic`, goes on while the machine is suspended."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class NotLeader(Exception):
    """The lease could not be renewed in time: whatever was about to be written must not be."""


class StuckLeader(Exception):
    """The leader's work did not end although leadership was lost: the process must."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Lengths in seconds: others take over after `lease`; the leader stops itself after `renew_deadline`."""

    lease: int = 8
    renew_deadline: float = 5.0
    retry: float = 1.0

    @classmethod
    def of_lease(cls, seconds: int) -> Timing:
        """The same proportions for a lease of another length."""
        usual = cls()
        share = seconds / usual.lease
        return cls(lease=seconds, renew_deadline=usual.renew_deadline * share, retry=usual.retry * share)

    def __post_init__(self) -> None:
        if not 0 < self.retry < self.renew_deadline < self.lease:
            raise ValueError(
                f"lease election needs 0 < retry < renew_deadline < lease, got retry={self.retry}, "
                f"renew_deadline={self.renew_deadline}, lease={self.lease}"
            )


class Fence:
    """One term of leadership. Ask it right before every write; it answers from the clock, without any I/O."""

    def __init__(self, term: int, open_until: float, clock: Callable[[], float]) -> None:
        self.term = term  # `leaseTransitions`: grows with every term
        self._open_until = open_until
        self._clock = clock
        self._is_closed = False

    def is_leader(self) -> bool:
        """Whether this process certainly still holds the lease."""
        return self.remaining_seconds() > 0

    def remaining_seconds(self) -> float:
        """How long it certainly will if nothing is renewed any more; 0 when it does not."""
        return 0.0 if self._is_closed else max(self._open_until - self._clock(), 0.0)

    def check(self) -> None:
        """Raises `NotLeader` unless `is_leader`."""
        if not self.is_leader():
            raise NotLeader(f"the lease was not renewed in time (term {self.term}): nothing may be written any more")

    def extend(self, open_until: float) -> None:
        """The lease was renewed. Too late is too late: a fence never opens again."""
        if self.is_leader():
            self._open_until = open_until
        else:
            self.close()

    def close(self) -> None:
        """The term is over."""
        self._is_closed = True


class Elector:
    """Campaigns for the Lease `namespace/name`. `identity` must be unique to this process, also across restarts."""

    def __init__(
        self,
        client: KubeClient,
        *,
        namespace: str,
        name: str,
        identity: str,
        timing: Timing = Timing(),
        clock: Callable[[], float] = uptime_seconds,
        random: Callable[[], float] = _random.random,
    ) -> None:
        self.identity = identity
        self.leader = ""  # who holds the lease as far as this process has seen
        self.errors = 0
        self.last_error = ""  # "" after any success
        self.terms = 0  # how often this process was elected
        self._client = client
        self._namespace = namespace
        self._name = name
        self._timing = timing
        self._clock = clock
        self._random = random
        self._lease: Json | None = None  # as last read or written
        self._seen_record: Json | None = None
        self._seen_at = 0.0
        self._fence: Fence | None = None

    def is_leader(self) -> bool:
        """Whether this process certainly leads now."""
        return self._fence is not None and self._fence.is_leader()

    async def run(self, lead: Callable[[Fence], Awaitable[None]]) -> None:
        """Campaigns, and runs `lead` for each term won, until cancelled or until `lead` returns or raises.

        `lead` is cancelled when the lease is lost, and the campaign goes on. When `run` is cancelled, `lead` is
        cancelled first and the lease then given back. Errors of the API never escape.
        """
        while True:
            fence = await self._campaign()
            if await self._lead(fence, lead):
                return

    # ------------------------------------------------------------ campaign
    async def _campaign(self) -> Fence:
        while True:
            fence = await self._try_to_acquire()
            if fence is not None:
                self.terms += 1
                self.leader = self.identity
                log.info("leader of %s/%s, term %d", self._namespace, self._name, fence.term)
                return fence
            await asyncio.sleep(self._timing.retry * (0.8 + 0.4 * self._random()))

    async def _try_to_acquire(self) -> Fence | None:
        try:
            async with asyncio.timeout(self._timing.renew_deadline):
                await self._look()
                if not self._is_free():
                    return None
                term = int(self._record().get("leaseTransitions") or 0) + (self._lease is not None)
                sent_at = self._clock()
                await self._write(
                    {
                        "holderIdentity": self.identity,
                        "leaseDurationSeconds": self._timing.lease,
                        "acquireTime": _now(),
                        "renewTime": _now(),
                        "leaseTransitions": term,
                    }
                )
        except (ApiError, TimeoutError) as error:
            self._note(error, "campaign")
            return None
        return Fence(term, sent_at + self._timing.renew_deadline, self._clock)

    async def _look(self) -> None:
        """Reads the lease and notes when its record was first seen as it is."""
        try:
            self._lease = await self._client.get(LEASES, self._namespace, self._name)
        except NotFound:
            self._lease = None
        record = self._record()
        if record != self._seen_record:
            self._seen_record, self._seen_at = record, self._clock()
        self.leader = str(record.get("holderIdentity") or "")

    def _is_free(self) -> bool:
        record = self._record()
        if record.get("holderIdentity") in (None, "", self.identity):
            return True
        lease_seconds = float(record.get("leaseDurationSeconds") or self._timing.lease)
        return self._clock() - self._seen_at > lease_seconds

    # ------------------------------------------------------------ leading
    async def _lead(self, fence: Fence, lead: Callable[[Fence], Awaitable[None]]) -> bool:
        """Whether `lead` ended by itself (what it raised is raised); false if the lease was lost."""
        self._fence = fence
        work = asyncio.ensure_future(lead(fence))
        renewing = asyncio.ensure_future(self._renew_until_lost(fence))
        try:
            await asyncio.wait((work, renewing), return_when=asyncio.FIRST_COMPLETED)
            was_lost = not work.done() or isinstance(work.exception(), NotLeader)
        finally:
            is_held = fence.is_leader()
            fence.close()
            await self._end(work, renewing)
            if is_held:
                await self._release()
        if renewing.done() and not renewing.cancelled():
            renewing.result()
        if was_lost:
            ended_with = None if work.cancelled() else work.exception()
            log.error("lost the lease %s/%s, term %d (%r)", self._namespace, self._name, fence.term, ended_with)
            return False
        work.result()
        return True

    async def _end(self, *tasks: asyncio.Future[None]) -> None:
        """Cancels the tasks and waits for them, but no longer than the others wait for the lease."""
        for task in tasks:
            task.cancel()
        _, pending = await asyncio.wait(tasks, timeout=self._timing.lease - self._timing.renew_deadline)
        if pending:
            raise StuckLeader(f"the work of {self.identity} goes on although its term has ended: end the process")

    async def _renew_until_lost(self, fence: Fence) -> None:
        while True:
            await asyncio.sleep(min(self._timing.retry, fence.remaining_seconds()))
            if not fence.is_leader():
                return
            try:
                # Half of the time for one try: a connection that hangs must leave time for another one.
                async with asyncio.timeout(min(fence.remaining_seconds(), self._timing.renew_deadline / 2)):
                    if not await self._renew(fence):
                        return
            except (ApiError, TimeoutError) as error:
                self._note(error, "renewal")

    async def _renew(self, fence: Fence) -> bool:
        """False if the lease is no longer held by this process."""
        sent_at = self._clock()
        try:
            await self._write(self._renewed())
        except (Conflict, NotFound):
            # Somebody else took it, or merely touched it, or an earlier renewal took place whose answer was lost.
            await self._look()
            if self.leader != self.identity:
                return False
            sent_at = self._clock()
            await self._write(self._renewed())
        fence.extend(sent_at + self._timing.renew_deadline)
        return True

    async def _release(self) -> None:
        """Gives the lease back, so that the others need not wait for its end; not if it is somebody else's by now."""
        if self._record().get("holderIdentity") != self.identity:
            return
        try:
            async with asyncio.timeout(RELEASE_SECONDS):
                await self._write({**self._record(), "holderIdentity": "", "leaseDurationSeconds": 1})
            self.leader = ""
        except (ApiError, TimeoutError) as error:
            self._note(error, "release")

    # ------------------------------------------------------------ the record
    def _record(self) -> Json:
        """The spec of the lease as last read or written; empty if there is none."""
        return (self._lease or {}).get("spec") or {}

    def _renewed(self) -> Json:
        """The record with a new time, and with our own duration, whoever edited it: others wait for that long."""
        return {**self._record(), "leaseDurationSeconds": self._timing.lease, "renewTime": _now()}

    async def _write(self, record: Json) -> None:
        """Creates or replaces the lease, if it is still as last seen."""
        if self._lease is None:
            meta = {"namespace": self._namespace, "name": self._name}
            lease = {"apiVersion": LEASES.api_version, "kind": "Lease", "metadata": meta, "spec": record}
            self._lease = await self._client.create(LEASES, self._namespace, lease)
        else:
            self._lease = await self._client.replace(LEASES, {**self._lease, "spec": record})
        self.last_error = ""

    def _note(self, error: Exception, during: str) -> None:
        """Losing a race is no error; an unreachable API is one, and no more than that."""
        if isinstance(error, Conflict | AlreadyExists):
            return
        self.errors += 1
        text = str(error) or "timed out"
        if text != self.last_error:
            log.warning("%s for the lease %s/%s failed: %s", during, self._namespace, self._name, text)
        self.last_error = text


def _now() -> str:
    """For people who read the record; nothing compares it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
