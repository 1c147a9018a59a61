"""What the sets are, and how they are found on disk."""

import errno
import pickle
import shutil
import subprocess
import sys
import tarfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from bip.data.sets import dataset_spec
from bip.data.splits import open_split
from bip.data.stores.base import ArraySplit
from bip.data.stores.folder import FolderStore
from bip.data.stores.lmdb import LmdbStore
from bip.data.tools.prepare import prepare_imagenet
from bip.errors import UserError
from tests.data.conftest import as_folder, opened, refused
from tests.data.test_layouts import CLASSES, kaggle_xml


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
    (tmp_path / "ImageNet").symlink_to(imagenet)  # data_dir/NAME
    for place, root in ((imagenet, imagenet), (tmp_path, tmp_path / "ImageNet")):
        for layout, train, found in (
            ("any", True, "train.lmdb"),
            ("any", False, "val.lmdb"),
            ("lmdb", True, "train.lmdb"),
            ("folder", False, "val"),
        ):
            split = open_split("ImageNet", place, train, layout)
            assert isinstance(split, LmdbStore if "lmdb" in found else FolderStore)
            assert split.path == root / found


def test_annotations_that_lie_elsewhere_get_the_build_command(tmp_path: Path) -> None:
    """As Kaggle's ImageNet is unpacked."""
    root, place = as_folder(tmp_path / "src", kaggle_xml()), "ILSVRC/Data/CLS-LOC"
    with refused("val/: its images lie in no class folders", "build-lmdb"):
        opened(dataset="ImageNet", num_classes=3, data_dir=root / place, batch_size=4)
    prepare_imagenet(root, tmp_path / "out")
    (tmp_path / "out" / "test").symlink_to(root / place / "test")
    assert open_split("ImageNet", tmp_path / "out", False).classes == CLASSES


@pytest.mark.parametrize(
    ("folder", "layout", "message"),
    [
        ("none", "any", "none does not exist"),
        ("", "any", "holds no CIFAR10 .*test.lmdb .*cifar-10-python.tar.gz .*test/"),
        ("", "lmdb", r"holds no CIFAR10 \(test.lmdb or val.lmdb\)"),
        ("", "folder", r"holds no CIFAR10 \(test/ or val/\)"),
    ],
)
def test_a_missing_set_names_the_path_and_the_remedy(
    tmp_path: Path, folder: str, layout: Any, message: str
) -> None:
    with refused(f"^data_dir: {tmp_path}", message, "python -m bip data build-lmdb SRC"):
        open_split("CIFAR10", tmp_path / folder, False, layout)


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
    with refused(f"{cifar_archive}.*missing or damaged", "download them again"):
        open_split("CIFAR10", cifar_archive, True)
    shutil.rmtree(batch.parent)
    (cifar_archive / "cifar-10-python.tar.gz").write_bytes(b"\x1f\x8b junk")
    with refused(r"cifar-10-python\.tar\.gz: cannot be extracted", "download it again"):
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
    as_folder(tmp_path, {"test/a/1.png": b"", "val/a/1.png": b""})
    monkeypatch.setattr("bip.data.splits.os.scandir", unreachable)
    with pytest.raises(OSError, match=f"Stale file handle: '{tmp_path}/test'"):
        open_split("ImageNet", tmp_path, False)
