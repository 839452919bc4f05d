"""`mend checkpoint export`: finds the checkpoint, and has the trainer's side write it as `transformers` reads it."""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from pathlib import Path
from typing import Any, Final

from mend.apply import TRAINING_RUNS
from mend.catalog import Catalog
from mend.crstatus import UnreadableStatus, from_resource
from mend.kube.client import KubeClient
from mend.kube.errors import ApiError
from mend.model import RunStatus, StoredCheckpoint
from mend.restore import on_lineage
from mend.store import Store, StoreError, open_store

_STORE_SECONDS: Final = 15.0
_DTYPES: Final = ("float32", "bfloat16", "float16")
_CHECKPOINT: Final = re.compile(r"(.+)/(step-\d{12}/\d{6,}-[^/]+)/?")


class _Refused(Exception):
    """Something the user can put right; the message says how."""


def add_export(commands: Any) -> None:
    """Add the command to the subparsers of `mend checkpoint`."""
    sub = commands.add_parser("export", help="write a checkpoint as a folder that transformers loads")
    sub.add_argument("source", metavar="URI|RUN", help="a run's prefix, one of its checkpoints, or a TrainingRun")
    sub.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="it must not exist, or be empty")
    sub.add_argument("--step", type=int, metavar="N", help="of the checkpoint (default: the newest)")
    sub.add_argument("--dtype", choices=_DTYPES, help="of the weights (default: as they were saved)")
    sub.add_argument("--config", type=Path, metavar="FILE", help="config.json to use instead of the checkpoint's own")
    sub.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="files to use instead of the checkpoint's own")
    sub.add_argument("--endpoint", metavar="URL", help="of the object store (default: the run's, else as AWS tools)")
    sub.add_argument("-n", "--namespace", default="default", help="of the TrainingRun (default: %(default)s)")
    sub.add_argument("--kubeconfig", help="default: as kubectl")
    sub.set_defaults(run=run_export)


def run_export(options: argparse.Namespace) -> int:
    """Its exit code."""
    try:
        from mend_trainer.export import CannotExport, Wanted, export
    except ImportError as error:
        print(f"mend: an export needs the trainer's packages ({error}): pip install 'mend[trainer]'", file=sys.stderr)
        return 1
    try:
        store, folder = _find(options)
        manifest = export(
            store,
            Wanted(
                folder=folder,
                target=options.to,
                dtype=options.dtype,
                config=options.config,
                tokenizer=options.tokenizer,
            ),
        )
    except (_Refused, CannotExport, StoreError, ApiError, UnreadableStatus) as error:
        print(f"mend: {error}", file=sys.stderr)
        return 1
    print(f"{options.to}: step {manifest.step} of attempt {manifest.attempt}, {manifest.tokens} tokens seen")
    return 0


def _find(options: argparse.Namespace) -> tuple[Store, str]:
    """The store at the run's prefix, and the checkpoint's folder in it."""
    uri, uid, status, endpoint = options.source.rstrip("/"), "", RunStatus(), options.endpoint
    if "://" not in uri:
        run = asyncio.run(_get_run(options))
        plan = run["spec"].get("checkpoint", {})
        uri, uid, status = plan.get("uri", ""), run["metadata"]["uid"], from_resource(run.get("status"))
        endpoint = endpoint or plan.get("endpoint")
    one = _CHECKPOINT.fullmatch(uri)
    try:
        store = open_store(one[1] if one else uri.rstrip("/"), endpoint, deadline_seconds=_STORE_SECONDS)
    except ValueError as error:
        raise _Refused(str(error)) from error
    chosen = choose(Catalog(store).checkpoints(), uid, status, f"{store.uri}/{one[2]}" if one else "", options.step)
    return store, chosen.ref.uri.removeprefix(f"{store.uri}/")


async def _get_run(options: argparse.Namespace) -> dict[str, Any]:
    client = await KubeClient.discover(options.kubeconfig)
    try:
        return await client.get(TRAINING_RUNS, options.namespace, options.source)
    finally:
        await client.close()


def choose(
    there: tuple[StoredCheckpoint, ...], uid: str, status: RunStatus, uri: str, step: int | None
) -> StoredCheckpoint:
    """The newest on the run's line, the one of that step, or the one at that address wherever it lies."""
    if uri:
        able = tuple(each for each in there if each.ref.uri == uri and not each.quarantined)
        able = tuple(each for each in able if step in (None, each.ref.step))
    else:
        line = on_lineage(uid, status, there)
        able = tuple(each for each in line if step in (None, each.ref.step))
    if able:
        return able[0]
    steps = ", ".join(dict.fromkeys(str(each.ref.step) for each in on_lineage(uid, status, there))) or "none"
    asked = uri or (f"--step {step}" if step is not None else "the newest checkpoint")
    spoilt = "; it is in quarantine" if any(each.quarantined and uri == each.ref.uri for each in there) else ""
    raise _Refused(f"{asked}: there is no such checkpoint on the run's line{spoilt}; there are those of steps: {steps}")
