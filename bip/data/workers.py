"""Reading and decoding in worker processes: the base of the loaders `lmdb` and `folder`."""

import contextlib
import errno
import gc
import multiprocessing.connection
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from bip.data.options import DataOptions
from bip.data.reader import Batch, Item, Loader, Reader, Request, Skips, Split
from bip.data.stores.base import ArraySplit
from bip.errors import LostWorker, UserError
from bip.files import may_pass

_T = TypeVar("_T")


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


def _shield_worker(_: int) -> None:
    # A scheduler signals every process of a job; here the parent ends its workers.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


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
            worker_init_fn=_shield_worker if self.num_workers else None,
            # Forking is safe as workers do not use CUDA; spawning would import torch in each.
            multiprocessing_context="fork" if self.num_workers else None,
            generator=torch.Generator(),  # else the DataLoader would draw from the global one
        )
        with _forking():
            batches = iter(loader)
        skips = Skips()
        try:
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

    def _explain(self, error: Exception, batches: object, pending: Iterable[Request]) -> Exception:
        """The error to raise for a dead worker, which torch reports within five seconds."""
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
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if main:
            signal.signal(signal.SIGCHLD, handler)


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
