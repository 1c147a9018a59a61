"""Batches of a data set on the training device: `open_data` and what it returns, `Data`.

Three steps, each ignorant of the others: `Order` says which images and which random numbers a
batch has (a `Request`); a source (`bip.data.sources`, `bip.data.dali`) fetches uint8 images for
requests; `Data` applies the batched crop, scales to float and normalises. What is drawn is a
function of the request, so neither worker count nor prefetch depth nor the past can change it.
"""

import hashlib
import itertools
import json
import os
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from bip.data import augment, decode
from bip.data.dali import DaliSource, is_installed
from bip.data.datasets import ArraySplit, DatasetSpec, Layout, dataset_spec, open_split
from bip.data.order import Order, holdout_split, rank_slice
from bip.data.published import open_store
from bip.data.sources import Batch, MemorySource, Reader, Request, Source, WorkerSource
from bip.data.staging import network_filesystem, stage
from bip.data.stores import FolderStore, ImageStore, LmdbStore
from bip.errors import UserError

Loader = Literal["auto", "memory", "lmdb", "folder", "dali"]

_DECODE_CHUNK = 500  # images per work item when a small set is decoded at the start


class Data:
    """The batches of one rank. Made by `open_data`.

    Attributes:
        train_size: images to train on, without the holdout.
        batches_per_epoch: global batches of an epoch.
        channels, image_dim: shape of an image, (channels, image_dim, image_dim).
        eval_batch: images of one evaluation batch on this rank.
        loader: which one it is, where "auto" was asked for.
        identity: what tells these images from others, by name: their numbers and classes,
            whatever the loader, and of LMDB stores a digest of their totals.
    """

    def __init__(
        self,
        *,
        identity: dict[str, str],
        loader: Loader,
        spec: DatasetSpec,
        image_dim: int,
        train: Source,
        test: Source,
        batch_size: int,
        test_batch_size: int,
        normalize: bool,
        holdout: int,
        seed: int,
        rank: int,
        world: int,
        device: torch.device,
    ) -> None:
        if batch_size % world:
            raise ValueError(f"batch_size {batch_size} does not divide by world size {world}")
        self.identity = identity
        self.loader = loader
        self.channels = spec.channels
        self.image_dim = image_dim
        self._spec = spec
        self._train = train
        self._train_indices, holdout_indices = holdout_split(len(train), holdout)
        self._splits = {
            "test": (test, np.arange(len(test))),
            "holdout": (train, holdout_indices),
        }
        self.train_size = len(self._train_indices)
        self.batches_per_epoch = Order(self.train_size, batch_size, seed).batches_per_epoch
        self._batch_size = batch_size
        self.eval_batch = max(1, test_batch_size // world)
        self._seed = seed
        self._rank = rank
        self._world = world
        # (x / 255 - mean) / std = scale * x + shift
        mean = torch.tensor(spec.mean if normalize else [0.0] * spec.channels)
        std = torch.tensor(spec.std if normalize else [1.0] * spec.channels)
        self._scale = (1 / (255 * std)).view(-1, 1, 1).to(device)
        self._shift = (-mean / std).view(-1, 1, 1).to(device)
        self._live: weakref.WeakSet[Generator[Batch, None, None]] = weakref.WeakSet()
        # Runs when this object goes or the interpreter exits, whichever is first.
        weakref.finalize(self, _close_all, self._live)

    def train(self, level: str = "lower", start: int = 0) -> Iterator[Batch]:
        """This rank's share of global batches start, start + 1, ... of a level, without end.

        Yields float32 images (batch_size / world, C, H, W) and int64 labels, on the device. The
        images are valid until the iterator's next batch is taken.
        Raises UserError for a damaged record.
        """
        order = Order(self.train_size, self._batch_size, self._seed, level)
        requests = (self._train_request(order, number) for number in itertools.count(start))
        return self._start(self._train, requests)

    def evaluate(self, split: Literal["test", "holdout"]) -> Iterator[Batch]:
        """This rank's shard of a split, in order: over all ranks each image exactly once.

        Shards may differ by one image, so ranks may get different numbers of batches, or none.
        """
        source, indices = self._splits[split]
        shard = indices[rank_slice(len(indices), self._rank, self._world)]
        step = self.eval_batch
        requests = (Request(shard[at : at + step]) for at in range(0, len(shard), step))
        return self._start(source, requests)

    def eval_size(self, split: Literal["test", "holdout"]) -> int:
        """Images of a split, over all ranks."""
        return len(self._splits[split][1])

    def close(self) -> None:
        """End all iterators and their worker processes. Further iterators may be started."""
        _close_all(self._live)

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

    def _start(self, source: Source, requests: Iterator[Request]) -> Iterator[Batch]:
        batches = self._finish(source, requests)
        self._live.add(batches)
        return batches

    def _finish(self, source: Source, requests: Iterator[Request]) -> Generator[Batch, None, None]:
        ahead, current = itertools.tee(requests)
        buffer = torch.empty(0)
        for request, (images, labels) in zip(current, source.fetch(ahead), strict=False):
            if request.uniforms is not None and self._spec.augment == "pad_crop":
                crops = augment.pad_crop_params(
                    request.uniforms,
                    self.image_dim,
                    self.image_dim,
                    self._spec.padding,
                    self._spec.flip,
                )
                images = augment.pad_crop(images, crops, self._spec.padding)
            if images.is_cuda:
                yield images.float().mul_(self._scale).add_(self._shift), labels
                continue
            # New memory for each batch would cost five times as much as the arithmetic.
            if buffer.numel() < images.numel():
                buffer = torch.empty(images.numel())
            out = buffer[: images.numel()].view(images.shape)
            augment.normalise(images, self._scale, self._shift, out)
            yield out, labels


def _close_all(live: weakref.WeakSet[Generator[Batch, None, None]]) -> None:
    for batches in list(live):
        batches.close()


def open_data(
    *,
    dataset: str,
    data_dir: Path,
    batch_size: int,
    test_batch_size: int,
    image_dim: int | None,
    normalize: bool,
    num_classes: int,
    holdout: int,
    loader: Loader,
    num_workers: int,
    seed: int,
    rank: int,
    world: int,
    device: torch.device,
    stage_to: Path | None = None,
    skip_bad: bool = False,
) -> Data:
    """Open both splits of a data set.

    Args:
        dataset: a name that `dataset_spec` knows.
        data_dir: where it lies (`open_split`).
        batch_size: training images per step over all ranks; divides by `world`.
        test_batch_size: likewise for evaluation; need not divide.
        image_dim: input height and width in pixels; None for the set's own.
        normalize: subtract the set's mean and divide by its deviation; else pixels in [0, 1].
        num_classes: the network's; must be the set's.
        holdout: training images to hold out, the same ones for every seed.
        loader: "memory" decodes a small set once, onto the device; "lmdb" and "folder" read
            through worker processes; "dali" decodes the LMDB's or the folder's images with NVIDIA
            DALI. "auto" is `choose_loader`'s, of an LMDB before a folder.
        num_workers: processes of each iterator of "lmdb" and "folder" (so twice as many in BiP,
            with its two levels); 0 reads in this process. Of "dali", threads.
        stage_to: a folder on the node's own disk; LMDB stores are copied there first, once for
            all processes of the node (`bip.data.staging`).
        skip_bad: replace training images that cannot be read by others of their batch, and warn,
            instead of failing. Of "memory", and in evaluation, they stay an error.

    Raises:
        UserError: set missing or damaged, wrong class count, loader that does not fit.
    """
    spec = dataset_spec(dataset)
    dim = image_dim or spec.image_dim
    found = open_splits(dataset, data_dir, loader, num_classes)
    if loader == "auto":
        loader = choose_loader(spec, device)
    in_memory = loader == "memory"
    train, test = (_stage(split, stage_to, in_memory, rank) for split in found)
    if rank == 0 and skip_bad and (in_memory or isinstance(train, ArraySplit)):
        print("warning: skip_bad: no effect, the images are decoded before training begins")

    def source(split: ImageStore | ArraySplit) -> Source:
        if isinstance(split, ArraySplit):
            return _from_arrays(split, spec, dim, device)
        reader = Reader(split, spec, dim, skip_bad)
        if in_memory:
            return _decode_all(reader, device)
        if loader == "dali":
            return DaliSource(reader, num_workers, device)
        return WorkerSource(reader, num_workers, device)

    if loader == "auto":  # whichever is there
        loader = "folder" if isinstance(train, FolderStore) else "lmdb"
    return Data(
        identity=_identity(train, test),
        loader=loader,
        spec=spec,
        image_dim=dim,
        train=source(train),
        test=source(test),
        batch_size=batch_size,
        test_batch_size=test_batch_size,
        normalize=normalize,
        holdout=holdout,
        seed=seed,
        rank=rank,
        world=world,
        device=device,
    )


def open_splits(
    dataset: str, data_dir: Path, loader: Loader, num_classes: int
) -> tuple[ImageStore | ArraySplit, ImageStore | ArraySplit]:
    """The training and the test split that `open_data` reads. Raises UserError as it does."""
    spec = dataset_spec(dataset)
    if loader == "memory" and not spec.small:
        raise UserError(f"loader: memory is for small sets, not {spec.name}; use lmdb or folder")
    if loader not in ("auto", "memory") and spec.name == "Digits":
        raise UserError(f"loader: {loader} does not apply to Digits; use auto or memory")
    layout: Layout = loader if loader in ("lmdb", "folder") else "any"
    train, test = (open_split(dataset, data_dir, part, layout) for part in (True, False))
    if loader == "dali" and isinstance(train, ArraySplit):
        raise UserError(
            f"loader: dali has nothing to decode in {spec.name}'s archives; use auto or memory"
        )
    _check_classes(dataset, data_dir, train.classes, test.classes, num_classes)
    return train, test


def choose_loader(spec: DatasetSpec, device: torch.device) -> Loader:
    """What `auto` takes: memory for small sets; for the others DALI where a GPU can decode and it
    is installed, else "auto" still: worker processes over what is there.
    """
    if spec.small:
        return "memory"
    return "dali" if device.type == "cuda" and is_installed() else "auto"


def _identity(*splits: ImageStore | ArraySplit) -> dict[str, str]:
    """As `Data.identity`: {"images": "50000 + 10000 images of 10 classes (1f6e0c2a)", ...}."""
    counts = (len(s.labels if isinstance(s, ArraySplit) else s) for s in splits)
    classes = splits[0].classes
    names = hashlib.sha256("\n".join(classes).encode()).hexdigest()[:8]
    found = {"images": f"{' + '.join(map(str, counts))} images of {len(classes)} classes ({names})"}
    headers = [split.header for split in splits if isinstance(split, LmdbStore)]
    if len(headers) == len(splits):
        totals = [(header["class_counts"], header["image_bytes"]) for header in headers]
        digest = hashlib.sha256(json.dumps(totals).encode()).hexdigest()[:8]
        found["stores"] = f"LMDB stores with totals {digest}"
    return found


def stage_data(
    dataset: str, data_dir: Path, folder: Path, loader: Loader, give_up: Callable[[], None]
) -> None:
    """Copy a data set's stores to the node's disk, where `open_data` with `stage_to` finds them.

    Before the ranks meet, because one node may copy for as long as others would not wait.
    """
    layout: Layout = loader if loader in ("lmdb", "folder") else "any"
    for train in (True, False):
        split = open_split(dataset, data_dir, train, layout)
        if not isinstance(split, ArraySplit | FolderStore):
            stage(split.path, folder, give_up)


def _stage(
    split: ImageStore | ArraySplit, stage_to: Path | None, in_memory: bool, rank: int
) -> ImageStore | ArraySplit:
    """The split's copy on the node's disk, if asked for; else a hint where it would help."""
    if isinstance(split, ArraySplit):
        if stage_to is not None and rank == 0:
            print("warning: stage_to: no effect, the images are in memory before training begins")
        return split
    if stage_to is not None:
        if isinstance(split, FolderStore):
            raise UserError(
                f"stage_to: copies LMDB stores, but {split.path} is a folder of images; build a "
                f"store first: python -m bip data build-lmdb {split.path.parent} OUT"
            )
        return open_store(stage(split.path, stage_to), split.classes)
    kind = network_filesystem(split.path)
    if kind is not None and rank == 0 and not in_memory:
        hint = "build an LMDB store" if isinstance(split, FolderStore) else "give --stage-to DIR"
        print(f"warning: {split.path} lies on {kind}; {hint} to read from the node's own disk")
    return split


def _check_classes(
    dataset: str, data_dir: Path, train: Sequence[str], test: Sequence[str], num_classes: int
) -> None:
    if list(train) != list(test):
        odd = sorted(set(train) ^ set(test)) or list(train)
        raise UserError(
            f"data_dir: the training and test splits of {dataset} in {data_dir} have different "
            f"classes ({len(train)} and {len(test)}; {odd[0]!r} is not in both alike); where the "
            f"images lie flat, build a store: python -m bip data build-lmdb {data_dir} OUT"
        )
    if len(train) != num_classes:
        raise UserError(
            f"num_classes: {num_classes}, but {dataset} in {data_dir} has {len(train)} classes; "
            f"use --num-classes {len(train)}"
        )


def _from_arrays(
    split: ArraySplit, spec: DatasetSpec, image_dim: int, device: torch.device
) -> MemorySource:
    images = split.images
    if images.shape[2:] != (image_dim, image_dim):
        images = np.stack(
            [
                decode.test_view(planes, image_dim, spec.test_zoom)
                for planes in np.ascontiguousarray(images.transpose(0, 2, 3, 1))
            ]
        )
    return MemorySource(
        torch.from_numpy(images).to(device), torch.from_numpy(split.labels).to(device)
    )


def _decode_all(reader: Reader, device: torch.device) -> MemorySource:
    count, dim = len(reader.store), reader.image_dim
    images = torch.empty((count, reader.spec.channels, dim, dim), dtype=torch.uint8)
    labels = torch.empty(count, dtype=torch.int64)
    chunks = [
        np.arange(at, min(at + _DECODE_CHUNK, count)) for at in range(0, count, _DECODE_CHUNK)
    ]
    # The machine's cores, whatever num_workers says: it counts processes that stay.
    cores = min(len(os.sched_getaffinity(0)), len(chunks), 8)
    workers = WorkerSource(reader, cores if len(chunks) > 1 else 0, torch.device("cpu"))
    requests = (Request(chunk) for chunk in chunks)
    for chunk, batch in zip(chunks, workers.fetch(requests), strict=True):
        rows = slice(int(chunk[0]), int(chunk[-1]) + 1)
        images[rows], labels[rows] = batch
    return MemorySource(images.to(device), labels.to(device))
