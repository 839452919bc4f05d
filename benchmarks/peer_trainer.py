"""The reference trainer as a peer runs it: the same loop, model and checkpoints, plus what that peer wants to be told.

torchrun ... peer_trainer.py torchrun --set ...     nothing more
ft_launcher ... peer_trainer.py nvrx --set ...      a heartbeat after every step, by NVRx's client
"""

from __future__ import annotations

import os
import sys
from typing import Any

from mend_trainer import train
from mend_trainer.session import Session


class _Watched(Session[Any]):
    """A session that also tells NVRx's rank monitor of every step, as its guide asks."""

    def __enter__(self) -> _Watched:
        from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient

        super().__enter__()
        self._client = RankMonitorClient()
        self._client.init_workload_monitoring()
        self._client.send_heartbeat()
        return self

    def completed(self, loss: Any = None, tokens: int = 0) -> None:
        super().completed(loss, tokens)
        self._client.send_heartbeat()


def main(peer: str, arguments: list[str]) -> None:
    """Say which process is which rank, then train."""
    print(f"rank {os.environ['RANK']} has pid {os.getpid()}", flush=True)
    if peer == "nvrx":
        train.Session = _Watched  # type: ignore[misc]
    train.main(arguments)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
