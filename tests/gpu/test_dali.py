"""The `dali` loader's "mixed" decoding on a GPU, against the lmdb loader on the CPU."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bip.data.loaders.dali import DaliLoader
from bip.data.reader import Request
from bip.errors import UserError
from tests.data.conftest import imagenet, opened, options  # noqa: F401
from tests.data.test_dali import HARMED, encoded, harmed_photos, tree  # noqa: F401
from tests.data.test_loaders import take

pytest.importorskip("nvidia.dali", reason="DALI is missing: pip install 'bip-hpc[dali]'")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CASE: dict[str, Any] = {
    "dataset": "ImageNet",
    "num_classes": 171,
    "batch_size": 24,
    "normalize": False,
}


def test_evaluation_is_close_to_lmdbs(imagenet: Path) -> None:  # noqa: F811
    """nvJPEG has another inverse DCT and upsampling than libjpeg: a mean of one level at most."""
    mine = opened(**CASE, data_dir=imagenet, loader="dali", num_workers=2, device="cuda")
    others = opened(**CASE, data_dir=imagenet, loader="lmdb")
    count = 0
    for (images, labels), (x, y) in zip(
        mine.evaluate("test"), others.evaluate("test"), strict=True
    ):
        assert images.is_cuda
        assert torch.equal(labels.cpu(), y)
        assert (255 * (images.cpu() - x)).abs().mean() < 1.0
        count += len(y)
    assert count == 171


def test_training_crops_are_lmdbs(imagenet: Path) -> None:  # noqa: F811
    """The same crops and flips: another place would differ by far more than another decoder.

    At a size that no crop is decoded at a JPEG scale for.
    """
    case = {**CASE, "data_dir": imagenet, "image_dim": 420, "num_workers": 2}
    mine, others = (
        take(
            opened(**case, loader=loader, device=device).train("upper", 3),
            7,
        )
        for loader, device in (("dali", "cuda"), ("lmdb", "cpu"))
    )
    distance = []
    for (images, labels), (x, y) in zip(mine, others, strict=True):
        assert torch.equal(labels.cpu(), y)
        distance.append((255 * (images.cpu() - x)).abs().mean((1, 2, 3)))
    assert torch.cat(distance).mean() < 1.5
    assert torch.cat(distance).max() < 6


def test_every_kind_of_image_is_close_to_lmdbs(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees", which no loader does
    files = {
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
    case = {**CASE, "num_classes": 2, "data_dir": tree(tmp_path, files), "batch_size": 11}
    case |= {"image_dim": 48, "test_batch_size": 11}
    ((x, y),) = opened(**case, loader="folder").evaluate("test")
    ((images, labels),) = opened(**case, loader="dali", device="cuda").evaluate("test")
    assert torch.equal(labels.cpu(), y)
    assert (255 * (images.cpu() - x)).abs().mean((1, 2, 3)).max() < 2


def test_damaged_photos_are_skipped_as_by_the_folder_loader(
    harmed_photos: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = {**CASE, "data_dir": harmed_photos, "image_dim": 420, "skip_bad": True}
    cuda = "cuda"
    mine = take(opened(**case, loader="dali", device=cuda).train(), 8)
    printed = {line.split(": ", 2)[2] for line in capsys.readouterr().out.splitlines()}
    others = take(opened(**case, loader="folder").train(), 8)
    expected = {line.split(": ", 2)[2] for line in capsys.readouterr().out.splitlines()}
    assert printed == expected
    for (images, labels), (x, y) in zip(mine, others, strict=True):
        assert torch.equal(labels.cpu(), y)
        # But for the photo with zeros in its scan, which each decoder makes its own grey of.
        distance = (255 * (images.cpu() - x)).abs().mean((1, 2, 3)).sort().values
        assert distance[-2] < 6
    again = opened(**case, loader="dali", device=cuda).train("lower", 5)
    for (images, labels), (x, y) in zip(take(again, 3), mine[5:], strict=True):
        assert torch.equal(images, x)
        assert torch.equal(labels, y)


def test_a_damaged_photo_is_named(harmed_photos: Path) -> None:  # noqa: F811
    images = sorted((harmed_photos / "train").rglob("*.JPEG"))
    bad = {images[index].name for index, way in HARMED.items() if way != "zeros"}
    case = {**CASE, "data_dir": harmed_photos, "image_dim": 64, "loader": "dali"}
    with pytest.raises(UserError, match="does not decode") as error:
        take(opened(**case, device="cuda").train(), 8)
    assert any(name in str(error.value) for name in bad)


def test_a_gpu_that_is_not_there_is_reported(imagenet: Path) -> None:  # noqa: F811
    case = {**CASE, "data_dir": imagenet, "loader": "dali"}
    source = opened(**case)._train
    assert isinstance(source, DaliLoader)
    beyond = torch.device("cuda", torch.cuda.device_count())
    with pytest.raises(UserError, match="loader: DALI does not start here"):
        next(
            DaliLoader(source.reader.store, options(**case), beyond).fetch([Request(np.arange(2))])
        )


@pytest.mark.parametrize("start", [1, 5, 8])
def test_a_resumed_run_draws_identical_bytes(imagenet: Path, start: int) -> None:  # noqa: F811
    case = {**CASE, "data_dir": imagenet, "loader": "dali", "device": "cuda"}
    for level in ("lower", "upper"):
        whole, rest = (
            [
                (x.clone(), y.clone())
                for x, y in itertools.islice(
                    opened(**case, num_workers=threads).train(level, first), 10 - first
                )
            ]
            for first, threads in ((0, 3), (start, 1))
        )
        for (x, y), (u, v) in zip(whole[start:], rest, strict=True):
            assert torch.equal(x, u)
            assert torch.equal(y, v)


def test_batches_stay_right_while_a_slow_step_uses_them(imagenet: Path) -> None:  # noqa: F811
    """The pipeline may not write into a batch that kernels still read."""
    case = {**CASE, "data_dir": imagenet, "loader": "dali", "device": "cuda"}
    quick = [x.sum(dtype=torch.float64) for x, _ in itertools.islice(opened(**case).train(), 8)]
    torch.cuda.synchronize()
    slow = []
    weights = torch.randn(4096, 4096, device="cuda")
    for images, _ in itertools.islice(opened(**case).train(), 8):
        for _ in range(20):
            weights = torch.tanh(weights @ weights)
        slow.append(images.sum(dtype=torch.float64))
    assert torch.equal(torch.stack(quick), torch.stack(slow))
