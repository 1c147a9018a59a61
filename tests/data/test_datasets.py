"""What the sets are, and how they are found on disk."""

import errno
import hashlib
import pickle
import shutil
import subprocess
import sys
import tarfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torchvision
from PIL import Image

from bip.data.sets import dataset_spec
from bip.data.splits import open_split
from bip.data.stores.base import ArraySplit
from bip.data.stores.folder import FolderStore
from bip.data.stores.lmdb import LmdbStore
from bip.data.tools.prepare import prepare_imagenet
from bip.errors import UserError
from tests.data.conftest import opened


def test_digits_are_scikit_learns() -> None:
    pytest.importorskip("sklearn", reason="the Digits images come with scikit-learn")
    from sklearn.datasets import load_digits

    train, test = (open_split("Digits", Path("unused"), part) for part in (True, False))
    assert isinstance(train, ArraySplit)
    assert isinstance(test, ArraySplit)
    pixels, labels = load_digits(return_X_y=True)  # values 0 ... 16
    expected = np.rint(pixels * (255 / 16)).reshape(-1, 1, 8, 8)
    for split, part in ((train, slice(1437)), (test, slice(1437, 1797))):
        assert split.images.dtype == np.uint8
        np.testing.assert_array_equal(split.images, expected[part])
        np.testing.assert_array_equal(split.labels, labels[part])
    assert (train.images.min(), train.images.max()) == (0, 255)
    spec = dataset_spec("Digits")
    pixels = train.images / 255
    np.testing.assert_allclose(spec.mean, pixels.mean(), atol=1e-4)
    np.testing.assert_allclose(spec.std, pixels.std(), atol=1e-4)


def test_digits_do_not_import_scikit_learn() -> None:
    """It would take most of a second of each rank's start."""
    script = """
import pathlib, sys
from bip.data.splits import open_split
open_split("Digits", pathlib.Path("unused"), True)
sys.exit(bool({name.split(".")[0] for name in sys.modules} & {"sklearn", "scipy"}))
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("spec", [None, ModuleSpec("sklearn", None)], ids=["none", "a folder"])
def test_digits_without_scikit_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: ModuleSpec | None
) -> None:
    (tmp_path / "datasets" / "data").mkdir(parents=True)
    (tmp_path / "datasets" / "data" / "digits.csv.gz").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    with pytest.raises(UserError, match=r"pip install 'bip-hpc\[demo\]'"):
        open_split("Digits", Path("unused"), True)


def test_lmdb_comes_before_folder_and_val_counts_as_test(imagenet: Path, tmp_path: Path) -> None:
    train, test = (open_split("ImageNet", imagenet, part) for part in (True, False))
    assert isinstance(train, LmdbStore)
    assert isinstance(test, LmdbStore)
    assert (train.path.name, test.path.name) == ("train.lmdb", "val.lmdb")
    folder = open_split("ImageNet", imagenet, False, "folder")
    assert isinstance(folder, FolderStore)
    assert folder.path == imagenet / "val"
    (tmp_path / "ImageNet").symlink_to(imagenet)  # data_dir/NAME
    below = open_split("ImageNet", tmp_path, True, "lmdb")
    assert isinstance(below, LmdbStore)


def test_images_that_lie_flat_get_the_build_command(tmp_path: Path) -> None:
    """As TinyImageNet and ImageNet are unpacked."""
    from tests.data.test_layouts import as_folder, kaggle_xml, tiny  # which imports this module

    for layout, name, place in (
        (tiny, "TinyImageNet", "tiny-imagenet-200"),
        (kaggle_xml, "ImageNet", "ILSVRC/Data/CLS-LOC"),
    ):
        root = as_folder(tmp_path / name, layout())
        data_dir = root / place
        case = {"dataset": name, "num_classes": 3, "data_dir": data_dir, "batch_size": 4}
        with pytest.raises(UserError) as error:
            opened(**case)
        assert "build a store: python -m bip data build-lmdb" in str(error.value)
        assert "\n" not in str(error.value)
        prepare_imagenet(root, tmp_path / f"{name} in folders")
        (tmp_path / f"{name} in folders" / "test").symlink_to(data_dir / "test")
        test = open_split(name, tmp_path / f"{name} in folders", False)
        assert test.classes == ["n01440764", "n01443537", "n02102040"]


@pytest.mark.parametrize(
    ("make", "layout", "message"),
    [
        (False, "any", "does not exist"),
        (True, "any", "holds no CIFAR10 .*test.lmdb .*cifar-10-python.tar.gz .*test/"),
        (True, "lmdb", r"holds no CIFAR10 \(test.lmdb or val.lmdb\)"),
        (True, "folder", r"holds no CIFAR10 \(test/ or val/\)"),
    ],
)
def test_a_missing_set_names_the_path_and_the_remedy(
    tmp_path: Path, make: bool, layout: str, message: str
) -> None:
    folder = tmp_path / "data"
    if make:
        folder.mkdir()
    with pytest.raises(UserError, match=message) as error:
        open_split("CIFAR10", folder, False, layout)  # type: ignore[arg-type]
    assert str(folder) in str(error.value)
    assert "python -m bip data build-lmdb SRC" in str(error.value)


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

    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "train_list", [batch(f"data_batch_{i}") for i in range(1, 6)])
    monkeypatch.setattr(cifar, "test_list", [batch("test_batch")])
    names = {"label_names": [f"class{i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))
    md5 = hashlib.md5((folder / "batches.meta").read_bytes()).hexdigest()
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": md5})
    return folder.parent


@pytest.mark.parametrize("packed", [False, True])
def test_torchvisions_cifar_archive(cifar_archive: Path, packed: bool) -> None:
    folder = cifar_archive / "cifar-10-batches-py"
    with open(folder / "data_batch_2", "rb") as stream:
        second = pickle.load(stream)
    if packed:
        with tarfile.open(cifar_archive / "cifar-10-python.tar.gz", "w:gz") as tar:
            tar.add(folder, folder.name)
        shutil.rmtree(folder)
    before = sorted(cifar_archive.iterdir())
    train, test = (open_split("CIFAR10", cifar_archive, part) for part in (True, False))
    assert isinstance(train, ArraySplit)
    assert (train.images.shape, len(test)) == ((30, 3, 32, 32), 6)
    assert train.classes[0] == "class0"
    np.testing.assert_array_equal(train.images[6:12].reshape(6, -1), second["data"])
    assert train.labels[6:12].tolist() == second["labels"]
    assert sorted(cifar_archive.iterdir()) == before


def test_a_damaged_cifar_archive_is_named(cifar_archive: Path) -> None:
    batch = cifar_archive / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{cifar_archive}.*missing or damaged"):
        open_split("CIFAR10", cifar_archive, True)
    shutil.rmtree(batch.parent)
    (cifar_archive / "cifar-10-python.tar.gz").write_bytes(b"\x1f\x8b junk")
    with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz: cannot be extracted"):
        open_split("CIFAR10", cifar_archive, True)


def unreachable(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.ESTALE, "Stale file handle")


@pytest.mark.parametrize("packed", [False, True])
def test_an_archive_that_is_unreachable_is_not_called_missing(
    cifar_archive: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    if packed:
        shutil.rmtree(cifar_archive / "cifar-10-batches-py")
        (cifar_archive / "cifar-10-python.tar.gz").touch()
        monkeypatch.setattr(tarfile, "open", unreachable)
    else:
        (cifar_archive / "cifar-10-batches-py" / "data_batch_3").unlink()  # as torchvision sees it
        monkeypatch.setattr(Path, "iterdir", unreachable)
    with pytest.raises(OSError, match=f"Stale file handle: '{cifar_archive}/cifar-10-"):
        open_split("CIFAR10", cifar_archive, True)


def test_an_unreachable_split_is_not_replaced_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("test", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("RGB", (32, 32), 7).save(tmp_path / split / "a" / "1.png")
    monkeypatch.setattr("bip.data.splits.os.scandir", unreachable)
    with pytest.raises(OSError, match=f"Stale file handle: '{tmp_path}/test'"):
        open_split("ImageNet", tmp_path, False)


def test_a_folder_tree_of_grayscale_and_colour(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for mode in ("L", "RGB"):
            (tmp_path / split / mode).mkdir(parents=True)
            Image.new(mode, (32, 32), 7).save(tmp_path / split / mode / "1.png")
    store = open_split("CIFAR10", tmp_path, True)
    assert isinstance(store, FolderStore)
    assert store.classes == ["L", "RGB"]
