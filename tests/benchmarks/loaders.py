"""Images per second of every loader over torchvision's, side by side on real JPEGs.

224-pixel training batches: random resized crop, flip, normalised float32, in `--workers`
processes (DALI: threads). The loaders take turns, so that a busy machine slows all alike; ratios
are medians over rounds. `loader_over_decode` sets the `lmdb` loader against a bare loop of the
same read, decode, crop and normalise in as many processes, without any transfer. `memory` is
measured on CIFAR-10 against torchvision's per-image pipeline. `open_ms` and `rss_mb` are of a
store of 1.28 M tiny records: from path to `Data`, and the private dirty memory that batches add
to a worker process.

`one_over_two_NAME` sets one iterator of twice the workers against two that take turns, as the two
levels of BiP do: over 1, one is faster. `cold_over_hinted`: random records of a store that is not
in the page cache, read with and without `prefetch`; the disk is whatever /tmp lies on.

Data: the environment variable BIP_SHARED_DATA, a folder with imagenet-jpeg-sample.zip and
cifar10-jpeg.zip.
"""

import gc
import itertools
import multiprocessing
import os
import random
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from bip.data.batches import Data, open_data
from bip.data.decode import decode
from bip.data.loaders import dali
from bip.data.options import DataOptions
from bip.data.sets import dataset_spec
from bip.data.stores.lmdb import LmdbStore
from bip.data.stores.writer import LmdbWriter
from bip.data.tools.build import build_lmdb
from tests.benchmarks.common import arguments, finish, machine, ratio, shared_data, synchronize

WARM_UP = 4  # batches before the clock starts, so that all queues are full
AT_LEAST = {
    "lmdb_over_torchvision": 1.6,
    "dali_over_torchvision": 1.6,
    "memory_over_torchvision": 20,
    "loader_over_decode": 0.91,
}
AT_MOST = {"build_over_copy": 1.5, "open_ms": 50, "rss_mb": 100}


class Seconds:
    """Time between the `WARM_UP`-th and the last of `count` more batches of a fresh iterator."""

    def __init__(self, start: Callable[[], Iterator[Any]], count: int) -> None:
        self.start, self.count = start, count

    def __call__(self) -> float:
        batches = self.start()
        for _ in itertools.islice(batches, WARM_UP):
            pass
        synchronize()
        started = time.perf_counter()
        for _ in itertools.islice(batches, self.count):
            pass
        synchronize()
        seconds = time.perf_counter() - started
        close = getattr(batches, "close", None)
        if close is not None:
            close()
        return seconds


def in_turn(candidates: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each candidate's own seconds, every round asking each once."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            seconds[name].append(call())
    return seconds


def endless(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def torchvision_folder(root: Path, batch: int, workers: int) -> Callable[[], Iterator[Any]]:
    """ImageFolder, the ImageNet recipe's transforms and a DataLoader."""
    spec = dataset_spec("ImageNet")
    recipe = transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(spec.mean, spec.std),
        ]
    )
    images = datasets.ImageFolder(root, recipe)
    return lambda: endless(
        DataLoader(images, batch, shuffle=True, num_workers=workers, drop_last=True)
    )


class CifarArrays(torch.utils.data.Dataset[Any]):
    """torchvision's CIFAR10: an array in memory, each image through Pillow and the transforms."""

    def __init__(self, store: LmdbStore) -> None:
        pairs = [store.read(index) for index in range(len(store))]
        self.images = np.stack([decode(data, 3) for data, _ in pairs])
        self.labels = [label for _, label in pairs]
        spec = dataset_spec("CIFAR10")
        self.recipe = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomCrop(32, 4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(spec.mean, spec.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.recipe(self.images[index]), self.labels[index]


def ours(
    root: Path,
    loader: str,
    batch: int,
    workers: int,
    dataset: str = "ImageNet",
    classes: int = 171,
    device: torch.device | None = None,
) -> Data:
    """On `device`; None: the GPU if there is one."""
    options = DataOptions(
        dataset=dataset,
        data_dir=root,
        batch_size=batch,
        test_batch_size=batch,
        normalize=True,
        num_classes=classes,
        loader=loader,
        num_workers=workers,
        seed=0,
    )
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return open_data(options, 0, 1, device)


def in_turns(data: Data) -> Iterator[Any]:
    """The two levels' batches, from an iterator each."""
    levels = [data.train("lower"), data.train("upper")]
    try:
        while True:
            for level in levels:
                yield next(level)
    finally:
        data.close()


def bare_loop(root: Path, batch: int, processes: int, count: int) -> Callable[[], float]:
    """The same batches made in place by `processes` that hand nothing over: seconds for `count`."""

    def work(pipe: Connection, mine: int) -> None:
        gc.freeze()  # DALI's pipelines may not be collected here
        torch.set_num_threads(1)
        # No CUDA: it does not outlive a fork.
        batches = ours(root, "lmdb", batch, 0, device=torch.device("cpu")).train()
        next(batches)
        pipe.send(None)
        pipe.recv()
        for _ in range(mine):
            next(batches)
        pipe.send(None)

    def seconds() -> float:
        context = multiprocessing.get_context("fork")
        pipes, children = [], []
        for number in range(processes):
            here, there = context.Pipe()
            share = count // processes + (number < count % processes)
            child = context.Process(target=work, args=(there, share))
            child.start()
            pipes.append(here)
            children.append(child)
        for pipe in pipes:
            pipe.recv()
        started = time.perf_counter()
        for pipe in pipes:
            pipe.send(None)
        for pipe in pipes:
            pipe.recv()
        passed = time.perf_counter() - started
        for child in children:
            child.join()
        return passed

    return seconds


def dali_file_reader(root: Path, batch: int, threads: int) -> Callable[[], Iterator[Any]]:
    """DALI reading, shuffling and cropping by itself: the usual recipe."""

    def batches() -> Iterator[Any]:
        from nvidia.dali import Pipeline, fn, types

        spec = dataset_spec("ImageNet")
        cuda = torch.cuda.is_available()
        pipeline = Pipeline(batch_size=batch, num_threads=threads, device_id=0 if cuda else None)
        with pipeline:
            encoded, labels = fn.readers.file(file_root=str(root), random_shuffle=True)
            images = fn.decoders.image_random_crop(
                encoded, device="mixed" if cuda else "cpu", random_area=[0.08, 1.0]
            )
            images = fn.resize(images, size=[224, 224])
            images = fn.crop_mirror_normalize(
                images,
                mirror=fn.random.coin_flip(),
                dtype=types.FLOAT,
                mean=[255 * value for value in spec.mean],
                std=[255 * value for value in spec.std],
            )
            pipeline.set_outputs(images, labels)
        pipeline.build()
        while True:
            yield pipeline.run()

    return batches


def repeated_photos(folder: Path, records: int) -> None:
    """`folder`/train and /val: trees of links to the sample's photos, `records` in train."""
    with zipfile.ZipFile(shared_data("imagenet-jpeg-sample.zip")) as archive:
        archive.extractall(folder)
    photos = sorted((folder / "val").rglob("*.JPEG"))
    for number in range(records):
        photo = photos[number % len(photos)]
        link = folder / "train" / photo.parent.name / f"{number:06}.JPEG"
        link.parent.mkdir(parents=True, exist_ok=True)
        os.link(photo, link)


def build_speed(folder: Path, rounds: int) -> dict[str, float]:
    """Seconds of build-lmdb over those of copying the files, the data in the page cache.

    A store is on the disk when it is done, so the copy is too: its time is until it is synced.
    `build_over_unsynced_copy`: until the copy is in the page cache.
    """
    for path in folder.rglob("*.JPEG"):
        path.read_bytes()
    target, unsynced = folder / "made", []

    def empty() -> None:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        os.sync()

    def copy() -> float:
        empty()
        started = time.perf_counter()
        shutil.copytree(folder / "train", target / "copy")
        unsynced.append(time.perf_counter() - started)
        os.sync()
        return time.perf_counter() - started

    def build() -> float:
        empty()
        started = time.perf_counter()
        build_lmdb(folder, target)
        return time.perf_counter() - started

    seconds = in_turn({"copy": copy, "build": build}, rounds)
    for store in target.glob("*.lmdb"):
        store.rename(folder / store.name)
    shutil.rmtree(target)
    return {
        "build_over_copy": ratio(seconds["build"], seconds["copy"]),
        "build_over_unsynced_copy": ratio(seconds["build"], unsynced),
    }


def cold_reads(path: Path, rounds: int) -> dict[str, float]:
    """What `prefetch` saves where the store is not in memory."""

    def read(hint: bool) -> float:
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        store = LmdbStore(path)  # and its map is gone with it: mapped pages would stay
        indices = random.Random(0).sample(range(len(store)), min(256, len(store)))
        started = time.perf_counter()
        for at in range(0, len(indices), 64):
            part = indices[at : at + 64]
            if hint:
                store.prefetch(part)
            for index in part:
                store.read(index)
        return time.perf_counter() - started

    seconds = in_turn({"plain": lambda: read(False), "hinted": lambda: read(True)}, rounds)
    return {"cold_over_hinted": ratio(seconds["plain"], seconds["hinted"])}


def many_records(folder: Path, count: int) -> dict[str, float]:
    """What a store of `count` records costs to open, and a worker to hold."""
    stream = BytesIO()
    Image.new("RGB", (16, 16), (120, 60, 30)).save(stream, "JPEG")
    classes = [f"n{number:08}" for number in range(1000)]
    for split, records in (("train", count), ("val", 1000)):
        with LmdbWriter(folder / f"{split}.lmdb", classes) as writer:
            for number in range(records):
                writer.add(stream.getvalue(), number % 1000, 16, 16)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        data = ours(folder, "lmdb", 128, 1, classes=1000)
        times.append(1e3 * (time.perf_counter() - started))
        del data
    data = ours(folder, "lmdb", 128, 1, classes=1000)
    batches = data.train()
    for _ in itertools.islice(batches, 12):
        pass
    (worker,) = multiprocessing.active_children()
    rollup = Path(f"/proc/{worker.pid}/smaps_rollup").read_text()
    dirty = int(rollup.split("Private_Dirty:")[1].split()[0]) / 1024
    data.close()
    return {"open_ms": sorted(times)[2], "rss_mb": dirty}


def imagenet(folder: Path, options: Any) -> dict[str, float]:
    batch, workers, count = options.batch, options.workers, options.batches
    repeated_photos(folder, options.records)
    figures = build_speed(folder, options.rounds) | cold_reads(
        folder / "train.lmdb", options.rounds
    )
    data = {name: ours(folder, name, batch, workers) for name in ("lmdb", "folder")}
    train = folder / "train"
    starts = {
        "torchvision": torchvision_folder(train, batch, workers),
        "lmdb": data["lmdb"].train,
        "folder": data["folder"].train,
    }
    if dali.is_installed():
        data["dali"] = ours(folder, "dali", batch, workers)
        starts["dali"] = data["dali"].train
        starts["dali_file_reader"] = dali_file_reader(train, batch, workers)
    candidates: dict[str, Callable[[], float]] = {
        name: Seconds(start, count) for name, start in starts.items()
    }
    double = {name: ours(folder, name, batch, 2 * workers) for name in data if name != "folder"}
    for name in double:
        candidates[f"{name}, two levels"] = Seconds(partial(in_turns, data[name]), count)
        candidates[f"{name}, one of both"] = Seconds(double[name].train, count)
    candidates["bare_loop"] = bare_loop(folder, batch, workers, count)
    seconds = in_turn(candidates, options.rounds)
    for name, times in seconds.items():
        print(f"{name:20} {batch * count / min(times):8.0f} images/s at best")
    for name in starts:
        if name != "torchvision":
            figures[f"{name}_over_torchvision"] = ratio(seconds["torchvision"], seconds[name])
    for name in double:
        figures[f"one_over_two_{name}"] = ratio(
            seconds[f"{name}, two levels"], seconds[f"{name}, one of both"]
        )
    figures["loader_over_decode"] = ratio(seconds["bare_loop"], seconds["lmdb"])
    return figures


def cifar(folder: Path, options: Any) -> dict[str, float]:
    few = folder / "few.zip"
    with (
        zipfile.ZipFile(shared_data("cifar10-jpeg.zip")) as full,
        zipfile.ZipFile(few, "w") as small,
    ):
        for name in full.namelist():
            if name.endswith(".jpg") and int(Path(name).stem) < 1000:
                small.writestr(name, full.read(name))
    build_lmdb(few, folder)
    memory = ours(folder, "memory", 128, 0, "CIFAR10", 10)
    images = CifarArrays(LmdbStore(folder / "train.lmdb"))
    loader = DataLoader(images, 128, shuffle=True, num_workers=options.workers, drop_last=True)
    seconds = in_turn(
        {
            "torchvision": Seconds(lambda: endless(loader), 50),
            "memory": Seconds(memory.train, 50),
        },
        options.rounds,
    )
    for name, times in seconds.items():
        print(f"CIFAR {name:14} {128 * 50 / min(times):8.0f} images/s at best")
    return {"memory_over_torchvision": ratio(seconds["torchvision"], seconds["memory"])}


def main() -> None:
    options = arguments(
        __doc__ or "", rounds=5, batch=64, batches=24, workers=2, records=5000, many=1_280_000
    )
    for name in ("imagenet-jpeg-sample.zip", "cifar10-jpeg.zip"):
        shared_data(name)  # not after minutes
    print(machine())
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    for part in (
        # First: a fork of a process that has run the others holds what they have left behind.
        lambda folder: many_records(folder, options.many),
        lambda folder: imagenet(folder, options),
        lambda folder: cifar(folder, options),
    ):
        with tempfile.TemporaryDirectory(prefix="bip-loaders-") as folder:
            figures |= part(Path(folder))
    for name, value in figures.items():
        least, most = AT_LEAST.get(name, value), AT_MOST.get(name, value)
        if not least <= value <= most:
            print(f"missed: {name} is {value:.4g}, the goal {least if value < least else most}")
    finish(figures, options.json)


if __name__ == "__main__":
    main()
