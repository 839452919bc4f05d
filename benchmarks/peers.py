"""Where the peers live: a virtual environment of its own for each, made on demand, so that nobody's is touched.

They see the packages of the environment that runs this (torch above all) through a path file; what they bring of their
own comes first. A peer that cannot be had costs its column and nothing else.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".cache" / "peers"
INSTALL_SECONDS = 900.0


class PeerUnavailable(Exception):
    """The peer cannot be installed here; the message is why, in a few words."""


@dataclass(frozen=True, slots=True)
class Package:
    """What to install. `alone` leaves out dependencies: some would bring another torch, with gigabytes of CUDA."""

    name: str
    requirements: Sequence[str]
    alone: bool = False


# The newest version of NVRx that installs from wheels and starts beside torch 2.13 without CUDA.
NVRX = Package(
    "nvrx",
    ("nvidia-resiliency-ext==0.4.1", "defusedxml", "nvidia-ml-py", "pynvml", "packaging", "psutil", "pyyaml"),
    alone=True,
)
RAY = Package("ray", ("ray[train]==2.60.0",))


def python_of(package: Package) -> Path:
    """The interpreter of this peer's environment, made first if need be. Raises `PeerUnavailable`."""
    home = FOLDER / package.name
    mark = home / f".ready-{_digest(package)}"
    if not mark.exists():
        shutil.rmtree(home, ignore_errors=True)
        _run("make its environment", [sys.executable, "-m", "venv", str(home)])
        pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run("install it", [*pip, *(["--no-deps"] if package.alone else []), *package.requirements])
        mark.touch()
    (site,) = home.glob("lib/python*/site-packages")
    (site / "project.pth").write_text("\n".join(_own_paths()) + "\n", encoding="utf-8")
    return home / "bin" / "python"


def _own_paths() -> list[str]:
    """Folders this interpreter imports from beside the standard library: spelt out, since path files do not nest."""
    packages = [path for path in sys.path if path.endswith("site-packages")]
    return [str(ROOT / "operator"), str(ROOT / "trainer"), *packages]


def _digest(package: Package) -> str:
    told = repr((tuple(package.requirements), package.alone, sys.version_info[:2]))
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def _run(what: str, command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerUnavailable(f"could not {what}: {type(error).__name__}") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise PeerUnavailable(f"could not {what}: {said[0][:80] if said else f'exit code {done.returncode}'}")
