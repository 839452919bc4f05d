"""A saver's dealings with other workers: it serves what is here, keeps the copies that come, and sends its own."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Final

from mend_trainer.checkpoint.arena import Arena, Snapshot
from mend_trainer.copies.credentials import Credentials
from mend_trainer.copies.sender import Sender
from mend_trainer.copies.server import SnapshotServer
from mend_trainer.copies.shelf import ArenaShelf
from mend_trainer.podmemory import PodMemory, pod_memory
from mend_trainer.savers import Guide

_RESERVE: Final = 0.05  # of the pod's limit, left to ranks and kernel


class Exchange:
    """Of one worker. `listener` is the agent's as well, so that its place is known before a saver is, and stays."""

    def __init__(
        self,
        own: Sequence[Arena],
        copies: Sequence[Arena],
        listener: socket.socket,
        credentials: Credentials,
        run_uid: str = "",
    ) -> None:
        self.news = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # readable once a copy has come
        self._copies = tuple(copies)
        self._guide = Guide()
        self._offered: dict[int, int] = {}  # by rank, which sequence
        shelf = ArenaShelf(
            own,
            copies,
            run_uid=run_uid,
            room_for=lambda more: refusal(more, pod_memory()),
            on_copy=lambda: os.eventfd_write(self.news, 1),
        )
        self._server = SnapshotServer(listener, credentials.tls, credentials.token, shelf)
        self._sender = Sender(credentials.tls, credentials.token)

    @property
    def copies(self) -> list[Snapshot]:
        """Those that are whole."""
        return [snapshot for arena in self._copies for snapshot in arena.snapshots()]

    def follow(self, guide: Guide) -> None:
        """Copies go to that buddy from now on; one that is new to it gets the newest at once."""
        if guide == self._guide:
            return
        if guide.buddy != self._guide.buddy:
            self._offered.clear()
        self._guide = guide
        self._sender.follow(guide.buddy, guide.bytes_per_second)

    def offer(self, newest: Snapshot) -> None:
        """The newest snapshot of a rank, digested; offering it again changes nothing."""
        rank = newest.header.rank
        if not self._guide.buddy:
            newest.mark_copied()
        elif self._offered.get(rank) != newest.sequence:
            self._offered[rank] = newest.sequence
            self._sender.offer(newest)

    def hear(self) -> None:
        """The news have been seen."""
        os.eventfd_read(self.news)


def refusal(more: int, pod: PodMemory) -> str:
    """Why so many bytes more had better not be taken for copies; "" if they may."""
    free = pod.free_bytes
    if free is None or more <= (left := max(0, free - int(pod.limit_bytes * _RESERVE))):
        return ""
    limit = pod.limit_bytes >> 20
    return (
        f"copies would take {more >> 20}Mi more, and {left >> 20}Mi are left of the limit of {limit}Mi; "
        "raise resources.limits.memory of container trainer, or set spec.checkpoint.memory.peers to false"
    )
