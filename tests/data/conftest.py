"""Real images, and small trees and stores made of them."""

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from bip.data.batches import Data, open_data
from bip.data.options import DataOptions
from bip.data.tools.build import build_lmdb

SHARED = Path(os.environ.get("BIP_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))


def _shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is missing; set BIP_SHARED_DATA to the folder with the real images")
    return path


@pytest.fixture(scope="session")
def cifar_zip() -> Path:
    """All 60,000 CIFAR-10 images as JPEG."""
    return _shared("cifar10-jpeg.zip")


@pytest.fixture(scope="session")
def small_cifar_zip(cifar_zip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """31 training and 7 test images of each class, inside a top folder, in no sorted order."""
    path = tmp_path_factory.mktemp("zip") / "small.zip"
    with zipfile.ZipFile(cifar_zip) as full, zipfile.ZipFile(path, "w") as small:
        for name in reversed(full.namelist()):
            limit = 31 if name.startswith("train/") else 7
            if int(Path(name).stem) < limit:
                small.writestr(f"cifar/{name}", full.read(name))
    return path


@pytest.fixture(scope="session")
def small_cifar(small_cifar_zip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.lmdb and test.lmdb of `small_cifar_zip` (310 and 70 images)."""
    out = tmp_path_factory.mktemp("cifar")
    build_lmdb(small_cifar_zip, out)
    return out


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """171 real ImageNet images, as train/ and val/ trees and as train.lmdb and val.lmdb."""
    root = tmp_path_factory.mktemp("imagenet")
    with zipfile.ZipFile(_shared("imagenet-jpeg-sample.zip")) as archive:
        archive.extractall(root)
    (root / "train").symlink_to(root / "val")
    build_lmdb(root, root)
    return root


def options(**changes: Any) -> DataOptions:
    """`DataOptions` with what a test does not care about filled in."""
    defaults = {
        "dataset": "Digits",
        "data_dir": Path("nowhere"),
        "batch_size": 64,
        "test_batch_size": 50,
        "normalize": True,
        "num_classes": 10,
        "num_workers": 0,
        "seed": 5,
    }
    return DataOptions(**{**defaults, **changes})


def opened(rank: int = 0, world: int = 1, device: str = "cpu", **changes: Any) -> Data:
    """`open_data` with what a test does not care about filled in."""
    return open_data(options(**changes), rank, world, torch.device(device))
