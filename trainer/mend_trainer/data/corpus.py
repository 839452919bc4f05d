"""The text that a run trains on, as a sorted list of files: by default the sources of Python's standard library."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import xxhash

STANDARD_LIBRARY: Final = "stdlib"
_NOT_SOURCES: Final = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


class NoText(ValueError):
    """There is nothing to train on where the configuration points."""


@dataclass(frozen=True, slots=True)
class Document:
    """One file of text; `name` is its path below the corpus, the same on every machine."""

    name: str
    path: str

    def read(self) -> bytes:
        """The whole file."""
        return Path(self.path).read_bytes()


def find_documents(source: str) -> tuple[Document, ...]:
    """The files of `source`, sorted by name: "stdlib", one text file, or a folder (all but its hidden files)."""
    if source == STANDARD_LIBRARY:
        root = Path(sysconfig.get_path("stdlib"))
        found = tuple(_below(root, suffix=".py"))
    elif (root := Path(source)).is_dir():
        found = tuple(_below(root))
    elif root.is_file():
        found = (Document(root.name, str(root)),)
    else:
        raise NoText(f"data.text: {source!r} is neither 'stdlib' nor an existing file or folder of text")
    if not found:
        raise NoText(f"data.text: no files below {root}; name a folder that holds text, or 'stdlib'")
    return tuple(sorted(found, key=lambda document: document.name))


def fingerprint(documents: Iterable[Document]) -> str:
    """Digest of names, sizes and times of the files: says cheaply whether this machine has packed them before."""
    seen = xxhash.xxh3_128()
    for document in documents:
        facts = os.stat(document.path)  # noqa: PTH116 - no Path is made here, see _below
        seen.update(f"{document.name}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
    return seen.hexdigest()


def _below(root: Path, suffix: str = "") -> Iterator[Document]:
    """Every start of a rank comes through here, so paths are plain text: `Path` costs ten times as much."""
    skipped = len(str(root)) + 1
    for folder, subfolders, files in os.walk(root):
        # Pruned while walking: the base interpreter's site-packages may hold a hundred thousand files.
        subfolders[:] = [name for name in subfolders if name not in _NOT_SOURCES and not name.startswith(".")]
        for name in files:
            if name.endswith(suffix) and not name.startswith("."):
                path = f"{folder}{os.sep}{name}"
                yield Document(path[skipped:].replace(os.sep, "/"), path)
