"""What only a GPU can show. Skipped without one; run on one with `python -m pytest tests/gpu`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bip import models
from bip.config import load_config
from bip.pruning.mask import Segment, find_prunable
from bip.pruning.parameters import PrunedParameters
from bip.pruning.threshold import Alone
from bip.pruning.threshold_device import DeviceThreshold, write_mask
from bip.run import train as train_run
from bip.training.optim import Clock
from bip.training.steps import Batch, ForwardBackward, build_step
from tests.runs import arguments, train
from tests.unit.networks import make_config
from tests.unit.scores_for_ranking import KINDS, make_scores, sorted_mask

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 1000, 3_000_000])
def test_selection_is_the_sorts(kind: str, n: int) -> None:
    values = make_scores(kind, n, 0)
    for segments in ((Segment("a", 0, n, max(1, n // 20)),), _halves(n)):
        threshold = DeviceThreshold(segments, n, Alone(), torch.device("cuda"))
        mask = torch.empty(n, device="cuda")
        on_gpu = values.cuda()
        write_mask(on_gpu, segments, *threshold.select(on_gpu), mask)
        assert torch.equal(mask.cpu(), sorted_mask(values, segments))


def _halves(n: int) -> tuple[Segment, ...]:
    if n == 1:
        return (Segment("a", 0, 1, 1),)
    return (Segment("a", 0, n // 2, max(1, n // 7)), Segment("b", n // 2, n, max(1, n // 9)))


@pytest.mark.parametrize("layer_type", ["unstructured", "filter", "channel"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bip_iteration_never_waits_for_the_gpu(layer_type: str, precision: str) -> None:
    network = models.build("resnet18", 10).cuda().to(memory_format=torch.channels_last)
    scope = "global" if layer_type == "unstructured" else "layer"
    config = make_config(
        trainer="bilevel", layer_type=layer_type, precision=precision, print_freq=1
    )
    layout = find_prunable(network, layer_type)  # type: ignore[arg-type]
    pruned = PrunedParameters(network, layout, config.k, scope)  # type: ignore[arg-type]
    with torch.no_grad():
        pruned.scores.copy_(pruned.weights)
    pruned.update_mask_and_z()
    batch: Batch = (
        torch.randn(8, 3, 32, 32, device="cuda"), torch.randint(10, (8,), device="cuda"),
    )  # fmt: skip

    def batches(_level: str, _start: int) -> Iterator[Batch]:
        while True:
            yield batch

    run = ForwardBackward(config, network, None, 0, torch.device("cuda"))
    step = build_step(config, network, pruned, run, batches, Clock(100, 10))
    step(0)  # libraries load and optimizers make their state
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert pruned.kept() == sum(mask.sum() for mask in pruned.views(pruned.mask))
    for z, mask, weight in zip(
        pruned.z, pruned.views(pruned.mask), pruned.views(pruned.weights), strict=True
    ):
        assert torch.equal(z, mask * weight)


@pytest.mark.parametrize("kind", ["pretrain", "bip", "hydra"])
def test_two_deterministic_runs_are_equal_bit_for_bit(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    dense = train("pretrain", tmp_path / "dense", deterministic=True)
    settings = {} if kind == "pretrain" else {"source_net": dense.best}
    first, second = (
        train(kind, tmp_path / name, deterministic=True, max_steps=6, **settings)
        for name in ("a", "b")
    )
    assert first.losses == second.losses
    assert first.result["weights_sha256"] == second.result["weights_sha256"]


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"compile": True}])
def test_fast_options_train(options: dict[str, object], tmp_path: Path) -> None:
    result = train_run(load_config(arguments("pretrain", tmp_path, epochs=5, **options)))
    assert result["top1"] > 60
