"""What is known of each run's prefix in the object store: listed in the background, completed by what ranks report.

The store may be slow or away; a look at a run never waits for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from msgspec.structs import replace

from mend.agents import RunKey
from mend.catalog import Catalog
from mend.kube.client import SECRETS, KubeClient
from mend.kube.errors import ApiError, NotFound
from mend.listing import StoredCheckpoint, StoreView
from mend.manifest import signing_key
from mend.names import AUTHORITY_SECRET_KEY, SIGNING_SECRET_KEY
from mend.observation import AgentView
from mend.observe import decoded
from mend.ownership import Owner
from mend.restore import MAX_CANDIDATES, candidates
from mend.spec import Checkpointing
from mend.states import CheckpointRef
from mend.status import RunStatus
from mend.store import Credentials, StoreError, open_store

log = logging.getLogger(__name__)

T = TypeVar("T")
RETRY_SECONDS = 2.0
CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    AUTHORITY_SECRET_KEY,
)
DEADLINE_SECONDS = 10.0
NO_CONDITIONAL_WRITES = (
    "the store ignores conditional writes (If-None-Match): two writers could overwrite each other unnoticed; "
    "make sure that nothing else writes under spec.checkpoint.uri"
)
LISTED_AT_LEAST = 32  # checkpoints; a view of fewer is whole
THREADS = 32  # a store that does not answer holds one until the deadline; runs with other stores must not wait for it


@dataclass(slots=True)
class _Prefix:
    """One run's prefix. `pruned` are checkpoints that a listing under way may still have seen."""

    owner: Owner
    rules: Checkpointing
    view: StoreView = field(default_factory=StoreView)
    catalog: Catalog | None = None
    task: asyncio.Task[None] | None = None
    retry_at: float = 0.0
    older: dict[str, StoredCheckpoint] = field(default_factory=dict)  # what partial views leave out
    completing: asyncio.Task[None] | None = None
    reported: dict[str, StoredCheckpoint] = field(default_factory=dict)
    spoilt: set[str] = field(default_factory=set)
    verified: set[str] = field(default_factory=set)
    pruned: set[str] = field(default_factory=set)
    spared: set[str] = field(default_factory=set)  # by the catalog, which found them to be pinned or verified
    evidence_problem: str = ""


class Prefixes:
    """The prefixes of all runs. `on_news(run)` is called when a listing has ended, however it went."""

    def __init__(self, client: KubeClient, *, on_news: Callable[[RunKey], None]) -> None:
        self._client = client
        self._on_news = on_news
        self._prefixes: dict[RunKey, _Prefix] = {}
        self._pruning: dict[RunKey, asyncio.Task[None]] = {}
        self._sweeping: dict[RunKey, asyncio.Task[None]] = {}
        self._keeping: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="store")

    async def close(self) -> None:
        """Ends what goes on in the background."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        listing = [task for prefix in self._prefixes.values() for task in (prefix.task, prefix.completing)]
        tasks = [task for task in listing if task] + [
            *self._pruning.values(),
            *self._sweeping.values(),
            *self._keeping,
        ]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def want(self, run: RunKey, uid: str, rules: Checkpointing, status: RunStatus) -> None:
        """This is the run's prefix now: list it if it has to be known anew.

        That is at first sight, for each new attempt, and once pods that it replaces are gone: a rank may have committed
        with its last breath. The listing says what it was made for, so that one begun too early is not taken for it.
        """
        owner = Owner(namespace=run[0], name=run[1], uid=uid)
        prefix = self._prefixes.get(run)
        if prefix is None or prefix.owner != owner or _place(prefix.rules) != _place(rules):
            self.forget(run)
            prefix = self._prefixes[run] = _Prefix(owner, rules)
        view = prefix.view
        known = view.listed and view.listed_for == status.attempt and set(view.listed_beside) <= set(status.replacing)
        outdated = not known or view.problem
        if outdated and prefix.task is None and asyncio.get_running_loop().time() >= prefix.retry_at:
            prefix.task = asyncio.create_task(self._list(run, prefix, status))
            prefix.task.add_done_callback(partial(self._listed, run, prefix))

    def view(self, run: RunKey, status: RunStatus, agents: tuple[AgentView, ...], now: float) -> StoreView:
        """The last listing, with what the ranks have reported since."""
        prefix = self._prefixes[run]
        for agent in agents:
            self._hear(prefix, status, agent, now)
        told = (*prefix.older.values(), *prefix.reported.values(), *prefix.view.checkpoints)
        known = {each.ref.uri: each for each in told}
        checkpoints = tuple(
            replace(
                each,
                quarantined=each.quarantined or uri in prefix.spoilt,
                verified=each.verified or uri in prefix.verified,
                pinned=each.pinned or uri in prefix.spared,
            )
            for uri, each in sorted(known.items())
        )
        return replace(prefix.view, checkpoints=checkpoints, evidence_problem=prefix.evidence_problem)

    def prune(self, run: RunKey, uris: tuple[str, ...]) -> None:
        """Delete these checkpoints in the background."""
        prefix = self._prefixes.get(run)
        if prefix is not None and prefix.catalog is not None and run not in self._pruning:
            self._pruning[run] = asyncio.create_task(self._prune(run, prefix, prefix.catalog, uris))

    def sweep(self, run: RunKey, attempt: int) -> None:
        """Delete leftovers in the background."""
        prefix = self._prefixes.get(run)
        if prefix is not None and prefix.catalog is not None and run not in self._sweeping:
            self._sweeping[run] = asyncio.create_task(self._sweep(run, prefix.catalog, attempt))

    def keep(self, run: RunKey, key: str, raw: bytes) -> None:
        """Write an incident's dossier in the background: a recovery waits for nothing here."""
        prefix = self._prefixes.get(run)
        if prefix is not None:
            task = asyncio.create_task(self._keep(run, prefix, key, raw))
            self._keeping.add(task)
            task.add_done_callback(self._keeping.discard)

    def forget(self, run: RunKey) -> None:
        """The run is gone; its checkpoints stay."""
        prefix = self._prefixes.pop(run, None)
        for task in (prefix.task, prefix.completing) if prefix is not None else ():
            if task is not None:
                task.cancel()

    def _hear(self, prefix: _Prefix, status: RunStatus, agent: AgentView, now: float) -> None:
        """What one agent reports about checkpoints of the current attempt."""
        beat = agent.heartbeat
        if beat is None:
            return
        prefix.spoilt.update(beat.quarantined)
        if beat.restored is not None and beat.restored.uri:
            prefix.verified.add(beat.restored.uri)
        # Also of the one before a launch: its last words count.
        current = status.attempt_of_line
        if beat.save is not None and beat.save.committed is not None and beat.attempt == current:
            ref = beat.save.committed
            at = now - beat.save.committed_age_seconds
            prefix.reported.setdefault(ref.uri, _reported(prefix.owner.uid, ref, status, at))

    async def _list(self, run: RunKey, prefix: _Prefix, status: RunStatus) -> None:
        prefix.pruned.clear()
        prefix.spared.clear()
        try:
            if prefix.catalog is None:
                prefix.catalog = await self._open(run, prefix)
            view = await self._in_thread(prefix.catalog.view, prefix.owner, partial(_enough, prefix.owner.uid, status))
        except _BadSecret as error:
            view = replace(prefix.view, problem=str(error), problem_reason=error.reason)
        except (ApiError, StoreError) as error:
            reason = error.reason if isinstance(error, StoreError) else type(error).__name__
            view = replace(prefix.view, problem=str(error), problem_reason=reason)
        prefix.view = view
        if view.problem:
            self._try_later(prefix)
        else:
            found = tuple(each for each in view.checkpoints if each.ref.uri not in prefix.pruned)
            prefix.view = replace(view, checkpoints=found, listed_for=status.attempt, listed_beside=status.replacing)
            listed = {each.ref.uri for each in found}
            prefix.reported = {uri: each for uri, each in prefix.reported.items() if uri not in listed}
            if view.partial and not prefix.older and prefix.completing is None:
                prefix.completing = asyncio.create_task(self._complete(run, prefix, prefix.catalog))

    async def _complete(self, run: RunKey, prefix: _Prefix, catalog: Catalog | None) -> None:
        """List what is older than a partial view, for retention: it may take minutes, so no launch waits for it."""
        try:
            found = await self._in_thread(catalog.checkpoints) if catalog else ()
            prefix.older = {each.ref.uri: each for each in found if each.ref.uri not in prefix.pruned}
        except StoreError as error:
            log.warning("run %s: its older checkpoints could not be listed: %s", "/".join(run), error)
        finally:
            prefix.completing = None
        self._on_news(run)

    def _listed(self, run: RunKey, prefix: _Prefix, listing: asyncio.Task[None]) -> None:
        """A listing has ended. A mistake of ours is shown as what is wrong with the store: it must not stay unheard."""
        prefix.task = None
        if listing.cancelled():
            return
        if error := listing.exception():
            log.error("run %s: its checkpoints could not be listed", "/".join(run), exc_info=error)
            prefix.view = replace(prefix.view, problem=f"unexpected: {error!r}", problem_reason="InternalError")
            self._try_later(prefix)
        self._on_news(run)

    def _try_later(self, prefix: _Prefix) -> None:
        prefix.catalog = None  # its credentials may be what is wrong, and may have changed
        prefix.retry_at = asyncio.get_running_loop().time() + RETRY_SECONDS

    async def _prune(self, run: RunKey, prefix: _Prefix, catalog: Catalog, uris: tuple[str, ...]) -> None:
        try:
            spared = await self._in_thread(catalog.prune, uris)
        except StoreError as error:
            log.warning("run %s: retention could not delete: %s", "/".join(run), error)
        else:
            gone = set(uris) - set(spared)
            prefix.spared |= set(spared)
            prefix.pruned |= gone
            left = tuple(each for each in prefix.view.checkpoints if each.ref.uri not in gone)
            prefix.view = replace(prefix.view, checkpoints=left)
            prefix.reported = {uri: each for uri, each in prefix.reported.items() if uri not in gone}
            prefix.older = {uri: each for uri, each in prefix.older.items() if uri not in gone}
        finally:
            self._pruning.pop(run, None)

    async def _sweep(self, run: RunKey, catalog: Catalog, attempt: int) -> None:
        try:
            gone = await self._in_thread(catalog.sweep, attempt)
        except StoreError as error:
            log.warning("run %s: leftovers could not be deleted: %s", "/".join(run), error)
        else:
            if gone:
                log.info("run %s: deleted leftovers: %s", "/".join(run), ", ".join(gone))
        finally:
            self._sweeping.pop(run, None)

    async def _keep(self, run: RunKey, prefix: _Prefix, key: str, raw: bytes) -> None:
        try:
            if prefix.catalog is None:
                prefix.catalog = await self._open(run, prefix)
            await self._in_thread(prefix.catalog.keep_dossier, key, raw)
        except (ApiError, StoreError, _BadSecret) as error:
            log.warning("run %s: evidence could not be kept: %s", "/".join(run), error)
            prefix.evidence_problem = f"{key}: {error}"
        else:
            prefix.evidence_problem = ""
        self._on_news(run)

    async def _open(self, run: RunKey, prefix: _Prefix) -> Catalog:
        environment = await self._credentials(run, prefix.rules.credentials_secret)
        key = await self._signing_key(run, prefix.rules.signing_secret)
        return await self._in_thread(_open, prefix.rules, environment, key)

    async def _in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    async def _credentials(self, run: RunKey, name: str | None) -> dict[str, str]:
        """The Secret that the spec names, as environment; none means what AWS tools find in the controller's own."""
        return await self._secret(run, "credentialsSecret", name, CREDENTIALS) if name is not None else {}

    async def _signing_key(self, run: RunKey, name: str | None) -> bytes | None:
        """The key that the run's manifests are signed with; None if they are not to be."""
        if name is None:
            return None
        found = await self._secret(run, "signingSecret", name, (SIGNING_SECRET_KEY,))
        try:
            return signing_key(found.get(SIGNING_SECRET_KEY, "").encode(), "/".join(run))
        except ValueError as error:
            where = f"spec.checkpoint.signingSecret: key {SIGNING_SECRET_KEY} of Secret {name!r}"
            raise _BadSecret(f"{where}: {error}", "NoSigningKey") from error

    async def _secret(self, run: RunKey, field: str, name: str, keys: Iterable[str]) -> dict[str, str]:
        try:
            return decoded(await self._client.get(SECRETS, run[0], name), keys)
        except NotFound as error:
            message = f"spec.checkpoint.{field}: there is no Secret {name!r} in namespace {run[0]}"
            raise _BadSecret(message, "SecretNotFound") from error


class _BadSecret(Exception):
    """A Secret that the spec names is not there, or does not hold what it should."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def _enough(uid: str, status: RunStatus, found: Sequence[StoredCheckpoint]) -> bool:
    """Whether a launch needs to know of no older checkpoints."""
    return len(found) >= LISTED_AT_LEAST and len(candidates(uid, status, found)) >= MAX_CANDIDATES


def _place(rules: Checkpointing) -> tuple[str, str | None, str | None, str | None]:
    """Where a prefix is and how one gets there: if that changes, everything has to be found out anew."""
    return rules.uri, rules.endpoint, rules.credentials_secret, rules.signing_secret


def _open(rules: Checkpointing, environment: Mapping[str, str], key: bytes | None) -> Catalog:
    """The catalog of a prefix, once everything that mend needs of the store has been tried on it."""
    credentials = Credentials(
        access_key_id=environment.get("AWS_ACCESS_KEY_ID"),
        secret_access_key=environment.get("AWS_SECRET_ACCESS_KEY"),
        session_token=environment.get("AWS_SESSION_TOKEN"),
        region=environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION"),
        authority=environment.get(AUTHORITY_SECRET_KEY),
    )
    endpoint = rules.endpoint or environment.get("AWS_ENDPOINT_URL")
    store = open_store(rules.uri, endpoint, credentials, deadline_seconds=DEADLINE_SECONDS)
    return Catalog(store, caution="" if store.probe().conditional_writes else NO_CONDITIONAL_WRITES, key=key)


def _reported(uid: str, ref: CheckpointRef, status: RunStatus, at: float) -> StoredCheckpoint:
    return StoredCheckpoint(ref=ref, run_uid=uid, lineage=status.lineage, committed_at=at)
