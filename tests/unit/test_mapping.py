"""Shared memory in huge pages: the same bytes, wherever and however often it is mapped."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import pytest
import xxhash

from mend_trainer.checkpoint.copying import address_of
from mend_trainer.checkpoint.mapping import mapped
from mend_trainer.slots import HUGE_PAGE_BYTES, create_arena

START = 3 * HUGE_PAGE_BYTES
LENGTH = 8 * HUGE_PAGE_BYTES + 5000


def in_huge_pages(memory: memoryview) -> int:
    """How many of these bytes this process has mapped in huge pages, by the kernel's word."""
    address = f"{address_of(memory):x}-"
    mappings = Path("/proc/self/smaps").read_text().split("VmFlags")
    (about,) = [each for each in mappings if re.search(rf"^0*{address}", each, re.MULTILINE)]
    return 1024 * int(re.search(r"ShmemPmdMapped: +(\d+) kB", about)[1])  # type: ignore[index]


@pytest.mark.parametrize("length", [1, 4096, HUGE_PAGE_BYTES - 1, HUGE_PAGE_BYTES, LENGTH])
def test_what_one_has_written_others_read(length: int) -> None:
    """Mappings of the same place, made present at once or by use, show the same bytes, from the first to the last."""
    descriptor = create_arena("a")
    written = mapped(descriptor, START, length, touch=True)
    written[0], written[length - 1] = 7, 8
    for touch in (True, False):
        read = mapped(descriptor, START, length, touch=touch)
        assert (read[0], read[length - 1]) == (written[0], written[length - 1])
    assert os.pread(descriptor, 1, START + length - 1) == bytes([8])
    os.close(descriptor)


def test_touched_memory_is_all_there_and_no_more() -> None:
    """Made present means taken from the pod's memory: in whole small pages, so that a state takes what was told."""
    descriptor = create_arena("a")
    before = os.fstat(descriptor).st_blocks
    memory = mapped(descriptor, START, LENGTH, touch=True)
    assert len(memory) == 8 * HUGE_PAGE_BYTES + 8192
    assert (os.fstat(descriptor).st_blocks - before) * 512 == len(memory)
    os.close(descriptor)


def test_mapping_without_touch_takes_no_memory() -> None:
    """Who only reads makes nothing present."""
    descriptor = create_arena("a")
    before = os.fstat(descriptor).st_blocks
    memory = mapped(descriptor, START, LENGTH, touch=False)
    assert os.fstat(descriptor).st_blocks == before
    del memory
    os.close(descriptor)


def test_reading_goes_on_while_pages_are_put_together() -> None:
    """A rank that maps the arena of the one before it changes nothing for the saver that is reading it."""
    descriptor = create_arena("a")
    os.pwrite(descriptor, os.urandom(1 << 20) * (LENGTH >> 20), START)  # in small pages
    memory = mapped(descriptor, START, LENGTH, touch=False)
    digests = {xxhash.xxh3_64_intdigest(memory)}
    is_over = threading.Event()

    def read() -> None:
        while not is_over.is_set():
            digests.add(xxhash.xxh3_64_intdigest(memory))

    reader = threading.Thread(target=read)
    reader.start()
    again = mapped(descriptor, START, LENGTH, touch=True)
    is_over.set()
    reader.join()
    digests.add(xxhash.xxh3_64_intdigest(again))
    assert len(digests) == 1
    os.close(descriptor)


@pytest.mark.skipif(
    tuple(map(int, os.uname().release.split(".")[:2])) < (6, 1)
    or not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="needs Linux 6.1 with transparent huge pages",
)
def test_memory_is_in_huge_pages_for_all() -> None:
    """Where the kernel can, for who has made them and for who maps the place later."""
    descriptor = create_arena("a")
    first = mapped(descriptor, START, LENGTH, touch=True)
    assert in_huge_pages(first) > 0
    later = mapped(descriptor, START, LENGTH, touch=False)
    bytes(later[::4096])
    assert in_huge_pages(later) == in_huge_pages(first)
    os.close(descriptor)


def test_memory_that_cannot_be_mapped_is_said_so() -> None:
    """What is not open raises OSError with what was wanted, and no more."""
    descriptor = create_arena("a")
    os.close(descriptor)
    with pytest.raises(OSError, match=r"4096 bytes of shared memory cannot be mapped: Bad file descriptor"):
        mapped(descriptor, START, 1, touch=False)
