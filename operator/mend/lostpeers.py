"""Pure: what a healthy rank raises when a peer dies: a symptom, never the cause. Rank and controller agree on it."""

from __future__ import annotations

from typing import Final

ALWAYS: Final = frozenset({"DistBackendError", "DistNetworkError", "DistStoreError", "BrokenPipeError"})
BY_ITS_WORDS: Final = frozenset({"RuntimeError", "ConnectionError", "ConnectionResetError", "TimeoutError"})
WORDS: Final = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "timed out waiting",
    "nccl error",
    "ncclremoteerror",
    "socket timeout",
    "failed to connect",
    "gloo connectfullmesh failed",
)


def is_of_a_lost_peer(kind: str, message: str) -> bool:
    """Whether an exception of this type (its bare name) with this message is such a one."""
    text = message.lower()
    return kind in ALWAYS or (kind in BY_ITS_WORDS and any(words in text for words in WORDS))
