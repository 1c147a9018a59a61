"""What only a GPU can show. Skipped without one; run on one with `python -m pytest tests/gpu`."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bip import models
from bip.config import load_config
from bip.distributed.compare import compare_ranks, hash_tensor, run_state
from bip.distributed.control import LAG, Control
from bip.distributed.group import Group, Ranks, wrap
from bip.methods.base import Method, Parts
from bip.pruning.layout import Segment, find_prunable
from bip.pruning.select import Alone, make_selector
from bip.pruning.state import PrunedParameters
from bip.run import train as train_run
from bip.training.forward import Batch, ForwardBackward
from bip.training.optim import Clock
from tests.distributed.harness import run_ranks
from tests.runs import LAYER_TYPES, arguments, often, source_for, train
from tests.unit.networks import make_config
from tests.unit.scores_for_ranking import KINDS, make_scores, sorted_mask

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 1000, 3_000_000])
def test_selection_is_the_sorts(kind: str, n: int) -> None:
    values = make_scores(kind, n, 0)
    for segments in ((Segment("a", 0, n, max(1, n // 20)),), _halves(n)):
        mask = torch.empty(n, dtype=torch.uint8, device="cuda")
        make_selector(segments, Alone(), mask.device).update(values.cuda(), mask)
        assert torch.equal(mask.cpu(), sorted_mask(values, segments))


def _halves(n: int) -> tuple[Segment, ...]:
    if n == 1:
        return (Segment("a", 0, 1, 1),)
    return (Segment("a", 0, n // 2, max(1, n // 7)), Segment("b", n // 2, n, max(1, n // 9)))


def method_on_gpu(
    group: Group | None, layer_type: str, precision: str, trainer: str = "bip"
) -> tuple[PrunedParameters, Method]:
    """A method on this process's GPU, of one rank or of all."""
    device = group.device if group else torch.device("cuda")
    network = models.build("resnet18", 10).to(device).to(memory_format=torch.channels_last)
    scope = "global" if layer_type == "unstructured" else "layer"
    config = make_config(trainer=trainer, layer_type=layer_type, precision=precision, print_freq=1)
    layout = find_prunable(network, layer_type)  # type: ignore[arg-type]
    pruned = PrunedParameters(network, layout, config.k, scope, group)  # type: ignore[arg-type]
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()] if group else []:
            group.broadcast_(tensor)  # type: ignore[union-attr]
        pruned.weights.copy_(torch.cat([z.reshape(-1) for z in pruned.z]))
        pruned.scores.copy_(pruned.weights)
    pruned.update_mask_and_z()
    rank = group.rank if group else 0
    torch.manual_seed(rank)
    batch: Batch = (
        torch.randn(8, 3, 32, 32, device=device), torch.randint(10, (8,), device=device),
    )  # fmt: skip

    def batches(_level: str, _start: int) -> Iterator[Batch]:
        while True:
            yield batch

    ddp = wrap(network, device) if group else None
    run = ForwardBackward(config, network, ddp, rank, device)
    parts = Parts(config, network, pruned, run, batches, Clock(100, 10))
    return pruned, config.method(parts)


def check_product(pruned: PrunedParameters) -> None:
    assert pruned.kept() == sum(mask.sum() for mask in pruned.views(pruned.mask))
    for z, mask, weight in zip(
        pruned.z, pruned.views(pruned.mask), pruned.views(pruned.weights), strict=True
    ):
        assert torch.equal(z, mask * weight)


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("trainer", ["bip", "hydra", "feather"])
def test_an_iteration_never_waits_for_the_gpu(
    trainer: str, layer_type: str, precision: str
) -> None:
    pruned, method = method_on_gpu(None, layer_type, precision, trainer)
    method.step(0)  # libraries load and optimizers make their state
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        method.step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check_product(pruned)


def iterate_with_nccl(group: Group, layer_type: str) -> list[int]:
    """Iterations with their exchange; hashes of the state, which all ranks must share."""
    assert group.device == torch.device("cuda", group.rank)
    pruned, method = method_on_gpu(group, layer_type, "fp32")
    control = Control(group)
    for iteration in range(3):  # DDP rebuilds its buckets, NCCL connects
        method.step(iteration)
        control.post(0, False, pruned.proof)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for iteration in range(3, 3 + 2 * LAG):
            method.step(iteration)
            control.post(0, False, pruned.proof)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    control.finish()
    check_product(pruned)
    compare_ranks(run_state(torch.nn.Module(), pruned, method.optimizers, buffers=False), group)
    return [int(hash_tensor(tensor)) for tensor in (pruned.weights, pruned.scores, pruned.mask)]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("layer_type", LAYER_TYPES)
def test_two_ranks_over_nccl_never_wait_for_the_gpu(layer_type: str) -> None:
    first, second = run_ranks(2, iterate_with_nccl, layer_type, timeout=300)
    assert first == second


def test_the_host_runs_ahead_of_the_gpu() -> None:
    """By LAG iterations, as far as the exchange of the masks' proofs goes."""
    control = Control(Group(Ranks(0, 1, 0, 1), torch.device("cuda")))
    proof = torch.tensor([3, 4], device="cuda")
    control.post(0, False, proof)  # the slots are made
    torch.cuda.synchronize()
    began = time.monotonic()
    for _ in range(LAG - 1):
        torch.cuda._sleep(500_000_000)  # cycles: a fifth of a second and more
        control.post(0, False, proof)
    queued = time.monotonic() - began
    torch.cuda.synchronize()
    assert queued < 0.2 * (time.monotonic() - began)


@pytest.mark.parametrize("kind", ["pretrain", "bip", "hydra", "gmp", "acdc", "feather", "rigl"])
def test_two_deterministic_runs_are_equal_bit_for_bit(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    dense = train("pretrain", tmp_path / "dense", deterministic=True)
    settings = {} if kind == "pretrain" else often(kind) | source_for(kind, dense.best, dense.best)
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
