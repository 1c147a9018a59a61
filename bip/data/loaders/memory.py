"""The `memory` loader: a small split, decoded once, as one tensor on the training device."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch

from bip.data import decode
from bip.data.options import DataOptions
from bip.data.reader import Batch, Loader, Request, Split
from bip.data.stores.base import ArraySplit, ImageStore
from bip.data.workers import WorkerLoader

_CHUNK = 500  # images per work item of the decoding
_MOST_PROCESSES = 8


class MemoryLoader(Loader):
    """A split as one uint8 tensor on the training device."""

    in_memory = True

    def __init__(self, split: Split, options: DataOptions, device: torch.device) -> None:
        if isinstance(split, ArraySplit):
            images, labels = _resized(split, options), torch.from_numpy(split.labels)
        else:
            images, labels = _decoded(split, options)
        self.images, self.labels = images.to(device), labels.to(device)

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, requests: Iterable[Request]) -> Iterator[Batch]:
        for request in requests:
            if self.images.is_cuda:
                rows = torch.from_numpy(request.indices).pin_memory()
                rows = rows.to(self.images.device, non_blocking=True)
                yield self.images[rows], self.labels[rows]
            else:  # on the CPU NumPy's indexing is faster than torch's
                images = self.images.numpy()[request.indices]
                yield torch.from_numpy(images), self.labels[torch.from_numpy(request.indices)]


def _resized(split: ArraySplit, options: DataOptions) -> torch.Tensor:
    images, side = split.images, options.side
    if images.shape[2:] != (side, side):
        planes = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
        zoom = options.spec.test_zoom
        images = np.stack([decode.test_view(image, side, zoom) for image in planes])
    return torch.from_numpy(images)


def _decoded(store: ImageStore, options: DataOptions) -> tuple[torch.Tensor, torch.Tensor]:
    count, side = len(store), options.side
    images = torch.empty((count, options.spec.channels, side, side), dtype=torch.uint8)
    labels = torch.empty(count, dtype=torch.int64)
    chunks = [np.arange(at, min(at + _CHUNK, count)) for at in range(0, count, _CHUNK)]
    # All cores of the machine, as these threads end before training; num_workers do not.
    cores = min(len(os.sched_getaffinity(0)), len(chunks), _MOST_PROCESSES)
    options = replace(options, num_workers=cores if len(chunks) > 1 else 0)
    workers = WorkerLoader(store, options, torch.device("cpu"))
    for chunk, batch in zip(chunks, workers.fetch(map(Request, chunks)), strict=True):
        rows = slice(int(chunk[0]), int(chunk[-1]) + 1)
        images[rows], labels[rows] = batch
    return images, labels
