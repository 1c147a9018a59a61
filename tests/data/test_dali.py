"""The `dali` loader on the CPU: DALI itself, real JPEGs, the other loaders as oracle."""

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bip.data.loaders import dali
from bip.data.reader import Request
from bip.data.splits import open_split
from bip.errors import UserError
from tests.data.conftest import DALI, as_folder, encoded, opened, options, refused, same, take

pytestmark = DALI
CASE: dict[str, Any] = {"dataset": "ImageNet", "num_classes": 171, "normalize": False}
CASE |= {"batch_size": 24}


@pytest.mark.parametrize("test_batch_size", [1, 50, 171])
def test_evaluation_is_that_of_lmdb_and_folder(imagenet: Path, test_batch_size: int) -> None:
    """Tolerance on the CPU: none."""
    case = {**CASE, "data_dir": imagenet, "test_batch_size": test_batch_size}
    results = [
        take(opened(**case, loader=loader, num_workers=1).evaluate("test"))
        for loader in ("lmdb", "folder", "dali")
    ]
    assert sum(len(y) for _, y in results[0]) == 171
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_training_is_that_of_lmdb(imagenet: Path) -> None:
    """The same images, crops and flips; the other decodes a few large crops at half size."""
    mine, others = (
        take(opened(**CASE, data_dir=imagenet, loader=loader, holdout=9).train("upper", 3), 3)
        for loader in ("dali", "lmdb")
    )
    equal = 0
    for (images, labels), (x, y) in zip(mine, others, strict=True):
        assert torch.equal(labels, y)
        distance = (255 * (images - x)).abs().mean((1, 2, 3))
        assert distance.max() < 5
        equal += int((distance == 0).sum())
    assert 72 - 8 <= equal <= 72


@pytest.mark.parametrize("image_dim", [32, 24])
def test_small_sets_too(small_cifar: Path, image_dim: int) -> None:
    case = {"dataset": "CIFAR10", "data_dir": small_cifar, "image_dim": image_dim, "holdout": 50}
    mine, others = (opened(**case, loader=loader) for loader in ("dali", "lmdb"))
    assert same(take(mine.train(), 5), take(others.train(), 5))
    assert same(take(mine.evaluate("holdout")), take(others.evaluate("holdout")))


def tree(root: Path, files: dict[str, bytes]) -> Path:
    return as_folder(root, {f"{s}/{name}": files[name] for s in ("train", "val") for name in files})


def every_kind() -> dict[str, bytes]:
    """An image of each kind, in two classes."""
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees", which no loader does
    return {
        "a/1.jpg": encoded("RGB", "JPEG"),
        "a/2.jpg": encoded("L", "JPEG"),
        "a/3.jpg": encoded("CMYK", "JPEG"),
        "a/4.jpg": encoded("RGB", "JPEG", exif=exif),
        "a/5.jpg": encoded("RGB", "JPEG", progressive=True, subsampling=0),
        "a/6.jpg": encoded("RGB", "JPEG", subsampling=1),
        "a/7.jpg": encoded("RGB", "JPEG", restart_marker_blocks=3),
        "b/1.png": encoded("RGB", "PNG"),
        "b/2.png": encoded("RGBA", "PNG"),
        "b/3.png": encoded("P", "PNG"),
        "b/4.jpg": encoded("L", "PNG"),
    }


def test_every_kind_of_image_has_the_other_loaders_pixels(tmp_path: Path) -> None:
    case = {**CASE, "num_classes": 2, "data_dir": tree(tmp_path, every_kind()), "image_dim": 48}
    case["batch_size"] = 11
    mine, others = (
        take(opened(**case, loader=loader).evaluate("test")) for loader in ("dali", "folder")
    )
    assert same(mine, others)


def harmed(data: bytes, way: str) -> bytes:
    """A JPEG damaged within its scan, or where DALI alone notices it: in its Huffman tables."""
    scan, middle = data.rindex(b"\xff\xda"), (data.rindex(b"\xff\xda") + len(data)) // 2
    if way == "table":
        at = data.index(b"\xff\xc4") + 5
        codes = sum(data[at : at + 16])
        return data[:at] + bytes([codes]) + bytes(15) + data[at + 16 :]  # all of one bit
    at, content = {
        "marker": (middle, b"\xff\xc4\x00\x05"),
        "noise": (middle, random.Random(len(data)).randbytes(1500)),
        "zeros": (middle, bytes(1000)),
        "start": (scan + 20, b"\xff\xd8\xff\xe0"),
    }[way]
    return data[:at] + content + data[at + len(content) :]


HARMED = {3: "marker", 5: "table", 31: "noise", 32: "noise", 60: "zeros", 90: "start", 140: "table"}


@pytest.fixture(scope="module")
def harmed_photos(imagenet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real photos, in train/ some of them damaged, in the order of `HARMED`'s indices."""
    root, files = tmp_path_factory.mktemp("harmed"), {}
    for number, path in enumerate(sorted((imagenet / "val").rglob("*.JPEG"))):
        name, data = f"{path.parent.name}/{path.name}", path.read_bytes()
        files[f"val/{name}"] = data
        files[f"train/{name}"] = harmed(data, HARMED[number]) if number in HARMED else data
    return as_folder(root, files)


def test_damaged_photos_are_skipped_as_by_the_folder_loader(
    harmed_photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Byte for byte, at a size that no crop is decoded at a JPEG scale for."""
    case = {**CASE, "data_dir": harmed_photos, "image_dim": 420, "skip_bad": True}
    mine, others = (take(opened(**case, loader=loader).train(), 8) for loader in ("dali", "folder"))
    assert same(mine, others)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 12
    assert printed[:6] == printed[6:]
    for start in (1, 5):
        rest = opened(**case, loader="dali").train("lower", start)
        assert same(take(rest, 8 - start), mine[start:])


def test_a_damaged_photo_is_named(harmed_photos: Path) -> None:
    images = sorted((harmed_photos / "train").rglob("*.JPEG"))
    bad = {image.name: number for number, image in enumerate(images) if number in HARMED}
    for loader in ("dali", "folder"):
        case = {**CASE, "batch_size": 1, "data_dir": harmed_photos, "image_dim": 32}
        data = opened(**case, loader=loader)
        named = set()  # a batch or two before its own, as images are read ahead
        for number in range(171):
            try:
                take(data.train("lower", number), 1)
            except UserError as error:
                (index,) = (index for name, index in bad.items() if name in str(error))
                named.add(index if f"image {index}, class" in str(error) else -1)
        assert named == {index for index, way in HARMED.items() if way != "zeros"}


@pytest.mark.parametrize("depth", [2, 4])
def test_what_dali_alone_refuses_gets_the_other_loaders_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    monkeypatch.setattr(dali, "_DEPTH", depth)
    files = {f"a/{n}.jpg": encoded("RGB", "JPEG", quality=50 + n) for n in range(30)}
    bad = {files[f"a/{n}.jpg"] for n in (2, 7, 8, 21)}
    to_dali = dali._for_dali

    def refuse(data: bytes, channels: int, refused: bool) -> tuple[bytes, tuple[int, int]]:
        given, size = to_dali(data, channels, refused)
        return (b"\xff\xd8\xff\xe0" if data in bad and not refused else given), size

    monkeypatch.setattr(dali, "_for_dali", refuse)
    case = {**CASE, "num_classes": 1, "batch_size": 5, "image_dim": 48, "test_batch_size": 4}
    case["data_dir"] = tree(tmp_path, files)
    mine, others = (opened(**case, loader=loader) for loader in ("dali", "folder"))
    assert same(take(mine.train(), 14), take(others.train(), 14))
    assert same(take(mine.evaluate("test")), take(others.evaluate("test")))
    monkeypatch.setattr(dali, "_for_dali", lambda *_: (b"\xff\xd8\xff\xe0", (70, 90)))
    with refused(r"train: DALI fails on a batch \(.*rror.*\); use --loader lmdb or folder"):
        take(opened(**case, loader="dali").train(), 1)


def check_start_error(data_dir: Path, device: torch.device) -> None:
    case = {**CASE, "data_dir": data_dir, "loader": "dali"}
    source = open_split("ImageNet", data_dir, True, "lmdb")
    loader = dali.DaliLoader(source, options(**case), device)
    with refused(r"^loader: DALI does not start here \(.+\); use --loader lmdb or folder$"):
        next(loader.fetch([Request(np.arange(2))]))


def test_a_dali_that_does_not_start_is_reported(
    imagenet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        check_start_error(imagenet, torch.device("cuda:0"))
    monkeypatch.setattr(dali, "is_installed", lambda: True)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # a broken import
    check_start_error(imagenet, torch.device("cpu"))


def test_lack_of_memory_is_no_bad_image(imagenet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(dali, "_for_dali", fail)
    with refused(r"train\.lmdb: no memory for a batch", "--batch-size"):
        take(opened(**CASE, data_dir=imagenet, loader="dali", skip_bad=True).train(), 1)


def test_lack_of_memory_while_images_are_tried_alone_is_reported(
    imagenet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        def __init__(self, inputs: Iterator[Any], error: Exception) -> None:
            self.inputs, self.error = inputs, error

        def run(self) -> None:
            next(self.inputs)
            raise self.error

    def start(self: Any, batch_size: int, inputs: Iterator[Any]) -> Failing:
        error = MemoryError() if batch_size == 1 else RuntimeError("Error: what")
        return Failing(inputs, error)

    monkeypatch.setattr(dali.DaliLoader, "_start", start)
    with pytest.raises(UserError, match=r"train\.lmdb: no memory for a batch"):
        take(opened(**CASE, data_dir=imagenet, loader="dali").train(), 1)


def test_without_dali_the_error_names_the_extra(
    imagenet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dali, "is_installed", lambda: False)
    with pytest.raises(UserError, match=r"pip install 'bip-hpc\[dali\]'"):
        opened(**CASE, data_dir=imagenet, loader="dali")


def test_dali_is_not_imported_before_it_is_used() -> None:
    code = "import sys, bip.run; sys.exit('nvidia.dali' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
