"""`compiled` passes over arrays on the CPU: numba, its cache on the node's own disk, and threads.

Each pass is written once, over equal parts of its arrays, and compiled twice: for one thread, and
for several. Threads are OpenMP's, which start at once; those of a thread pool would have to be
woken first, on cores where torch's own threads still spin. Importing this imports numba: only what
runs on a CPU does.
"""

import contextlib
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
import torch

LOCK_SECONDS = 20.0  # several times what a pass takes to compile
THREAD_WORTH = 1 << 18  # elements; for fewer a thread costs more than it saves


def _find_cache() -> None:
    """Have numba cache in a folder of this user's on the node's own disk.

    Beside the code, where numba looks first, may be a disk that all nodes share, and a container
    may let us write neither there nor to the home folder. NUMBA_CACHE_DIR names another.
    """
    if not numba.config.CACHE_DIR:  # type: ignore[attr-defined]
        with contextlib.suppress(OSError):  # no such disk: numba looks for a folder itself
            numba.config.CACHE_DIR = _private_folder()  # type: ignore[attr-defined]


def _private_folder() -> str:
    """A folder that no other user can write: cached code is run."""
    folder = Path(tempfile.gettempdir(), f"bip-numba-{os.getuid()}")
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if status.st_uid == os.getuid() and stat.S_ISDIR(status.st_mode):
            folder.chmod(0o700)
            return str(folder)
    return tempfile.mkdtemp(prefix="bip-numba-")


@contextlib.contextmanager
def _one_process_at_a_time() -> Iterator[None]:
    """Hold this node's lock for compiling: what one process compiles, the next ones load.

    Without a lock each compiles for itself. So it does after LOCK_SECONDS: SLURM may have suspended
    the job that holds the lock.
    """
    lock, end = None, time.monotonic() + LOCK_SECONDS
    with contextlib.suppress(OSError):
        lock = os.open(Path(_private_folder(), "lock"), os.O_RDWR | os.O_CREAT, 0o600)
        while time.monotonic() < end:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


_find_cache()
compiled: Any = numba.njit(cache=True, nogil=True, boundscheck=False)
threaded: Any = numba.njit(cache=True, nogil=True, boundscheck=False, parallel=True)
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # type: ignore[attr-defined]


def share(size: int) -> int:
    """Number of parts, one per thread, for a pass over an array of this size."""
    most = int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    parts = min(torch.get_num_threads(), most, size // THREAD_WORTH)
    if parts > 1:
        with _torchs_threads():
            numba.set_num_threads(parts)
    return max(1, parts)


@contextlib.contextmanager
def _torchs_threads() -> Iterator[None]:
    """Leave torch its number of threads, on which the bits of its sums depend.

    numba starts as many threads as there are cores, by the OpenMP that torch uses too.
    """
    before = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def in_parts(function: Any) -> Callable[..., None]:
    """Compile `function(parts, ...)`, whose outer loop is a prange over `parts`, both ways.

    The caller gets `parts` from `share` and makes the output arrays to fit.
    """
    # numba caches by name, so the second needs another name.
    twin = FunctionType(function.__code__, function.__globals__, f"{function.__name__}_threaded")
    twin.__qualname__ = twin.__name__
    alone, together = compiled(function), threaded(twin)

    def call(parts: int, *arguments: Any) -> None:
        compiled_one = together if parts > 1 else alone
        if compiled_one.signatures:
            compiled_one(parts, *arguments)
            return
        with _one_process_at_a_time(), _torchs_threads():
            compiled_one(parts, *arguments)

    return call
