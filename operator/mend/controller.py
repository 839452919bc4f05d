"""The loop: whatever changes about a run wakes it; it is then looked at as a whole, decided on, and acted for.

Keeps nothing that matters: attempt, lineage, budgets and incidents are in the run's status, so that the next leader
continues where this one ended.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from mend import nodehealth, render
from mend.agents import AgentPool, RunKey
from mend.apply import TRAINING_RUNS, Applier
from mend.crstatus import UnreadableStatus
from mend.decide import decide, reject
from mend.heartbeats import Point
from mend.journal import Entry, Journal, changes_something
from mend.kube.client import NODES, PODS, SECRETS, SERVICES, Json, KubeClient
from mend.kube.election import Elector, Fence, NotLeader
from mend.kube.errors import ApiError, Conflict, NotFound
from mend.kube.events import EventRecorder, Regarding
from mend.kube.queue import WorkQueue
from mend.kube.reflector import Reflector, all_synced
from mend.metrics import Metrics, WatchFigures
from mend.names import API_VERSION, CONTROLLER_NAME, KIND, LABEL_RUN, TOKEN_SECRET_KEY, TRAINER_CONTAINER
from mend.noted import accepted_spec
from mend.observation import Observation, PodPhase, WorkerPod
from mend.observe import LOG_LINES, bare_observation, belongs_to, decoded, targets, worker_pod
from mend.prefixes import Prefixes
from mend.presence import never_ran
from mend.spec import InvalidSpec, Spec, parse_spec
from mend.strikebook import StrikeBook

log = logging.getLogger(__name__)

LOOKS_AT_ONCE = 16
DEAF_SECONDS = 180.0  # a watch is renewed within about a minute, however quiet
LOG_SECONDS = 1.0  # a recovery does not wait longer for the last lines of a pod, whose node may be gone
OWN_OBJECTS = LABEL_RUN  # selects whatever carries the label


class SteadyClock:
    """Seconds since the epoch that never go backwards: the wall clock once, then the monotonic one."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() + self._offset


@dataclass(slots=True)
class _Known:
    """What is kept in mind of one run between two looks; all of it can be had again."""

    uid: str
    unreadable: str = ""  # what is wrong with its status, as told to its owner
    written: Json | None = None  # the run as last written by this controller
    token: str | None = None
    has_service: bool = False
    has_tls: bool = False
    log_tails: dict[str, tuple[str, ...]] | None = None  # of pods that have failed, by uid


class Controller:
    """All that one leader does. `lead` runs until it is cancelled."""

    def __init__(
        self,
        client: KubeClient,
        *,
        namespace: str | None,
        home: str,
        journal: Journal,
        metrics: Metrics,
        instance: str,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._client = client
        self._journal = journal
        self._metrics = metrics
        self._clock = clock or SteadyClock()
        self._queue: WorkQueue[RunKey] = WorkQueue()
        self._recorder = EventRecorder(client, component="mend", instance=instance)
        self._known: dict[RunKey, _Known] = {}
        self._doubted: set[RunKey] = set()  # to be read from the API server, whatever the watch says
        self._namespace = namespace
        self._home = home  # the namespace of what the controller keeps for itself
        self._leads = False
        self._begin_term()
        metrics.follow_queue(self._queue.depth)
        journal.follow_runs(lambda run: self._runs.index.get(*run.split("/", 1)) is not None)

    async def run(self, elector: Elector) -> None:
        """Campaign for leadership and lead whenever it is won, until cancelled."""
        await elector.run(self.lead)

    def _begin_term(self) -> None:
        """Watches without memory: what an earlier term has seen is old, and must not be decided on."""
        self._known.clear()
        self._doubted.clear()
        self._runs = Reflector(self._client, TRAINING_RUNS, namespace=self._namespace, on_change=self._run_changed)
        self._pods = Reflector(
            self._client,
            PODS,
            namespace=self._namespace,
            label_selector=OWN_OBJECTS,
            on_change=self._pod_changed,
        )
        self._nodes = Reflector(self._client, NODES, on_change=self._node_changed)
        self._book = StrikeBook(self._client, self._home, self._clock, on_change=self._book_changed)
        self._metrics.follow_strikes(lambda: self._book.by_node() if self._leads else {})
        for reflector in self._watches():
            self._metrics.follow_watch(reflector.resource.plural, partial(_figures, reflector))

    async def lead(self, fence: Fence) -> None:
        """Watch, decide and act until cancelled; everything that was started ends with it."""
        self._begin_term()
        pool = AgentPool(on_news=self._queue.add, on_points=self._points)
        prefixes = Prefixes(self._client, on_news=self._queue.add)
        applier = Applier(
            self._client,
            pool,
            self._recorder,
            fence,
            self._book,
            prefixes.prune,
            prefixes.sweep,
            prefixes.keep,
            self._queue.add,
        )
        reflectors = self._watches()
        try:
            async with asyncio.TaskGroup() as tasks:
                for reflector in reflectors:
                    tasks.create_task(reflector.run())
                tasks.create_task(self._recorder.run())
                self._metrics.leads(True)
                self._leads = True
                await all_synced(reflectors)
                for _ in range(LOOKS_AT_ONCE):
                    tasks.create_task(self._work(pool, prefixes, applier))
        finally:
            self._leads = False
            self._metrics.leads(False)
            await applier.close()
            await prefixes.close()
            await pool.close()

    def trouble(self) -> str:
        """Why a leader is not ready: watches that have heard nothing for long; "" if all is well, or of no concern."""
        if not self._leads:
            return ""
        silent = [each.resource.plural for each in self._watches() if each.silent_seconds() > DEAF_SECONDS]
        return f"nothing was heard of {', '.join(silent)} for {DEAF_SECONDS:.0f} s" if silent else ""

    def _watches(self) -> tuple[Reflector, ...]:
        return (self._runs, self._pods, self._nodes, self._book.reflector)

    # ------------------------------------------------------------ waking
    def _run_changed(self, old: Json | None, new: Json | None) -> None:
        run = new or old
        assert run is not None
        self._queue.add(_key(run))

    def _pod_changed(self, old: Json | None, new: Json | None) -> None:
        pod = new or old
        assert pod is not None
        name = (pod["metadata"].get("labels") or {}).get(LABEL_RUN)
        if name:
            self._queue.add((pod["metadata"]["namespace"], name))

    def _node_changed(self, old: Json | None, new: Json | None) -> None:
        """Node heartbeats are many; only a node that goes or comes, or its health, concerns the runs on it."""
        if old is not None and new is not None and nodehealth.fingerprint(old) == nodehealth.fingerprint(new):
            return
        node = (new or old or {})["metadata"]["name"]
        for pod in self._pods.index.values():
            if (pod.get("spec") or {}).get("nodeName") == node:
                self._pod_changed(None, pod)

    def _book_changed(self) -> None:
        """Pods of any run may avoid other nodes now; it happens a few times a day at the most."""
        for run in self._runs.index.values():
            self._queue.add(_key(run))

    def _points(self, run: RunKey, attempt: int, points: tuple[Point, ...]) -> None:
        self._journal.measured("/".join(run), attempt, points)

    # ------------------------------------------------------------ looking
    async def _work(self, pool: AgentPool, prefixes: Prefixes, applier: Applier) -> None:
        while True:
            run = await self._queue.get()
            began, waited = time.monotonic(), self._queue.last_waited_seconds
            problem: Exception | None = None
            try:
                await self._look(run, pool, prefixes, applier)
            except Conflict:
                self._doubted.add(run)  # decided on old facts
                self._queue.failed(run)
            except UnreadableStatus as error:
                seconds, problem = self._queue.failed(run), error  # guessing instead could start it from scratch
                log.error("run %s is left alone: %s; looked at again in %.1f s", "/".join(run), error, seconds)
            except ApiError as error:
                seconds, problem = self._queue.failed(run), error
                log.warning("run %s: %s; again in %.1f s", "/".join(run), error, seconds)
            except NotLeader:
                return  # the elector has the same clock, and ends the others too
            except Exception as error:
                seconds, problem = self._queue.failed(run), error
                log.exception("run %s: unexpected; again in %.1f s", "/".join(run), seconds)
            else:
                self._queue.forget(run)
            finally:
                self._queue.done(run)
                self._metrics.looked(time.monotonic() - began, waited, problem)

    async def _look(self, key: RunKey, pool: AgentPool, prefixes: Prefixes, applier: Applier) -> None:
        """Observe, decide, write down, act."""
        run = await self._current(key)
        known = self._known.get(key)
        if run is None or (known is not None and known.uid != run["metadata"]["uid"]):
            self._forget(key, pool, prefixes)  # gone, or gone and made anew under its name
        if run is None:
            return
        known = self._known.setdefault(key, _Known(run["metadata"]["uid"]))
        now = self._clock()
        problems: tuple[str, ...] = ()
        try:
            spec = parse_spec(run.get("spec"))
        except InvalidSpec as invalid:
            seen = self._bare(run, known, now)
            kept = accepted_spec(seen.status)
            if kept is None:
                rejection = reject(invalid.problems, seen, now)
                known.written = await applier.write_status(run, rejection, seen)
                await applier.act(None, seen, rejection.actions)
                return
            spec, problems = kept, invalid.problems
        if spec.managed_by != CONTROLLER_NAME:
            self._forget(key, pool, prefixes)
            return
        seen = await self._observe(run, spec, known, pool, prefixes, now)
        seen = msgspec.structs.replace(seen, spec_problems=problems)
        decision = decide(spec, seen, now)
        known.written = await applier.write_status(run, decision, seen)
        if changes_something(seen, decision):
            self._journal.decided("/".join(key), Entry(now=now, spec=spec, seen=seen, decision=decision))
            log.info("run %s: %s", "/".join(key), decision.reason)
        self._metrics.record(seen, decision.status, self._clock())
        if decision.wake_after is not None:
            self._queue.add_after(key, decision.wake_after)  # whatever becomes of the actions
        await applier.act(spec, seen, decision.actions)

    async def _current(self, key: RunKey) -> Json | None:
        """The run as watched, or as this controller has just written it if the watch does not know that yet."""
        if key in self._doubted:
            fresh = await self._get_or_none(TRAINING_RUNS, *key)
            self._doubted.discard(key)
            return fresh
        watched, known = self._runs.index.get(*key), self._known.get(key)
        if watched is None or known is None or known.written is None:
            return watched
        return known.written if _version(known.written) > _version(watched) else watched

    def _forget(self, key: RunKey, pool: AgentPool, prefixes: Prefixes) -> None:
        self._known.pop(key, None)
        self._journal.forget("/".join(key))
        pool.forget(key)
        prefixes.forget(key)
        self._metrics.forget(*key)

    # ------------------------------------------------------------ observing
    async def _observe(
        self, run: Json, spec: Spec, known: _Known, pool: AgentPool, prefixes: Prefixes, now: float
    ) -> Observation:
        key = _key(run)
        bare = self._bare(run, known, now)
        await self._find_objects(key, known)
        pods = await self._worker_pods(key, bare.uid, known, now)
        pool.fence(key, bare.status.attempt)
        pool.update(key, targets(pods, known.token))
        agents = pool.views(key)
        prefixes.want(key, bare.uid, spec.checkpoint, bare.status)
        return msgspec.structs.replace(
            bare,
            pods=pods,
            agents=agents,
            evidence=pool.evidence(key),
            checks=pool.checks(key),
            store=prefixes.view(key, bare.status, agents, now),
            step_times=pool.step_times(key),
            paces=pool.paces(key),
            losses=pool.losses(key, bare.status.attempt, spec.health.loss_spike),
            evaluations=pool.evaluations(key, best.metric) if (best := spec.checkpoint.keep_best) else (),
            has_service=known.has_service,
            has_token=known.token is not None,
            has_tls=known.has_tls,
            strikes=self._book.strikes(),
            predecessors=self._predecessors(key, bare.uid),
        )

    def _bare(self, run: Json, known: _Known, now: float) -> Observation:
        """The run by its own word; a word that cannot be read is told to its owner, once, and raised."""
        try:
            seen = bare_observation(run, now)
        except UnreadableStatus as error:
            if known.unreadable != str(error):
                known.unreadable = str(error)
                about = Regarding(API_VERSION, KIND, *_key(run), known.uid)
                self._recorder.record(about, "Warning", "UnreadableStatus", f"the run is left alone: {error}")
            raise
        known.unreadable = ""
        return seen

    def _predecessors(self, key: RunKey, uid: str) -> tuple[str, ...]:
        """Pods that a deleted run of this name has left: they may yet save."""
        namespace, name = key
        pods = self._pods.index.by_label(LABEL_RUN, name, namespace)
        return tuple(sorted(pod["metadata"]["name"] for pod in pods if not belongs_to(pod, uid)))

    async def _find_objects(self, key: RunKey, known: _Known) -> None:
        """The run's Secrets and Service, asked for by name: so no right to list secrets is needed."""
        namespace, name = key
        if known.token is None:
            secret = await self._get_or_none(SECRETS, namespace, render.token_secret_name(name))
            if secret is not None and belongs_to(secret, known.uid):
                known.token = decoded(secret, (TOKEN_SECRET_KEY,)).get(TOKEN_SECRET_KEY)
        known.has_tls = known.has_tls or await self._is_there(SECRETS, known, namespace, render.tls_secret_name(name))
        known.has_service = known.has_service or await self._is_there(
            SERVICES, known, namespace, render.service_name(name)
        )

    async def _is_there(self, resource: Any, known: _Known, namespace: str, name: str) -> bool:
        found = await self._get_or_none(resource, namespace, name)
        return found is not None and belongs_to(found, known.uid)

    async def _get_or_none(self, resource: Any, namespace: str, name: str) -> Json | None:
        try:
            return await self._client.get(resource, namespace, name)
        except NotFound:
            return None

    async def _worker_pods(self, key: RunKey, uid: str, known: _Known, now: float) -> tuple[WorkerPod, ...]:
        namespace, _ = key
        nodes = {node["metadata"]["name"]: node for node in self._nodes.index.values()}
        mine = [worker_pod(pod, nodes, now) for pod in self._pods.index.by_owner(uid)]
        told = known.log_tails = known.log_tails or {}
        pods = []
        for pod in sorted(mine, key=lambda each: (each.index, each.attempt)):
            if pod.phase is PodPhase.FAILED and pod.uid not in told and not never_ran(pod):
                told[pod.uid] = await self._last_lines(namespace, pod.name)
            pods.append(msgspec.structs.replace(pod, log_tail=told.get(pod.uid, ())))
        return tuple(pods)

    async def _last_lines(self, namespace: str, pod: str) -> tuple[str, ...]:
        try:
            async with asyncio.timeout(LOG_SECONDS):
                text = await self._client.log_tail(namespace, pod, container=TRAINER_CONTAINER, lines=LOG_LINES)
        except (ApiError, TimeoutError) as error:
            return (f"(its log cannot be read: {error or 'no answer'})",)
        return tuple(text.splitlines())


def _key(run: Json) -> RunKey:
    return run["metadata"]["namespace"], run["metadata"]["name"]


def _version(run: Json) -> int:
    """Resource versions of one object can be compared as numbers (KEP-5504)."""
    return int(run["metadata"]["resourceVersion"])


def _figures(reflector: Reflector) -> WatchFigures:
    health = reflector.health
    return WatchFigures(reflector.silent_seconds(), health.relists, health.errors)
