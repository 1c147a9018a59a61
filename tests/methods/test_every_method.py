"""What every method that prunes holds to, whatever it does: found by listing the methods."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bip.config import load_config
from bip.errors import UserError
from bip.methods import methods
from bip.pruning.layout import keep_count
from bip.training.checkpoint import layer_masks, read_checkpoint
from tests.distributed.harness import run_ranks
from tests.distributed.test_ddp import state_of_rank
from tests.runs import Finished, arguments, cases_of_rivals, source_for, train
from tests.unit.test_resume import Stopped, stop_after

PRUNING = {name: method for name, method in methods().items() if method.mode == "prune"}


def settings_of(name: str, source: Path, **more: Any) -> dict[str, Any]:
    start = {} if PRUNING[name].starts_from == "fresh" else {"source_net": source}
    return start | {"k": 0.3, "epochs": 2, "batch_size": 300} | more


@pytest.mark.parametrize("name", PRUNING)
@pytest.mark.parametrize("stop", [1, 3])
def test_two_runs_are_equal_and_so_is_a_resumed_one(
    name: str, stop: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(name, source)
    whole = train(name, tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        stop_after(stop, patch)
        with pytest.raises(Stopped):
            train(name, tmp_path / "parts", **settings, checkpoint_minutes=1e-9)
    resumed = train(name, tmp_path / "parts", **settings)
    assert resumed.losses == whole.losses
    for key in ("weights_sha256", "mask_sha256", "top1", "kept", "forward_backwards"):
        assert resumed.result[key] == whole.result[key]


@pytest.mark.parametrize("name", PRUNING)
@pytest.mark.parametrize("layer_type", ["unstructured", "filter"])
def test_two_ranks_follow_one(name: str, layer_type: str, source: Path, tmp_path: Path) -> None:
    settings = settings_of(name, source, freeze_bn=True, max_steps=5, layer_type=layer_type)
    one = train(name, tmp_path / "one", **settings)
    ranks = run_ranks(2, state_of_rank, settings, name, tmp_path / "two", join=False)
    two = Finished(Path(ranks[0]["folder"]), ranks[0]["result"])
    assert two.losses == pytest.approx(one.losses, rel=1e-3)
    agreement = torch.cat([(a == two.masks[n]).flatten() for n, a in one.masks.items()])
    assert agreement.float().mean() > 0.999
    assert torch.equal(ranks[0]["mask"], ranks[1]["mask"])
    for value, other in zip(*(rank["network"].values() for rank in ranks), strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("name", PRUNING)
def test_a_budget_gives_the_iterations(name: str, source: Path, tmp_path: Path) -> None:
    method = PRUNING[name]
    config = load_config(arguments(name, tmp_path, **settings_of(name, source)))
    start, each = method.start_cost(config), method.forward_backwards(config)
    settings = settings_of(name, source, budget=start + 3 * each + each // 2)
    finished = train(name, tmp_path, **settings)
    assert len(finished.losses) == 3
    assert finished.result["forward_backwards"] == start + 3 * each
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
