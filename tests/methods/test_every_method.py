"""What holds for every method that prunes, at the end of a short run."""

from pathlib import Path
from typing import Any

import pytest

from bip.pruning.layout import keep_count
from tests.runs import cases_of_rivals, source_for, train

CASES = cases_of_rivals()


@pytest.mark.parametrize("case", CASES)
def test_runs_repeat_bit_for_bit_and_keep_exactly_k(
    case: str, source: Path, tmp_path: Path
) -> None:
    name, settings = CASES[case]
    settings = settings | {"max_steps": 8, "k": 0.3} | source_for(name, source, source)
    runs: list[Any] = [train(name, tmp_path / str(i), **settings) for i in range(2)]
    assert runs[0].losses == runs[1].losses
    for key in ("weights_sha256", "mask_sha256", "top1", "kept"):
        assert runs[0].result[key] == runs[1].result[key]
    masks = runs[0].masks.values()
    if settings["layer_type"] == "unstructured":
        assert runs[0].result["kept"] == keep_count("0.3", sum(mask.numel() for mask in masks))
    else:
        for mask in masks:
            assert int(mask.flatten(1).amax(1).sum()) == keep_count("0.3", len(mask))
