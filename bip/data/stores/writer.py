"""`LmdbWriter`: build a store so that an incomplete one is never used."""

import contextlib
import errno
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import lmdb

from bip.data.stores.environment import size_of
from bip.data.stores.lmdb import FORMAT, HEADER_KEY, VERSION, pack_record, record_key
from bip.data.stores.staging import claims
from bip.errors import UserError
from bip.files import atomic_write_json, fsync_folder, read_json


class LmdbWriter:
    """Build a store of `classes` at `path`; use as a context manager.

    Records go to a hidden file beside `path`, which is renamed to `path` when the block ends
    without an exception. With a `plan`, a build that ends early leaves that file and a record of
    its progress; the next writer with the same plan resumes there, after `done` source images.
    Without a plan an error removes the file, and the next build overwrites that of a killed one.
    A thread writes the records, so that the next ones are prepared while the disk is busy.

    Args:
        classes: names by label; None: named by their numbers, as many as there are labels.
        options: how the images were changed and checked, for the header.
        plan: identifies all that the records depend on; None for a build that cannot resume.
        retry_skipped: start again if the earlier build skipped images.

    Attributes:
        skipped: (name, reason) of source images left out.
        repaired: how many images were repaired, by what they were.
        image_bytes, source_bytes: size of the images as stored, and before any re-encoding.

    Raises:
        UserError: `path` exists, another process is building it, or the filesystem has no locks.
    """

    _BATCH = 1000  # records per transaction
    _BATCH_BYTES = 64 << 20

    def __init__(
        self,
        path: Path,
        classes: Sequence[str] | None,
        plan: str | None = None,
        retry_skipped: bool = False,
        options: Mapping[str, int] | None = None,
    ) -> None:
        self.path = path
        self.classes = list(classes or ())
        self._numbered = classes is None
        self._options = dict(options or {})
        self._plan = plan
        self._retry_skipped = retry_skipped
        self._partial = path.with_name(f".{path.name}.partial")
        self._note = path.with_name(f".{path.name}.progress")
        self._thread = ThreadPoolExecutor(1)
        self._transaction: Future[None] | None = None
        self._start()

    def _start(self, note: dict[str, Any] | None = None) -> None:
        note = note or {}
        self._pending: list[tuple[bytes, bytes]] = []
        self._pending_bytes = 0
        self._count: int = note.get("count", 0)
        self.image_bytes: int = note.get("image_bytes", 0)
        self._class_counts: list[int] = note.get("class_counts", [0] * len(self.classes))
        if self._numbered:
            self.classes = [f"{label}" for label in range(len(self._class_counts))]
        self.source_bytes: int = note.get("source_bytes", 0)
        self.skipped: list[tuple[str, str]] = [(n, why) for n, why in note.get("skipped", [])]
        self.repaired: Counter[str] = Counter(note.get("repaired", {}))

    @property
    def done(self) -> int:
        """Source images that were stored or skipped."""
        return self._count + len(self.skipped)

    def add(
        self,
        data: bytes,
        label: int,
        width: int,
        height: int,
        source_bytes: int | None = None,
        repaired: str | None = None,
    ) -> None:
        """Append one image: its encoded bytes, class index and size in pixels."""
        self._pending.append((record_key(self._count), pack_record(data, label, width, height)))
        self._pending_bytes += len(data)
        self._count += 1
        self.image_bytes += len(data)
        if self._numbered and label >= len(self.classes):
            more = range(len(self.classes), label + 1)
            self.classes += map(str, more)
            self._class_counts += [0] * len(more)
        self._class_counts[label] += 1
        self.source_bytes += len(data) if source_bytes is None else source_bytes
        if repaired is not None:
            self.repaired[repaired] += 1
        if len(self._pending) >= self._BATCH or self._pending_bytes >= self._BATCH_BYTES:
            self._flush()

    def skip(self, name: str, reason: str) -> None:
        """Leave out one source image."""
        self.skipped.append((name, reason))

    def __enter__(self) -> Self:
        self._lock = os.open(self._partial, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._claim()
            note = self._earlier_note()
            if note is None or not self._go_on(note):
                self._note.unlink(missing_ok=True)  # its records are gone
                os.ftruncate(self._lock, 0)
                self._start()
                self._open()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def _open(self) -> None:
        self._env = lmdb.open(
            str(self._partial),
            subdir=False,
            map_size=max(64 << 20, 2 * os.fstat(self._lock).st_size),
            lock=False,  # the flock is enough
            # Sync every transaction only if a later build may resume; always sync at the end.
            sync=self._plan is not None,
            metasync=self._plan is not None,
        )

    def _earlier_note(self) -> dict[str, Any] | None:
        try:
            note = read_json(self._note)
        except UserError:
            return None
        if self._plan is None or not isinstance(note, dict) or note.get("plan") != self._plan:
            return None
        return None if note["skipped"] and self._retry_skipped else note

    def _go_on(self, note: dict[str, Any]) -> bool:
        """Open an earlier build's file at its recorded progress. False if it is unusable."""
        try:
            self._open()
        except lmdb.Error:
            return False
        if os.fstat(self._lock).st_size < size_of(self._env):
            self._env.close()
            return False
        try:
            with self._env.begin(write=True) as transaction, transaction.cursor() as cursor:
                # After a crash the records may be one transaction ahead of the note.
                while cursor.last() and cursor.key() >= record_key(note["count"]):
                    cursor.delete()
                whole = bool(transaction.stat()["entries"] == note["count"])
        except lmdb.Error:
            whole = False
        if whole:
            self._start(note)
        else:
            self._env.close()
        return whole

    def _claim(self) -> None:
        try:
            claimed = claims(self._lock, self._partial)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            raise UserError(
                f"{self.path}: this filesystem has no file locks; build on a local disk and copy "
                "the file"
            ) from error
        if not claimed:
            raise UserError(f"{self.path}: another process is building it; wait for that one")
        if self.path.exists():
            self._partial.unlink()
            raise UserError(f"{self.path}: exists; remove it or choose another folder")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        whole = False
        try:
            if kind is None:
                self._finish()
                whole = True
            elif self._plan is not None:
                # Keep as much as possible: the note counts complete transactions only.
                with contextlib.suppress(OSError, lmdb.Error):
                    self._flush()
                    self._wait()
        finally:
            self._thread.shutdown()
            self._env.close()
            if whole or self._plan is None or not self._note.exists():
                for path in (self._note, self._partial):
                    path.unlink(missing_ok=True)
            os.close(self._lock)

    def _finish(self) -> None:
        header = {
            "format": FORMAT,
            "version": VERSION,
            "count": self._count,
            "classes": self.classes,
            "class_counts": self._class_counts,
            "image_bytes": self.image_bytes,
            "skipped": len(self.skipped),
            "options": self._options,
        }
        self._pending.append((HEADER_KEY, json.dumps(header).encode()))
        self._flush(with_note=False)
        self._wait()
        self._env.sync(True)
        os.replace(self._partial, self.path)
        fsync_folder(self.path.parent)

    def _flush(self, with_note: bool = True) -> None:
        """Start the transaction of all pending records, when the one before it has ended."""
        self._wait()
        note = self._progress() if with_note and self._plan is not None else None
        self._transaction = self._thread.submit(self._write, self._pending, note)
        self._pending, self._pending_bytes = [], 0

    def _wait(self) -> None:
        """Until the transaction has ended. Raises its error."""
        if self._transaction is not None:
            self._transaction.result()

    def _progress(self) -> dict[str, Any]:
        return {
            "plan": self._plan,
            "count": self._count,
            "image_bytes": self.image_bytes,
            "class_counts": list(self._class_counts),
            "source_bytes": self.source_bytes,
            "skipped": list(self.skipped),
            "repaired": dict(self.repaired),
        }

    def _write(self, records: list[tuple[bytes, bytes]], note: dict[str, Any] | None) -> None:
        while True:
            try:
                with self._env.begin(write=True) as transaction:
                    for key, value in records:
                        # Keys only increase (the header's is the last), so LMDB can fill its pages.
                        transaction.put(key, value, append=True)
                break
            except lmdb.MapFullError:
                self._env.set_mapsize(2 * self._env.info()["map_size"])
        if note is not None:
            atomic_write_json(self._note, note)
