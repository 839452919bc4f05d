"""`mend checkpoint`: what a run has saved, whether it is sound, what is kept for good, and what the run trusts.

From anywhere with credentials for the store: a bucket can be looked at when the cluster is gone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
from msgspec.structs import replace

from mend.ancestry import chain_doubts, gone_ancestors, is_stale
from mend.catalog import Catalog
from mend.environment import ENV_SIGNING_KEY
from mend.keys import MANIFEST_NAME, PINNED_NAME, parse_folder
from mend.listing import StoredCheckpoint
from mend.manifest import Manifest, UnreadableManifest, decode_manifest, encode_manifest
from mend.restore import is_on_lineage, on_lineage
from mend.store import Forbidden, NotFound
from mend.verify import Verification, leave_note, verify
from mend.whereabouts import Refused, Whereabouts, add_which, chosen, command, find, folder_of, the_one
from mend.wishing import add_now


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
    add_now(commands)


# ---------------------------------------------------------------- list
def _list(options: argparse.Namespace) -> int:
    from rich.console import Console

    where = find(options)
    catalog = Catalog(where.store, key=where.key)
    there = catalog.checkpoints()
    line = {each.ref.uri for each in on_lineage(where.uid, where.status, there)}
    started = {(link.attempt, link.step) for link in where.status.lineage[-1:]}
    table = _table(
        ("STEP", "right"), ("ATTEMPT", "right"), ("AGE", "right"), ("SIZE", "right"), "VERIFIED", "PINNED", ""
    )
    shown = chosen(where, there, None, every=True) if where.folder else there
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
        print(f"mend: {where.store.uri}: there is no committed checkpoint", file=sys.stderr)
    return 0


# ---------------------------------------------------------------- verify
def _verify(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markup import escape

    where = find(options)
    there = Catalog(where.store).checkpoints()
    asked = chosen(where, there, options.step, every=options.all)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    table = _table(("STEP", "right"), ("ATTEMPT", "right"), "OBJECT", ("SIZE", "right"), "STATE", "DETAIL")
    bad = 0
    with _bar(sum(each.bytes for each in asked)) as told:
        for checkpoint in asked:
            found, remarks = _verified(where, there, checkpoint, told)
            bad += not found.is_sound
            _settle(where, checkpoint, found, quarantine=options.quarantine)
            for row in _rows(found, checkpoint, remarks, each_object=len(asked) == 1):
                table.add_row(*map(escape, row))
    console.print(table)
    print(f"{len(asked) - bad} of {len(asked)} checkpoints are sound", file=sys.stderr)
    if bad and not options.quarantine:
        print("mend: --quarantine marks those that are damaged, so that no run restores them", file=sys.stderr)
    return 1 if bad else 0


def _verified(
    where: Whereabouts, there: Sequence[StoredCheckpoint], checkpoint: StoredCheckpoint, told: Callable[[int], None]
) -> tuple[Verification, list[str]]:
    """What reading it back has shown, with what its kin say against it; and what is merely to be known."""
    found = verify(where.store, folder_of(where, checkpoint), where.key, told)
    remarks = ["it is in quarantine"] if checkpoint.quarantined else []
    if found.manifest is None:
        return found, remarks
    links = {(link.attempt, link.step) for link in found.manifest.lineage}
    kin = list(_manifests(where, [each for each in there if (each.ref.attempt, each.ref.step) in links]))
    doubts = list(chain_doubts(found.manifest, kin))
    before = _before(checkpoint, there)
    for parent in _manifests(where, [before] if before else []):
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


def _manifests(where: Whereabouts, checkpoints: Sequence[StoredCheckpoint]) -> Iterator[Manifest]:
    """As far as they can be read; what is wrong with one shows when it is verified itself."""
    for each in checkpoints:
        try:
            yield decode_manifest(where.store.get(f"{folder_of(where, each)}/{MANIFEST_NAME}"), where.key)
        except (UnreadableManifest, NotFound):
            continue


def _settle(where: Whereabouts, checkpoint: StoredCheckpoint, found: Verification, *, quarantine: bool) -> None:
    try:
        leave_note(where.store, folder_of(where, checkpoint), found, time.time(), quarantine=quarantine)
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
    where = find(options)
    one = the_one(where, options)
    note = {"reason": options.reason, "pinned_unix_seconds": time.time()}
    where.store.put(f"{folder_of(where, one)}/{PINNED_NAME}", msgspec.json.encode(note))
    print(f"{one.ref.uri} is pinned")
    return 0


def _unpin(options: argparse.Namespace) -> int:
    where = find(options)
    one = the_one(where, options)
    where.store.delete([f"{folder_of(where, one)}/{PINNED_NAME}"])
    print(f"{one.ref.uri} is left to retention")
    return 0


def _sign(options: argparse.Namespace) -> int:
    """Signs only what was read back and is sound: a signature says that the run may rely on it."""
    where = find(options)
    if where.key is None:
        raise Refused(f"what to sign with is missing: give --signing-key FILE, or set {ENV_SIGNING_KEY}")
    asked = chosen(where, Catalog(where.store).checkpoints(), options.step, every=options.all)
    refused = 0
    with _bar(sum(each.bytes for each in asked)) as told:
        for each in asked:
            folder = folder_of(where, each)
            found = verify(where.store, folder, None, told)
            if not found.is_sound or found.manifest is None or each.quarantined:
                refused += 1
                why = "; ".join(found.problems) or "it is in quarantine"
                print(f"mend: step {each.ref.step} of attempt {each.ref.attempt} is not signed: {why}", file=sys.stderr)
                continue
            manifest = replace(found.manifest, save_id=parse_folder(folder).save_id)
            where.store.put(f"{folder}/{MANIFEST_NAME}", encode_manifest(manifest, where.key))
            print(f"{each.ref.uri} is signed")
    return 1 if refused else 0


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
