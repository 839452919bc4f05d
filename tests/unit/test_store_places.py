"""Where a store is, and what a listing of a folder owes to its reader."""

from __future__ import annotations

from pathlib import Path

import pytest

from mend.store import open_store


@pytest.mark.parametrize("uri", ["file:///runs/a#1", "s3://bucket/a?b", "ftp://host/a", "file://host/a", "s3:///a"])
def test_an_address_that_would_be_misread_is_refused(uri: str) -> None:
    """What follows a # or ? would be cut off silently, and two runs could meet under one prefix."""
    with pytest.raises(ValueError, match="checkpoint uri"):
        open_store(uri)


def test_an_entry_that_vanishes_hides_no_other(tmp_path: Path) -> None:
    """A file deleted while the folder is read (here: a link to nothing) is left out; all others are listed."""
    store = open_store(f"file://{tmp_path}")
    for number in range(4):
        store.put(f"step-{number}/manifest.json", b"{}")
        store.put(f"file-{number}", b"x")
    (tmp_path / "a-vanished").symlink_to(tmp_path / "nowhere")
    (tmp_path / "step-1" / "vanished").symlink_to(tmp_path / "nowhere")
    assert [entry.key for entry in store.list(delimiter="/")] == [
        *[f"file-{number}" for number in range(4)],
        *[f"step-{number}/" for number in range(4)],
    ]
    assert [entry.key for entry in store.list("step-")] == [f"step-{number}/manifest.json" for number in range(4)]
