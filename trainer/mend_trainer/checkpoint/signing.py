"""The key that a run's manifests are signed with, as the pod was given it."""

from __future__ import annotations

import os

from mend.environment import ENV_SIGNING_KEY
from mend.manifest import signing_key


def key_of(run: str) -> bytes | None:
    """The key of `run`; None if manifests are not to be signed. Raises ValueError for one that could be guessed."""
    secret = os.environ.get(ENV_SIGNING_KEY, "")
    return signing_key(secret.encode(), run) if secret else None
