"""A rank that starts processes which try to outlive it: one in a session of its own, one orphan that ends at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

runaway = subprocess.Popen(["sleep", "3600"], start_new_session=True)
child = os.fork()
if child == 0:
    if os.fork():
        os._exit(0)
    os._exit(0)  # its parent is gone, so the agent has to bury it
os.waitpid(child, 0)
Path(sys.argv[1]).write_text(f"{runaway.pid}\n")
time.sleep(3600)
