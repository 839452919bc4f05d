"""The traps of the proxy that lies."""

from __future__ import annotations

import pytest

from lying_proxy import Trap


def test_what_goes_wrong_in_a_trap_is_told_to_who_waits_for_it() -> None:
    """It is done once, in the thread of a request; nobody takes a fault that did not happen for one that did."""
    calls = []

    def act() -> None:
        calls.append(1)
        raise OSError("the page is gone")

    trap = Trap(lambda method, path: method == "PUT", 1, act, after=False)
    trap.come_by("PUT", "/first", after=False)
    assert not trap.sprung.is_set()
    with pytest.raises(OSError, match="the page is gone"):
        trap.come_by("PUT", "/second", after=False)
    with pytest.raises(OSError, match="the page is gone"):
        trap.spring()
    assert calls == [1]
