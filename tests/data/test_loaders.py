"""Batches: the same for every loader, world size, worker count and starting point."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bip.data import decode
from bip.data.augment import pad_crop_params
from bip.data.loaders import choose
from bip.data.order import Order, holdout_split
from bip.data.reader import Batch
from bip.data.sets import dataset_spec
from bip.data.splits import open_split
from bip.data.stores.base import ArraySplit
from bip.data.stores.lmdb import LmdbStore
from bip.errors import UserError
from tests.data.conftest import opened
from tests.data.test_augment import naive_pad_crop

CIFAR: dict[str, Any] = {"dataset": "CIFAR10", "num_classes": 10}
IMAGENET: dict[str, Any] = {
    "dataset": "ImageNet",
    "num_classes": 171,
    "image_dim": 64,
    "batch_size": 24,
}


def take(batches: Iterator[Batch], count: int | None = None) -> list[Batch]:
    """Copies: an iterator's images are valid until its next batch."""
    return [(images.clone(), labels) for images, labels in itertools.islice(batches, count)]


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(x, u) and torch.equal(y, v)
        for (x, y), (u, v) in zip(first, second, strict=True)
    )


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


def test_without_normalize_pixels_lie_between_0_and_1() -> None:
    images, _ = next(opened(normalize=False).train())
    assert (images.min(), images.max()) == (0, 1)


def test_levels_and_seeds_draw_different_batches() -> None:
    draws = [
        next(opened(seed=seed).train(level))[1].tolist()
        for seed in (0, 1)
        for level in ("lower", "upper")
    ]
    assert len({tuple(labels) for labels in draws}) == 4


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


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("loader", ["memory", "lmdb"])
def test_resumed_training_draws_the_remaining_batches(
    small_cifar: Path, loader: str, workers: int
) -> None:
    case = {**CIFAR, "data_dir": small_cifar, "loader": loader, "num_workers": workers}
    data = opened(**case)
    whole = {level: take(data.train(level), 9) for level in ("lower", "upper")}
    data.close()
    for start in (1, 4, 7):  # epochs have 4 batches
        data = opened(**case)
        streams = {level: data.train(level, start) for level in whole}
        rest: dict[str, list[Batch]] = {level: [] for level in whole}
        for _ in range(start, 9):  # as BiP draws them: in turn
            for level, stream in streams.items():
                rest[level] += take(stream, 1)
        data.close()
        assert all(same(rest[level], whole[level][start:]) for level in whole)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
def test_loaders_and_worker_counts_give_identical_batches(
    imagenet: Path, small_cifar: Path
) -> None:
    for case, ways in (
        (
            IMAGENET | {"data_dir": imagenet},
            [("lmdb", 0), ("folder", 0), ("lmdb", 1), ("folder", 3)],
        ),
        (CIFAR | {"data_dir": small_cifar}, [("memory", 0), ("lmdb", 0)]),
    ):
        batches = []
        for loader, workers in ways:
            data = opened(**case, loader=loader, num_workers=workers, holdout=9)
            batches.append(take(data.train(), 8) + take(data.evaluate("test")))
            data.close()
        assert all(same(batches[0], other) for other in batches[1:])


@pytest.mark.parametrize("loader", ["memory", "folder"])
@pytest.mark.parametrize("size", [-1, 60])
def test_an_image_that_does_not_decode_is_named(tmp_path: Path, loader: str, size: int) -> None:
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / split / name / "1.png")
    bad = tmp_path / "test" / "b" / "1.png"
    bad.write_bytes(bad.read_bytes()[:size] if size > 0 else b"<html>404</html>")
    case = CIFAR | {"num_classes": 2, "data_dir": tmp_path, "batch_size": 2, "loader": loader}
    with pytest.raises(UserError) as error:
        take(opened(**case, num_workers=1).evaluate("test"))
    assert f"{bad} (image 1, class b) does not decode" in str(error.value)
    assert "\n" not in str(error.value)


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
    test, train = (open_split("Digits", Path("unused"), part) for part in (False, True))
    assert isinstance(test, ArraySplit)
    assert isinstance(train, ArraySplit)
    held = holdout_split(1437, 59)[1]  # 59 and 360 do not divide by all of 1-4
    expected: dict[Literal["test", "holdout"], tuple[np.ndarray, np.ndarray]] = {
        "test": (test.images, test.labels),
        "holdout": (train.images[held], train.labels[held]),
    }
    spec = dataset_spec("Digits")
    for split, (images, labels) in expected.items():
        shown: list[Batch] = []
        for rank in range(world):
            data = opened(
                rank=rank, world=world, test_batch_size=test_batch_size, holdout=59, batch_size=60
            )
            assert data.eval_size(split) == len(labels)
            shard = take(data.evaluate(split))
            assert all(len(y) <= max(1, test_batch_size // world) for _, y in shard)
            shown += shard
        assert torch.cat([y for _, y in shown]).tolist() == labels.tolist()
        got = pixels(torch.cat([x for x, _ in shown]), spec.mean, spec.std)
        np.testing.assert_array_equal(got, images)


@pytest.mark.parametrize("world", [3, 4])
def test_a_split_smaller_than_the_world_leaves_ranks_without_batches(world: int) -> None:
    counts = [
        sum(
            len(y)
            for _, y in opened(rank=r, world=world, holdout=2, batch_size=12).evaluate("holdout")
        )
        for r in range(world)
    ]
    assert sum(counts) == 2
    assert max(counts) == 1


def test_the_holdout_is_never_trained_on() -> None:
    _, held = holdout_split(1437, 900)
    data = opened(holdout=900, batch_size=537)
    train = open_split("Digits", Path("unused"), True)
    assert isinstance(train, ArraySplit)
    (_, labels), *_ = take(data.train(), 1)
    rest = np.setdiff1d(np.arange(1437), held)
    assert np.bincount(labels).tolist() == np.bincount(train.labels[rest]).tolist()


def test_image_dim_resizes(small_cifar: Path) -> None:
    cases: list[dict[str, Any]] = [
        {"image_dim": 12},
        {**CIFAR, "data_dir": small_cifar, "image_dim": 24},
    ]
    for case in cases:
        data = opened(**case)
        dim = case["image_dim"]
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

        data = opened(
            dataset="CIFAR10", data_dir=Path(sys.argv[2]), loader="lmdb", num_workers=2
        )
        batches = data.train()
        def loop():
            for number, _ in enumerate(batches):
                if sys.argv[1] == "raise" and number == 1:
                    raise ValueError
                if sys.argv[1] == "killed worker" and number == 1:
                    os.kill(multiprocessing.active_children()[0].pid, 9)
                if sys.argv[1] == "exit" and number == 3:
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


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_record_stops_training_with_one_line(
    small_cifar: Path, tmp_path: Path, workers: int
) -> None:
    for split in ("train", "test"):
        content = bytearray((small_cifar / f"{split}.lmdb").read_bytes())
        if split == "train":
            data = LmdbStore(small_cifar / "train.lmdb").read(123)[0]
            content[content.index(data) + 100] ^= 4
        (tmp_path / f"{split}.lmdb").write_bytes(content)
    case = {**CIFAR, "data_dir": tmp_path, "num_workers": workers}
    with pytest.raises(UserError) as error:
        take(opened(**case, loader="lmdb").train(), 8)
    assert "train.lmdb: record 123 (class " in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="record 123 "):
        opened(**case, loader="memory")


def test_splits_with_different_classes_are_an_error(tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "test/a", "test/c"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / name / "1.png")
    with pytest.raises(UserError, match=r"different classes.*'b'"):
        opened(dataset="CIFAR10", num_classes=2, data_dir=tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 100}, "num_classes: 100, but Digits .*has 10 classes"),
        ({"loader": "lmdb"}, "loader: lmdb does not apply to Digits"),
        ({"dataset": "ImageNet", "loader": "memory"}, "loader: memory is for small sets"),
        ({"dataset": "CIFAR10"}, "data_dir: nowhere does not exist"),
        ({"batch_size": 1438}, "batch_size: 1438 is more than the 1437 images"),
        ({"batch_size": 1400, "holdout": 40}, "batch_size: 1400 is more than the 1397 images"),
        ({"holdout": 1437}, "holdout: 1437 of the 1437"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        opened(**changes)
    assert "\n" not in str(error.value)


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("loader", ["memory", "lmdb"])
def test_batches_on_cuda_are_those_on_the_cpu(small_cifar: Path, loader: str) -> None:
    case = {**CIFAR, "data_dir": small_cifar, "loader": loader, "num_workers": 1}
    expected = take(opened(**case).train(), 6)
    data = opened(**case, device="cuda")
    for (images, labels), (x, y) in zip(take(data.train(), 6), expected, strict=True):
        assert images.is_cuda
        assert labels.is_cuda
        torch.testing.assert_close(images.cpu(), x, rtol=0, atol=1e-6)
        assert torch.equal(labels.cpu(), y)
    data.close()
