"""Says what a main program can see of how it was started, and lets a spawned process do the same."""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path


def double(number: int) -> int:
    """Runs in a process that imports this file again."""
    return 2 * number


if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        doubled = pool.apply(double, (21,))
    here = str(Path(__file__).resolve().parent)
    facts = {"argv": sys.argv[1:], "name": Path(sys.argv[0]).name, "first": sys.path[0] == here, "doubled": doubled}
    print(json.dumps(facts))
