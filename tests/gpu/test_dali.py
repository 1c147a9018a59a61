"""The `dali` loader's "mixed" decoding on a GPU, against the lmdb loader on the CPU."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.conftest import imagenet, open_with_defaults  # noqa: F401

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
    mine = open_with_defaults(
        **CASE, data_dir=imagenet, loader="dali", num_workers=2, device=torch.device("cuda")
    )
    others = open_with_defaults(**CASE, data_dir=imagenet, loader="lmdb")
    count = 0
    for (images, labels), (x, y) in zip(
        mine.evaluate("test"), others.evaluate("test"), strict=True
    ):
        assert images.is_cuda
        assert torch.equal(labels.cpu(), y)
        assert (255 * (images.cpu() - x)).abs().mean() < 1.0
        count += len(y)
    assert count == 171


@pytest.mark.parametrize("start", [1, 5, 8])
def test_a_resumed_run_draws_identical_bytes(imagenet: Path, start: int) -> None:  # noqa: F811
    case = {**CASE, "data_dir": imagenet, "loader": "dali", "device": torch.device("cuda")}
    for level in ("lower", "upper"):
        whole, rest = (
            [
                (x.clone(), y.clone())
                for x, y in itertools.islice(
                    open_with_defaults(**case, num_workers=threads).train(level, first), 10 - first
                )
            ]
            for first, threads in ((0, 3), (start, 1))
        )
        for (x, y), (u, v) in zip(whole[start:], rest, strict=True):
            assert torch.equal(x, u)
            assert torch.equal(y, v)


def test_batches_stay_right_while_a_slow_step_uses_them(imagenet: Path) -> None:  # noqa: F811
    """The pipeline may not write into a batch that kernels still read."""
    case = {**CASE, "data_dir": imagenet, "loader": "dali", "device": torch.device("cuda")}
    quick = [
        x.sum(dtype=torch.float64)
        for x, _ in itertools.islice(open_with_defaults(**case).train(), 8)
    ]
    torch.cuda.synchronize()
    slow = []
    weights = torch.randn(4096, 4096, device="cuda")
    for images, _ in itertools.islice(open_with_defaults(**case).train(), 8):
        for _ in range(20):
            weights = torch.tanh(weights @ weights)
        slow.append(images.sum(dtype=torch.float64))
    assert torch.equal(torch.stack(quick), torch.stack(slow))
