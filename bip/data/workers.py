"""Reading and decoding in worker processes: the base of the loaders `lmdb` and `folder`."""

import atexit
import contextlib
import errno
import gc
import multiprocessing.connection
import multiprocessing.queues
import os
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from bip.data.options import DataOptions
from bip.data.reader import Batch, Item, Loader, Reader, Request, Skips, Split
from bip.data.stores.base import ArraySplit
from bip.errors import ExitCode, LostWorker, UserError
from bip.files import may_pass
from bip.machine import limit_reached

_T = TypeVar("_T")
# Below it multiprocessing adds up to 40 characters.
LONGEST_TMPDIR = 60


class _Work(Dataset[Item | str | OSError]):
    """Requests as the DataLoader's items.

    Errors are returned, not raised: a UserError as its text, and an OSError that may pass as
    itself, because a raised one would reach the parent without its number.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __getitem__(self, request: Request) -> Item | str | OSError:
        try:
            return self.reader.read(request, shared=get_worker_info() is not None)
        except UserError as error:
            return str(error)
        except OSError as error:
            if may_pass(error):
                return error
            if limit := limit_reached(error):
                return f"{self.reader.store.path}: a loader process cannot read it: {limit}"
            raise
        except (RuntimeError, MemoryError) as error:  # mostly a full /dev/shm
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            if isinstance(error, RuntimeError) and "memory" not in reason:
                raise
            return (
                f"{self.reader.store.path}: a loader process cannot get memory ({reason}); use "
                "fewer --num-workers, or ask for more memory or space in /dev/shm"
            )


def _unchanged(item: Any) -> Any:
    return item


def _begin_worker(_: int) -> None:
    # A scheduler signals every process of a job; here the parent ends its workers.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # Python prints the error and drops the batch, for which the run would wait forever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]


def _end_worker(error: Exception, _batch: object) -> None:
    """A batch cannot be sent to the run's process: the worker ends, which that process notices."""
    reason = limit_reached(error) or f"{type(error).__name__}: {error}"
    print(f"error: a loader process cannot send a batch: {reason}", file=sys.stderr, flush=True)
    os._exit(ExitCode.FAILED)


class WorkerLoader(Loader):
    """A split read and decoded by worker processes (with `num_workers` 0 by this process)."""

    def __init__(self, split: Split, options: DataOptions, device: torch.device) -> None:
        assert not isinstance(split, ArraySplit)
        self.reader = Reader(split, options)
        self.num_workers = options.num_workers
        self.device = device

    def __len__(self) -> int:
        return len(self.reader.store)

    def fetch(self, requests: Iterable[Request]) -> Iterator[Batch]:
        return _to_device(self._fetch(requests), self.device)

    def _fetch(self, requests: Iterable[Request]) -> Iterator[Batch]:
        pending: deque[Request] = deque()  # whose batches are not received yet
        loader = DataLoader(
            _Work(self.reader),
            sampler=_remember(requests, pending),
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_begin_worker if self.num_workers else None,
            # Forking is safe as workers do not use CUDA; spawning would import torch in each.
            multiprocessing_context="fork" if self.num_workers else None,
            generator=torch.Generator(),  # else the DataLoader would draw from the global one
        )
        skips = Skips()
        batches: Iterator[Any] | None = None
        try:
            with _forking():
                batches = self._start(loader)
            while True:
                try:
                    batch = next(batches, None)
                except (RuntimeError, OSError, EOFError) as error:
                    raise self._explain(error, batches, pending) from error
                if batch is None:
                    return
                pending.popleft()
                if isinstance(batch, str):
                    raise UserError(batch)
                if isinstance(batch, OSError):
                    raise batch
                images, labels, skipped = batch
                skips.report(skipped)
                yield images, torch.from_numpy(labels)
        finally:
            _end_workers(batches)

    def _start(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """The loader's iterator. If a worker cannot be started, those before it are ended."""
        before = set(multiprocessing.active_children())
        try:
            return iter(loader)
        except (OSError, RuntimeError) as error:
            started = [p for p in multiprocessing.active_children() if p not in before]
            for process in started:  # they ignore SIGTERM, by which Python would end them
                process.kill()
                process.join()
            for frame, _ in traceback.walk_tb(error.__traceback__):
                half_made = frame.f_locals.get("self")
                if isinstance(half_made, _MultiProcessingDataLoaderIter):
                    half_made._shutdown = True  # its own clean-up would fail
            if (limit := limit_reached(error)) is None:
                raise
            raise UserError(
                f"num_workers: loader process {len(started) + 1} of {self.num_workers} cannot "
                f"start: {limit}; use fewer --num-workers, or raise that limit"
            ) from error

    def _explain(self, error: Exception, batches: object, pending: Iterable[Request]) -> Exception:
        """The error to raise for a dead worker, which torch reports within five seconds."""
        if limit := limit_reached(error):
            return UserError(f"num_workers: batches cannot be received: {limit}; use fewer")
        if not isinstance(batches, _MultiProcessingDataLoaderIter):
            return error
        # Its pipe may break a moment before the process ends.
        for gone in multiprocessing.connection.wait([w.sentinel for w in batches._workers], 1):
            next(w for w in batches._workers if w.sentinel == gone).join(1)
        dead = {number for number, w in enumerate(batches._workers) if not w.is_alive()}
        if not dead:
            return error
        path = self.reader.store.path
        codes = sorted({batches._workers[number].exitcode or 0 for number in dead})
        how = ", ".join(_ending(code) for code in codes)
        try:
            self.reader.store.check_unchanged()
        except OSError:
            pass  # how the process died is more useful to the user
        except UserError:
            return UserError(
                f"{path}: replaced or cut short during the run, and a loader process died "
                f"({how}); put the store back and start again"
            )
        # Batches are received in order, so the first one due from a dead worker is the cause.
        first = batches._rcvd_idx
        due = [r for n, r in enumerate(pending, first) if batches._task_info[n][0] in dead]
        where = f" over the batch {_some(due[0].indices.tolist())}" if due else ""
        died = f"{path}: a loader process died{where} ({how}); "
        if -signal.SIGBUS in codes:  # an I/O error of a mapped file
            died += "its file system failed, or /dev/shm is full: use fewer --num-workers"
            return OSError(errno.EIO, died)
        return LostWorker(
            f"{died}mostly for lack of memory: use fewer --num-workers, or ask for more"
        )


def _ending(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _some(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:3]))
    return f"of records {shown}" + (f" and {len(indices) - 3} more" if len(indices) > 3 else "")


def _remember(requests: Iterable[Request], pending: deque[Request]) -> Iterator[Request]:
    for request in requests:
        pending.append(request)
        yield request


@contextlib.contextmanager
def _forking() -> Iterator[None]:
    """Start forked workers in the body.

    The garbage collector is frozen, so that a worker never collects this process's objects:
    destroying DALI's pipelines there crashes (SIGSEGV), and the collector's marks would copy shared
    pages. torch's SIGCHLD handler is removed, as it raises anywhere in the main thread when a
    worker dies. The death is reported when the worker's batch is due.
    """
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD)
    _use_short_socket_folder()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if main:
            signal.signal(signal.SIGCHLD, handler)


def _use_short_socket_folder() -> None:
    """Have workers open their sockets where a socket's path fits into 108 bytes.

    multiprocessing makes the folder in TMPDIR, whose path has over 100 characters on some clusters.
    """
    config = multiprocessing.process.current_process()._config  # type: ignore[attr-defined]
    if "tempdir" in config or len(os.fsencode(tempfile.gettempdir())) <= LONGEST_TMPDIR:
        return
    for parent in (os.environ.get("XDG_RUNTIME_DIR", ""), "/tmp", "/var/tmp", "/dev/shm"):
        if parent and len(os.fsencode(parent)) <= LONGEST_TMPDIR:
            with contextlib.suppress(OSError):
                config["tempdir"] = tempfile.mkdtemp(prefix="bip-", dir=parent)
                atexit.register(shutil.rmtree, config["tempdir"], ignore_errors=True)
                return
    raise UserError(
        f"TMPDIR: {tempfile.gettempdir()}: too long for the sockets of loader processes; set a "
        "shorter one, or use --num-workers 0"
    )


def _to_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on the device. CUDA copies the next batch early, on a stream of its own."""
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)

    def copied() -> Iterator[tuple[Batch, torch.cuda.Event]]:
        for images, labels in batches:
            with torch.cuda.stream(stream):
                moved = (
                    images.to(device, non_blocking=True),
                    labels.to(device, non_blocking=True),
                )
                event = stream.record_event()
            yield moved, event

    for (images, labels), event in _one_ahead(copied()):
        current = torch.cuda.current_stream(device)
        current.wait_event(event)
        for tensor in (images, labels):
            tensor.record_stream(current)  # else its memory could be reused during the step
        yield images, labels


def _one_ahead(items: Iterator[_T]) -> Iterator[_T]:
    last: list[_T] = []
    for item in items:
        yield from last
        last = [item]
    yield from last


def _end_workers(batches: object) -> None:
    """End an iterator's processes now, not when it is collected.

    A traceback may keep the iterator alive until the interpreter exits. Then multiprocessing sends
    SIGTERM, which the workers ignore, and waits forever. PyTorch has no public call for this.
    """
    if isinstance(batches, _MultiProcessingDataLoaderIter):
        batches._shutdown_workers()
        for worker in batches._workers:
            if worker.is_alive():
                worker.kill()
