"""Lines out of chunks, and delays that grow."""

from __future__ import annotations

from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given

from mend.backoff import Backoff
from mend.lines import LineSplitter, LineTooLong


@given(st.lists(st.binary(max_size=20)), st.lists(st.integers(0, 40)))
def test_any_cut_gives_the_same_lines(lines: list[bytes], cuts: list[int]) -> None:
    """However the network cuts a stream, the same lines come out."""
    lines = [line.replace(b"\n", b"") for line in lines]
    stream = b"".join(line + b"\n" for line in lines)
    bounds = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    splitter, found = LineSplitter(1000), []
    for start, end in pairwise(bounds):
        found += splitter.feed(stream[start:end])
    assert found == [line for line in lines if line]


@pytest.mark.parametrize("chunks", [[b"x" * 11], [b"x" * 6, b"x" * 5], [b"y" * 11 + b"\n"]])
def test_a_line_beyond_the_limit_is_refused_before_it_ends(chunks: list[bytes]) -> None:
    """A peer that never ends its line cannot fill the memory."""
    splitter = LineSplitter(10)
    for chunk in chunks[:-1]:
        assert splitter.feed(chunk) == []
    with pytest.raises(LineTooLong, match="10 bytes"):
        splitter.feed(chunks[-1])


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True))
def test_delays_double_and_stay_in_the_upper_half(failures: int, draw: float) -> None:
    """A delay lies between half and the whole of the doubled base, never above the ceiling."""
    seconds = Backoff(0.1, 5.0).seconds(failures, lambda: draw)
    full = min(0.1 * 2 ** min(failures - 1, 60), 5.0)
    assert full / 2 <= seconds <= full
