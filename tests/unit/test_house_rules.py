"""The rules of the house that no other tool watches: what lies where, and that the documents keep their word."""

from __future__ import annotations

import operator
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLAIN_FOLDERS = ("operator", "trainer")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("folder", PLAIN_FOLDERS)
def test_no_module_lies_directly_in(folder: str) -> None:
    """A module or an __init__.py there would put a second `operator`, or a `trainer`, on everybody's path."""
    assert sorted(path.name for path in (ROOT / folder).iterdir() if path.suffix in {".py", ".pyi", ".so"}) == []


def test_operator_is_the_standard_librarys() -> None:
    """The folder of that name never shadows the module, not even for a program started in the repository's root."""
    standard = Path(sysconfig.get_path("stdlib")).resolve()
    assert Path(operator.__file__).resolve().parent == standard
    told = subprocess.run(
        [sys.executable, "-c", "import operator; print(operator.__file__)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(told.stdout.strip()).resolve().parent == standard


def test_imports_point_down() -> None:
    """import-linter finds a layer for every module, and no import that climbs."""
    program = Path(sys.executable).with_name("lint-imports")
    linted = subprocess.run([program, "--no-logo", "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert linted.returncode == 0, linted.stdout + linted.stderr


def contracts() -> dict[str, dict[str, Any]]:
    """The contracts of import-linter by the first words of their names."""
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return {" ".join(each["name"].split()[:3]): each for each in found}


def layers() -> list[set[str]]:
    """The layers, highest first."""
    return [set(layer.split(" | ")) for layer in contracts()["imports point down"]["layers"]]


def test_the_architecture_shows_the_layers_that_are_checked() -> None:
    """The layers in docs/architecture.md are those of pyproject.toml, in their order."""
    block = (ROOT / "docs/architecture.md").read_text().split("## Layers")[1].split("```")[1]
    shown = [set(re.split(r"  +", line)[0].split(", ")) for line in block.strip().splitlines()]
    assert shown == layers()


def test_everything_from_the_decision_down_is_held_pure() -> None:
    """No module of the core escapes the contract that keeps clocks, sockets and files out of it."""
    heart = next(place for place, layer in enumerate(layers()) if "decide" in layer)
    core = {f"mend.{name}" for layer in layers()[heart:] for name in layer}
    assert core - set(contracts()["the pure core"]["source_modules"]) == set()


def test_the_pod_side_is_kept_from_the_whole_controller() -> None:
    """What the pod side may import is a short list; every other module of the controller is forbidden by name."""
    wire = {"protocol", "heartbeats", "orders", "evidence", "reports"}
    words = {"states", "names", "environment", "exitcodes", "keys"}
    shared = wire | words | {"manifest", "store", "verify", "backoff", "lines", "lostpeers"}
    others = {f"mend.{name}" for layer in layers() for name in layer - shared}
    assert others - set(contracts()["the pod side"]["forbidden_modules"]) == set()


def modules() -> set[str]:
    """The modules directly in `mend`, its layers."""
    folder = ROOT / "operator/mend"
    return {
        path.stem for path in folder.iterdir() if path.stem != "__init__" and (path.suffix == ".py" or path.is_dir())
    } - {"__pycache__"}


def test_every_word_of_the_vocabulary_is_used() -> None:
    """A word that the code no longer uses is a word to forget."""
    table = re.findall(r"^\| ([^|]+?) \|", (ROOT / "docs/vocabulary.md").read_text(), re.M)
    words = [word for row in table for word in re.split(r" / |, ", row) if row not in {"word", "---"}]
    assert len(words) > 20
    sources = [path for folder in ("operator", "trainer", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    text = "\n".join(path.read_text().lower() for path in sources).replace("_", " ").replace("-", " ")
    assert [word for word in words if word.lower().replace("-", " ") not in text] == []


def test_the_readme_begins_with_the_two_commands() -> None:
    """Whoever arrives is told first how to see it work and how to check it."""
    readme = (ROOT / "README.md").read_text()
    commands = [line.strip() for block in re.findall(r"```\w*\n(.*?)```", readme, re.S) for line in block.splitlines()]
    assert [line.split("#")[0].strip() for line in commands if line][:2] == ["make demo", "make test"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_in_documents_lead_somewhere(document: Path) -> None:
    """Every link to a file names one that is there, and every link to a section one that it has."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, section = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        if not path.exists() or (section and section not in sections(path)):
            broken.append(target)
    assert broken == []


def sections(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_make_targets_in_documents_exist() -> None:
    """No document sends its reader to a target that is not there."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {name for path in DOCUMENTS for name in re.findall(r"`make (\w+)`", path.read_text())}
    assert named - targets == set()


def test_decisions_are_numbered_once() -> None:
    """Each page of docs/decisions has a number of its own."""
    numbers = [path.name[:4] for path in (ROOT / "docs/decisions").glob("*.md")]
    assert all(number.isdecimal() for number in numbers)
    assert len(numbers) == len(set(numbers))


@pytest.mark.parametrize(("pip", "python", "built"), [(0, 0, True), (0, 1, True), (1, 0, False)])
def test_a_trainer_image_without_its_packages_is_never_built(
    tmp_path: Path, pip: int, python: int, built: bool
) -> None:
    """A failed installation fails the build; a file that cannot be compiled does not: some package always has one."""
    recipe = (ROOT / "Dockerfile.trainer").read_text().replace("\\\n", "")
    commands = [line.removeprefix("RUN ") for line in recipe.splitlines() if line.startswith("RUN ")]
    for program, code in (("pip", pip), ("python", python)):
        (tmp_path / program).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / program).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TORCH": "torch"}
    ended = [subprocess.run(["/bin/sh", "-c", command], env=env, check=False).returncode for command in commands]
    assert len(ended) == 1
    assert (ended == [0]) is built


@pytest.mark.parametrize("module", sorted(modules()))
def test_every_module_states_its_purpose(module: str) -> None:
    """The first line of a module or package is one sentence about it."""
    path = ROOT / "operator/mend" / module
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    assert re.match(r'"""[A-Z`].*[.:]', source), f"{module} begins with no sentence"
