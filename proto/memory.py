"""Memory of shared files: maps that can hold huge pages, and pages that are there before their use.

A file in /dev/shm has pages of 4 KiB unless its mount says otherwise. Huge ones (2 MiB) make a
first touch 15 times cheaper, give O_DIRECT few long segments instead of hundreds (2.0 to 2.4 times
the rate), and need no privilege: since Linux 6.1 MADV_COLLAPSE turns pages of a shared file into
huge ones whatever the system's setting, if the address and the offset in the file agree modulo
2 MiB. mmap does not promise that for such a file, so the map is made here.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from threading import Event

MADV_POPULATE_WRITE = 23  # Linux 5.14; not in Python's mmap module
MADV_COLLAPSE = 25  # Linux 6.1
HUGE_BYTES = 2 << 20
# One call. The interpreter's lock is free meanwhile, so this only bounds how fast stop is heeded:
# memory that a virtual machine has never touched comes at 0.1 to 0.25 GB/s, else at 1 to 2.
CHUNK_BYTES = 4 << 20

_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
)  # fmt: skip
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def map_shared(fd: int, length: int) -> memoryview:
    """Map a file for reading and writing, its beginning at a multiple of HUGE_BYTES.

    It is unmapped when the last view of it is gone, so a thread that still reads cannot be hurt.

    Args:
        fd: of the file, not needed afterwards.
        length: bytes, >= 1; the file is at least that long.

    Raises:
        OSError: no address space or no map left.
    """
    # More than is needed, so that an aligned piece lies in it; what is beside it goes again.
    spare = _checked(
        _libc.mmap(
            None, length + HUGE_BYTES, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
        )
    )
    start = -(-spare // HUGE_BYTES) * HUGE_BYTES
    page = mmap.PAGESIZE
    stop = -(-(start + length) // page) * page
    try:
        access = mmap.PROT_READ | mmap.PROT_WRITE
        _checked(_libc.mmap(start, length, access, mmap.MAP_SHARED | _MAP_FIXED, fd, 0))
    except OSError:
        _libc.munmap(spare, length + HUGE_BYTES)
        raise
    if start > spare:
        _libc.munmap(spare, start - spare)
    if spare + length + HUGE_BYTES > stop:
        _libc.munmap(stop, spare + length + HUGE_BYTES - stop)
    whole = (ctypes.c_ubyte * length).from_address(start)
    weakref.finalize(whole, _libc.munmap, start, length).atexit = False
    return memoryview(whole).cast("B")


def _checked(address: int | None) -> int:
    if address is None or address == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return address


def _address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def collapse(memory: memoryview) -> bool:
    """Turn HUGE_BYTES of a shared map into one huge page, contents unchanged; gives it its memory.

    About 0.8 ms. Fails while a device transfers to or from it, and where the kernel cannot.

    Args:
        memory: HUGE_BYTES from a multiple of them on.
    """
    start = _address(memory)
    assert start % HUGE_BYTES == 0, "does not begin where a huge page could"
    assert len(memory) == HUGE_BYTES, "not as long as a huge page"
    # Of a piece that nobody has touched the kernel makes nothing.
    if _libc.madvise(start, mmap.PAGESIZE, MADV_POPULATE_WRITE):
        return False
    return not _libc.madvise(start, HUGE_BYTES, MADV_COLLAPSE)


def populate(memory: memoryview, stop: Event) -> bool:
    """Give every page of a mapping its memory, contents unchanged; for a background thread.

    A first write to a page costs a fault and the zeroing of the page: a load of 94 MiB into a
    fresh pool took 280 ms, into a populated one 30.

    Args:
        memory: writable, of a mapping, so that it begins at a page; kept mapped until the return.
        stop: set it to end early.

    Returns:
        False when stopped, or when the kernel refuses; pages then come with their first use.
    """
    start = _address(memory)
    assert start % mmap.PAGESIZE == 0, "not the beginning of a mapping"
    for offset in range(0, len(memory), CHUNK_BYTES):
        length = min(CHUNK_BYTES, len(memory) - offset)
        if stop.is_set() or _libc.madvise(start + offset, length, MADV_POPULATE_WRITE):
            return False
    return True
