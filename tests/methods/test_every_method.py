"""What every method that prunes holds to, found by listing the methods.

That they resume bit for bit is in tests/unit/test_resume.py, that ranks follow one in
tests/distributed/test_ddp.py.
"""

from pathlib import Path
from typing import Any

import pytest

from bip.config import load_config
from bip.errors import UserError
from bip.methods import methods
from bip.pruning.layout import keep_count
from bip.training.checkpoint import layer_masks, read_checkpoint
from tests.runs import arguments, cases_of_rivals, source_for, train

PRUNING = {name: method for name, method in methods().items() if method.mode == "prune"}


def settings_of(name: str, source: Path, **more: Any) -> dict[str, Any]:
    start = {} if PRUNING[name].starts_from == "fresh" else {"source_net": source}
    return start | {"k": 0.3, "epochs": 2, "batch_size": 300} | more


@pytest.mark.parametrize("name", PRUNING)
def test_a_budget_gives_the_iterations(name: str, source: Path, tmp_path: Path) -> None:
    method = PRUNING[name]
    config = load_config(arguments(name, tmp_path, **settings_of(name, source)))
    start, each = method.start_cost(config), method.forward_backwards(config)
    budget = start + 3 * each + each // 2
    settings = settings_of(name, source, budget=budget)
    finished = train(name, tmp_path, **settings)
    costs = [start + method.cost(config, n, n) for n in range(9)]
    assert finished.result["forward_backwards"] == max(cost for cost in costs if cost <= budget)
    assert costs[len(finished.losses)] == finished.result["forward_backwards"]
    with pytest.raises(UserError, match=f"budget: .* at least {start + each}|equal to 1, not 0"):
        load_config(arguments(name, tmp_path, **settings | {"budget": start + each - 1}))


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
