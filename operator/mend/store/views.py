"""Pure: bytes that lie in several places, cut into parts and read one after another without being copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

MAX_PARTS: Final = 10_000
LEAST_PART_BYTES: Final = 16 << 20
SLICE_BYTES: Final = 1 << 20


def part_length(total: int, usual: int, workers: int) -> int:
    """The length of a part: as usual, shorter where workers would have nothing to do, longer where S3 would refuse.

    A connection to a service has its own speed: an object of two parts is carried by two of them.
    """
    fair = max(LEAST_PART_BYTES, -(-total // workers))
    return max(min(usual, fair), -(-total // MAX_PARTS))


def cut(views: Sequence[memoryview], length: int) -> Iterator[list[memoryview]]:
    """The views' bytes in runs of `length` (the last is shorter), without copying."""
    run: list[memoryview] = []
    room = length
    for view in views:
        while view.nbytes:
            run.append(view[:room])
            room -= run[-1].nbytes
            view = view[run[-1].nbytes :]
            if not room:
                yield run
                run, room = [], length
    if run:
        yield run


class Body:
    """Views as the file that botocore measures and signs, and as the slices that are sent.

    A file would be sent in blocks of 16 KiB, which is thousands of calls for a part. One slice for all would not do
    either: the time limit of a socket is one for each slice handed to it, and a large part would have to be through
    a crowded network within it.
    """

    def __init__(self, views: Sequence[memoryview], hand: Callable[[int], None] = lambda count: None) -> None:
        """`hand` is told of the bytes of each slice that was taken over."""
        self._hand = hand
        self.slices = [view[at : at + SLICE_BYTES] for view in views for at in range(0, view.nbytes, SLICE_BYTES)]
        self._bytes = sum(each.nbytes for each in self.slices)
        self._at = 0
        self._rest = iter(self.slices)
        self._left = memoryview(b"")  # of the slice that is being read

    def __len__(self) -> int:
        return self._bytes

    def handed_over(self) -> Iterator[memoryview]:
        """The slices, for whoever sends them; each is told of once the next one is wanted."""
        for each in self.slices:
            yield each
            self._hand(each.nbytes)

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes; none at the end."""
        wanted = self._bytes - self._at if size < 0 else size
        taken: list[memoryview] = []
        while wanted and (self._left or self._advance()):
            taken.append(self._left[:wanted])
            self._left = self._left[wanted:]
            wanted -= taken[-1].nbytes
        found = b"".join(taken)
        self._at += len(found)
        return found

    def seek(self, offset: int, whence: int = 0) -> int:
        """To the beginning or to the end, which is all that anyone asks for."""
        if offset or whence not in (0, 2):
            raise ValueError(f"seek({offset}, {whence}): expected the beginning or the end")
        self._rest = iter([]) if whence else iter(self.slices)
        self._left = memoryview(b"")
        self._at = self._bytes if whence else 0
        return self._at

    def tell(self) -> int:
        """Bytes before the next read."""
        return self._at

    def _advance(self) -> bool:
        self._left = next(self._rest, memoryview(b""))
        return bool(self._left)
