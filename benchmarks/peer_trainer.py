"""The reference trainer as a peer runs it: the same loop, model and checkpoints, plus what that peer wants to be told.

    torchrun ... peer_trainer.py torchrun --set ...     nothing more
    ft_launcher ... peer_trainer.py nvrx --set ...      a heartbeat after every step, by NVRx's client

What it imports, and so how long it takes to start, is the same for both.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import marks

from mend_trainer import train


def _watched(session: type) -> type:
    """A session that also tells NVRx's rank monitor of every step, as its guide asks."""
    from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient

    class Watched(session):  # type: ignore[misc, valid-type]
        def __enter__(self) -> Any:
            entered = super().__enter__()
            self._client = RankMonitorClient()
            self._client.init_workload_monitoring()
            self._client.send_heartbeat()
            return entered

        def completed(self, *args: Any, **more: Any) -> None:
            super().completed(*args, **more)
            self._client.send_heartbeat()

    return Watched


def main(peer: str, arguments: list[str]) -> None:
    """Say which process is which rank, then train."""
    print(f"rank {os.environ['RANK']} has pid {os.getpid()}", flush=True)
    marks.watch(train)
    if peer == "nvrx":
        train.Session = _watched(train.Session)  # type: ignore[misc]
    train.main(arguments)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
