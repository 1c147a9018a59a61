"""The published LMDB layout, read without running code from it: `PublishedStore`, `open_store`.

Keys b"__len__" and b"__keys__" hold a pickled count and a pickled list of keys, every other key a
pickled (image bytes, label). Unpickling can run any code; `loads` is no unpickler but a reader of
the few opcodes that plain data needs. It never looks a name up, and takes no more memory than a
small multiple of its input: some 3 times for a record, 24 at the very most.
"""

import contextlib
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from bip.data.stores import (
    HEADER_KEY,
    DamagedImage,
    Environment,
    LmdbStore,
    check_identity,
    file_identity,
    open_environment,
)
from bip.errors import UserError
from bip.files import raise_passing

Plain = bytes | str | int | tuple["Plain", ...] | list["Plain"]

_MARK = object()
_MAX_INT = 16  # bytes
_MAX_KEY = 511  # bytes, LMDB's
_RECORD_CODES = 64  # of a pickled (bytes, label); one that pickle wrote has about ten
_FREE = 64  # lists, tuples and marks that even the smallest pickle may have

# opcode: how many bytes its length takes
_SHORT_BYTES = b"C"[0]
_BYTES = {b"B"[0]: 4, b"\x8e"[0]: 8}
_TEXT = {b"\x8c"[0]: 1, b"X"[0]: 4, b"\x8d"[0]: 8}
_INTS = {b"K"[0]: "<B", b"M"[0]: "<H", b"J"[0]: "<i"}
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}


def loads(data: bytes | memoryview, most: int | None = None) -> Plain:
    """The value of a pickle (protocol 2 to 5) that holds bytes, str, int, tuple and list alone.

    Args:
        most: opcodes that it may have; None: any number.

    Raises:
        ValueError: anything else in it, it is damaged, or it is made to swell.
    """
    try:
        return _loads(bytes(data), len(data) if most is None else most)
    except IndexError:
        raise ValueError("pickle is cut short, or damaged") from None
    except (KeyError, struct.error, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"damaged pickle ({type(error).__name__})") from error


def _loads(data: bytes, most: int) -> Plain:
    stack: list[Any] = []
    memo: list[Any] = []
    at = 0
    # One byte makes an object of up to 64, of these kinds alone.
    containers = _FREE + len(data) // 64

    def take(count: int) -> bytes:
        nonlocal at
        if count > len(data) - at:
            raise ValueError("pickle is cut short")
        at += count
        return data[at - count : at]

    def number(size: int) -> int:
        return int.from_bytes(take(size), "little")

    def to_mark() -> list[Any]:
        place = len(stack) - 1
        while stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise ValueError("pickle without its mark")
        items = stack[place + 1 :]
        del stack[place:]
        return items

    def keep(place: int) -> None:
        if place > len(memo) or stack[-1] is _MARK:
            raise ValueError("pickle numbers no object, or in no order")
        memo[place : place + 1] = [stack[-1]]

    def contain(container: Any) -> None:
        nonlocal containers
        containers -= 1
        if containers < 0:
            raise ValueError("pickle holds more lists and tuples than data")
        stack.append(container)

    for _ in range(most):
        code = data[at]
        at += 1
        if code == _SHORT_BYTES:  # a million of them in __keys__
            end = at + 1 + data[at]
            if end > len(data):
                raise ValueError("pickle is cut short")
            stack.append(data[at + 1 : end])
            at = end
        elif code == 0x94:  # MEMOIZE
            keep(len(memo))
        elif code in _BYTES:
            stack.append(take(number(_BYTES[code])))
        elif code in (b"q"[0], b"r"[0]):  # BINPUT, LONG_BINPUT
            keep(number(1 if code == b"q"[0] else 4))
        elif code in (b"h"[0], b"j"[0]):  # BINGET, LONG_BINGET
            stack.append(memo[number(1 if code == b"h"[0] else 4)])
        elif code in _INTS:
            form = _INTS[code]
            stack.append(struct.unpack(form, take(struct.calcsize(form)))[0])
        elif code == 0x8A:  # LONG1
            size = number(1)
            if size > _MAX_INT:
                raise ValueError("pickle holds a huge integer")
            stack.append(int.from_bytes(take(size), "little", signed=True))
        elif code in _TEXT:
            stack.append(str(take(number(_TEXT[code])), "utf-8"))
        elif code in _TUPLES:
            count = _TUPLES[code]
            if len(stack) < count or _MARK in stack[-count:]:
                raise ValueError("pickle without its items")
            items = stack[-count:]
            del stack[-count:]
            contain(tuple(items))
        elif code == b")"[0]:
            contain(())
        elif code == b"]"[0]:
            contain([])
        elif code == b"("[0]:
            stack.append(_MARK)
        elif code == b"t"[0]:
            contain(tuple(to_mark()))
        elif code == b"a"[0]:  # APPEND
            item = stack.pop()
            _extend(stack[-1], [item])
        elif code == b"e"[0]:  # APPENDS
            items = to_mark()
            _extend(stack[-1], items)
        elif code == 0x80:  # PROTO
            if number(1) > 5:
                raise ValueError("pickle of an unknown protocol")
        elif code == 0x95:  # FRAME
            take(8)
        elif code == b"."[0]:  # STOP
            if len(stack) != 1 or stack[0] is _MARK:
                raise ValueError("pickle ends within a value")
            value: Plain = stack[0]
            return value
        else:
            raise ValueError(f"pickle opcode {bytes([code])!r} is not plain data; not loaded")
    raise ValueError("pickle is cut short, or of more than bytes and a label")


def _extend(target: Any, items: list[Any]) -> None:
    if type(target) is not list:
        raise ValueError("pickle appends to what is no list")
    target.extend(items)


class PublishedStore:
    """Read access to a store in the published layout; opened lazily in each process.

    Args:
        classes: names by label; None: not known, any label is taken.

    Raises:
        UserError: not such a store.
        OSError: its file system is away.
    """

    def __init__(self, path: Path, classes: list[str] | None = None) -> None:
        self.path = path
        self.classes = classes or []
        self._any_label = classes is None
        self._opened: Environment | None = None
        keys = self._load(b"__keys__", list)
        self._identity = file_identity(path)
        count = self._load(b"__len__", int)
        if count != len(keys) or not all(type(key) is bytes for key in keys):
            raise UserError(f"{path}: __len__ is {count}, but there are {len(keys)} __keys__")
        if max(map(len, keys), default=0) > _MAX_KEY or len(set(keys)) != count:
            raise UserError(
                f"{path}: __keys__ holds a key twice or one over {_MAX_KEY} bytes; "
                "build the store again"
            )
        # One block of bytes, not a million objects, so that forked workers share it.
        self._keys = b"".join(keys)
        self._ends = np.cumsum([len(key) for key in keys], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, index: int) -> str:
        return f"record {index} of {self.path}"

    def check_unchanged(self) -> None:
        check_identity(self.path, self._identity)

    def prefetch(self, indices: Iterable[int]) -> None:
        with contextlib.suppress(lmdb.Error, OSError):  # `read` tells
            self._open().prefetch(map(self._key, indices))

    def label(self, index: int) -> int:
        return self.read(index)[1]

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded bytes and the label.

        Raises:
            DamagedImage: not a plain (bytes, label), or there is no such class.
            UserError: the record is missing.
            OSError: the store's file system is away.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        value = self._load(self._key(index), tuple, self.name(index))
        match value:
            case (bytes() as data, int() as label) if self._fits(label):
                return data, label
            case (bytes(), int() as label):
                raise DamagedImage(
                    f"{self.path}: record {index} has label {label}, but there are "
                    f"{len(self.classes)} classes; give the right --num-classes"
                )
        raise DamagedImage(f"{self.path}: record {index} is no (image bytes, label)")

    def _key(self, index: int) -> bytes:
        start = int(self._ends[index - 1]) if index else 0
        return self._keys[start : int(self._ends[index])]

    def _fits(self, label: int) -> bool:
        return self._any_label or 0 <= label < len(self.classes)

    def _load(self, key: bytes, kind: type, what: str = "") -> Any:
        what = what or f"{key.decode()} of {self.path}"
        try:
            with self._env().begin(buffers=True) as transaction:
                found = transaction.get(key)
                if found is None:
                    raise UserError(f"{what}: missing; build the store again")
                value = loads(found, None if kind is list else _RECORD_CODES)
        except lmdb.Error as error:
            raise_passing(error, what)
            raise UserError(f"{what}: cannot be read ({error}); build the store again") from error
        except ValueError as error:
            raise DamagedImage(
                f"{what}: cannot be read ({error}); build the store again"
            ) from error
        if type(value) is not kind:
            raise DamagedImage(f"{what}: no {kind.__name__}; build the store again")
        return value

    def _env(self) -> lmdb.Environment:
        return self._open().env

    def _open(self) -> Environment:
        if self._opened is None or self._opened.pid != os.getpid():
            self._opened = open_environment(self.path)
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


def open_store(
    path: Path, classes: list[str] | None = None, in_order: bool = False
) -> LmdbStore | PublishedStore:
    """The store at `path`, in this program's layout or the published one.

    Args:
        classes: of a store in the published layout, which names none.
        in_order: it will be read from the first record to the last.

    Raises:
        UserError: neither.
        OSError: its file system is away.
    """
    environment = open_environment(path, in_order)
    try:
        with environment.env.begin() as transaction:
            header, length = transaction.get(HEADER_KEY), transaction.get(b"__len__")
    except lmdb.Error as error:
        raise_passing(error, path)
        raise UserError(f"{path}: unreadable ({error}); build it again") from error
    published = header is None and length is not None
    return PublishedStore(path, classes) if published else LmdbStore(path)
