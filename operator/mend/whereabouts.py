"""Which checkpoints a command is about: its words on the command line, and what they name in store and cluster."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mend.apply import TRAINING_RUNS
from mend.catalog import Catalog
from mend.crstatus import UnreadableStatus, from_resource
from mend.environment import ENV_SIGNING_KEY
from mend.keys import SAVE_FOLDER
from mend.kube.client import KubeClient
from mend.kube.errors import ApiError
from mend.listing import StoredCheckpoint
from mend.manifest import signing_key
from mend.ownership import Owner, PrefixOwned, owner_of
from mend.restore import on_lineage
from mend.status import RunStatus
from mend.store import Store, StoreError, open_store

STORE_SECONDS: Final = 15.0
_CHECKPOINT: Final = re.compile(rf"(?P<prefix>.+)/(?P<folder>{SAVE_FOLDER})/?")


class Refused(Exception):
    """Something the user can put right; the message says how."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Whereabouts:
    """Where the checkpoints are that a command is about, and what is known of their run."""

    store: Store
    uid: str
    status: RunStatus
    folder: str = ""  # of the one checkpoint that was named; "": the whole prefix
    key: bytes | None = None


# ---------------------------------------------------------------- words
def command(commands: Any, name: str, text: str, work: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    """Add a command that is about checkpoints, and how they are read, to these subparsers."""
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
    add_cluster(sub)
    sub.set_defaults(run=lambda options: told(work, options))
    return sub


def add_which(sub: argparse.ArgumentParser, default: str) -> None:
    """The option that chooses one of several."""
    sub.add_argument("--step", type=int, metavar="N", help=f"of the checkpoint ({default})")


def add_cluster(sub: argparse.ArgumentParser) -> None:
    """The options that say where a TrainingRun is."""
    sub.add_argument("-n", "--namespace", default="default", help="of the TrainingRun (default: %(default)s)")
    sub.add_argument("--kubeconfig", help="default: as kubectl")


def told(work: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """The exit code; what the user can put right is told in one line."""
    try:
        return work(options)
    except (Refused, StoreError, ApiError, UnreadableStatus) as error:
        print(f"mend: {error}", file=sys.stderr)
        return 1


# ---------------------------------------------------------------- finding
def find(options: argparse.Namespace) -> Whereabouts:
    """Where these words lead; raises `Refused`, or what the cluster or the store have to say."""
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
    return Whereabouts(store=store, uid=uid, status=status, folder=one["folder"] if one else "", key=key)


async def _get_run(options: argparse.Namespace) -> dict[str, Any]:
    client = await KubeClient.discover(options.kubeconfig)
    try:
        return await client.get(TRAINING_RUNS, options.namespace, options.source)
    finally:
        await client.close()


def _owner(store: Store) -> Owner | None:
    try:
        return owner_of(store)
    except PrefixOwned:  # by something that is not mend
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


def chosen(
    where: Whereabouts, there: Sequence[StoredCheckpoint], step: int | None, *, every: bool
) -> list[StoredCheckpoint]:
    """What a command is about: the one that was named, all, those of a step, or the newest on the lineage."""
    if where.folder:
        uri = f"{where.store.uri}/{where.folder}"
        able = [each for each in there if each.ref.uri == uri]
        if not able:
            raise Refused(f"{uri}: there is no committed checkpoint")
        return able
    line = on_lineage(where.uid, where.status, there)
    able = list(there) if every else list(line[:1])
    if step is not None:
        able = [each for each in there if each.ref.step == step]
        able = [each for each in able if each in line] or able
    if not able:
        steps = ", ".join(str(each.ref.step) for each in line) or "none"
        asked = "a checkpoint" if step is None else f"a checkpoint of step {step}"
        raise Refused(f"{where.store.uri}: there is no {asked.removeprefix('a ')}; on the lineage are: {steps}")
    return able


def the_one(where: Whereabouts, options: argparse.Namespace) -> StoredCheckpoint:
    """The one checkpoint that a command is about; raises `Refused` if there are several."""
    able = chosen(where, Catalog(where.store).checkpoints(), options.step, every=False)
    if len(able) > 1:
        raise Refused("there are several of that step; name one: " + ", ".join(each.ref.uri for each in able))
    return able[0]


def folder_of(where: Whereabouts, checkpoint: StoredCheckpoint) -> str:
    """Relative to the store's prefix."""
    return checkpoint.ref.uri.removeprefix(f"{where.store.uri}/")
