"""The published LMDB layout, read without running code from it: `PublishedStore`, `open_store`.

Keys b"__len__" and b"__keys__" hold a pickled count and a pickled list of keys, every other key a
pickled (image bytes, label). Unpickling can run any code, so `load_plain` accepts plain data only,
of any protocol, and the integers of NumPy.
"""

import io
import pickle
import pickletools
import re
import shlex
from pathlib import Path
from typing import Any, Literal, NoReturn

import lmdb
import numpy as np

from bip.data.stores.base import MAX_BYTES, DamagedImage
from bip.data.stores.environment import LmdbFile, open_environment
from bip.data.stores.lmdb import HEADER_KEY, LmdbStore
from bip.errors import UserError
from bip.files import raise_passing

Plain = bytes | bytearray | str | int | tuple["Plain", ...] | list["Plain"]

_MAX_INT = 128  # bits
_MAX_DEPTH = 32  # of lists and tuples in each other
_MAX_KEY = 511  # bytes, LMDB's
_FEW = 128  # opcodes; pickle writes up to 80 for (bytes, label), 12 for each of many keys
_OPCODES = frozenset(
    [
        *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET"),
        *("LONG_BINGET", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "SHORT_BINUNICODE"),
        *("BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2", "LONG1", "EMPTY_LIST"),
        *("APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("NEWTRUE", "NEWFALSE", "NONE", "BYTEARRAY8", "INT", "LONG", "STRING", "BINSTRING"),
        *("SHORT_BINSTRING", "UNICODE", "LIST", "PUT", "GET"),
        *("GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),  # of the names in `_NAMES` only
    ]
)
# Commands that make a store of other kinds readable; they trust its content.
_ADD_KEYS = (
    "e=lmdb.open({path!r},subdir={folder},map_size=1<<40);t=e.begin(write=True);"
    "k=[k for k,_ in t.cursor()];t.put(b'__keys__',pickle.dumps(k));"
    "t.put(b'__len__',pickle.dumps(len(k)));t.commit()"
)
_FROM_ARROW = (
    "s=lmdb.open({path!r},subdir={folder},readonly=True,lock=False);"
    "t=lmdb.open('NEW.lmdb',subdir=False,map_size=1<<40).begin(write=True);"
    "[t.put(k,pickle.dumps(pyarrow.deserialize(v))) for k,v in s.begin().cursor()];t.commit()"
)


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"it is encoded in {encoding}")
    return text.encode("latin-1")


def _bytes(*parts: object) -> bytes:
    match parts:
        case ():
            return b""
        case (bytes() as data,):
            return data
        case (str() as text, str() as encoding):
            return _encode(text, encoding)
    raise ValueError("it makes bytes of something else")


class _Dtype:
    """The type of a NumPy integer, as "i8"."""

    def __init__(self, code: str, *_: object) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple[object, ...]) -> None:
        self.order = str(state[1])


def _scalar(dtype: _Dtype, data: bytes) -> int:
    code = dtype.code if type(dtype) is _Dtype else ""
    if not re.fullmatch("[iub][1248]", code) or len(data) != int(code[1]):
        raise ValueError("it holds a NumPy number that is no integer")
    order: Literal["big", "little"] = "big" if dtype.order == ">" else "little"
    return int.from_bytes(data, order, signed=dtype.code[0] == "i")


# What pickle writes instead of plain data, and harmless functions that do the same.
_NAMES: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _encode,
    **{
        (module, name): _bytes
        for module in ("builtins", "__builtin__")
        for name in ("bytes", "bytearray")
    },
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
}


class _PlainUnpickler(pickle.Unpickler):
    """Looks up no name but those in `_NAMES`, so it cannot load code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise ValueError(f"it names {module}.{name}")
        return _NAMES[module, name]

    def persistent_load(self, pid: object) -> NoReturn:
        raise ValueError("it refers to another object")


def load_plain(
    data: bytes | memoryview, max_opcodes: int = _FEW, max_bytes: int = MAX_BYTES
) -> Plain:
    """The value of a pickle that holds only bytes, str, int, tuple and list.

    The opcodes are checked before anything is loaded, because pickle would allocate gigabytes for
    a large length or memo index. pickletools compares lengths with the data; memo indices are
    limited here. Each opcode makes at most one small object, so memory stays below 3 times the
    data plus 200 bytes for each of `max_opcodes`.

    Raises:
        ValueError: it holds anything else, is damaged, or exceeds a limit.
    """
    try:
        if len(data) > max_bytes:
            raise ValueError(f"it is larger than {max_bytes} bytes")
        data = bytes(data)
        for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if number >= max_opcodes:
                raise ValueError(f"it has more than {max_opcodes} opcodes")
            if opcode.name not in _OPCODES:
                raise ValueError(f"opcode {opcode.name} is not plain data")
            if isinstance(argument, int):
                if opcode.name.endswith("PUT") and argument > max_opcodes:
                    raise ValueError(f"memo index {argument}")
                if argument.bit_length() > _MAX_INT:
                    raise ValueError("it holds a huge integer")
        value = _PlainUnpickler(io.BytesIO(data), encoding="bytes").load()  # of Python 2
    except MemoryError:  # lengths are checked, so memory is really short
        raise
    except Exception as error:  # pickle does not document what damaged data raise
        raise ValueError(f"pickle not loaded: {error or type(error).__name__}") from error
    _check_plain(value)
    return value  # type: ignore[no-any-return]


def _check_plain(value: object) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        # Each container once, though a memo may place it in many.
        containers: dict[int, list[object] | tuple[object, ...]] = {}
        for item in level:
            if type(item) in (list, tuple):
                containers[id(item)] = item  # type: ignore[assignment]
            elif type(item) not in (bytes, bytearray, str, int, bool):
                raise ValueError(f"pickle not loaded: it holds a {type(item).__name__}")
        if not containers:
            return
        level = [item for container in containers.values() for item in container]
    raise ValueError(f"pickle not loaded: more than {_MAX_DEPTH} lists and tuples in each other")


class PublishedStore(LmdbFile):
    """Read access to a store in the published layout.

    Args:
        classes: names by label; None: unknown, so any label is accepted.

    Raises:
        UserError: not such a store.
        OSError: its file system is unreachable.
    """

    def __init__(self, path: Path, classes: list[str] | None = None) -> None:
        super().__init__(path)
        self.classes = classes or []
        self._any_label = classes is None
        count = self._load(b"__len__", int)
        keys = [k.encode() if type(k) is str else k for k in self._load(b"__keys__", list)]
        if count != len(keys) or not all(type(key) is bytes for key in keys):
            raise UserError(f"{path}: __len__ is {count}, but there are {len(keys)} __keys__")
        if max(map(len, keys), default=0) > _MAX_KEY or len(set(keys)) != count:
            raise UserError(
                f"{path}: __keys__ holds a key twice or one over {_MAX_KEY} bytes; "
                "build the store again"
            )
        # One block of bytes instead of a million objects, so that forked workers share it.
        self._keys = b"".join(keys)
        self._ends = np.cumsum([len(key) for key in keys], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded bytes and the label.

        Raises:
            DamagedImage: not a plain (bytes, label), or its class does not exist.
            UserError: the record is missing.
            OSError: the store's file system is unreachable.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        value = self._load(self._key(index), tuple, self.name(index))
        match value:
            case (bytes() | bytearray() as data, int() as label) if self._fits(label):
                return bytes(data), int(label)
            case (bytes() | bytearray(), int() as label):
                raise DamagedImage(
                    f"{self.path}: record {index} has label {label}, but there are "
                    f"{len(self.classes)} classes; give the right --num-classes"
                )
        raise DamagedImage(f"{self.path}: record {index} is not (image bytes, label)")

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
                    add = _command(self.path, "lmdb,pickle", _ADD_KEYS)
                    hint = f", or if it is whole, add it: {add}" if key == b"__len__" else ""
                    raise UserError(f"{what}: missing; build the store again{hint}")
                if key == b"__len__" and bytes(found[:4]) == b"\x01\0\0\0":
                    command = _command(self.path, "lmdb,pickle,pyarrow", _FROM_ARROW)
                    raise UserError(
                        f"{self.path}: is written by pyarrow; convert it: "
                        f"pip install 'pyarrow<14' && {command}"
                    )
                limits = (_FEW, MAX_BYTES)
                if kind is list:  # of keys; there are at most as many as records
                    entries = transaction.stat()["entries"]
                    limits = (12 * entries + _FEW, (_MAX_KEY + 9) * entries + MAX_BYTES)
                value = load_plain(found, *limits)
        except lmdb.Error as error:
            raise_passing(error, what)
            raise UserError(f"{what}: cannot be read ({error}); build the store again") from error
        except ValueError as error:
            raise DamagedImage(
                f"{what}: cannot be read ({error}); build the store again"
            ) from error
        if type(value) is not kind and not (kind is tuple and type(value) is list):
            raise DamagedImage(f"{what}: not a {kind.__name__}; build the store again")
        return value


def _is_pair(data: bytes) -> bool:
    try:
        return isinstance(load_plain(data), tuple | list)
    except ValueError:
        return False


def _command(path: Path, modules: str, script: str) -> str:
    script = script.format(path=str(path), folder=path.is_dir())
    return f"python -c {shlex.quote(f'import {modules};{script}')}"


def open_store(
    path: Path, classes: list[str] | None = None, in_order: bool = False
) -> LmdbStore | PublishedStore:
    """The store at `path`, in this program's layout or the published one.

    Args:
        classes: for a store in the published layout, which does not name its classes.
        in_order: all records will be read in order.

    Raises:
        UserError: neither.
        OSError: its file system is unreachable.
    """
    environment = open_environment(path, in_order)
    try:
        with environment.env.begin() as transaction:
            header, length = transaction.get(HEADER_KEY), transaction.get(b"__len__")
            with transaction.cursor() as cursor:
                first = cursor.value() if cursor.first() else b""
    except lmdb.Error as error:
        raise_passing(error, path)
        raise UserError(f"{path}: unreadable ({error}); build it again") from error
    published = header is None and (length is not None or _is_pair(first))
    return PublishedStore(path, classes) if published else LmdbStore(path)
