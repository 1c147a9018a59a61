"""LMDB's file format, as far as needed to ask the kernel for large values ahead of reading them.

LMDB reads a value while it is accessed, one page of 4 KB after the other: 27 waits for a photo, on
a network disk 27 requests. A large value is on consecutive pages of its own, and the leaf page has
their number. LMDB has no call that returns it, so this file reads the leaf's node (by ctypes), at
the address where LMDB just found the key. It never changes what is read: where the file does not
look as expected, there is no prefetch and plain LMDB does the work.

Format (LMDB 0.9, data version 1; integers in the machine's own order):

    page 0, after a page header of 16 bytes: magic 0xBEEFC0DE, version (uint32 each)
    node: low and high half of the value's size, flags, the key's size (uint16 each); the key;
        then the value or, with flag 1, the number of the first page of its own (uint64)

Set the environment variable BIP_LMDB_PREFETCH=0 to turn this off.
"""

import ctypes
import mmap
import os
import struct
import weakref
from collections.abc import Iterable
from pathlib import Path

import lmdb
import numpy as np

_SWITCH = "BIP_LMDB_PREFETCH"
_PAGE_HEADER = 16
_META = struct.Struct("=II")
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_NODE = struct.Struct("=HHHH")
_NODE_PAGE = struct.Struct("=Q")
_OWN_PAGES = 1  # F_BIGDATA


class PageReader:
    """Makes the kernel read the values of keys ahead. Made by `open_pages`."""

    def __init__(self, file: int, page_size: int) -> None:
        self._file, self._page_size = file, page_size
        weakref.finalize(self, os.close, file)

    def prefetch(self, env: lmdb.Environment, keys: Iterable[bytes]) -> None:
        """Make the kernel read the values of `keys` now, each in one piece.

        This reads the leaf page of each key; there are few leaf pages.
        """
        size = os.fstat(self._file).st_size
        with env.begin(buffers=True) as transaction, transaction.cursor() as cursor:
            for key in keys:
                place = self._place(cursor.key()) if cursor.set_key(key) else None
                if place is not None and sum(place) <= size:
                    os.posix_fadvise(self._file, *place, os.POSIX_FADV_WILLNEED)

    def _place(self, key: memoryview) -> tuple[int, int] | None:
        """(start, length) in the file of a key's value; None if it is on the leaf page.

        Args:
            key: a buffer from LMDB, inside its map of the file.
        """
        address = np.frombuffer(key, np.uint8).__array_interface__["data"][0]
        # LMDB has read the 8 bytes before the key. The bytes after it may be on the next page,
        # which may not be mapped if this one is damaged.
        if address % mmap.PAGESIZE + len(key) + _NODE_PAGE.size > mmap.PAGESIZE:
            return None
        low, high, flags, key_size = _NODE.unpack(ctypes.string_at(address - _NODE.size, 8))
        if flags != _OWN_PAGES or key_size != len(key):
            return None
        (page,) = _NODE_PAGE.unpack(ctypes.string_at(address + key_size, _NODE_PAGE.size))
        return page * self._page_size, _PAGE_HEADER + low + (high << 16)


def open_pages(file: Path, env: lmdb.Environment) -> PageReader | None:
    """A reader of the pages of `env`, whose file is `file`.

    None if it is turned off or the file's format is not the one above. Raises OSError.
    """
    if os.environ.get(_SWITCH) == "0":
        return None
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    start = os.pread(descriptor, _META.size, _PAGE_HEADER)
    if len(start) < _META.size or _META.unpack(start) != (_MAGIC, _VERSION):
        os.close(descriptor)
        return None
    return PageReader(descriptor, int(env.stat()["psize"]))
