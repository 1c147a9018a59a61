"""Durable files: written whole or not at all, readable after any crash."""

import contextlib
import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Self

from bip.errors import UserError

# Errors of a file system that is unreachable for a while.
_PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EAGAIN, errno.EBUSY}
_PASSING |= {errno.ECOMM, errno.ENOLINK, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN}
_PASSING |= {errno.ENETUNREACH, errno.ENOTCONN, errno.ECONNRESET, errno.ESHUTDOWN, errno.EPROTO}


# How file systems refuse what they do not have: links, locks.
NOT_SUPPORTED = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EMLINK}


def may_pass(error: OSError) -> bool:
    """Whether the error may pass without a fix by the user. (A full disk stays full.)"""
    return error.errno in _PASSING


def raise_passing(error: Exception, what: object) -> None:
    """Raise an OSError that names `what` if `error` may pass; else do nothing.

    Args:
        error: an OSError, or one whose text ends with the system's text, such as LMDB's.
    """
    for number in _PASSING:
        text = os.strerror(number)
        if error.errno == number if isinstance(error, OSError) else str(error).endswith(text):
            raise OSError(number, text, str(what)) from error


def result_dir_error(folder: Path, error: OSError) -> Exception:
    """The exception for an unusable `folder`: a UserError, or `error` itself if it may pass."""
    if may_pass(error):
        return error
    return UserError(
        f"result_dir: {folder}: {error.strerror}; repair it or give another --result-dir"
    )


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def fsync_folder(folder: Path) -> None:
    """Make the folder's entries (new names, renames) durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_open(path: Path) -> Iterator[BinaryIO]:
    """A stream to a temporary file; at the end it is synced, then renamed to `path`.

    A reader sees the old file or the new one, never a part. Raises OSError (disk full,
    read-only folder) and leaves the old file as it was.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync_folder(path.parent)


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write `data` through `atomic_open`."""
    with atomic_open(path) as stream:
        stream.write(data)


class DigestWriter:
    """Writes to `stream`, and computes its SHA-256 in a thread at the same time."""

    LARGE = 1 << 20  # bytes; for fewer a thread costs more than it saves

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.sha256 = hashlib.sha256()
        self.pool = ThreadPoolExecutor(1)

    def write(self, data: bytes) -> int:
        if len(data) < self.LARGE:
            self.sha256.update(data)
            return self.stream.write(data)
        hashing = self.pool.submit(self.sha256.update, data)
        written = self.stream.write(data)
        hashing.result()  # the caller may change `data` after this call
        return written

    def flush(self) -> None:
        self.stream.flush()

    def hexdigest(self) -> str:
        return self.sha256.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()


def atomic_write_json(path: Path, value: Any) -> None:
    """`atomic_write_bytes` of `value` as indented JSON."""
    atomic_write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """A JSON file's value, or None if there is no such file.

    Raises UserError if it is damaged, OSError if its file system is unreachable.
    """
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and may_pass(error):
            raise
        raise UserError(f"{path}: cannot be read ({error})") from None


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line. A line cut short by an earlier crash is ended first."""
    with open(path, "a+b") as stream:
        if stream.tell() > 0:
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                stream.write(b"\n")
        stream.write((json.dumps(record) + "\n").encode())


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSON-lines file; none if it does not exist. Skips damaged lines."""
    try:
        stream = open(path, "rb")  # noqa: SIM115
    except (FileNotFoundError, NotADirectoryError):
        return
    with stream:
        for line in stream:
            if (record := json_object(line)) is not None:
                yield record


def json_object(text: bytes | str) -> dict[str, Any] | None:
    """The JSON object that `text` is, or None."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
