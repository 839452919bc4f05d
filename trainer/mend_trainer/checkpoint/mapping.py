"""Maps shared memory, in huge pages where the kernel gives them.

A state is copied faster into memory of 2 MiB pages, and whoever maps it anew, as a rank that restores does, meets one
page fault where there would be 512. Most nodes give shared memory no huge pages by themselves
(/sys/kernel/mm/transparent_hugepage/shmem_enabled is `never`), but Linux 6.1 and later make them of what is there when
they are asked to, whatever that file says. Where they do not, all is as before, in small pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from typing import Final

from mend_trainer.slots import HUGE_PAGE_BYTES, PAGE_BYTES

# Not in the standard library of Python 3.11.
_MAP_FIXED: Final = 0x10
_MAP_NORESERVE: Final = 0x4000
_MADV_COLLAPSE: Final = 25
_FAILED: Final = ctypes.c_void_p(-1).value

_mmap = ctypes.CDLL(None, use_errno=True).mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]


def mapped(descriptor: int, start: int, length: int, *, touch: bool) -> memoryview:
    """The bytes of the file from `start` on, a multiple of huge pages; `touch`: all of them present at once.

    It has whole pages, so it may be somewhat longer than asked, and stays mapped as long as anybody has a part of it.
    """
    assert start % HUGE_PAGE_BYTES == 0
    length = max(1, -(-length // PAGE_BYTES)) * PAGE_BYTES
    # A huge page has to lie at a multiple of its size, and mmap of Python cannot say where: it holds the addresses,
    # and the file is put over them.
    space = mmap.mmap(-1, length + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    first = ctypes.addressof(ctypes.c_char.from_buffer(space))
    skipped = -first % HUGE_PAGE_BYTES
    _put_over(first + skipped, length, descriptor, start)
    memory = memoryview(space)[skipped : skipped + length]
    if touch:
        _make_huge(space, skipped, length)
        _put_over(first + skipped, length, descriptor, start, mmap.MAP_POPULATE)
    return memory


def _put_over(address: int, length: int, descriptor: int, start: int, flags: int = 0) -> None:
    readable = mmap.PROT_READ | mmap.PROT_WRITE
    if _mmap(address, length, readable, mmap.MAP_SHARED | _MAP_FIXED | flags, descriptor, start) == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"{length} bytes of shared memory cannot be mapped: {os.strerror(number)}")


def _make_huge(space: mmap.mmap, skipped: int, length: int) -> None:
    """Ask for the huge pages that fit into it; what it holds stays as it is."""
    whole = length // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if not whole:
        return
    # Of each, one small page has to be there: the rest then costs no page faults. Read only, it may hold a snapshot.
    bytes(memoryview(space)[skipped : skipped + whole : HUGE_PAGE_BYTES])
    with contextlib.suppress(OSError):  # an older kernel, or not enough memory in one piece
        space.madvise(_MADV_COLLAPSE, skipped, whole)
