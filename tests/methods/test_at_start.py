"""SNIP, GraSP, SynFlow and random: each criterion against a reference."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bip.building import build_network
from bip.config import load_config
from bip.distributed.group import Group, Ranks
from bip.methods.at_start import PrunedAtStart
from bip.methods.grasp import TEMPERATURE, hessian_gradient
from bip.methods.synflow import linearised, synaptic_flow
from bip.pruning.layout import find_prunable, keep_count
from bip.run import Run
from bip.run_folder import Progress
from bip.training.metrics import RunLog
from tests.distributed.harness import run_ranks
from tests.runs import LAYER_TYPES, arguments, train
from tests.unit.networks import random_batch, small_net

ALONE = Group(Ranks(0, 1, 0, 1), torch.device("cpu"))


def prepared(name: str, folder: Path, group: Group = ALONE, **settings: object) -> Run:
    """A run just before its first iteration."""
    run = Run(load_config(arguments(name, folder, **settings)), group)
    method = run.loop(Progress(), RunLog(run.folder.path, active=False)).method
    assert isinstance(method, PrunedAtStart)
    run.network.train()
    method.prepare()
    return run


def fresh(run: Run) -> nn.Module:
    """The network as it was initialised."""
    return build_network(run.config, run.data, ALONE, None)[0].train()


def test_snip_scores_by_the_gradient_of_connections_that_are_one(tmp_path: Path) -> None:
    run = prepared("snip", tmp_path, score_batches=3, k=0.2)
    network, layout = fresh(run), run.pruned.layout
    named = dict(network.named_parameters())
    connections = {t.name: torch.ones(t.shape, requires_grad=True) for t in layout.tensors}
    batches = run.data.train("upper")
    for _ in range(3):
        images, labels = next(batches)
        masked = named | {name: named[name].detach() * c for name, c in connections.items()}
        output = torch.func.functional_call(network, masked, images)
        F.cross_entropy(output, labels).backward()
    expected = torch.cat([c.grad.abs().flatten() for c in connections.values()])
    torch.testing.assert_close(run.pruned.scores.detach(), expected, rtol=1e-4, atol=1e-7)


def test_grasps_product_is_that_of_the_hessian_in_float64() -> None:
    network = small_net(dtype=torch.float64)
    weights = [p for n, p in network.named_parameters() if "weight" in n and "bn" not in n]
    batches = [random_batch(seed, dtype=torch.float64) for seed in (0, 1)]
    sizes = [p.numel() for p in weights]
    names = [n for n, p in network.named_parameters() if any(p is w for w in weights)]

    def loss(flat: Tensor) -> Tensor:
        parts = zip(names, weights, flat.split(sizes), strict=True)
        values = {name: part.view(weight.shape) for name, weight, part in parts}
        losses = [
            F.cross_entropy(torch.func.functional_call(network, values, x) / TEMPERATURE, y)
            for x, y in batches
        ]
        return torch.stack(losses).mean()

    theta = torch.cat([w.detach().flatten() for w in weights])
    g = torch.autograd.functional.jacobian(loss, theta)
    _, expected = torch.autograd.functional.hvp(loss, theta, g)
    found = hessian_gradient(network, weights, lambda: batches)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)
    assert all(weight.grad is None for weight in weights)


def test_grasp_prunes_the_largest_of_minus_theta_hessian_gradient(tmp_path: Path) -> None:
    run = prepared("grasp", tmp_path, k=0.2, score_batches=1)
    network = fresh(run)
    named = dict(network.named_parameters())
    weights = [named[t.name] for t in run.pruned.layout.tensors]
    batch = next(run.data.train("upper"))
    product = hessian_gradient(network, weights, lambda: [batch])
    score = -torch.cat([w.detach().flatten() for w in weights]) * product
    assert score[run.pruned.mask == 1].max() <= score[run.pruned.mask == 0].min()


def test_synflow_is_conserved_from_layer_to_layer() -> None:
    network = small_net()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
        for norm in (network.bn1, network.bn2):
            norm.running_mean.zero_()
    layout = find_prunable(network, "unstructured")
    linear = linearised(network)
    # A tanh stands in this network, where the theorem wants a homogeneous function.
    torch.tanh, tanh = torch.abs, torch.tanh
    try:
        weights = [dict(linear.named_parameters())[t.name] for t in layout.tensors]
        flow = synaptic_flow(linear, weights, (3, 8, 8))
        total = linear(torch.ones(1, 3, 8, 8, dtype=torch.float64)).sum()
    finally:
        torch.tanh = tanh
    assert flow.dtype == torch.float64
    sums = torch.stack([flow[t.start : t.stop].sum() for t in layout.tensors])
    torch.testing.assert_close(sums, total.expand(len(sums)), rtol=1e-12, atol=0)


def test_synflow_keeps_what_carries_flow(tmp_path: Path) -> None:
    """With what one round prunes at once, a layer that carries all flow may be emptied."""
    run = prepared("synflow", tmp_path, k=0.005)
    assert run.pruned.kept() == keep_count("0.005", run.pruned.layout.size)
    linear = linearised(run.network)  # z: with its mask
    weights = [dict(linear.named_parameters())[t.name] for t in run.pruned.layout.tensors]
    flow = synaptic_flow(linear, weights, (1, 8, 8))
    assert (flow[run.pruned.mask == 1] > 0).all()


def mask_of_rank(group: Group, folder: Path, layer_type: str) -> Tensor:
    run = prepared("random", folder, group, layer_type=layer_type, batch_size=60, k=0.3)
    return run.pruned.mask


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
def test_random_is_the_same_on_every_world_size_and_another_for_each_seed(
    layer_type: str, tmp_path: Path
) -> None:
    masks = [mask for w in (1, 2, 3) for mask in run_ranks(w, mask_of_rank, tmp_path, layer_type)]
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    other = prepared("random", tmp_path, layer_type=layer_type, batch_size=60, k=0.3, seed=1)
    assert not torch.equal(other.pruned.mask, masks[0])


@pytest.mark.parametrize("name", ["snip", "grasp", "synflow", "random"])
def test_the_mask_stays_and_scoring_leaves_no_trace_in_the_statistics(
    name: str, tmp_path: Path
) -> None:
    run = prepared(name, tmp_path, k=0.2)
    assert run.pruned.kept() == keep_count("0.2", run.pruned.layout.size)
    assert not run.network.bn1.running_mean.any()
    finished = train(name, tmp_path, k=0.2, max_steps=3)
    mask = torch.cat([mask.flatten() for mask in finished.masks.values()])
    assert torch.equal(mask, run.pruned.mask)
