"""What the command after `mend-agent --` is: Python, which a warm process can run, or any other program."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

_HARMLESS_OPTIONS: Final = frozenset({"-u"})  # a rank's output is line-buffered anyway


class Script(msgspec.Struct, frozen=True, kw_only=True, tag="script"):
    """`python PATH ARGS`."""

    path: str
    arguments: tuple[str, ...] = ()


class Module(msgspec.Struct, frozen=True, kw_only=True, tag="module"):
    """`python -m NAME ARGS`."""

    name: str
    arguments: tuple[str, ...] = ()


class Program(msgspec.Struct, frozen=True, kw_only=True, tag="program"):
    """Anything else: started cold, by exec."""

    argv: tuple[str, ...]


Command = Script | Module | Program


def understand(argv: Sequence[str]) -> Command:
    """What `argv` asks for. Python means *this* Python: another interpreter has other packages."""
    program = Program(argv=tuple(argv))
    found = shutil.which(argv[0])
    if found is None:
        return program
    if _is_this_python(Path(found)):
        return _python_command(argv[1:]) or program
    if _is_script_of_this_python(Path(found)):
        return Script(path=found, arguments=tuple(argv[1:]))
    return program


def _python_command(words: Sequence[str]) -> Script | Module | None:
    rest = list(words)
    while rest and rest[0] in _HARMLESS_OPTIONS:
        rest.pop(0)
    match rest:
        case ["-m", name, *arguments]:
            return Module(name=name, arguments=tuple(arguments))
        case [path, *arguments] if not path.startswith("-"):
            return Script(path=path, arguments=tuple(arguments))
        case _:
            return None  # -c, -, -X...: rare, and to be obeyed exactly, so leave them to Python itself


def _is_this_python(found: Path) -> bool:
    """Compared by folder and never by link target: the Pythons of two venvs are links to the same file."""
    return found.name.startswith("python") and _same_folder(found, Path(sys.executable))


def _is_script_of_this_python(found: Path) -> bool:
    """Such as the console scripts that pip writes: `#!/path/of/this/python`."""
    try:
        with found.open("rb") as file:
            first = file.readline(256)
    except OSError:
        return False
    words = first.removeprefix(b"#!").split() if first.startswith(b"#!") else []
    return len(words) == 1 and _is_this_python(Path(os.fsdecode(words[0])))


def _same_folder(one: Path, other: Path) -> bool:
    try:
        return one.parent.samefile(other.parent)
    except OSError:
        return False
