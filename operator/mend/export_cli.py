"""`mend checkpoint export`: finds the checkpoint, and has the trainer's side write it as `transformers` reads it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from mend.whereabouts import Refused, add_which, command, find, folder_of, the_one

_DTYPES: Final = ("float32", "bfloat16", "float16")


def add_export(commands: Any) -> None:
    """Add the command to the subparsers of `mend checkpoint`."""
    sub = command(commands, "export", "write a checkpoint as a folder that transformers loads", run_export)
    add_which(sub, "default: the newest on the lineage")
    sub.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="it must not exist, or be empty")
    sub.add_argument("--dtype", choices=_DTYPES, help="of the weights (default: as they were saved)")
    sub.add_argument("--config", type=Path, metavar="FILE", help="config.json to use instead of the checkpoint's own")
    sub.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="files to use instead of the checkpoint's own")


def run_export(options: argparse.Namespace) -> int:
    """Its exit code; raises `Refused`."""
    try:
        from mend_trainer.export import CannotExport, Wanted, export
    except ImportError as error:
        raise Refused(f"an export needs the trainer's packages ({error}): pip install 'mend[trainer]'") from error
    where = find(options)
    checkpoint = the_one(where, options)
    if checkpoint.quarantined:
        raise Refused(f"{checkpoint.ref.uri}: it is in quarantine; choose another by --step")
    wanted = Wanted(
        folder=folder_of(where, checkpoint),
        target=options.to,
        key=where.key,
        dtype=options.dtype,
        config=options.config,
        tokenizer=options.tokenizer,
    )
    try:
        manifest = export(where.store, wanted)
    except CannotExport as error:
        raise Refused(str(error)) from error
    print(f"{options.to}: step {manifest.step} of attempt {manifest.attempt}, {manifest.tokens} tokens seen")
    return 0
