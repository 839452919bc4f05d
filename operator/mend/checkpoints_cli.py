"""`mend checkpoint`: what a run has saved, whether it is sound, what is kept for good, and a save right now.

From anywhere with credentials for the store: a bucket can be looked at when the cluster is gone.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from mend.ancestry import chain_doubts, gone_ancestors, is_stale
from mend.apply import TRAINING_RUNS
from mend.catalog import Catalog, Owner
from mend.crstatus import UnreadableStatus, from_resource
from mend.kube.client import KubeClient
from mend.kube.errors import ApiError
from mend.manifest import Manifest, UnreadableManifest, decode_manifest, encode_manifest, signing_key
from mend.model import RunStatus, StoredCheckpoint, WishState
from mend.protocol import ANNOTATION_SAVE_NOW, ENV_SIGNING_KEY, MANIFEST_NAME, OWNER_KEY, PINNED_NAME, SAVE_FOLDER
from mend.restore import is_on_lineage, on_lineage
from mend.store import Forbidden, NotFound, Store, StoreError, open_store
from mend.verify import Verification, leave_note, verify

STORE_SECONDS: Final = 15.0
POLL_SECONDS: Final = 0.5
_CHECKPOINT: Final = re.compile(rf"(?P<prefix>.+)/(?P<folder>{SAVE_FOLDER})/?")


class Refused(Exception):
    """Something the user can put right; the message says how."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the checkpoints are that a command is about, and what is known of their run."""

    store: Store
    uid: str
    status: RunStatus
    folder: str = ""  # of the one checkpoint that was named; "": the whole prefix
    key: bytes | None = None


# ---------------------------------------------------------------- words
def add_life(commands: Any) -> None:
    """Add these commands to the subparsers of `mend checkpoint`."""
    sub = command(commands, "list", "what there is: age, size, verified, pinned, on the lineage or not", _list)
    sub = command(
        commands, "verify", "read checkpoints back to the last byte; exit code 1 if one is not sound", _verify
    )
    add_which(sub, "default: the newest on the lineage")
    sub.add_argument("--all", action="store_true", help="all that lie under the prefix")
    sub.add_argument("--quarantine", action="store_true", help="mark those that are damaged: they are never restored")
    sub = command(commands, "pin", "keep a checkpoint for good, whatever retention says", _pin)
    add_which(sub, "default: the newest on the lineage")
    sub.add_argument("--reason", default="", metavar="TEXT", help="kept with it, for whoever wonders")
    sub = command(commands, "unpin", "leave a checkpoint to retention again", _unpin)
    add_which(sub, "default: the newest on the lineage")
    sub = command(
        commands, "sign", "read checkpoints back and sign their manifests, so that the run restores them", _sign
    )
    add_which(sub, "default: the newest on the lineage")
    sub.add_argument("--all", action="store_true", help="all that lie under the prefix")
    sub = commands.add_parser("now", help="ask a run for a checkpoint at the end of its step")
    sub.add_argument("source", metavar="RUN", help="name of a TrainingRun")
    sub.add_argument("--wait", action="store_true", help="until it is committed")
    sub.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="of --wait (default: %(default)g)")
    _add_cluster(sub)
    sub.set_defaults(run=lambda options: _told(_now, options))


def command(commands: Any, name: str, text: str, work: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    sub: argparse.ArgumentParser = commands.add_parser(name, help=text)
    sub.add_argument("source", metavar="URI|RUN", help="a run's prefix, one of its checkpoints, or a TrainingRun")
    sub.add_argument("--endpoint", metavar="URL", help="of the object store (default: the run's, else as AWS tools)")
    sub.add_argument(
        "--signing-key",
        type=Path,
        metavar="FILE",
        help=f"key of the run's signingSecret (default: {ENV_SIGNING_KEY} in the environment, else none)",
    )
    sub.add_argument(
        "--run-name", metavar="NAMESPACE/NAME", help="whom the key signs for (default: whose prefix it is)"
    )
    _add_cluster(sub)
    sub.set_defaults(run=lambda options: _told(work, options))
    return sub


def add_which(sub: argparse.ArgumentParser, default: str) -> None:
    sub.add_argument("--step", type=int, metavar="N", help=f"of the checkpoint ({default})")


def _add_cluster(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("-n", "--namespace", default="default", help="of the TrainingRun (default: %(default)s)")
    sub.add_argument("--kubeconfig", help="default: as kubectl")


def _told(work: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    try:
        return work(options)
    except (Refused, StoreError, ApiError, UnreadableStatus) as error:
        print(f"mend: {error}", file=sys.stderr)
        return 1


# ---------------------------------------------------------------- finding
def find(options: argparse.Namespace) -> Place:
    uri, endpoint, uid, status, run = options.source.rstrip("/"), options.endpoint, "", RunStatus(), ""
    if "://" not in options.source:
        found = asyncio.run(_get_run(options))
        plan = found["spec"].get("checkpoint", {})
        uri, endpoint = plan.get("uri", "").rstrip("/"), endpoint or plan.get("endpoint")
        uid, status = found["metadata"]["uid"], from_resource(found.get("status"))
        run = f"{options.namespace}/{options.source}"
    one = _CHECKPOINT.fullmatch(uri)
    try:
        store = open_store(one["prefix"] if one else uri, endpoint, deadline_seconds=STORE_SECONDS)
    except ValueError as error:
        raise Refused(str(error)) from error
    owner = _owner(store)
    if not uid and owner is not None:
        uid = owner.uid
    key = _key(options, options.run_name or run or (f"{owner.namespace}/{owner.name}" if owner else ""))
    return Place(store=store, uid=uid, status=status, folder=one["folder"] if one else "", key=key)


async def _get_run(options: argparse.Namespace) -> dict[str, Any]:
    client = await KubeClient.discover(options.kubeconfig)
    try:
        return await client.get(TRAINING_RUNS, options.namespace, options.source)
    finally:
        await client.close()


def _owner(store: Store) -> Owner | None:
    try:
        return msgspec.json.decode(store.get(OWNER_KEY), type=Owner)
    except (NotFound, msgspec.MsgspecError):
        return None


def _key(options: argparse.Namespace, run: str) -> bytes | None:
    secret = os.environ.get(ENV_SIGNING_KEY, "").encode()
    where = ENV_SIGNING_KEY
    if options.signing_key is not None:
        where = f"--signing-key {options.signing_key}"
        try:
            secret = options.signing_key.read_bytes()
        except OSError as error:
            raise Refused(f"{where}: {error.strerror}") from error
    if not secret:
        return None
    if not run:
        raise Refused("whose signatures these are is not known: the prefix has no owner; name the run by --run-name")
    try:
        return signing_key(secret, run)
    except ValueError as error:
        raise Refused(f"{where}: {error}") from error


def chosen(place: Place, there: Sequence[StoredCheckpoint], step: int | None, *, every: bool) -> list[StoredCheckpoint]:
    """What a command is about: the one that was named, all, those of a step, or the newest on the lineage."""
    if place.folder:
        uri = f"{place.store.uri}/{place.folder}"
        able = [each for each in there if each.ref.uri == uri]
        if not able:
            raise Refused(f"{uri}: there is no committed checkpoint")
        return able
    line = on_lineage(place.uid, place.status, there)
    able = list(there) if every else list(line[:1])
    if step is not None:
        able = [each for each in there if each.ref.step == step]
        able = [each for each in able if each in line] or able
    if not able:
        steps = ", ".join(str(each.ref.step) for each in line) or "none"
        asked = "a checkpoint" if step is None else f"a checkpoint of step {step}"
        raise Refused(f"{place.store.uri}: there is no {asked.removeprefix('a ')}; on the lineage are: {steps}")
    return able


def the_one(place: Place, options: argparse.Namespace) -> StoredCheckpoint:
    able = chosen(place, Catalog(place.store).checkpoints(), options.step, every=False)
    if len(able) > 1:
        raise Refused("there are several of that step; name one: " + ", ".join(each.ref.uri for each in able))
    return able[0]


def folder_of(place: Place, checkpoint: StoredCheckpoint) -> str:
    return checkpoint.ref.uri.removeprefix(f"{place.store.uri}/")


# ---------------------------------------------------------------- list
def _list(options: argparse.Namespace) -> int:
    from rich.console import Console

    place = find(options)
    catalog = Catalog(place.store, key=place.key)
    there = catalog.checkpoints()
    line = {each.ref.uri for each in on_lineage(place.uid, place.status, there)}
    started = {(link.attempt, link.step) for link in place.status.lineage[-1:]}
    table = _table(
        ("STEP", "right"), ("ATTEMPT", "right"), ("AGE", "right"), ("SIZE", "right"), "VERIFIED", "PINNED", ""
    )
    shown = chosen(place, there, None, every=True) if place.folder else there
    for each in reversed(shown):
        notes = ["quarantined"] if each.quarantined else [] if each.ref.uri in line else ["off the lineage"]
        notes += ["the present attempt started here"] if (each.ref.attempt, each.ref.step) in started else []
        table.add_row(
            str(each.ref.step),
            str(each.ref.attempt),
            _age(time.time() - each.committed_at) if each.committed_at else "-",
            _size(each.bytes) if each.bytes else "-",
            "yes" if each.verified else "-",
            "yes" if each.pinned else "-",
            ", ".join(notes),
        )
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)
    if catalog.passed_over:
        print(f"mend: {catalog.passed_over}", file=sys.stderr)
    if not there:
        print(f"mend: {place.store.uri}: there is no committed checkpoint", file=sys.stderr)
    return 0


# ---------------------------------------------------------------- verify
def _verify(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markup import escape

    place = find(options)
    there = Catalog(place.store).checkpoints()
    asked = chosen(place, there, options.step, every=options.all)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    table = _table(("STEP", "right"), ("ATTEMPT", "right"), "OBJECT", ("SIZE", "right"), "STATE", "DETAIL")
    bad = 0
    with _bar(sum(each.bytes for each in asked)) as told:
        for checkpoint in asked:
            found, remarks = _verified(place, there, checkpoint, told)
            bad += not found.is_sound
            _settle(place, checkpoint, found, quarantine=options.quarantine)
            for row in _rows(found, checkpoint, remarks, each_object=len(asked) == 1):
                table.add_row(*map(escape, row))
    console.print(table)
    print(f"{len(asked) - bad} of {len(asked)} checkpoints are sound", file=sys.stderr)
    if bad and not options.quarantine:
        print("mend: --quarantine marks those that are damaged, so that no run restores them", file=sys.stderr)
    return 1 if bad else 0


def _verified(
    place: Place, there: Sequence[StoredCheckpoint], checkpoint: StoredCheckpoint, told: Callable[[int], None]
) -> tuple[Verification, list[str]]:
    """What reading it back has shown, with what its kin say against it; and what is merely to be known."""
    found = verify(place.store, folder_of(place, checkpoint), place.key, told)
    remarks = ["it is in quarantine"] if checkpoint.quarantined else []
    if found.manifest is None:
        return found, remarks
    links = {(link.attempt, link.step) for link in found.manifest.lineage}
    kin = list(_manifests(place, [each for each in there if (each.ref.attempt, each.ref.step) in links]))
    doubts = list(chain_doubts(found.manifest, kin))
    before = _before(checkpoint, there)
    for parent in _manifests(place, [before] if before else []):
        if is_stale(found.manifest, parent):
            doubts.append(f"its model is byte for byte that of step {parent.step}: a buffer was saved twice")
    gone = gone_ancestors(found.manifest, kin)
    remarks += [f"of {len(found.manifest.lineage)} ancestors {len(gone)} are gone"] if gone else []
    return replace(found, doubts=(*found.doubts, *doubts)), remarks


def _before(checkpoint: StoredCheckpoint, there: Sequence[StoredCheckpoint]) -> StoredCheckpoint | None:
    """The newest checkpoint that this one's run had passed through before it."""
    own = checkpoint.run_uid, checkpoint.ref.attempt, checkpoint.lineage
    line = [each for each in there if is_on_lineage(each, *own) and each.ref.step < checkpoint.ref.step]
    return max((each for each in line if not each.quarantined), key=lambda each: each.ref.step, default=None)


def _manifests(place: Place, checkpoints: Sequence[StoredCheckpoint]) -> Iterator[Manifest]:
    """As far as they can be read; what is wrong with one shows when it is verified itself."""
    for each in checkpoints:
        try:
            yield decode_manifest(place.store.get(f"{folder_of(place, each)}/{MANIFEST_NAME}"), place.key)
        except (UnreadableManifest, NotFound):
            continue


def _settle(place: Place, checkpoint: StoredCheckpoint, found: Verification, *, quarantine: bool) -> None:
    try:
        leave_note(place.store, folder_of(place, checkpoint), found, time.time(), quarantine=quarantine)
    except Forbidden as error:  # one may be allowed to read only
        print(f"mend: step {checkpoint.ref.step}: the result is not noted in the store: {error}", file=sys.stderr)


def _rows(
    found: Verification, checkpoint: StoredCheckpoint, remarks: Sequence[str], *, each_object: bool
) -> Iterator[tuple[str, ...]]:
    names = str(checkpoint.ref.step), str(checkpoint.ref.attempt)
    whole = "sound" if found.is_sound else "DAMAGED" if found.is_damaged else "DOUBTFUL"
    said = "; ".join((*found.damage, *found.doubts, *remarks))
    yield (*names, "(whole)", _size(found.bytes), whole, said)
    for each in found.objects:
        if each_object or each.is_bad:
            unproven = f"{each.unproven_bytes} bytes around tensors were never digested" if each.unproven_bytes else ""
            yield (*names, each.key, _size(each.bytes), each.state, each.detail or unproven)


# ---------------------------------------------------------------- pin, sign
def _pin(options: argparse.Namespace) -> int:
    place = find(options)
    one = the_one(place, options)
    note = {"reason": options.reason, "pinned_unix_seconds": time.time()}
    place.store.put(f"{folder_of(place, one)}/{PINNED_NAME}", msgspec.json.encode(note))
    print(f"{one.ref.uri} is pinned")
    return 0


def _unpin(options: argparse.Namespace) -> int:
    place = find(options)
    one = the_one(place, options)
    place.store.delete([f"{folder_of(place, one)}/{PINNED_NAME}"])
    print(f"{one.ref.uri} is left to retention")
    return 0


def _sign(options: argparse.Namespace) -> int:
    """Signs only what was read back and is sound: a signature says that the run may rely on it."""
    place = find(options)
    if place.key is None:
        raise Refused(f"what to sign with is missing: give --signing-key FILE, or set {ENV_SIGNING_KEY}")
    asked = chosen(place, Catalog(place.store).checkpoints(), options.step, every=options.all)
    refused = 0
    with _bar(sum(each.bytes for each in asked)) as told:
        for each in asked:
            folder = folder_of(place, each)
            found = verify(place.store, folder, None, told)
            if not found.is_sound or found.manifest is None or each.quarantined:
                refused += 1
                why = "; ".join(found.problems) or "it is in quarantine"
                print(f"mend: step {each.ref.step} of attempt {each.ref.attempt} is not signed: {why}", file=sys.stderr)
                continue
            manifest = replace(found.manifest, save_id=folder.partition("/")[2].partition("-")[2])
            place.store.put(f"{folder}/{MANIFEST_NAME}", encode_manifest(manifest, place.key))
            print(f"{each.ref.uri} is signed")
    return 1 if refused else 0


# ---------------------------------------------------------------- now
def _now(options: argparse.Namespace) -> int:
    return asyncio.run(_ask_for_save(options))


async def _ask_for_save(options: argparse.Namespace) -> int:
    if "/" in options.source:
        raise Refused(f"{options.source!r}: expected the name of a TrainingRun; only a run can be asked for a save")
    client = await KubeClient.discover(options.kubeconfig)
    try:
        wish = uuid.uuid4().hex
        run = await client.get(TRAINING_RUNS, options.namespace, options.source)
        status = from_resource(run.get("status"))
        if status.phase.is_final:
            raise Refused(f"{options.namespace}/{options.source} has {status.phase.lower()}: nothing trains any more")
        body = {"metadata": {"annotations": {ANNOTATION_SAVE_NOW: wish}}}
        await client.merge_patch(TRAINING_RUNS, options.namespace, options.source, body)
        if not options.wait:
            print(f"asked for a checkpoint (wish {wish}); the run is {status.phase} at step {status.step}")
            return 0
        return await _follow(client, options, wish, status.step)
    finally:
        await client.close()


async def _follow(client: KubeClient, options: argparse.Namespace, wish: str, asked_step: int) -> int:
    """Until the wish is answered; 1 if nothing comes of it.

    What became of it is not seen where the interval has asked meanwhile: then the step of the checkpoint tells.
    """
    give_up_at = time.monotonic() + options.timeout
    with _spinner() as say:
        while time.monotonic() < give_up_at:
            run = await client.get(TRAINING_RUNS, options.namespace, options.source)
            status = from_resource(run.get("status"))
            known = status.wish if status.wish is not None and status.wish.id == wish else None
            newer = status.checkpoint is not None and status.checkpoint.step >= asked_step
            answered = known is not None and (newer if known.by_interval else known.state is WishState.ANSWERED)
            if answered and status.checkpoint:
                print(f"{status.checkpoint.uri}: step {status.checkpoint.step} is committed")
                return 0
            if known is not None and known.state is WishState.GIVEN_UP:
                raise Refused(f"asked {known.times} times, and no checkpoint was committed: {_why_not(status)}")
            if status.phase.is_final:
                raise Refused(f"the run has {status.phase.lower()} meanwhile")
            asked = f"asked at step {known.step}" if known and known.times else f"waiting for the run, {status.phase}"
            say(f"{asked}, now at step {status.step}")
            await asyncio.sleep(POLL_SECONDS)
    raise Refused(f"no checkpoint within {options.timeout:g} s; the wish stands: mend describe {options.source}")


def _why_not(status: RunStatus) -> str:
    ready = next((each for each in status.conditions if each.type == "StorageReady"), None)
    return ready.message if ready is not None and ready.status != "True" else "see the logs of the worker of rank 0"


# ---------------------------------------------------------------- showing
def _table(*headings: str | tuple[str, str]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        name, justify = (heading, "left") if isinstance(heading, str) else heading
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    return table


@contextmanager
def _bar(total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on the terminal; nothing where there is none."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("reading", total=total_bytes)
        yield lambda read_bytes: progress.update(task, advance=read_bytes)


@contextmanager
def _spinner() -> Iterator[Callable[[str], None]]:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("asking")
        yield lambda text: progress.update(task, description=text)


def _age(seconds: float) -> str:
    from mend.show import age

    return age(seconds)


def _size(count: int) -> str:
    """Bytes as people read them."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
