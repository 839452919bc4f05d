"""Misbehaviour on command, for tests of what talks to the API server.

`PUT /mend-local/faults` (admin token only) replaces the faults in force by those in the JSON body, `GET` shows them,
`DELETE` lifts them all. All fields may be left out:

    {"dropWatches": true}                          close every open watch, once
    {"expireWatches": 3}                           answer the next 3 watches that name a version with 410 Gone
    {"forgetHistory": true}                        once: compact, so that watches and pages from older versions get 410
    {"conflicts": 2, "resource": "pods"}           answer the next 2 updates and patches with 409
    {"errors": 5, "errorCode": 503}                answer the next 5 requests with this code
    {"delaySeconds": 0.5}                          hold every request for so long before it is looked at
    {"frozen": true}                               accept requests and answer none; open watches fall silent, too
    {"discardWrites": true}                        go on answering but keep nothing for a restart
    {"kill": true}                                 end the server's process with SIGKILL, at once

`resource` (a plural such as "pods" or "trainingruns") limits expireWatches, conflicts, errors and delaySeconds to it.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from mend_local import failures
from mend_local.failures import ApiFailure

PATH = "/mend-local/faults"
_WRITES = ("update", "patch")


class Faults(msgspec.Struct, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """What is to go wrong; counts are used up."""

    drop_watches: bool = False
    expire_watches: int = 0
    forget_history: bool = False
    conflicts: int = 0
    errors: int = 0
    error_code: int = 500
    delay_seconds: float = 0.0
    frozen: bool = False
    discard_writes: bool = False
    kill: bool = False
    resource: str = ""


class Misbehaviour:
    """The faults in force and how they are done to requests."""

    def __init__(self) -> None:
        self.faults = Faults()
        self._thawed = asyncio.Event()
        self._thawed.set()

    def impose(self, raw: bytes) -> Faults:
        """Replace the faults in force; raises a 400 that names a field that is none."""
        try:
            self.faults = msgspec.json.decode(raw or b"{}", type=Faults)
        except msgspec.MsgspecError as error:
            raise failures.bad_request(f"these are no faults: {error}") from error
        if self.faults.frozen:
            self._thawed.clear()
        else:
            self._thawed.set()
        return self.faults

    async def before(self, verb: str, resource: str, name: str) -> None:
        """Done to every request before it is looked at; raises what it is to be answered with."""
        faults = self.faults
        matches = not faults.resource or faults.resource == resource
        if faults.delay_seconds and matches:
            await asyncio.sleep(faults.delay_seconds)
        await self.thawed()
        if not matches:
            return
        if faults.errors > 0:
            faults.errors -= 1
            raise ApiFailure(faults.error_code, "InternalError", "an error was asked for (fault injection)")
        if faults.conflicts > 0 and verb in _WRITES:
            faults.conflicts -= 1
            raise failures.conflict("", resource, name)

    def expires_watch(self, resource: str) -> bool:
        """Whether this watch is to be answered with 410."""
        faults = self.faults
        if faults.expire_watches <= 0 or (faults.resource and faults.resource != resource):
            return False
        faults.expire_watches -= 1
        return True

    async def thawed(self) -> None:
        """Wait until the server is not frozen."""
        await self._thawed.wait()

    @property
    def shown(self) -> Any:
        """The faults in force as JSON values."""
        return msgspec.to_builtins(self.faults)
