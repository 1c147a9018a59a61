"""The lock on a run folder: two attempts of one run never write it at the same time.

A lock is a file `.lock.N` that names its holder, which touches it every few seconds. An attempt
takes over a dead holder's lock by creating `.lock.N+1` and removing N. Only one attempt can create
it, on NFS too, because it is made as a hard link. A holder that finds its file removed stops
writing. The file of a released lock stays, so that N only grows.
"""

import json
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from bip.errors import RankError, UserError
from bip.files import NOT_SUPPORTED, result_dir_error
from bip.slurm import SlurmError, kill_wait, own_restarts, own_task, show_task

BEAT_SECONDS = 5.0
UNREACHABLE_SECONDS = 30.0  # for which the file system may be unreachable while waiting


@dataclass(frozen=True)
class Holder:
    """One attempt: a process, and the SLURM job and restart that it belongs to."""

    host: str
    boot: str  # boot ID and process namespace, in which `pid` is valid
    pid: int
    born: str  # start time of the process: a later process may get the same pid
    job: str | None
    restart: int
    released: bool = False

    @classmethod
    def self(cls, env: Mapping[str, str] = os.environ) -> "Holder":
        here = platform.node(), _boot(), os.getpid(), _born(os.getpid()) or ""
        return cls(*here, own_task(env), own_restarts(env))

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


def _boot() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def _born(pid: int) -> str | None:
    """Start time of the process in kernel ticks; None if it has ended (or is a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _attempt_is_over(holder: Holder) -> bool | None:
    """Whether SLURM has ended the holder's attempt; None if unknown.

    Its processes may run for another KillWait.
    """
    if not holder.job:
        return None
    try:
        task = show_task(holder.job, timeout=30)
    except (SlurmError, OSError):
        return None
    if task is None or task.restarts > holder.restart:
        return True
    return task.state not in ("RUNNING", "SUSPENDED", "CONFIGURING", "STOPPED", "SIGNALING")


class RunLock:
    """Held from `acquire` to `release` by one attempt, on its rank 0."""

    def __init__(self, folder: Path, env: Mapping[str, str] = os.environ) -> None:
        self.folder = folder
        self.own = Holder.self(env)
        self.path: Path | None = None
        self._ended = threading.Event()
        self._beat: threading.Thread | None = None

    def acquire(self, give_up: Callable[[], bool] = lambda: False) -> bool:
        """Take the lock; wait for its holder if SLURM is ending that.

        Returns False if `give_up` returned True meanwhile. Raises UserError if a live attempt
        holds it or the folder cannot be used, OSError if its file system is unreachable.
        """
        began = time.monotonic()
        seen, since, is_reported = (0.0, -1), began, False
        limit: float | None = None
        while not give_up():
            try:
                number, holder = self._newest()
            except OSError:
                if time.monotonic() - began > max(UNREACHABLE_SECONDS, limit or 0):
                    raise
                time.sleep(1)
                continue
            beat = (self._touched(number), number)
            now = time.monotonic()
            if beat != seen:
                seen, since = beat, now
            silent = now - since
            if holder is None or holder.released or self._is_dead(holder, silent):
                if self._take(number):
                    if holder is not None and not holder.released:
                        print(f"taking over from {holder}, which has ended", flush=True)
                    return True
                continue
            if limit is None:
                limit = self._patience(holder)
            if now - began > limit:
                raise UserError(
                    f"{self.folder}: in use by {holder}; wait for it or cancel it (touched "
                    f"{max(0, time.time() - beat[0]):.0f} s ago)"
                )
            if not is_reported:
                print(f"waiting for {holder} to end, which still has {self.folder}", flush=True)
                is_reported = True
            time.sleep(min(1.0, limit / 10))
        return False

    def check(self) -> None:
        """Raises RankError if another attempt has taken the folder over."""
        try:
            if self.path is not None:
                self.path.open("rb").close()  # opening makes NFS ask its server again
        except FileNotFoundError:
            raise RankError(f"{self.folder}: another attempt has taken this run over") from None

    def release(self) -> None:
        """Release the lock if it is held."""
        self._ended.set()
        if self._beat is not None:
            self._beat.join()
        path, self.path = self.path, None
        if path is None or not path.exists():
            return
        released = asdict(self.own) | {"released": True}
        temporary = self._temporary(released)
        with suppress(OSError):
            os.replace(temporary, path)

    def _newest(self) -> tuple[int, Holder | None]:
        """The highest lock's number and its holder."""
        number = 0
        try:
            names = os.listdir(self.folder)
            numbers = [int(name[6:]) for name in names if re.fullmatch(r"\.lock\.\d+", name)]
            number = max(numbers, default=0)
            text = self._file(number).read_text()
            if not text:  # it is just being written, where there are no hard links
                time.sleep(1)
                text = self._file(number).read_text()
            return number, Holder(**json.loads(text))
        except (FileNotFoundError, ValueError, TypeError):
            return number, None  # no holder wrote it: a link makes the whole file appear
        except OSError as error:  # the lock may be held nevertheless
            raise result_dir_error(self.folder, error) from None

    def _file(self, number: int) -> Path:
        return self.folder / f".lock.{number}"

    def _touched(self, number: int) -> float:
        try:
            with open(self._file(number), "rb") as stream:  # opening makes NFS ask its server
                return os.fstat(stream.fileno()).st_mtime
        except OSError:
            return 0.0

    def _is_dead(self, holder: Holder, silent: float) -> bool:
        """`silent`: seconds since its last beat."""
        if holder.boot == self.own.boot:
            return _born(holder.pid) != holder.born
        if silent <= 3 * BEAT_SECONDS:
            return False
        over = _attempt_is_over(holder)
        # Where SLURM gives no answer, a minute without a beat counts as dead.
        return over if over is not None else silent > 60

    def _patience(self, holder: Holder) -> float:
        """Seconds to wait for a live holder: long only if it is being ended."""
        if _attempt_is_over(holder) or (holder.job and holder.job == self.own.job):
            return kill_wait() + 60
        if holder.boot != self.own.boot:
            return 75.0
        return 2.0

    def _take(self, number: int) -> bool:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self._temporary(asdict(self.own))
            try:
                self._make(temporary, self._file(number + 1))
            except FileExistsError:
                # After a lost answer NFS repeats the request, and reports the link that it made
                # itself. Then the file has two links.
                with open(temporary, "rb") as stream:  # opening makes NFS ask its server
                    if os.fstat(stream.fileno()).st_nlink != 2:
                        return False
            finally:
                temporary.unlink()
            self._file(number).unlink(missing_ok=True)
            if self._newest()[0] > number + 1:  # others took over meanwhile
                self._file(number + 1).unlink(missing_ok=True)
                return False
        except OSError as error:
            raise result_dir_error(self.folder, error) from None
        self.path = self._file(number + 1)
        self._ended.clear()
        self._beat = threading.Thread(target=self._touch, name="lock", daemon=True)
        self._beat.start()
        return True

    def _make(self, temporary: Path, path: Path) -> None:
        """Create the lock with its whole content, unless it exists."""
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise
            print(
                f"note: {self.folder}: its file system has no hard links, so the lock on it is "
                "weaker: do not start this run twice at the same moment",
                flush=True,
            )
            with open(path, "xb") as stream:  # others see it empty for a moment
                stream.write(temporary.read_bytes())

    def _temporary(self, holder: dict[str, object]) -> Path:
        path = self.folder / f".lock-{uuid.uuid4().hex}"
        path.write_text(json.dumps(holder))
        return path

    def _touch(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            path = self.path
            if path is not None:
                with suppress(OSError):
                    os.utime(path)
