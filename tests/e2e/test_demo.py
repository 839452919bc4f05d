"""`mend demo` as a user runs it: its promises, its files, and nothing left behind however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PNG = b"\x89PNG\r\n\x1a\n"


def demo(folder: Path, steps: int) -> subprocess.Popen[str]:
    """The demonstration, with its state and results below `folder`."""
    program = Path(sys.executable).parent / "mend"
    return subprocess.Popen(
        [str(program), "demo", "--folder", str(folder / "results"), "--steps", str(steps)],
        env={**os.environ, "XDG_STATE_HOME": str(folder / "state")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def left_behind(folder: Path) -> list[str]:
    """Command lines of processes that have to do with this demonstration."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            known = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in known and int(process.name) != os.getpid():
            found.append((process / "cmdline").read_text().replace("\0", " "))
    return found


@pytest.mark.timeout(300)
def test_the_demo_keeps_its_promises(tmp_path: Path) -> None:
    """Both faults are noticed and rightly blamed, the run finishes, and nothing was lost, bit for bit."""
    running = demo(tmp_path, steps=40)
    output, _ = running.communicate(timeout=240)
    assert running.returncode == 0, output
    facts = json.loads((tmp_path / "results" / "summary.json").read_text())
    assert [(each["kind"], each["injected_rank"], each["culprit_ranks"]) for each in facts["incidents"]] == [
        ("crashed", 2, [2]),
        ("hung", 1, [1]),
    ]
    assert (facts["attempts"], facts["final_step"], facts["bit_exact"]) == (3, 39, True)
    assert (tmp_path / "results" / "run.png").read_bytes().startswith(PNG)
    assert "Nothing was lost" in output
    assert not left_behind(tmp_path)


@pytest.mark.timeout(180)
def test_an_impatient_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    """Ctrl-C in the midst of training, and again while it ends: every process is gone when the command is."""
    running = demo(tmp_path, steps=1000)
    assert running.stdout is not None
    for line in running.stdout:
        if "unbroken: Running" in line:
            break
    running.send_signal(signal.SIGINT)
    time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGINT, output
    assert "Traceback" not in output
    assert not left_behind(tmp_path)
