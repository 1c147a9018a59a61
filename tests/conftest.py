"""Shared by all tests: one thread per process, and small finished runs to start from."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.runs import LAYER_TYPES, Finished, train

torch.set_num_threads(1)
# Timings on a shared machine mean nothing; the same cases every time do.
settings.register_profile("bip", deadline=None, derandomize=True)
settings.load_profile("bip")


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A dense network pretrained on Digits for two epochs."""
    return train("pretrain", tmp_path_factory.mktemp("dense"), epochs=2)


@pytest.fixture(scope="session")
def source(dense: Finished) -> Path:
    """The pretrained network's checkpoint, for --source-net."""
    return dense.newest


@pytest.fixture(scope="session")
def pruned_runs(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    """A BiP run of each layer type at k = 0.3, by layer type."""
    folder = tmp_path_factory.mktemp("pruned")
    return {
        layer_type: train(
            "bip", folder, source_net=source, max_steps=6, k=0.3, layer_type=layer_type
        )
        for layer_type in LAYER_TYPES
    }
