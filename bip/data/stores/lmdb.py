"""This program's LMDB layout: its format, and `LmdbStore`, which reads it.

Format version 1; all integers big-endian; nothing is pickled:

    key, 8 bytes: index 0 ... count - 1
    value: label, width, height (int32 each), CRC32 (uint32), image bytes as in the original file
    key b"header": JSON {"format", "version", "count", "classes", "class_counts", "image_bytes",
        "skipped": source images left out, "options": how the images were changed and checked}

The CRC32 covers label, width, height and image bytes. A store is one file; it gets its name only
when it is complete (`bip.data.stores.writer`), and the header is its last record.
"""

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import lmdb

from bip.data.stores.base import DamagedImage
from bip.data.stores.environment import LmdbFile
from bip.errors import UserError
from bip.files import raise_passing

FORMAT = "bip-lmdb"
VERSION = 1
HEADER_KEY = b"header"
_RECORD = struct.Struct(">iii")
_CRC = struct.Struct(">I")
_IMAGE_OFFSET = _RECORD.size + _CRC.size


def record_key(index: int) -> bytes:
    return index.to_bytes(8, "big")


def pack_record(data: bytes, label: int, width: int, height: int) -> bytes:
    """The stored value of one image."""
    head = _RECORD.pack(label, width, height)
    return head + _CRC.pack(zlib.crc32(data, zlib.crc32(head))) + data


class LmdbStore(LmdbFile):
    """Read access to a store that `bip.data.stores.writer` made.

    Raises:
        UserError: not a store, half-built, truncated, or of a newer format.
        OSError: its file system is unreachable.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.header = self._read_header()
        self.classes: list[str] = self.header["classes"]
        self._count: int = self.header["count"]

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded bytes and the label.

        Raises:
            DamagedImage: its checksum is wrong, or its class does not exist.
            UserError: the record is missing.
            OSError: the store's file system is unreachable.
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

    def _key(self, index: int) -> bytes:
        return record_key(index)

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
                f"{self.path}: header counts {count} records, {sum(counts)} by class, but there "
                f"are {entries - 1}; copy or build the store again"
            )
        return header
