"""What a rank's process does around the user's program, tried on the cold start alone: the warm one runs the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from mend.environment import ENV_PAGE, ENV_REPORT_FD, ENV_STACKS
from mend.heartbeats import Phase, RankError
from mend.reports import Raised, decode_report
from mend_trainer.progress import PageReader, create_page
from mend_trainer.rank import ENV_AGENT_PID

PROGRAMS = Path(__file__).parents[1] / "programs"


class Ended:
    """A rank that has ended: its code, what it printed and reported, and its page."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self._page = folder / "page"
        create_page(self._page)
        read, write = os.pipe()
        try:
            done = subprocess.run(
                [sys.executable, "-m", "mend_trainer.rank", *command],
                env={
                    **os.environ,
                    ENV_AGENT_PID: str(os.getpid()),
                    ENV_PAGE: str(self._page),
                    ENV_REPORT_FD: str(write),
                    ENV_STACKS: str(folder / "stacks"),
                },
                cwd=folder,
                pass_fds=[write],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=120,
            )
        finally:
            os.close(write)
        with os.fdopen(read, "rb") as pipe:
            self.reports = [decode_report(line) for line in pipe]
        self.code = done.returncode
        self.output = done.stdout

    @property
    def error(self) -> RankError:
        """The one exception that it reported."""
        (report,) = self.reports
        assert isinstance(report, Raised)
        return report.error

    @property
    def phase(self) -> Phase:
        """The last one on its page."""
        return PageReader(self._page).read().phase


def a_script(folder: Path, text: str) -> list[str]:
    """The command that runs this text as a script."""
    (folder / "script.py").write_text(text)
    return [sys.executable, str(folder / "script.py")]


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (["no-such-command"], 127, "mend-agent: no-such-command: no such command"),
        (["/etc/hostname"], 126, "mend-agent: /etc/hostname: cannot be executed"),
        ([sys.executable, "no_such_script.py"], 2, "can't open file 'no_such_script.py'"),
        ([sys.executable, "-m", "no_such_module"], 1, "No module named"),
        ([sys.executable, "-c", "exit(9)"], 9, ""),
        (["sh", "-c", "kill -11 $$"], -11, ""),
    ],
)
def test_codes_are_those_of_a_shell_and_of_python(tmp_path: Path, command: list[str], code: int, words: str) -> None:
    """What cannot be run says why in its last line, and exits as it would without mend."""
    ended = Ended(command, tmp_path)
    assert ended.code == code
    assert words in ended.output


@pytest.mark.parametrize(
    ("statement", "code", "printed"),
    [
        ("pass", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('no data')", 1, "no data\n"),
        ("os._exit(5)", 5, ""),
    ],
)
def test_leaving_is_no_error(tmp_path: Path, statement: str, code: int, printed: str) -> None:
    """sys.exit with all it accepts keeps its meaning, and nothing is reported as raised."""
    ended = Ended(a_script(tmp_path, f"import os, sys\n{statement}\n"), tmp_path)
    assert (ended.code, ended.output, ended.reports) == (code, printed, [])


def test_an_exception_is_reported_and_printed_from_the_users_frame_on(tmp_path: Path) -> None:
    """The report holds type, message and traceback, chained causes included, without a frame of mend's."""
    text = "def step():\n    raise KeyError('x')\n"
    text += "try:\n    step()\nexcept KeyError as error:\n    raise ValueError('y') from error\n"
    ended = Ended(a_script(tmp_path, text), tmp_path)
    assert ended.code == 1
    assert (ended.error.type, ended.error.message, ended.error.fatal) == ("ValueError", "y", False)
    for told in (ended.error.traceback, ended.output):
        assert "KeyError: 'x'" in told
        assert "in step" in told
        assert "mend_trainer" not in told
        assert "runpy" not in told


def test_a_long_traceback_keeps_its_end(tmp_path: Path) -> None:
    """8 KiB are enough for what happened last."""
    ended = Ended(a_script(tmp_path, "raise ValueError('a' * 100_000 + 'the end')\n"), tmp_path)
    assert len(ended.error.traceback) == 8192
    assert ended.error.traceback.rstrip().endswith("the end")
    assert len(ended.error.message) == 8192


def test_a_rank_that_ends_says_so_on_its_page(tmp_path: Path) -> None:
    """Teardown can hang too: the page shows that it has begun, here as seen by an exit handler."""
    text = (
        "import atexit, os, pathlib\nfrom mend_trainer.progress import PageReader\n"
        "read = PageReader(pathlib.Path(os.environ['MEND_PAGE'])).read\n"
        "print(read().phase)\natexit.register(lambda: print(read().phase))\n"
    )
    assert Ended(a_script(tmp_path, text), tmp_path).output == "starting\nexiting\n"


def test_main_sees_what_python_would_show_it(tmp_path: Path) -> None:
    """argv, the import path and processes started by `spawn` are as without mend."""
    script = PROGRAMS / "what_main_sees.py"
    ended = Ended([sys.executable, "-u", str(script), "--lr", "1"], tmp_path)
    plain = subprocess.run([sys.executable, str(script), "--lr", "1"], capture_output=True, text=True, timeout=120)
    assert json.loads(ended.output) == json.loads(plain.stdout)
    assert json.loads(plain.stdout)["doubled"] == 42


def test_a_module_runs_as_main(tmp_path: Path) -> None:
    """`python -m` finds the module in the current directory, with its own arguments."""
    (tmp_path / "trainer_of_a_user.py").write_text("import sys\nprint(__name__, sys.argv[1:])\n")
    ended = Ended([sys.executable, "-m", "trainer_of_a_user", "-m", "x"], tmp_path)
    assert (ended.code, ended.output) == (0, "__main__ ['-m', 'x']\n")
