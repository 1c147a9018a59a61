"""Real images, small trees and stores made of them, and what several files of tests use."""

import contextlib
import hashlib
import io
import itertools
import os
import pickle
import random
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bip.data.batches import Data, open_data
from bip.data.loaders import dali
from bip.data.options import DataOptions
from bip.data.reader import Batch
from bip.data.stores.base import ImageStore
from bip.data.stores.lmdb import LmdbStore
from bip.data.tools.build import build_lmdb
from bip.errors import UserError

DALI = pytest.mark.skipif(not dali.is_installed(), reason="no DALI: bip-hpc[dali]")
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


@pytest.fixture
def cifar_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `cifar-10-batches-py` of 6 images per file, whose MD5 torchvision expects."""
    folder = tmp_path / "archives" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def batch(name: str) -> list[str]:
        content = {
            "data": rng.integers(0, 256, (6, 3072), dtype=np.uint8),
            "labels": rng.permutation([0, 0, 1, 1, 2, 2]).tolist(),
        }
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    from torchvision.datasets import CIFAR10 as cifar  # takes a second

    monkeypatch.setattr(cifar, "train_list", [batch(f"data_batch_{i}") for i in range(1, 6)])
    monkeypatch.setattr(cifar, "test_list", [batch("test_batch")])
    names = {"label_names": [f"class{i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))
    md5 = hashlib.md5((folder / "batches.meta").read_bytes()).hexdigest()
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": md5})
    return folder.parent


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


@contextlib.contextmanager
def refused(*parts: str, kind: type[Exception] = UserError) -> Iterator[None]:
    """An error of one line, which has all the parts (regular expressions)."""
    with pytest.raises(kind) as error:
        yield
    text = str(error.value)
    del error  # its traceback holds stores open
    assert "\n" not in text
    for part in parts:
        assert re.search(part, text), f"{part} is not in: {text}"


def take(batches: Iterator[Batch], count: int | None = None) -> list[Batch]:
    """Copies: an iterator's images are valid until its next batch."""
    return [(images.clone(), labels) for images, labels in itertools.islice(batches, count)]


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(x, u) and torch.equal(y, v)
        for (x, y), (u, v) in zip(first, second, strict=True)
    )


def encoded(mode: str, kind: str, **how: Any) -> bytes:
    """A picture of two gradients, 90 x 70 pixels."""
    stream = io.BytesIO()
    gradient = Image.linear_gradient("L").resize((90, 70))
    image = Image.merge("RGB", [gradient, gradient.rotate(180), gradient])
    image.convert(mode).save(stream, kind, **how)
    return stream.getvalue()


def as_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def damage(path: Path, *indices: int) -> None:
    """Flip a bit of these records' images in a store."""
    content = bytearray(path.read_bytes())
    pairs = read_all(LmdbStore(path))
    for index in indices:
        content[content.index(pairs[index][0]) + 30] ^= 1
    path.write_bytes(content)


def read_all(store: ImageStore) -> list[tuple[bytes, int]]:
    return [store.read(index) for index in range(len(store))]


def mutate(
    rng: random.Random,
    data: bytes,
    most: int,
    words: Sequence[bytes] = (b"\xff\xff", b"\x00\x00", b"\x7f\xff", b"\x80\x00"),
) -> bytes:
    """`data` with 1 to `most` faults: another byte, bytes missing, noise, one of `words`."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, most)):
        at = rng.randrange(len(changed)) if changed else 0
        way = rng.randrange(4)
        if way == 0 and changed:
            changed[at] = rng.randrange(256)
        elif way == 1:
            del changed[at : at + rng.randint(1, 30)]
        elif way == 2:
            changed[at:at] = rng.randbytes(rng.randint(1, 8))
        else:
            changed[at : at + 2] = rng.choice(words)
    return bytes(changed)
