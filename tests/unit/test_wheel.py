"""What is packaged: outside a checkout, `mend local` finds its CRD and its permissions in the wheel."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WHERE_FROM = """
import json
from mend_local.bootstrap import crd_files, permission_files
print(json.dumps([[str(path) for path in files] for files in (crd_files(), permission_files())]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what an installation of the wheel holds; without a build backend, by pyproject.toml."""
    folder = tmp_path_factory.mktemp("installed")
    if importlib.util.find_spec("hatchling") is not None:
        build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist")]
        subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
        (wheel,) = (folder / "dist").glob("mend-*.whl")
        zipfile.ZipFile(wheel).extractall(folder)
        return folder
    said = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for package in said["packages"]:
        shutil.copytree(ROOT / package, folder / Path(package).name)
    for source, place in said["force-include"].items():
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copyfile
        copy(ROOT / source, folder / place)
    return folder


def test_the_wheel_has_what_mend_local_installs(installed: Path) -> None:
    """CRD and RBAC are found beside the package, far from any checkout, and are those of the chart."""
    told = subprocess.run(
        [sys.executable, "-c", WHERE_FROM],
        cwd=installed,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    definitions, permissions = ([Path(path) for path in files] for files in json.loads(told.stdout))
    assert all(path.is_relative_to(installed) for path in (*definitions, *permissions))
    wanted = sorted((ROOT / "charts/mend/crds").glob("*.yaml"))
    assert [(path.name, path.read_bytes()) for path in definitions] == [(p.name, p.read_bytes()) for p in wanted]
    assert [path.read_bytes() for path in permissions] == [(ROOT / "manifests/rbac.yaml").read_bytes()]


def test_the_wheel_has_every_file_of_the_packages(installed: Path) -> None:
    """Modules and the data that they open: nothing stays behind in the checkout."""
    homes = (ROOT / "operator", ROOT / "trainer")
    files = [(home, path) for home in homes for path in home.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert [str(path) for home, path in files if not (installed / path.relative_to(home)).is_file()] == []
