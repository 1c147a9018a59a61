"""Batches of a data set on the training device: `open_data` and what it returns, `Data`.

Three independent steps: `Order` gives the images and the random numbers of a batch (a `Request`); a
loader (`bip.data.loaders`) fetches uint8 images for requests; `Data` applies the batched crop,
scales to float and normalises. A batch is a function of its request, so the number of workers,
the prefetch depth and earlier batches cannot change it.
"""

import itertools
import weakref
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from bip.data import augment
from bip.data.loaders import choose, loader_class
from bip.data.options import DataOptions
from bip.data.order import Order, holdout_split, rank_slice
from bip.data.reader import Batch, Loader, Request
from bip.data.splits import identity, local_copy, open_splits


class Data:
    """The batches of one rank. Made by `open_data`.

    Attributes:
        train_size: images to train on, without the holdout.
        batches_per_epoch: global batches of an epoch.
        channels, image_dim: shape of an image, (channels, image_dim, image_dim).
        eval_batch: images of one evaluation batch on this rank.
        loader: its name; for "auto" the one that was chosen.
        identity: describes these images, to detect other ones (`bip.data.splits.identity`).
    """

    def __init__(
        self,
        options: DataOptions,
        train: Loader,
        test: Loader,
        identity: dict[str, str],
        rank: int,
        world: int,
        device: torch.device,
    ) -> None:
        if options.batch_size % world:
            raise ValueError(
                f"batch_size {options.batch_size} does not divide by world size {world}"
            )
        spec = options.spec
        self.identity = identity
        self.loader = options.loader
        self.channels = spec.channels
        self.image_dim = options.side
        self._options = options
        self._spec = spec
        self._train = train
        self._train_indices, holdout_indices = holdout_split(len(train), options.holdout)
        self._splits = {
            "test": (test, np.arange(len(test))),
            "holdout": (train, holdout_indices),
        }
        self.train_size = len(self._train_indices)
        self.batches_per_epoch = self._order("lower").batches_per_epoch
        self.eval_batch = max(1, options.test_batch_size // world)
        self._rank = rank
        self._world = world
        # (x / 255 - mean) / std = scale * x + shift
        mean = torch.tensor(spec.mean if options.normalize else [0.0] * spec.channels)
        std = torch.tensor(spec.std if options.normalize else [1.0] * spec.channels)
        self._scale = (1 / (255 * std)).view(-1, 1, 1).to(device)
        self._shift = (-mean / std).view(-1, 1, 1).to(device)
        self._live: weakref.WeakSet[Generator[Batch, None, None]] = weakref.WeakSet()
        # Runs when this object is collected or when the interpreter exits.
        weakref.finalize(self, _close_all, self._live)

    def train(self, level: str = "lower", start: int = 0) -> Iterator[Batch]:
        """This rank's share of global batches start, start + 1, ... of a level, without end.

        Yields float32 images (batch_size / world, C, H, W) and int64 labels, on the device. The
        images are valid until the iterator's next batch is taken.
        Raises UserError for a damaged record.
        """
        order = self._order(level)
        requests = (self._train_request(order, number) for number in itertools.count(start))
        return self._start(self._train, requests)

    def evaluate(self, split: Literal["test", "holdout"]) -> Iterator[Batch]:
        """This rank's shard of a split, in order: over all ranks each image exactly once.

        Shards may differ by one image, so ranks may get different numbers of batches, or none.
        """
        loader, indices = self._splits[split]
        shard = indices[rank_slice(len(indices), self._rank, self._world)]
        step = self.eval_batch
        requests = (Request(shard[at : at + step]) for at in range(0, len(shard), step))
        return self._start(loader, requests)

    def eval_size(self, split: Literal["test", "holdout"]) -> int:
        """Number of images of a split, over all ranks."""
        return len(self._splits[split][1])

    def close(self) -> None:
        """End all iterators and their worker processes. Further iterators may be started."""
        _close_all(self._live)

    def _order(self, level: str) -> Order:
        return Order(self.train_size, self._options.batch_size, self._options.seed, level)

    def _train_request(self, order: Order, number: int) -> Request:
        epoch, positions, indices = order.batch(number)
        share = rank_slice(len(positions), self._rank, self._world)
        draws = (
            augment.PAD_CROP_DRAWS
            if self._spec.augment == "pad_crop"
            else augment.RESIZED_CROP_DRAWS
        )
        mine = positions[share]
        uniforms = order.uniforms(epoch, int(mine[0]), len(mine), draws)
        return Request(self._train_indices[indices[share]], uniforms)

    def _start(self, loader: Loader, requests: Iterator[Request]) -> Iterator[Batch]:
        batches = self._finish(loader, requests)
        self._live.add(batches)
        return batches

    def _finish(self, loader: Loader, requests: Iterator[Request]) -> Generator[Batch, None, None]:
        ahead, current = itertools.tee(requests)
        buffer = torch.empty(0)
        for request, (images, labels) in zip(current, loader.fetch(ahead), strict=False):
            crops = None
            if request.uniforms is not None and self._spec.augment == "pad_crop":
                crops = augment.pad_crop_params(
                    request.uniforms,
                    self.image_dim,
                    self.image_dim,
                    self._spec.padding,
                    self._spec.flip,
                )
            if images.is_cuda:
                if crops is not None:
                    images = augment.pad_crop(images, crops, self._spec.padding)
                yield images.float().mul_(self._scale).add_(self._shift), labels
                continue
            # New memory for each batch would cost five times as much as the arithmetic.
            if buffer.numel() < images.numel():
                buffer = torch.empty(images.numel())
            out = buffer[: images.numel()].view(images.shape)
            if crops is None:
                augment.normalise(images, self._scale, self._shift, out)
            else:
                augment.pad_crop_normalised(
                    images, crops, self._spec.padding, self._scale, self._shift, out
                )
            yield out, labels


def _close_all(live: weakref.WeakSet[Generator[Batch, None, None]]) -> None:
    for batches in list(live):
        batches.close()


def open_data(options: DataOptions, rank: int, world: int, device: torch.device) -> Data:
    """Open both splits of a data set.

    Raises:
        UserError: data set missing or damaged, wrong number of classes, unsuitable loader.
        OSError: its file system is unreachable.
    """
    found = open_splits(options)
    if options.loader == "auto":
        options = replace(options, loader=choose(options.spec, found[0], device))
    loader = loader_class(options.loader)
    splits = [local_copy(split, options, loader.in_memory, first=rank == 0) for split in found]
    if rank == 0 and options.skip_bad and loader.in_memory:
        print("warning: skip_bad: no effect, the images are decoded before training")
    train, test = (loader(split, options, device) for split in splits)
    return Data(options, train, test, identity(*splits), rank, world, device)
