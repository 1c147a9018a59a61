"""Stores of encoded images: `LmdbStore` and `FolderStore`, one interface.

LMDB layout (format version 1; all integers big-endian; nothing is pickled):

    key, 8 bytes: index 0 ... count - 1
    value: label, width, height (int32 each), CRC32 (uint32), image bytes as in the original file
    key b"header": JSON {"format", "version", "count", "classes", "class_counts", "image_bytes",
        "skipped": source images left out, "options": how the images were changed and checked}

The CRC32 covers label, width, height and image bytes. A store is one file; it gets its name only
when it is whole (`bip.data.writer`), and the header is its last record.
"""

import contextlib
import ctypes
import json
import mmap
import os
import struct
import weakref
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import lmdb
import numpy as np

from bip.errors import UserError
from bip.files import raise_passing

FORMAT = "bip-lmdb"
VERSION = 1
HEADER_KEY = b"header"
_RECORD = struct.Struct(">iii")
_CRC = struct.Struct(">I")
_IMAGE_OFFSET = _RECORD.size + _CRC.size
# LMDB's node, in the machine's own order: low and high half of the value's size, flags, the key's
# size; then the key; then the value, or the number of its first page.
_NODE = struct.Struct("=HHHH")
_NODE_PAGE = struct.Struct("=Q")
_ON_PAGES_OF_ITS_OWN = 1  # F_BIGDATA
_PAGE_HEADER = 16

MOST_BYTES = 256 << 20  # of an encoded image; a larger file is none, and may not fit in memory
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".gif"})


class DamagedImage(UserError):
    """One image is at fault: its bytes or its label. What `skip_bad` skips, and nothing else is.

    A disk that fails, a file that is gone or a broken tree of pages is no such thing: the image may
    be sound, and many more would follow.
    """


class ImageStore(Protocol):
    """A split of labelled, encoded images. Picklable, and cheap to pickle."""

    path: Path
    classes: list[str]

    def __len__(self) -> int: ...

    def label(self, index: int) -> int: ...

    def prefetch(self, indices: Iterable[int]) -> None:
        """A hint that these images will be read soon. Changes nothing that is read."""
        ...

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded bytes and the label of one image.

        Raises:
            DamagedImage: the record is damaged.
            UserError: it cannot be read.
            OSError: nor can it now, but its file system may come back.
        """
        ...

    def name(self, index: int) -> str:
        """What to call the image in a message to the user."""
        ...

    def check_unchanged(self) -> None:
        """Raises UserError if the store's file is no longer the one that was opened, OSError if its
        file system is away."""
        ...


def record_key(index: int) -> bytes:
    return index.to_bytes(8, "big")


def pack_record(data: bytes, label: int, width: int, height: int) -> bytes:
    """The stored value of one image."""
    head = _RECORD.pack(label, width, height)
    return head + _CRC.pack(zlib.crc32(data, zlib.crc32(head))) + data


class Environment:
    """An open read-only LMDB environment and the process that opened it.

    Args:
        in_order: it will be read from the first record to the last.
    """

    def __init__(self, path: Path, in_order: bool = False) -> None:
        self.pid = os.getpid()
        self.env = lmdb.open(
            str(path),
            subdir=path.is_dir(),
            readonly=True,
            create=False,
            lock=False,
            readahead=in_order,
            meminit=False,
        )
        self._page = int(self.env.stat()["psize"])
        self._file = -1 if in_order else os.open(data_file(path), os.O_RDONLY | os.O_CLOEXEC)
        if not in_order:
            weakref.finalize(self, os.close, self._file)

    def prefetch(self, keys: Iterable[bytes]) -> None:
        """Have the kernel read the values of `keys` at once, each as one piece.

        Else they are read as `get` touches them, a page of 4 KB at a time with a wait for each: 27
        of them for a photo, over the network if the store lies there. LMDB keeps a large value on
        pages of its own; which, only the leaf page tells, so that is read here (two pages a key, of
        few in all). Where it does not look as LMDB writes it nothing is asked for.
        """
        if self._file < 0:
            return
        size = os.fstat(self._file).st_size
        with self.env.begin(buffers=True) as transaction, transaction.cursor() as cursor:
            for key in keys:
                if not cursor.set_key(key):
                    continue
                place = np.frombuffer(cursor.key(), np.uint8).__array_interface__["data"][0]
                # LMDB read the 8 bytes before the key to find it. Those after may be the next
                # page's, which there may not be, if the page is damaged.
                if place % mmap.PAGESIZE + len(key) + _NODE_PAGE.size > mmap.PAGESIZE:
                    continue
                low, high, flags, key_size = _NODE.unpack(ctypes.string_at(place - _NODE.size, 8))
                if flags != _ON_PAGES_OF_ITS_OWN or key_size != len(key):
                    continue
                (page,) = _NODE_PAGE.unpack(ctypes.string_at(place + key_size, _NODE_PAGE.size))
                start, length = page * self._page, _PAGE_HEADER + low + (high << 16)
                if start + length <= size:
                    os.posix_fadvise(self._file, start, length, os.POSIX_FADV_WILLNEED)


# LMDB allows one environment per file and process, so stores of one file (device, inode) share it
# here. The entries go when the last store does.
_open_environments: weakref.WeakValueDictionary[tuple[int, int], Environment] = (
    weakref.WeakValueDictionary()
)


def _shared_environment(path: Path, in_order: bool) -> Environment:
    status = path.stat()
    key = (status.st_dev, status.st_ino)
    found = _open_environments.get(key)
    if found is not None and found.pid != os.getpid():
        # Inherited over a fork: LMDB forbids its use here. Closing only unmaps the child's copy.
        found.env.close()
        found = None
    if found is None:
        found = Environment(path, in_order)
        _open_environments[key] = found
    return found


def data_file(path: Path) -> Path:
    """The file of a store that is a folder or a single file."""
    return path / "data.mdb" if path.is_dir() else path


def size_of(env: lmdb.Environment) -> int:
    """The bytes that an environment's pages take; its file has as many, if it is whole."""
    return int((env.info()["last_pgno"] + 1) * env.stat()["psize"])


def open_environment(path: Path, in_order: bool = False) -> Environment:
    """The LMDB environment of a store, this process's own.

    Args:
        in_order: read ahead, as for one who reads all of it. No matter if it is open already.

    Raises:
        UserError: none there, unreadable, or cut short.
        OSError: its file system is away.
    """
    try:
        opened = _shared_environment(path, in_order)
    except (lmdb.Error, OSError) as error:
        raise_passing(error, path)
        raise UserError(
            f"{path}: not a readable LMDB store ({error}); "
            "build it with: python -m bip data build-lmdb SRC OUT"
        ) from error
    # A page beyond the end of the file would be a bus error, not an exception.
    size, expected = data_file(path).stat().st_size, size_of(opened.env)
    if size < expected:
        raise UserError(f"{path}: truncated, {size} of {expected} bytes; copy or build it again")
    return opened


def file_identity(path: Path) -> tuple[int, int, int]:
    """What tells a store's file from one put in its place: device, inode and size in bytes."""
    status = data_file(path).stat()
    return status.st_dev, status.st_ino, status.st_size


def check_identity(path: Path, identity: tuple[int, int, int]) -> None:
    """Raises UserError if the file at `path` has another identity, OSError if its file system is
    away.

    A worker that mapped a file cut short would die of a bus error; one that opened a new file
    would train on other images.
    """
    try:
        unchanged = file_identity(path) == identity
    except OSError as error:
        raise_passing(error, path)
        raise UserError(
            f"{path}: gone during the run ({error.strerror}); put it back and start again"
        ) from error
    if not unchanged:
        raise UserError(
            f"{path}: was replaced or cut short during the run; put the store back, or start a "
            "new run with the new one"
        )


class LmdbStore:
    """Read access to a store that `bip.data.writer` made; opened lazily in each process.

    Raises:
        UserError: not a store, half-built, truncated, or of a newer format.
        OSError: its file system is away.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: Environment | None = None
        header = self._read_header()
        self._identity = file_identity(path)
        self.classes: list[str] = header["classes"]
        self.header = header
        self._count: int = header["count"]

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        return f"record {index} of {self.path}"

    def check_unchanged(self) -> None:
        check_identity(self.path, self._identity)

    def prefetch(self, indices: Iterable[int]) -> None:
        with contextlib.suppress(lmdb.Error, OSError):  # `read` tells
            self._open().prefetch(map(record_key, indices))

    def label(self, index: int) -> int:
        """The label alone, unchecked. Takes as long as the image, whose pages LMDB touches too."""
        with self._env().begin(buffers=True) as transaction:
            label, _, _ = _RECORD.unpack_from(self._value(transaction, index))
        return int(label)

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded bytes and the label.

        Raises:
            DamagedImage: its checksum does not match, or there is no such class.
            UserError: the record is missing.
            OSError: the store's file system is away.
        """
        with self._env().begin(buffers=True) as transaction:
            value = self._value(transaction, index)
            head, data = value[: _RECORD.size], bytes(value[_IMAGE_OFFSET:])
            label, _, _ = _RECORD.unpack(head)
            (crc,) = _CRC.unpack_from(value, _RECORD.size)
            if zlib.crc32(data, zlib.crc32(head)) != crc:
                known = 0 <= label < len(self.classes)
                class_name = self.classes[label] if known else f"number {label}, unknown"
                raise DamagedImage(
                    f"{self.path}: record {index} (class {class_name}) fails its checksum; "
                    "copy or build the store again"
                )
        if not 0 <= label < len(self.classes):
            raise DamagedImage(
                f"{self.path}: record {index} is of class {label}, but the store has "
                f"{len(self.classes)} classes; build it again"
            )
        return data, int(label)

    def _value(self, transaction: lmdb.Transaction, index: int) -> memoryview:
        if not 0 <= index < self._count:
            raise IndexError(index)
        try:
            value = transaction.get(record_key(index))
        except lmdb.Error as error:
            raise_passing(error, f"{self.path} (record {index})")
            raise UserError(
                f"{self.path}: record {index} cannot be read ({error}); "
                "copy or build the store again"
            ) from error
        if value is None or len(value) < _IMAGE_OFFSET:
            kind, what = (UserError, "missing") if value is None else (DamagedImage, "cut short")
            raise kind(f"{self.path}: record {index} is {what}; copy or build the store again")
        return memoryview(value)

    def _env(self) -> lmdb.Environment:
        return self._open().env

    def _open(self) -> Environment:
        if self._opened is None or self._opened.pid != os.getpid():
            self._opened = open_environment(self.path)
        return self._opened

    def _read_header(self) -> dict[str, Any]:
        remedy = "build it with: python -m bip data build-lmdb SRC OUT"
        try:
            with self._env().begin() as transaction:
                text, entries = transaction.get(HEADER_KEY), transaction.stat()["entries"]
            header = json.loads(text) if text is not None else None
        except (lmdb.Error, ValueError) as error:
            raise_passing(error, self.path)
            raise UserError(f"{self.path}: unreadable header ({error}); {remedy}") from error
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise UserError(f"{self.path}: not a {FORMAT} store, or a half-built one; {remedy}")
        if header.get("version") != VERSION:
            raise UserError(
                f"{self.path}: store format version {header.get('version')}, this program reads "
                f"version {VERSION}; {remedy}"
            )
        count, classes = header.get("count"), header.get("classes")
        counts, image_bytes = header.get("class_counts"), header.get("image_bytes")
        if not (
            type(count) is int
            and isinstance(classes, list)
            and classes
            and all(isinstance(name, str) for name in classes)
            and isinstance(counts, list)
            and len(counts) == len(classes)
            and all(type(number) is int and number >= 0 for number in counts)
            and type(image_bytes) is int
        ):
            raise UserError(f"{self.path}: header lacks count, classes or totals; {remedy}")
        if not count == sum(counts) == entries - 1:
            raise UserError(
                f"{self.path}: header tells of {count} records, {sum(counts)} by class, but there "
                f"are {entries - 1}; copy or build the store again"
            )
        return header

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


class FolderStore:
    """An ImageFolder tree, `path`/CLASS/.../FILE: classes and files in sorted order.

    Names are kept in one block of bytes, not as objects, so that forked workers share them.

    Raises:
        UserError: no images in `path`.
        OSError: its file system is away.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        members, self.classes = image_tree(walk_files(path))
        if not members:
            raise UserError(
                f"{path}: no CLASS/IMAGE files below it; if its images lie flat, build a store: "
                f"python -m bip data build-lmdb {path.parent} OUT"
            )
        self._labels = np.array([label for _, label in members], np.int32)
        names = [os.fsencode(name) for name, _ in members]
        self._names = b"".join(names)
        self._ends = np.cumsum([len(name) for name in names], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._labels)

    def name(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0
        return str(self.path / os.fsdecode(self._names[start : int(self._ends[index])]))

    def check_unchanged(self) -> None:
        """A file that is gone is found when it is read."""

    def prefetch(self, indices: Iterable[int]) -> None:
        """Nothing: a file is read in one piece anyhow."""

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def read(self, index: int) -> tuple[bytes, int]:
        """The file's bytes and its label. Raises UserError if the file cannot be read, OSError if
        its file system is away."""
        name, what = self.name(index), f"image {index}, class {self.classes[self.label(index)]}"
        try:
            with open(name, "rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                if size > MOST_BYTES:
                    raise DamagedImage(f"{name} ({what}): {no_image_of(size)}; remove it")
                return stream.read(), self.label(index)
        except OSError as error:
            raise_passing(error, f"{name} ({what})")
            raise UserError(f"{name}: cannot be read ({error.strerror}); {what}") from error


def no_image_of(size: int) -> str:
    return f"is no image, as it has {size / 1e6:.0f} MB"


def image_tree(names: Iterable[str]) -> tuple[list[tuple[str, int]], list[str]]:
    """Sort relative names CLASS/.../IMAGE into ((name, label) of each image, class names).

    One rule for folders and archives, so that both give the same order. Hidden files and files
    that are no images by their suffix are left out.
    """
    found: list[tuple[str, str]] = []
    for name in names:
        path = PurePosixPath(name)
        hidden = any(part.startswith(".") for part in path.parts)
        if len(path.parts) > 1 and not hidden and path.suffix.lower() in IMAGE_SUFFIXES:
            found.append((path.parts[0], name))
    found.sort()
    classes = sorted({class_name for class_name, _ in found})
    labels = {class_name: label for label, class_name in enumerate(classes)}
    return [(name, labels[class_name]) for class_name, name in found], classes


def walk_files(root: Path) -> Iterable[str]:
    """The files below a folder, by their names relative to it. Links are followed.

    Raises:
        UserError: a folder cannot be read.
        OSError: its file system is away.
    """
    for folder, _, files in os.walk(root, onerror=_unreadable, followlinks=True):
        prefix = os.path.relpath(folder, root)
        for file in files:
            yield file if prefix == "." else f"{prefix}/{file}"


def _unreadable(error: OSError) -> None:
    raise_passing(error, error.filename)
    raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
