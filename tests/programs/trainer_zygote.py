"""Imports the trainer once and forks a rank for each JSON line on stdin: {"argv": [...], "env": {...}, "folder": ""}.

A rank runs `mend-train argv`, or the script argv[0] if that ends in .py. Its folder receives log, reports (what it
would write to the agent's pipe, as a file that a SIGKILL leaves intact) and, if it lives to say so, its exit code.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

import mend_trainer.train
from mend_trainer.warm import IMPORTS


def live(argv: list[str], env: dict[str, str], folder: Path) -> int:
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    reports = os.open(folder / "reports", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.environ.update(env | {"MEND_REPORT_FD": str(reports)})
    try:
        if argv and argv[0].endswith(".py"):
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
        else:
            mend_trainer.train.main(argv)
    except SystemExit as leave:
        return int(leave.code or 0)
    except BaseException:  # noqa: BLE001 - as the interpreter would do
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps: tests watch their ranks by pidfd
    for name in (*IMPORTS, "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            folder = Path(order["folder"])
            code = live(order["argv"], order["env"], folder)
            sys.stdout.flush()
            (folder / "exit").write_text(str(code))
            sys.exit(code)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
