"""Open LMDB files: one environment per file and process, read-only, never across a fork."""

import contextlib
import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lmdb

from bip.data.stores.pages import open_pages
from bip.errors import UserError
from bip.files import raise_passing


class Environment:
    """An open read-only LMDB environment and the process that opened it.

    Args:
        in_order: all records will be read in order.
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
        self._pages = None if in_order else open_pages(data_file(path), self.env)

    def prefetch(self, keys: Iterable[bytes]) -> None:
        """A hint that the values of `keys` will be read soon."""
        if self._pages is not None:
            self._pages.prefetch(self.env, keys)


# LMDB allows one environment per file and process, so stores of one file (device, inode) share it.
# An entry is removed with its last store.
_open_environments: weakref.WeakValueDictionary[tuple[int, int], Environment] = (
    weakref.WeakValueDictionary()
)


def _shared_environment(path: Path, in_order: bool) -> Environment:
    status = path.stat()
    key = (status.st_dev, status.st_ino)
    found = _open_environments.get(key)
    if found is not None and found.pid != os.getpid():
        # Inherited by a fork: LMDB forbids its use here. Closing only unmaps the child's copy.
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
    """Bytes of an environment's pages; its file has at least as many, if it is complete."""
    return int((env.info()["last_pgno"] + 1) * env.stat()["psize"])


def open_environment(path: Path, in_order: bool = False) -> Environment:
    """The LMDB environment of a store, this process's own.

    Args:
        in_order: read ahead, for a reader of all records. Without effect if it is already open.

    Raises:
        UserError: it does not exist, is unreadable or cut short.
        OSError: its file system is unreachable.
    """
    try:
        opened = _shared_environment(path, in_order)
    except (lmdb.Error, OSError) as error:
        raise_passing(error, path)
        raise UserError(
            f"{path}: not a readable LMDB store ({error}); "
            "build it with: python -m bip data build-lmdb SRC OUT"
        ) from error
    # Reading a page beyond the end of the file would be a bus error, not an exception.
    size, expected = data_file(path).stat().st_size, size_of(opened.env)
    if size < expected:
        raise UserError(f"{path}: truncated, {size} of {expected} bytes; copy or build it again")
    return opened


class LmdbFile:
    """The base of stores in an LMDB file, which is opened once per process. Picklable.

    Raises UserError and OSError as `open_environment`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: Environment | None = open_environment(path)
        self._identity = self._find_identity()

    def name(self, index: int) -> str:
        return f"record {index} of {self.path}"

    def prefetch(self, indices: Iterable[int]) -> None:
        with contextlib.suppress(lmdb.Error, OSError):  # `read` reports it
            self._open().prefetch(map(self._key, indices))

    def check_unchanged(self) -> None:
        """Raises UserError if the file was replaced, OSError if its file system is unreachable.

        A worker that mapped a file cut short would die by a bus error; one that opened a new file
        would train on other images.
        """
        try:
            unchanged = self._find_identity() == self._identity
        except OSError as error:
            raise_passing(error, self.path)
            raise UserError(
                f"{self.path}: gone during the run ({error.strerror}); put it back and start again"
            ) from error
        if not unchanged:
            raise UserError(
                f"{self.path}: was replaced or cut short during the run; put the store back, or "
                "start a new run with the new one"
            )

    def _find_identity(self) -> tuple[int, int, int]:
        status = data_file(self.path).stat()
        return status.st_dev, status.st_ino, status.st_size

    def _key(self, index: int) -> bytes:
        raise NotImplementedError

    def _env(self) -> lmdb.Environment:
        return self._open().env

    def _open(self) -> Environment:
        if self._opened is None or self._opened.pid != os.getpid():
            self._opened = open_environment(self.path)
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}
