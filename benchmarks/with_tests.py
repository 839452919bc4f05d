"""Finds what the tests use: importing this puts tests/ on the path, so that benchmarks inject the same faults."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
if str(TESTS) not in sys.path:
    sys.path.append(str(TESTS))


def build_gil_holder(folder: Path) -> Path | None:
    """A C library whose only function holds the GIL for ever; None without a C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None
    library = folder / "gil_holder.so"
    source = TESTS / "programs" / "gil_holder.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return library
