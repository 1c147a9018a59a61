"""Stop after any step, start again, draw the identical remaining batches: every loader."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bip.data.loaders import dali
from tests.data.conftest import opened
from tests.data.test_loaders import same, take

STEPS = 11  # epochs have 4 batches of CIFAR and 7 of ImageNet
SETS: dict[str, dict[str, Any]] = {
    "CIFAR10": {"num_classes": 10},
    "ImageNet": {"num_classes": 171, "image_dim": 40, "batch_size": 24},
}


@pytest.fixture(scope="module")
def folders(small_cifar: Path, imagenet: Path) -> dict[str, Path]:
    return {"CIFAR10": small_cifar, "ImageNet": imagenet}


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    dataset=st.sampled_from(sorted(SETS)),
    loader=st.sampled_from(["memory", "lmdb", "folder", "dali"]),
    stop=st.integers(0, STEPS),
    workers=st.tuples(*[st.sampled_from([0, 1, 3])] * 2),
    rank=st.integers(0, 1),
    level=st.sampled_from(["lower", "upper"]),
)
def test_a_stop_after_any_step_changes_no_byte(
    folders: dict[str, Path],
    dataset: str,
    loader: str,
    stop: int,
    workers: tuple[int, int],
    rank: int,
    level: str,
) -> None:
    if loader == "dali" and not dali.is_installed():
        return
    if dataset == "ImageNet" and loader == "memory":
        loader = "lmdb"
    if dataset == "CIFAR10" and loader == "folder":
        loader = "lmdb"
    case = {**SETS[dataset], "dataset": dataset, "data_dir": folders[dataset], "loader": loader}
    case |= {"rank": rank, "world": 2}

    def drawn(start: int, count: int, num_workers: int) -> Any:
        data = opened(**case, num_workers=num_workers)
        batches = take(data.train(level, start), count)
        data.close()
        return batches

    whole = drawn(0, STEPS, workers[0])
    assert len(whole) == STEPS
    assert same(drawn(stop, STEPS - stop, workers[1]), whole[stop:])
