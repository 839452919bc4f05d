"""Carries a decision out: its status first, then its actions, each of which may be done twice without harm.

Every write asks the fence right before it: a controller that is no longer the leader changes nothing any more. The
status is put with the version it was decided on, so that a decision from old facts fails before it acts.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from typing import Any, assert_never

from mend import dossier, render
from mend.actions import (
    AnyAction,
    CreateService,
    CreateTls,
    CreateToken,
    CreateWorker,
    Decision,
    DeleteRun,
    DeleteWorker,
    EmitEvent,
    KeepEvidence,
    LiftStrikes,
    PruneCheckpoints,
    SendCheck,
    SendGather,
    SendLaunch,
    SendSaveNow,
    SendStop,
    StrikeNode,
    SweepLeftovers,
)
from mend.agents import AgentPool, RunKey
from mend.crstatus import to_resource
from mend.dial import AgentError
from mend.kube.client import PODS, SECRETS, SERVICES, Json, KubeClient, Resource
from mend.kube.election import Fence
from mend.kube.errors import AlreadyExists, ApiError, Conflict, Forbidden, Invalid, NotFound
from mend.kube.events import EventRecorder, Regarding
from mend.names import API_VERSION, GROUP, KIND, PLURAL, VERSION
from mend.observation import Observation
from mend.observe import belongs_to
from mend.orders import Check, Gather, Order, SaveNow, Stop
from mend.protocol import encode
from mend.spec import Spec
from mend.strikebook import StrikeBook

log = logging.getLogger(__name__)

TRAINING_RUNS = Resource(GROUP, VERSION, PLURAL)
TOKEN_BYTES = 32
Sending = SendLaunch | SendGather | SendSaveNow | SendStop | SendCheck


class Applier:
    """Writes to the API server, the agents and the store, for as long as `fence` is open."""

    def __init__(
        self,
        client: KubeClient,
        pool: AgentPool,
        recorder: EventRecorder,
        fence: Fence,
        book: StrikeBook,
        prune: Callable[[RunKey, tuple[str, ...]], None],
        sweep: Callable[[RunKey, int], None],
        keep: Callable[[RunKey, str, bytes], None],
        wake: Callable[[RunKey], None],
    ) -> None:
        self._client = client
        self._pool = pool
        self._recorder = recorder
        self._fence = fence
        self._book = book
        self._prune = prune
        self._sweep = sweep
        self._keep = keep
        self._wake = wake
        self._sending: dict[tuple[str, bytes], asyncio.Task[None]] = {}  # by pod and order

    async def close(self) -> None:
        """Ends orders that are still under way: the next leader gives its own."""
        tasks = tuple(self._sending.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def write_status(self, run: Json, decision: Decision, before: Observation) -> Json:
        """The run with the decision's status in it. Raises `Conflict` if it has changed since it was seen."""
        if decision.status == before.status:
            return run
        self._fence.check()
        return await self._client.replace(TRAINING_RUNS, {**run, "status": to_resource(decision.status)}, "status")

    async def act(self, spec: Spec | None, seen: Observation, actions: tuple[AnyAction, ...]) -> None:
        """Do every action, whatever becomes of the others; the first `ApiError` is raised in the end, to try again.

        Events and orders come first and wait for nothing: no refused write, and no agent that is slow to answer, may
        hold up the recovery of this run or of another.
        """
        self._fence.check()
        refused: list[ApiError] = []
        for action in sorted(actions, key=_waits):
            try:
                await self._one(spec, seen, action)
            except ApiError as error:
                self._note_refusal(seen, action, error)
                refused.append(error)
        if refused:
            raise refused[0]

    async def _one(self, spec: Spec | None, seen: Observation, action: AnyAction) -> None:
        self._fence.check()
        match action:
            case CreateToken():
                await self._create(SECRETS, seen, render.token_secret(seen, secrets.token_urlsafe(TOKEN_BYTES)))
            case CreateTls():
                from mend.selfsigned import self_signed  # its library is large, and wanted once in a run's life

                await self._create(SECRETS, seen, render.tls_secret(seen, self_signed(f"mend run {seen.uid}")))
            case CreateService():
                await self._create(SERVICES, seen, render.service(seen))
            case CreateWorker(index=index, attempt=attempt, avoid=avoid):
                assert spec is not None
                await self._create(PODS, seen, render.worker(spec, seen, index, attempt, avoid))
            case DeleteWorker():
                await self._delete(PODS, seen, action.name, action.uid, action.grace_seconds)
            case EmitEvent():
                self._recorder.record(regarding(seen), action.type, action.reason, action.message)
            case PruneCheckpoints(uris=uris):
                self._prune((seen.namespace, seen.name), uris)
            case SweepLeftovers(attempt=attempt):
                self._sweep((seen.namespace, seen.name), attempt)
            case KeepEvidence(key=key, record=record):
                self._keep((seen.namespace, seen.name), key, dossier.encode(dossier.compose(seen, record)))
            case StrikeNode(strike=strike):
                await self._book.strike(strike)
            case LiftStrikes(ids=ids):
                await self._book.lift(ids)
            case DeleteRun():
                await self._delete(TRAINING_RUNS, seen, seen.name, seen.uid, None)
            case SendLaunch() | SendGather() | SendSaveNow() | SendStop() | SendCheck():
                self._send(seen, action)
            case never:
                assert_never(never)

    async def _create(self, resource: Resource, seen: Observation, body: Any) -> None:
        """Once is as good as twice; but what an earlier run of this name has left goes soon, and is waited for."""
        name = body["metadata"]["name"]
        try:
            await self._client.create(resource, seen.namespace, body)
        except AlreadyExists as error:
            if not belongs_to(await self._client.get(resource, seen.namespace, name), seen.uid):
                why = "it is not of this run; if it stays, delete it or give the run another name"
                raise ApiError(f"{resource.plural} {name}", error.status, error.reason, why) from error

    async def _delete(self, resource: Resource, seen: Observation, name: str, uid: str, grace: int | None) -> None:
        try:
            await self._client.delete(resource, seen.namespace, name, uid=uid, grace_seconds=grace)
        except (NotFound, Conflict):
            log.debug("%s %s is gone, or another one has its name", resource.plural, name)

    def _note_refusal(self, seen: Observation, action: AnyAction, error: ApiError) -> None:
        """What Kubernetes will not have (quota, admission, an invalid template), the user must be told of."""
        if isinstance(error, Forbidden | Invalid):
            self._recorder.record(regarding(seen), "Warning", "Refused", f"{type(action).__name__}: {error}")

    def _send(self, seen: Observation, action: Sending) -> None:
        """Give an order, unless the very same is still under way; the run is looked at again once it is answered."""
        order = _order(action)
        key = (action.pod_uid, encode(order))
        if key not in self._sending:
            task = asyncio.create_task(self._deliver((seen.namespace, seen.name), action, order))
            self._sending[key] = task
            task.add_done_callback(lambda _: self._sending.pop(key, None))

    async def _deliver(self, run: RunKey, action: Sending, order: Order) -> None:
        """An order that fails is no error of the controller's: the next look decides from what is then seen."""
        try:
            await self._pool.send(run, action.worker, action.pod_uid, order)
        except AgentError as error:
            log.warning("order %s: %s", type(action).__name__, error)
        if isinstance(action, SendGather | SendCheck):
            self._wake(run)


def regarding(seen: Observation) -> Regarding:
    """The run as the object of events."""
    return Regarding(API_VERSION, KIND, seen.namespace, seen.name, seen.uid)


def _waits(action: AnyAction) -> bool:
    """Whether doing it waits for the API server."""
    return not isinstance(action, EmitEvent | Sending | PruneCheckpoints | SweepLeftovers | KeepEvidence)


def _order(action: Sending) -> Order:
    match action:
        case SendLaunch(launch=launch):
            return launch
        case SendCheck():
            return Check(
                attempt=action.attempt, round=action.round, seconds=action.seconds, neighbours=action.neighbours
            )
        case SendGather():
            return Gather(attempt=action.attempt, seconds=action.seconds)
        case SendSaveNow():
            return SaveNow(attempt=action.attempt)
        case SendStop():
            return Stop(
                attempt=action.attempt,
                reason=action.reason,
                grace_seconds=action.grace_seconds,
                exit=action.exit,
                exit_code=action.exit_code,
            )
        case never:
            assert_never(never)
