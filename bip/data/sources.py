"""Sources: fetch uint8 images for requests, from memory or through worker processes."""

import contextlib
import errno
import gc
import math
import multiprocessing.connection
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from bip.data import decode
from bip.data.datasets import DatasetSpec
from bip.data.stores import DamagedImage, ImageStore
from bip.errors import LostWorker, UserError
from bip.files import may_pass

Batch = tuple[Tensor, Tensor]
_Item = tuple[Tensor, NDArray[np.int64], list[str]]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Request:
    """One rank's share of a batch.

    Attributes:
        indices: into the split, shape (n,).
        uniforms: the random numbers of the training view, shape (n, draws); None asks for the
            test view.
    """

    indices: NDArray[np.int64]
    uniforms: NDArray[np.float64] | None = None


class Source(Protocol):
    """Fetches one split's images."""

    def __len__(self) -> int: ...

    def fetch(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """For each request uint8 images (n, C, H, W) and int64 labels (n,), on the device.

        Requests may be taken ahead of their batches. A batch is valid until the next one is taken.
        Images are the random view of
        "resized_crop", and whole for "pad_crop", whose crop is applied to the batch afterwards.
        """
        ...


class MemorySource:
    """A split as one uint8 tensor on the training device."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, requests: Iterable[Request]) -> Iterator[Batch]:
        for request in requests:
            if self.images.is_cuda:
                rows = torch.from_numpy(request.indices).pin_memory()
                rows = rows.to(self.images.device, non_blocking=True)
                yield self.images[rows], self.labels[rows]
            else:  # NumPy copies whole rows, faster than torch's indexing on the CPU
                images = self.images.numpy()[request.indices]
                yield torch.from_numpy(images), self.labels[torch.from_numpy(request.indices)]


@dataclass(frozen=True)
class Reader:
    """Reads and decodes the images of requests; what a worker process holds."""

    store: ImageStore
    spec: DatasetSpec
    image_dim: int
    skip_bad: bool = False

    def read(self, request: Request, shared: bool = False) -> _Item:
        """uint8 images (n, C, H, W), labels (n,), and one line on each image replaced.

        Labels are no tensor: every tensor from a worker costs a connection to it.

        Args:
            shared: decode into memory that other processes can map, so that nothing is copied on
                the way to them.

        Raises:
            DamagedImage: one is, unless `skip_bad` and the request is for training.
            UserError: the store cannot be read.
            OSError: nor can it now, but its file system may come back.
        """
        random = request.uniforms is not None and self.spec.augment == "resized_crop"
        shape = (len(request.indices), self.spec.channels, self.image_dim, self.image_dim)
        images = _shared_bytes(shape) if shared else torch.empty(shape, dtype=torch.uint8)

        def read_one(row: int) -> tuple[int, int]:
            index = int(request.indices[row])
            data, label = self.store.read(index)
            draws = request.uniforms[row] if request.uniforms is not None and random else None
            try:
                images[row] = torch.from_numpy(self._view(data, draws))
            except decode.DECODE_ERRORS as error:
                raise self.damaged(index, label, error) from error
            return row, label

        pairs, skipped = self.each(request, read_one)
        for row, (origin, _) in enumerate(pairs):
            if origin != row:
                images[row] = images[origin]
        return images, np.array([label for _, label in pairs], np.int64), skipped

    def each(
        self,
        request: Request,
        read_one: Callable[[int], _T],
        map_: Callable[[Callable[[int], _T | str], range], Iterable[_T | str]] = map,
    ) -> tuple[list[_T], list[str]]:
        """`read_one` of every row; with `skip_bad` a bad row becomes the nearest good one after it.

        Within the batch, so that no image of a holdout is ever drawn.

        Args:
            read_one: returns no str.
            map_: as `map`; another may call it for several rows at once.
        """

        def read_or_tell(row: int) -> _T | str:
            try:
                return read_one(row)
            except DamagedImage as error:
                if request.uniforms is None:
                    raise
                if not self.skip_bad:
                    raise DamagedImage(f"{error}, or give --skip-bad") from error
                return str(error)

        self.store.check_unchanged()
        self.store.prefetch(request.indices.tolist())
        rows = list(map_(read_or_tell, range(len(request.indices))))
        skipped = [row for row in rows if isinstance(row, str)]
        found = [None if isinstance(row, str) else row for row in rows]
        good = [item for item in found if item is not None]
        if not good and skipped:
            raise UserError(f"{skipped[0]}; nor is another image of its batch sound")
        for row in reversed(range(len(found))):
            if found[row] is None:
                found[row] = found[(row + 1) % len(found)] or good[0]
        return [item for item in found if item is not None], skipped

    def damaged(self, index: int, label: int, error: Exception) -> DamagedImage:
        """What to tell the user of an image that does not decode."""
        return DamagedImage(
            f"{self.store.name(index)} (image {index}, class {self.store.classes[label]}) does not "
            f"decode ({decode.reason(error)}); repair or remove it and build the store again"
        )

    def _view(self, data: bytes, draws: NDArray[np.float64] | None) -> NDArray[np.uint8]:
        spec, dim = self.spec, self.image_dim
        if draws is None:
            return decode.test_view(decode.decode(data, spec.channels), dim, spec.test_zoom)
        return decode.resized_crop(data, draws, spec.channels, dim, spec.flip)


def _shared_bytes(shape: tuple[int, ...]) -> Tensor:
    # What DataLoader's own collation does in a worker; torch has no public call without a copy.
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


class _Work(Dataset[_Item | str | OSError]):
    """Requests as the DataLoader's items. An error for the user travels as its one line of text,
    an OSError that may pass as it is: raised, it would reach the parent without its number."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __getitem__(self, request: Request) -> _Item | str | OSError:
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
                f"{self.reader.store.path}: a loader process gets no memory ({reason}); use fewer "
                "--num-workers, or ask for more memory or space in /dev/shm"
            )


def _as_it_is(item: Any) -> Any:
    return item


def _shield_worker(_: int) -> None:
    # A scheduler signals the whole job; the parent decides when its workers end.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


class WorkerSource:
    """A split read and decoded by worker processes (in this one with `num_workers` 0)."""

    def __init__(self, reader: Reader, num_workers: int, device: torch.device) -> None:
        self.reader = reader
        self.num_workers = num_workers
        self.device = device

    def __len__(self) -> int:
        return len(self.reader.store)

    def fetch(self, requests: Iterable[Request]) -> Iterator[Batch]:
        return _to_device(self._fetch(requests), self.device)

    def _fetch(self, requests: Iterable[Request]) -> Iterator[Batch]:
        pending: deque[Request] = deque()  # handed out, and their batches not received yet
        loader = DataLoader(
            _Work(self.reader),
            sampler=_remember(requests, pending),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_shield_worker if self.num_workers else None,
            # Workers hold a few paths and use no CUDA; spawning would import torch in each.
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
                skips.tell(skipped)
                yield images, torch.from_numpy(labels)
        finally:
            _end_workers(batches)

    def _explain(self, error: Exception, batches: object, pending: Iterable[Request]) -> Exception:
        """What to tell the user; torch tells of a dead worker within five seconds."""
        if not isinstance(batches, _MultiProcessingDataLoaderIter):
            return error
        # Its pipe may break a moment before the process is gone.
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
            pass  # how the process died tells more
        except UserError:
            return UserError(
                f"{path}: replaced or cut short during the run, and a loader process died of it "
                f"({how}); put the store back and start again"
            )
        # Batches are received in order, so the first one that a dead worker owes is at fault.
        first = batches._rcvd_idx
        owed = [r for n, r in enumerate(pending, first) if batches._task_info[n][0] in dead]
        where = f" over the batch {_some(owed[0].indices.tolist())}" if owed else ""
        told = f"{path}: a loader process died{where} ({how}); "
        if -signal.SIGBUS in codes:  # what a mapped file has for an I/O error
            told += "its file system fails or was away, or /dev/shm is full: fewer --num-workers"
            return OSError(errno.EIO, f"{told} need less")
        return LostWorker(
            f"{told}mostly for want of memory: use fewer --num-workers, or ask for more"
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
    """Around the start of forked workers.

    Frozen, what this process holds is never collected in a worker: DALI's pipelines cannot be
    destroyed there (SIGSEGV), and the collector's marks would copy shared pages. And torch's
    handler of SIGCHLD is taken away again, which raises wherever the main thread is when a worker
    dies; the batch that the worker owes tells of it in a place made for it.
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


class Skips:
    """Tells of each image that was replaced, once, and how many there are."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def tell(self, skipped: Iterable[str]) -> None:
        for line in skipped:
            if line not in self._known:
                self._known.add(line)
                print(f"warning: skipped ({len(self._known)} so far): {line}", flush=True)


def _to_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """On CUDA, batches are copied one ahead, on a stream of their own."""
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
            tensor.record_stream(current)  # else its memory could be reused under the step
        yield images, labels


def _one_ahead(items: Iterator[_T]) -> Iterator[_T]:
    last: list[_T] = []
    for item in items:
        yield from last
        last = [item]
    yield from last


def _end_workers(batches: object) -> None:
    """End an iterator's processes now, not when it is collected.

    A traceback may keep the iterator alive to the interpreter's exit, where multiprocessing sends
    SIGTERM, which the workers ignore, and waits for ever. PyTorch has no public call for this.
    """
    if isinstance(batches, _MultiProcessingDataLoaderIter):
        batches._shutdown_workers()
        for worker in batches._workers:
            if worker.is_alive():
                worker.kill()
