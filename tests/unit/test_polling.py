"""Descriptors that are waited for."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator

import pytest

from mend_trainer.polling import is_writable, readable

HIGH = 1500


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """A process that may open more than a thousand."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard <= HIGH:
        pytest.skip(f"this user may open {hard} files at most")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, HIGH + 1), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_descriptors")
def test_numbers_that_select_does_not_know() -> None:
    """A descriptor above 1023 is waited for like any other: something to read, room to write, the other end gone."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        os.dup2(ours.fileno(), HIGH)
        try:
            assert readable([HIGH], 0.0) == set()
            assert is_writable(HIGH, 0.0)
            theirs.send(b"x")
            assert readable([HIGH, theirs], None) == {HIGH}
            os.read(HIGH, 1)
            theirs.close()
            assert readable([HIGH], None) == {HIGH}
        finally:
            os.close(HIGH)
