"""Sources: fetch uint8 images for requests, from memory or through worker processes."""

import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from bip.data import decode
from bip.data.datasets import DatasetSpec
from bip.data.stores import ImageStore
from bip.errors import UserError

Batch = tuple[Tensor, Tensor]


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

    def read(self, request: Request) -> tuple[list[Tensor], NDArray[np.int64]]:
        """uint8 images, each (C, H, W), and labels (n,). Raises UserError for a bad record."""
        self.store.check_unchanged()
        random = request.uniforms is not None and self.spec.augment == "resized_crop"
        images, labels = [], np.empty(len(request.indices), np.int64)
        for row, index in enumerate(request.indices.tolist()):
            data, labels[row] = self.store.read(index)
            draws = request.uniforms[row] if request.uniforms is not None and random else None
            try:
                images.append(torch.from_numpy(self._view(data, draws)))
            except decode.DECODE_ERRORS as error:
                raise self.damaged(index, int(labels[row]), error) from error
        return images, labels

    def damaged(self, index: int, label: int, error: Exception) -> UserError:
        """What to tell the user of an image that does not decode."""
        return UserError(
            f"{self.store.name(index)} (class {self.store.classes[label]}) does not decode "
            f"({decode.reason(error)}); repair or remove it and build the store again"
        )

    def _view(self, data: bytes, draws: NDArray[np.float64] | None) -> NDArray[np.uint8]:
        spec, dim = self.spec, self.image_dim
        if draws is None:
            return decode.test_view(decode.decode(data, spec.channels), dim, spec.test_zoom)
        return decode.resized_crop(data, draws, spec.channels, dim, spec.flip)


class _Work(Dataset[tuple[Tensor, Tensor] | str]):
    """Requests as the DataLoader's items. An error travels as its one line of text."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __getitem__(self, request: Request) -> tuple[Tensor, Tensor] | str:
        try:
            images, labels = self.reader.read(request)
        except UserError as error:
            return str(error)
        # In a worker this stacks straight into shared memory.
        return default_collate(images), torch.from_numpy(labels)


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
        loader = DataLoader(
            _Work(self.reader),
            sampler=requests,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_shield_worker if self.num_workers else None,
            # Workers hold a few paths and use no CUDA; spawning would import torch in each.
            multiprocessing_context="fork" if self.num_workers else None,
            generator=torch.Generator(),  # else the DataLoader would draw from the global one
        )
        batches = iter(loader)
        try:
            for batch in batches:
                if isinstance(batch, str):
                    raise UserError(batch)
                images, labels = batch
                yield (
                    images.to(self.device, non_blocking=True),
                    labels.to(self.device, non_blocking=True),
                )
        finally:
            _end_workers(batches)


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
