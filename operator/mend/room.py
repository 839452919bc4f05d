"""Keeps a folder of journals below its bound: the oldest files go, those of runs that are gone first."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

# What else lies in the folder is somebody else's, and is neither counted nor touched.
OURS = re.compile(r"(?P<stem>.+)\.(journal|curve)(?P<older>\.1|\.before)?\.jsonl")


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    stem: str  # of its run
    is_older: bool  # nothing is written to it any more
    bytes: int
    changed_at: float


def make_room(folder: Path, most_bytes: int, is_living: Callable[[str], bool]) -> tuple[Path, ...]:
    """Removes files until those in `folder` have no more than `most_bytes`; says which.

    `is_living` is asked, by the stem of its files, whether a run is still there. Of such runs, what nothing is
    written to any more goes before the rest. Raises OSError where the folder cannot be read or changed.
    """
    files = list(_files(folder))
    surplus = sum(each.bytes for each in files) - most_bytes
    removed = []
    for each in sorted(files, key=lambda each: (is_living(each.stem), not each.is_older, each.changed_at)):
        if surplus <= 0:
            break
        each.path.unlink(missing_ok=True)
        surplus -= each.bytes
        removed.append(each.path)
    if removed:
        log.warning("journals have no more room in %s: removed %s", folder, ", ".join(path.name for path in removed))
    return tuple(removed)


def _files(folder: Path) -> Iterator[_File]:
    for path in folder.iterdir():
        if known := OURS.fullmatch(path.name):
            facts = path.lstat()
            yield _File(path, known["stem"], known["older"] is not None, facts.st_size, facts.st_mtime)
