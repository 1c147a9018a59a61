"""θ, scores, mask and z: who owns what, what moves, what stays, what returns."""

import copy
import itertools
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bip.methods.base import Parts
from bip.pruning.layout import find_followers, find_prunable
from bip.pruning.passes import mask_out, upper_gradient
from bip.pruning.state import PrunedParameters
from bip.training.forward import ForwardBackward
from bip.training.optim import Clock
from tests.runs import LAYER_TYPES, Finished, make_run, train
from tests.unit.networks import (
    METHODS,
    Setup,
    make_config,
    make_setup,
    prune,
    random_batch,
    small_net,
)

pytestmark = pytest.mark.usefixtures("both_devices")
PRUNE = ("bip", "accelerate", "hydra")


def pruned_of(setup: Setup) -> PrunedParameters:
    assert setup.pruned is not None
    return setup.pruned


# The size and the sign of a score's step


@pytest.mark.parametrize("inv_gamma", [10.0**e for e in range(-4, 5)])
def test_one_step_moves_the_scores_by_the_formula(inv_gamma: float) -> None:
    """Δs = −lr · sign(s) ⊙ (θ − (1/γ) m ⊙ g) ⊙ g with g from autograd, at every scale of 1/γ."""
    network = small_net(dtype=torch.float64)
    pruned = prune(network, "unstructured")
    images, labels = random_batch(2, dtype=torch.float64)
    F.cross_entropy(network(images), labels).backward()
    g = torch.cat([z.grad.flatten() for z in pruned.z])
    direct, implicit = pruned.weights * g, pruned.mask * g * g * inv_gamma
    before = pruned.scores.detach().clone()
    optimizer = torch.optim.SGD([pruned.scores], lr=1.0)

    norms = pruned.term_norms(inv_gamma).norm(dim=1)
    pruned.set_upper_gradient(inv_gamma)
    optimizer.step()
    change = pruned.scores.detach() - before

    expected = -before.sign() * (direct - implicit)
    torch.testing.assert_close(change, expected, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(
        norms, torch.stack([implicit.norm(), direct.norm()]), rtol=1e-9, atol=0
    )
    # The sweep covers both regimes, and where one term rules, its sign is the step's.
    if inv_gamma == 1e-4:
        assert implicit.norm() < 1e-2 * direct.norm()
    if inv_gamma == 1e4:
        assert implicit.norm() > 1e2 * direct.norm()
        kept = (pruned.mask == 1) & (implicit > 10 * direct.abs())
        assert kept.sum() > 100
        assert (change[kept] * before[kept] > 0).all(), "γ → 0 drives kept scores away from zero"


def test_large_arrays_are_shared_among_threads_and_agree_with_the_operations_of_a_gpu() -> None:
    """The compiled pass, on one thread and on two, against torch's own operations."""
    torch.manual_seed(0)
    n = 1 << 19
    g, weights, scores = torch.randn(n), torch.randn(n), torch.randn(n)
    mask = (torch.rand(n) < 0.3).to(torch.uint8)
    scores[::7], scores[::14] = 0.0, -0.0
    sign = torch.where(scores < 0, -1.0, 1.0)
    expected = sign * (weights - 0.3 * mask * g) * g
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            out = torch.empty(n)
            upper_gradient(g, weights, mask, scores, 0.3, out)
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
            for values in (g.clone(), g.double(), g.bfloat16()):
                masked, before = torch.empty_like(values), values.clone()
                mask_out(values, mask, masked)
                assert torch.equal(masked, before * mask)
                mask_out(values, mask, values)
                assert torch.equal(values, masked)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("accelerate", [False, True])
def test_the_ratio_of_the_two_terms_is_logged(
    source: Path, tmp_path: Path, accelerate: bool
) -> None:
    """That of the step it is logged with, however often."""
    ratios = {}
    for lr2, print_freq in ((1e-4, 1), (1e-1, 1), (1e-4, 3)):
        settings = {"max_steps": 7, "lr2": lr2, "print_freq": print_freq, "accelerate": accelerate}
        settings["mask_until"] = 1
        finished = train("bip", tmp_path / str(print_freq), source_net=source, **settings)
        ratios[lr2, print_freq] = {
            record["step"]: record["implicit_over_direct"] for record in finished.records()
        }
    often, larger, seldom = ratios.values()
    assert [*often] == [1, 2, 3, 4, 5, 6, 7]
    assert seldom == {step: often[step] for step in (3, 6, 7)}
    assert all(math.isfinite(ratio) for ratio in often.values())
    if accelerate:  # the implicit term is left out
        assert {*often.values(), *larger.values()} == {0}
    else:
        assert 0 < often[1] < 0.1
        # After one lower step from the same start g and θ are the same, so the ratio is linear.
        assert larger[1] == pytest.approx(1000 * often[1], rel=1e-6)


# What was pruned returns


class TwoFilters(nn.Module):
    """Filter i passes input channel i through its batch-norm on to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(2)
        self.head = nn.Linear(2, 2)
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(2).view(2, 2, 1, 1))
            self.head.weight.copy_(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.conv(x)).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", PRUNE)
@pytest.mark.parametrize(
    ("layer_type", "scores", "before", "after"),
    [
        ("unstructured", [0.6, 0.5, 0.6, 0.5], [1, 0, 1, 0], [0, 1, 0, 1]),
        ("filter", [0.6, 0, 0, 0.5], [1, 1, 0, 0], [0, 0, 1, 1]),  # through its batch-norm
    ],
)
def test_what_was_pruned_returns(
    layer_type: Any, scores: list[float], before: list[int], after: list[int], method: str
) -> None:
    """Only the second of two inputs separates the classes; what passes it on starts pruned."""
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    batch = x, (x[:, 1] > 0).long()
    network: nn.Module = nn.Linear(2, 2, bias=False)
    if layer_type == "filter":
        network, batch = TwoFilters(), (x[..., None, None].expand(64, 2, 4, 4), batch[1])
    else:
        with torch.no_grad():
            network.weight.copy_(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))  # type: ignore[operator]
    config = make_config(
        **METHODS[method], layer_type=layer_type, k="0.5", scope="layer",
        mask_lr=0.05, lr=0.05, momentum=0, wd=0, mask_wd=0,
    )  # fmt: skip
    pruned = PrunedParameters(network, find_prunable(network, layer_type), config.k, "layer")
    with torch.no_grad():
        pruned.scores.copy_(torch.tensor(scores))
    pruned.update_mask_and_z()
    run = ForwardBackward(config, network.train(), None, 0, torch.device("cpu"))
    parts = Parts(
        config, network, pruned, run, lambda level, start: itertools.repeat(batch), Clock(200, 200)
    )
    step = config.method(parts).step
    assert pruned.mask.tolist() == before
    for iteration in range(50):
        step(iteration)
    assert pruned.mask.tolist() == after
    assert (network(batch[0]).argmax(1) == batch[1]).float().mean() > 0.95


# z, θ and s are three things


@pytest.mark.parametrize("init", ["scaled", "hydra", "kaiming_normal"])
def test_weights_and_scores_never_share_storage(source: Path, init: str, tmp_path: Path) -> None:
    start = {"scores_init_type": init} if init != "scaled" else {}
    settings = {"scaled_score_init": init == "scaled", **start}
    pruned = make_run("bip", tmp_path, source_net=source, **settings).pruned
    assert pruned is not None
    buffers = [pruned.weights, pruned.scores, pruned.mask, pruned.gradient, *pruned.z]
    assert len({buffer.untyped_storage().data_ptr() for buffer in buffers}) == len(buffers)


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
def test_hydra_leaves_all_but_batch_norm_bit_for_bit(
    dense: Finished, layer_type: str, tmp_path: Path
) -> None:
    """Weight decay is on, so that a parameter in the wrong optimizer would move."""
    finished = train(
        "hydra", tmp_path, source_net=dense.newest, max_steps=5, k=0.3, layer_type=layer_type
    )
    moved = {n for n, t in dense.weights.items() if not torch.equal(t, finished.weights[n])}
    assert moved
    assert all("bn" in name for name in moved)
    scores = [t for n, t in finished.state["state_dict"].items() if "popup_scores" in n]
    weights = [t for n, t in dense.weights.items() if finished.masks.get(n) is not None]
    assert any(not torch.equal(s, w) for s, w in zip(scores, weights, strict=True))


def test_bip_moves_weights_and_scores(dense: Finished, pruned_runs: dict[str, Finished]) -> None:
    for finished in pruned_runs.values():
        for name in finished.masks:
            score = finished.state["state_dict"][name.replace("weight", "popup_scores")]
            before, after = dense.weights[name], finished.weights[name]
            for a, b in ((after, before), (score, before), (score, after)):
                assert not torch.equal(a, b)


def test_pretrain_knows_no_scores(dense: Finished) -> None:
    state = dense.state
    assert not [name for name in state["state_dict"] if "score" in name or "mask" in name]
    assert state["mask"] is None
    assert dense.result["mask_sha256"] is None
    assert dense.result["kept"] == dense.result["total"]
    assert list(make_setup("pretrain").method.optimizers) == ["lower"]


# Who owns what


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop"])
@pytest.mark.parametrize("freeze_bn", [False, True])
@pytest.mark.parametrize(
    ("method", "layer_type"), [("pretrain", "dense"), *itertools.product(METHODS, LAYER_TYPES)]
)
def test_each_optimizer_owns_only_its_levels_tensors(
    method: str, layer_type: str, freeze_bn: bool, optimizer: str
) -> None:
    setup = make_setup(method, layer_type, freeze_bn=freeze_bn, optimizer=optimizer)
    pruned = setup.pruned
    named = dict(setup.network.named_parameters())
    norm = {"bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias"}
    prunable = {tensor.name for tensor in pruned.layout.tensors} if pruned else set()
    trained_norm = set() if freeze_bn else norm
    others = set(named) - norm - prunable  # biases, and weights that the layer type leaves dense

    names = {p.data_ptr(): name for name, p in named.items()}
    if pruned is not None:
        names |= {pruned.weights.data_ptr(): "θ", pruned.scores.data_ptr(): "s"}
    actual = {}
    for level, each in setup.method.optimizers.items():
        tensors = [p for group in each.param_groups for p in group["params"]]
        assert len({id(t) for t in tensors}) == len(tensors)
        actual[level] = {names[t.data_ptr()] for t in tensors}
    expected = {
        "pretrain": {"lower": others | trained_norm},
        "bip": {"lower": {"θ"} | others | trained_norm, "upper": {"s"}},
        "accelerate": {"lower": {"θ"} | others | trained_norm, "upper": {"s"}},
        "hydra": {"upper": {"s"} | trained_norm},
        "finetune": {"lower": {"θ"} | others | trained_norm},
    }[method]
    assert actual == expected


@pytest.mark.parametrize("bn_wd", [True, False])
@pytest.mark.parametrize("method", ["pretrain", *METHODS])
def test_no_bn_wd_takes_weight_decay_off_batch_norm_alone(method: str, bn_wd: bool) -> None:
    setup = make_setup(method, bn_wd=bn_wd, wd=0.01, **{"mask_wd": 0.002} if bn_wd else {})
    norm = {id(p) for m in (setup.network.bn1, setup.network.bn2) for p in m.parameters()}
    decays: dict[str, set[float]] = {"norm": set(), "lower": set(), "upper": set()}
    for level, optimizer in setup.method.optimizers.items():
        for group in optimizer.param_groups:
            for p in group["params"]:
                decays["norm" if id(p) in norm else level].add(group["weight_decay"])
    assert decays["norm"] == {0.01 if bn_wd else 0.0}
    assert decays["lower"] == (set() if method == "hydra" else {0.01})
    # mask_wd (by default wd) rules BiP's scores; HYDRA's go by wd.
    scores = {0.002 if bn_wd else 0.01}
    upper = {"bip": scores, "accelerate": scores, "hydra": {0.01}}
    assert decays["upper"] == upper.get(method, set())


def test_weight_decay_acts_on_masked_weights_too() -> None:
    setup = make_setup("bip", wd=0.5, lr=0.1, momentum=0)
    pruned = pruned_of(setup)
    masked = pruned.mask == 0
    before = pruned.weights.detach().clone()
    setup.method.step(0)
    torch.testing.assert_close(pruned.weights.detach()[masked], before[masked] * (1 - 0.1 * 0.5))


@pytest.mark.parametrize("kind", ["pretrain", "bip", "hydra", "finetune"])
def test_freeze_bn_freezes_affine_and_running_statistics(
    kind: str, dense: Finished, pruned_runs: dict[str, Finished], tmp_path: Path
) -> None:
    if kind == "pretrain":
        for name, value in train(kind, tmp_path, max_steps=3, freeze_bn=True).weights.items():
            if "bn" in name:
                assert (value == name.endswith(("weight", "running_var"))).all(), name
        return
    before = pruned_runs["unstructured"] if kind == "finetune" else dense
    settings = {"source_net": before.newest, "max_steps": 3, "k": 0.3}
    frozen = train(kind, tmp_path, freeze_bn=True, **settings)
    free = train(kind, tmp_path, **settings)
    norm = [name for name in before.weights if "bn" in name]
    assert len(norm) == 5 * 5
    assert all(torch.equal(before.weights[n], frozen.weights[n]) for n in norm)
    assert not any(torch.equal(before.weights[n], free.weights[n]) for n in norm)


def test_frozen_batch_norm_trains_with_its_running_statistics() -> None:
    """The loss of the first step is that of the network in evaluation mode."""
    setup = make_setup("pretrain", freeze_bn=True)
    network = copy.deepcopy(setup.network).eval()
    (report,) = setup.method.step(0)
    images, labels = random_batch(0)
    expected = F.cross_entropy(network(images), labels, reduction="sum")
    torch.testing.assert_close(report.loss, expected)


# Fine-tuning, and the end of pruning


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
def test_finetune_keeps_the_mask_bit_for_bit(
    layer_type: str, pruned_runs: dict[str, Finished], tmp_path: Path
) -> None:
    """And what follows pruned filters stays zero."""
    before = pruned_runs[layer_type]
    after = train(
        "finetune", tmp_path, source_net=before.newest, max_steps=5, k=0.3, layer_type=layer_type
    )
    for key in ("mask_sha256", "kept"):
        assert after.result[key] == before.result[key]
    assert torch.equal(after.state["mask"], before.state["mask"])
    assert list(after.masks) == list(before.masks)
    for name, mask in after.masks.items():
        assert torch.equal(mask, before.masks[name])
        moved = after.weights[name] != before.weights[name]
        assert moved[mask == 1].any(), "what is kept is trained"
        if layer_type == "filter":
            gone = mask.flatten(1).amax(1) == 0
            assert int(gone.sum()) == 36 - 11  # ceil(0.3 · 36) filters stay
            norm = name.replace("conv", "bn")
            for state in (before.weights, after.weights):
                for part in (norm, norm.replace("weight", "bias")):
                    assert (state[part][gone] == 0).all()
                    assert (state[part][~gone] != 0).any()


def test_finetune_zeroes_them_after_every_step() -> None:
    """conv3's bias has a gradient even where its filter is pruned: tanh passes it on."""
    setup = make_setup("finetune", "filter", lr=0.5)
    pruned, network = pruned_of(setup), setup.network
    gone = [mask.flatten(1).amax(1) == 0 for mask in pruned.views(pruned.mask)]
    for iteration in range(3):
        setup.method.step(iteration)
        assert network.conv3.bias.grad is not None
        assert (network.conv3.bias.grad[gone[2]] != 0).all()
        pairs = [network.bn1.weight, network.bn1.bias, network.bn2.weight, network.bn2.bias]
        followers = [*zip(pairs, (0, 0, 1, 1), strict=True)]
        for parameter, layer in [*followers, (network.conv2.bias, 1), (network.conv3.bias, 2)]:
            assert (parameter[gone[layer]] == 0).all()
            assert (parameter[~gone[layer]] != 0).all()


def test_the_stored_mask_rules_not_the_scores(
    pruned_runs: dict[str, Finished], tmp_path: Path
) -> None:
    before = pruned_runs["unstructured"]
    state = before.state
    for name in before.masks:
        state["state_dict"][name.replace("weight", "popup_scores")].normal_()
    torch.save(state, tmp_path / "other-scores.pth.tar")
    source = tmp_path / "other-scores.pth.tar"
    after = train("finetune", tmp_path, source_net=source, max_steps=1, k=0.3)
    assert after.result["mask_sha256"] == before.result["mask_sha256"]


class Chain(nn.Module):
    """Convolution (with a bias), batch-norm, convolution: what can be shrunk by hand."""

    def __init__(self, middle: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, middle, 3)
        self.norm = nn.BatchNorm2d(middle)
        self.second = nn.Conv2d(middle, 5, 3)
        self.head = nn.Linear(5, 2)  # not called: with it `second` does not give the classes

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.norm(self.first(x))))  # type: ignore[no-any-return]


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_a_pruned_filter_contributes_exactly_zero(training: bool) -> None:
    """The masked network equals the compact one, from which the pruned filters are gone."""
    torch.manual_seed(0)
    wide = Chain(8).double()
    wide.norm.weight.uniform_(0.5, 2)
    wide.norm.bias.normal_()
    wide.norm.running_mean.normal_()
    images = torch.randn(4, 3, 9, 9, dtype=torch.float64)
    layout = find_prunable(wide, "filter")
    pruned = PrunedParameters(wide, layout, Decimal("0.5"), "layer")
    pruned.followers = find_followers(wide, layout, images)
    keep = torch.tensor([1, 3, 4, 6])
    pruned.mask.zero_()
    pruned.views(pruned.mask)[0][keep] = 1
    pruned.views(pruned.mask)[1][1:] = 1  # of the second layer filter 0 goes, its bias too
    pruned.write_z()
    pruned.write_followers()

    compact = Chain(4).double()
    compact.first.weight.copy_(wide.first.weight[keep])
    compact.first.bias.copy_(wide.first.bias[keep])
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(compact.norm, name).copy_(getattr(wide.norm, name)[keep])
    compact.second.weight.copy_(wide.second.weight[:, keep])
    compact.second.bias.copy_(wide.second.bias)
    wide.train(training)
    compact.train(training)
    out = wide(images)
    torch.testing.assert_close(out, compact(images), rtol=1e-12, atol=1e-12)
    assert (out[:, 0] == 0).all()
    assert (out[:, 1:] != 0).any()


def test_while_pruning_the_batch_norm_of_a_pruned_filter_is_left_alone() -> None:
    setup = make_setup("bip", "filter")
    pruned = pruned_of(setup)
    assert pruned.followers
    for iteration in range(3):
        setup.method.step(iteration)
        gone = pruned.views(pruned.mask)[0].flatten(1).amax(1) == 0
        assert gone.any()
        assert (setup.network.bn1.weight[gone] != 0).all()
