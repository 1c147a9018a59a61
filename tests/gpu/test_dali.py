"""The `dali` loader's "mixed" decoding on a GPU, against the lmdb loader on the CPU."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bip.data.reader import Batch
from bip.errors import UserError
from tests.data.conftest import imagenet, opened, same, take  # noqa: F401
from tests.data.test_dali import (  # noqa: F401
    CASE,
    HARMED,
    check_start_error,
    every_kind,
    harmed_photos,
    tree,
)

pytest.importorskip("nvidia.dali", reason="DALI is missing: pip install 'bip-hpc[dali]'")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def distances(
    mine: Iterator[Batch], others: Iterator[Batch], count: int | None = None
) -> torch.Tensor:
    """The mean difference of each pair of images, in levels; their labels are equal."""
    found = []
    for (images, labels), (x, y) in zip(take(mine, count), take(others, count), strict=True):
        assert images.is_cuda
        assert torch.equal(labels.cpu(), y)
        found.append((255 * (images.cpu() - x)).abs().mean((1, 2, 3)))
    return torch.cat(found)


def test_evaluation_is_close_to_lmdbs(imagenet: Path) -> None:  # noqa: F811
    """nvJPEG has another inverse DCT and upsampling than libjpeg: a mean of one level at most."""
    mine = opened(**CASE, data_dir=imagenet, loader="dali", num_workers=2, device="cuda")
    others = opened(**CASE, data_dir=imagenet, loader="lmdb")
    distance = distances(mine.evaluate("test"), others.evaluate("test"))
    assert len(distance) == 171
    assert max(batch.mean() for batch in distance.split(others.eval_batch)) < 1.0


def test_training_crops_are_lmdbs(imagenet: Path) -> None:  # noqa: F811
    """The same crops and flips: another place would differ by far more than another decoder.

    At a size that no crop is decoded at a JPEG scale for.
    """
    case = {**CASE, "data_dir": imagenet, "image_dim": 420, "num_workers": 2}
    mine, others = (
        opened(**case, loader=loader, device=device).train("upper", 3)
        for loader, device in (("dali", "cuda"), ("lmdb", "cpu"))
    )
    distance = distances(mine, others, 7)
    assert distance.mean() < 1.5
    assert distance.max() < 6


def test_every_kind_of_image_is_close_to_lmdbs(tmp_path: Path) -> None:
    case = {**CASE, "num_classes": 2, "data_dir": tree(tmp_path, every_kind()), "batch_size": 11}
    case |= {"image_dim": 48, "test_batch_size": 11}
    others = opened(**case, loader="folder").evaluate("test")
    mine = opened(**case, loader="dali", device="cuda").evaluate("test")
    assert distances(mine, others).max() < 2


def test_damaged_photos_are_skipped_as_by_the_folder_loader(
    harmed_photos: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = {**CASE, "data_dir": harmed_photos, "image_dim": 420, "skip_bad": True}
    ways = {"dali": "cuda", "folder": "cpu"}
    batches, printed = {}, {}
    for loader, device in ways.items():
        batches[loader] = take(opened(**case, loader=loader, device=device).train(), 8)
        lines = capsys.readouterr().out.splitlines()
        printed[loader] = {line.split(": ", 2)[2] for line in lines}
    assert printed["dali"] == printed["folder"]
    for mine, others in zip(batches["dali"], batches["folder"], strict=True):
        # But for the photo with zeros in its scan, which each decoder makes its own grey of.
        assert distances(iter([mine]), iter([others])).sort().values[-2] < 6
    again = opened(**case, loader="dali", device="cuda").train("lower", 5)
    assert same(take(again, 3), batches["dali"][5:])


def test_a_damaged_photo_is_named(harmed_photos: Path) -> None:  # noqa: F811
    images = sorted((harmed_photos / "train").rglob("*.JPEG"))
    bad = {images[index].name for index, way in HARMED.items() if way != "zeros"}
    case = {**CASE, "data_dir": harmed_photos, "image_dim": 64, "loader": "dali"}
    with pytest.raises(UserError, match="does not decode") as error:
        take(opened(**case, device="cuda").train(), 8)
    assert any(name in str(error.value) for name in bad)


def test_a_gpu_that_is_not_there_is_reported(imagenet: Path) -> None:  # noqa: F811
    check_start_error(imagenet, torch.device("cuda", torch.cuda.device_count()))


@pytest.mark.parametrize("start", [1, 5, 8])
def test_a_resumed_run_draws_identical_bytes(imagenet: Path, start: int) -> None:  # noqa: F811
    case = {**CASE, "data_dir": imagenet, "loader": "dali", "device": "cuda"}
    for level in ("lower", "upper"):
        whole, rest = (
            take(opened(**case, num_workers=threads).train(level, first), 10 - first)
            for first, threads in ((0, 3), (start, 1))
        )
        assert same(whole[start:], rest)


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
