"""What a standby has made ready for the rank that it will become: it is taken at most once, in the same process.

A program says what that is in a function `mend_warm(arguments)` of its main module, which mend calls in each standby.
"""

from __future__ import annotations

from typing import Any, Final

_shelf: Final[dict[Any, Any]] = {}  # of this process, like everything that imports have made ready


def put_ready(key: Any, thing: Any) -> None:
    """Keep `thing` for whoever asks for exactly this key."""
    _shelf[key] = thing


def take_ready(key: Any) -> Any | None:
    """What was made ready under this key, once; None if nothing was."""
    return _shelf.pop(key, None)
