"""What holds for every method that prunes, at the end of a short run and of its best epoch."""

from pathlib import Path
from typing import Any

import pytest

from bip.pruning.layout import keep_count
from bip.training.checkpoint import layer_masks, read_checkpoint
from tests.runs import cases_of_rivals, source_for, train

CASES = cases_of_rivals()


@pytest.mark.parametrize("case", CASES)
def test_runs_repeat_bit_for_bit_and_keep_exactly_k(
    case: str, source: Path, tmp_path: Path
) -> None:
    name, settings = CASES[case]
    settings = settings | {"epochs": 2, "batch_size": 300, "k": 0.3, "holdout": 100}
    settings |= source_for(name, source, source)
    runs: list[Any] = [train(name, tmp_path / str(i), **settings) for i in range(2)]
    assert runs[0].losses == runs[1].losses
    for key in ("weights_sha256", "mask_sha256", "top1", "kept"):
        assert runs[0].result[key] == runs[1].result[key]
    for state in (runs[0].state, read_checkpoint(runs[0].best)):
        masks = layer_masks(state).values()
        if settings["layer_type"] == "unstructured":
            size = sum(mask.numel() for mask in masks)
            assert sum(int(mask.sum()) for mask in masks) == keep_count("0.3", size)
        else:
            for mask in masks:
                assert int(mask.flatten(1).amax(1).sum()) == keep_count("0.3", len(mask))
