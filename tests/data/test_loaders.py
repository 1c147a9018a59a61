"""Batches: the same for every loader, world size, worker count and starting point."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bip.data import decode
from bip.data.augment import pad_crop_params
from bip.data.loaders import choose, dali
from bip.data.order import Order, holdout_split
from bip.data.reader import Batch
from bip.data.sets import dataset_spec
from bip.data.splits import open_split
from bip.data.stores.base import ArraySplit
from bip.data.stores.lmdb import LmdbStore
from tests.data.conftest import DALI, as_folder, damage, encoded, opened, refused, same, take
from tests.data.test_augment import naive_pad_crop

CIFAR: dict[str, Any] = {"dataset": "CIFAR10", "num_classes": 10}
IMAGENET: dict[str, Any] = {"dataset": "ImageNet", "num_classes": 171, "image_dim": 40}
IMAGENET |= {"batch_size": 24}
LEVELS = ("lower", "upper")


def pixels(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """The uint8 pixels that normalised images were made of."""
    raw = (images * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)) * 255
    assert (raw - raw.round()).abs().max() < 1e-3
    return raw.round().to(torch.uint8).numpy()


def test_shapes_types_and_sizes() -> None:
    data = opened(holdout=100)
    assert (data.train_size, data.batches_per_epoch) == (1337, 20)
    assert (data.channels, data.image_dim) == (1, 8)
    assert (data.eval_size("test"), data.eval_size("holdout")) == (360, 100)
    images, labels = next(data.train())
    assert (images.shape, images.dtype) == ((64, 1, 8, 8), torch.float32)
    assert (labels.shape, labels.dtype) == ((64,), torch.int64)
    images, _ = next(opened(normalize=False).train())
    assert (images.min(), images.max()) == (0, 1)


@pytest.mark.parametrize("level", ["lower", "upper"])
def test_training_images_are_the_ordered_ones_cropped_one_by_one(
    small_cifar: Path, level: str
) -> None:
    """The whole path against a loop: order, holdout, decode, crop, flip, normalise."""
    store, spec = LmdbStore(small_cifar / "train.lmdb"), dataset_spec("CIFAR10")
    train, _ = holdout_split(310, 50)
    order = Order(260, 64, 5, level)
    data = opened(**CIFAR, data_dir=small_cifar, holdout=50)
    for number, (images, labels) in enumerate(take(data.train(level), 6)):
        epoch, positions, indices = order.batch(number)
        got = pixels(images, spec.mean, spec.std)
        for row, (position, index) in enumerate(zip(positions, train[indices], strict=True)):
            encoded, label = store.read(int(index))
            image = np.asarray(decode.open_image(encoded)).transpose(2, 0, 1)
            crops = pad_crop_params(order.uniforms(epoch, int(position), 1, 4), 32, 32, 4, True)
            top, left, flip = int(crops.top[0]), int(crops.left[0]), bool(crops.flip[0])
            np.testing.assert_array_equal(got[row], naive_pad_crop(image, top, left, flip, 4))
            assert labels[row] == label


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_global_batch(imagenet: Path, world: int) -> None:
    for case in ({}, {**IMAGENET, "data_dir": imagenet, "loader": "lmdb"}):
        whole = take(opened(**case).train("upper", 2), 3)
        shares = [
            take(opened(**case, rank=r, world=world).train("upper", 2), 3) for r in range(world)
        ]
        joined = [
            (torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))
            for parts in zip(*shares, strict=True)
        ]
        assert same(joined, whole)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(
    case=st.sampled_from(range(5)),
    stop=st.integers(0, 11),  # epochs have 4 batches of CIFAR and 7 of ImageNet
    workers=st.tuples(*[st.sampled_from([0, 1, 3])] * 2),
    rank=st.integers(0, 1),
)
def test_a_stop_after_any_step_changes_no_byte(
    small_cifar: Path, imagenet: Path, case: int, stop: int, workers: tuple[int, int], rank: int
) -> None:
    """Every loader; the remaining batches are drawn as BiP does, the levels in turn."""
    cifar, photos = CIFAR | {"data_dir": small_cifar}, IMAGENET | {"data_dir": imagenet}
    part, loader = [
        *((cifar, "memory"), (cifar, "lmdb"), (photos, "lmdb"), (photos, "folder")),
        (photos, "dali" if dali.is_installed() else "lmdb"),
    ][case]
    settings = {**part, "loader": loader, "rank": rank, "world": 2}
    data = opened(**settings, num_workers=workers[0])
    whole = {level: take(data.train(level), 11) for level in LEVELS}
    data.close()
    data = opened(**settings, num_workers=workers[1])
    streams = {level: data.train(level, stop) for level in LEVELS}
    for number in range(stop, 11):
        for level, stream in streams.items():
            assert same(take(stream, 1), [whole[level][number]])
    data.close()


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
def test_loaders_and_worker_counts_give_identical_batches(
    imagenet: Path, small_cifar: Path
) -> None:
    photos = [("lmdb", 0), ("folder", 0), ("lmdb", 1), ("folder", 3)]
    for case, ways in (
        (IMAGENET | {"data_dir": imagenet}, photos),
        (CIFAR | {"data_dir": small_cifar}, [("memory", 0), ("lmdb", 0)]),
    ):
        batches = []
        for loader, workers in ways:
            data = opened(**case, loader=loader, num_workers=workers, holdout=9)
            batches.append(take(data.train(), 8) + take(data.evaluate("test")))
            data.close()
        assert all(same(batches[0], other) for other in batches[1:])


@pytest.mark.parametrize("bad", ["no image", "cut short", "header only", "noise", "cut PNG"])
@pytest.mark.parametrize("loader", ["memory", "folder", pytest.param("dali", marks=DALI)])
def test_an_image_that_does_not_decode_is_named(tmp_path: Path, loader: str, bad: str) -> None:
    good = encoded("RGB", "JPEG")
    harmed = {
        "no image": b"<html>404</html>",
        "cut short": good[: len(good) // 2],
        "header only": good[:30],
        "noise": good[:25] + bytes(range(256)) * 4 + good[-2:],
        "cut PNG": encoded("RGB", "PNG")[:60],
    }[bad]
    for split in ("train", "test"):
        as_folder(tmp_path / split, {"a/1.jpg": good, "b/1.jpg": harmed})
    case = CIFAR | {"num_classes": 2, "data_dir": tmp_path, "batch_size": 2, "loader": loader}
    named = r"/b/1\.jpg .image 1, class b. does not decode .*; repair or remove it"
    with refused(named, "again$" if loader == "memory" else "--skip-bad$"):
        take(opened(**case, num_workers=1).train(), 1)
    with refused(named):
        take(opened(**case, num_workers=1).evaluate("test"))


def test_auto_takes_the_lmdb_and_else_the_folder_of_the_same_images(
    imagenet: Path, tmp_path: Path
) -> None:
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(imagenet / split)
    lmdb, folder = (opened(**IMAGENET, data_dir=place) for place in (imagenet, tmp_path))
    assert (lmdb.loader, folder.loader) == ("lmdb", "folder")
    assert lmdb.identity["images"] == folder.identity["images"]
    assert lmdb.identity.keys() - folder.identity.keys() == {"stores"}


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("test_batch_size", [1, 3, 50, 7000])
def test_evaluation_shows_every_image_once(world: int, test_batch_size: int) -> None:
    """Over all ranks, some of which may get no batch at all (2 images for 4 ranks)."""
    test, train = (open_split("Digits", Path("unused"), part) for part in (False, True))
    assert isinstance(test, ArraySplit)
    assert isinstance(train, ArraySplit)
    splits: list[tuple[Literal["test", "holdout"], int]] = [("test", 0), ("holdout", 59)]
    spec = dataset_spec("Digits")
    for split, holdout in [*splits, ("holdout", 2)]:  # 59 and 360 do not divide by all of 1-4
        held = holdout_split(1437, holdout)[1]
        source, rows = (test, np.arange(360)) if split == "test" else (train, held)
        shown: list[Batch] = []
        case = {"test_batch_size": test_batch_size, "holdout": holdout, "batch_size": 60}
        for rank in range(world):
            data = opened(rank=rank, world=world, **case)
            assert data.eval_size(split) == len(rows)
            shard = take(data.evaluate(split))
            assert all(len(y) <= max(1, test_batch_size // world) for _, y in shard)
            assert 0 <= sum(len(y) for _, y in shard) - len(rows) // world <= 1
            shown += shard
        assert torch.cat([y for _, y in shown]).tolist() == source.labels[rows].tolist()
        got = pixels(torch.cat([x for x, _ in shown]), spec.mean, spec.std)
        np.testing.assert_array_equal(got, source.images[rows])


def test_image_dim_resizes(small_cifar: Path) -> None:
    for dim, case in ((12, {}), (24, {**CIFAR, "data_dir": small_cifar})):
        data = opened(**case, image_dim=dim)
        assert data.image_dim == dim
        assert next(data.train())[0].shape[2:] == (dim, dim)
        assert next(data.evaluate("test"))[0].shape[2:] == (dim, dim)


def test_global_random_state_is_left_alone(small_cifar: Path) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    data = opened(**CIFAR, data_dir=small_cifar, loader="lmdb", num_workers=1)
    take(data.train(), 2)
    take(data.evaluate("test"))
    data.close()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_workers_outlive_the_schedulers_signals_and_end_with_close(small_cifar: Path) -> None:
    data = opened(**CIFAR, data_dir=small_cifar, loader="lmdb", num_workers=2)
    batches = data.train()
    first = take(batches, 3)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        assert worker.pid is not None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            os.kill(worker.pid, number)
    rest = take(batches, 12)
    assert all(worker.is_alive() for worker in workers)
    data.close()
    assert multiprocessing.active_children() == []
    plain = opened(**CIFAR, data_dir=small_cifar, loader="memory").train()
    assert same(first + rest, take(plain, 15))


def test_no_way_of_ending_hangs_on_the_workers(small_cifar: Path) -> None:
    """They ignore SIGTERM, which is what multiprocessing sends at exit before it waits."""
    code = """
        import multiprocessing, os, sys
        from pathlib import Path
        from tests.data.conftest import opened

        way, folder = sys.argv[1], Path(sys.argv[2])
        batches = opened(dataset="CIFAR10", data_dir=folder, loader="lmdb", num_workers=2).train()
        def loop():
            for number, _ in enumerate(batches):
                if way == "raise" and number == 1:
                    raise ValueError
                if way == "killed worker" and number == 1:
                    os.kill(multiprocessing.active_children()[0].pid, 9)
                if way == "exit" and number == 3:
                    sys.exit(3)
        try:
            loop()
        except Exception as error:
            kept = error
            sys.exit(4)
    """
    runs = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), way, small_cifar])
        for way in ("exit", "raise", "killed worker")
    ]
    try:
        assert [run.wait(timeout=40) for run in runs] == [3, 4, 4]
    finally:
        for run in runs:
            run.kill()


@pytest.mark.parametrize(("loader", "workers"), [("lmdb", 0), ("lmdb", 2), ("memory", 0)])
def test_a_damaged_record_stops_training_with_one_line(
    small_cifar: Path, tmp_path: Path, loader: str, workers: int
) -> None:
    for split in ("train", "test"):
        shutil.copy(small_cifar / f"{split}.lmdb", tmp_path)
    damage(tmp_path / "train.lmdb", 123)
    with refused(r"train\.lmdb: record 123 \(class "):
        take(opened(**CIFAR, data_dir=tmp_path, loader=loader, num_workers=workers).train(), 8)


def test_splits_with_different_classes_are_an_error(tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "test/a", "test/c"):
        as_folder(tmp_path, {f"{name}/1.png": b""})
    with refused(r"different classes.*'b'"):
        opened(dataset="CIFAR10", num_classes=2, data_dir=tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 100}, "num_classes: 100, but Digits .*--num-classes 10$"),
        ({"loader": "lmdb"}, "loader: lmdb .* Digits.*use auto or memory"),
        ({"dataset": "ImageNet", "loader": "memory"}, "loader: memory .*use lmdb or folder"),
        ({"batch_size": 1438}, "batch_size: 1438 .* 1437 images"),
        ({"batch_size": 1400, "holdout": 40}, "batch_size: 1400 .* 1397 images.*at most 1397"),
        ({"holdout": 1437}, "holdout: 1437 of the 1437.* use 0 to 1436"),
        ({"holdout": 1438}, "holdout: 1438"),
        ({"holdout": -1}, "holdout: -1"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, object], message: str) -> None:
    with refused(message):
        opened(**changes)


def test_auto_takes_dali_where_a_gpu_can_decode(
    imagenet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    small, large = dataset_spec("CIFAR10"), dataset_spec("ImageNet")
    store = LmdbStore(imagenet / "val.lmdb")
    for there, on_gpu in ((True, "dali"), (False, "lmdb")):
        monkeypatch.setattr("bip.data.loaders.dali.is_installed", lambda there=there: there)
        assert choose(large, store, cuda) == on_gpu
        assert choose(large, store, cpu) == "lmdb"
        assert choose(small, store, cuda) == "memory"
