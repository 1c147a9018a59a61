"""The `memory` and `lmdb` loaders on a GPU, against themselves on the CPU."""

from pathlib import Path

import pytest
import torch

from tests.data.conftest import cifar_zip, opened, small_cifar, small_cifar_zip, take  # noqa: F401
from tests.data.test_loaders import CIFAR

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("loader", ["memory", "lmdb"])
def test_batches_on_cuda_are_those_on_the_cpu(small_cifar: Path, loader: str) -> None:  # noqa: F811
    case = {**CIFAR, "data_dir": small_cifar, "loader": loader, "num_workers": 1}
    expected = take(opened(**case).train(), 6)
    data = opened(**case, device="cuda")
    for (images, labels), (x, y) in zip(take(data.train(), 6), expected, strict=True):
        assert images.is_cuda
        assert labels.is_cuda
        torch.testing.assert_close(images.cpu(), x, rtol=0, atol=1e-6)
        assert torch.equal(labels.cpu(), y)
    data.close()
