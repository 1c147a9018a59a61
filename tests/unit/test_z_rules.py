"""The four rules of z: rewritten in place, requires_grad as it was, one autocast context per
forward, g complete before it is squared. With DDP: tests/distributed/test_ddp.py.
"""

import copy
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bip.methods.bip import Bip
from bip.pruning.layout import find_prunable
from bip.pruning.state import PrunedParameters
from bip.training.forward import ForwardBackward
from tests.runs import LAYER_TYPES
from tests.unit.networks import METHODS, make_config, make_setup, prune, random_batch, small_net

CPU = torch.device("cpu")


def loss_sum(network: nn.Module, batch: tuple[Tensor, Tensor], bf16: bool) -> Tensor:
    """The oracle: a copy of the network, that nothing was ever cached for."""
    images, labels = batch
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = copy.deepcopy(network)(images)
        return F.cross_entropy(out, labels) * len(labels)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_forward_sees_the_rewritten_z(precision: str) -> None:
    """Under autocast too, where cast weights are cached for as long as a context lives."""
    setup = make_setup("bip", precision=precision, lr=0.5, mask_lr=0.5)
    assert isinstance(setup.method, Bip)
    lower, upper = random_batch(0), random_batch(1000)
    bf16 = precision == "bf16"
    expected = loss_sum(setup.network, lower, bf16)
    stale = loss_sum(setup.network, upper, bf16)
    (first,) = setup.method.lower.step(0)
    torch.testing.assert_close(first.loss, expected.to(first.loss))
    expected = loss_sum(setup.network, upper, bf16)
    (second,) = setup.method.upper.step(0)
    torch.testing.assert_close(second.loss, expected.to(second.loss))
    assert abs(float(expected - stale)) > 0.1, "the lower step changed what the upper one sees"
    # And the next iteration sees what the upper step did to the mask.
    expected = loss_sum(setup.network, random_batch(1), bf16)
    (third,) = setup.method.lower.step(1)
    torch.testing.assert_close(third.loss, expected.to(third.loss))


def test_bf16_gradients_arrive_in_float32_and_near_the_full_ones() -> None:
    gradients = {}
    for precision in ("fp32", "bf16"):
        network = small_net()
        pruned = prune(network, "unstructured")
        config = make_config(precision=precision)
        ForwardBackward(config, network, None, 0, CPU)(random_batch(0), "lower", 0)
        pruned.take_gradient()
        gradients[precision] = pruned.gradient
    assert gradients["bf16"].dtype == torch.float32
    assert not torch.equal(gradients["bf16"], gradients["fp32"]), "autocast is in force"
    error = (gradients["bf16"] - gradients["fp32"]).norm() / gradients["fp32"].norm()
    assert error < 0.1


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("method", [*METHODS, "gmp", "acdc", "feather", "rigl"])
@pytest.mark.parametrize("settings", [{}, {"precision": "bf16"}, {"lower_steps": 3}], ids=str)
def test_z_is_m_times_theta_and_keeps_its_storage_and_requires_grad(
    method: str, layer_type: str, settings: dict[str, Any]
) -> None:
    setup = make_setup(method, layer_type, **settings)
    pruned = setup.pruned
    assert pruned is not None
    with torch.no_grad():
        pruned.scores.mul_(1e-4)  # so that a step changes the mask

    def places() -> list[tuple[int, int, bool]]:
        tensors = [*setup.network.parameters(), pruned.weights, pruned.scores]
        return [(id(t), t.data_ptr(), t.requires_grad) for t in tensors]

    before, seen = places(), []
    for iteration in range(3):
        setup.method.step(iteration)
        assert places() == before
        seen.append(torch.cat([z.detach().flatten() for z in pruned.z]))
        assert torch.equal(seen[-1], pruned.mask * pruned.weights.detach())
        for tensor, z in zip(pruned.layout.tensors, pruned.z, strict=True):
            assert setup.network.get_parameter(tensor.name) is z
    assert all(requires_grad for _, _, requires_grad in before)
    assert not torch.equal(seen[0], seen[-1])


# Memory formats


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
def test_channels_last_changes_no_position(layer_type: str) -> None:
    """θ, s, m and g are in logical order: same ranking, same ties, same gradients."""
    plain = small_net(dtype=torch.float64)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    assert last.conv2.weight.stride() != plain.conv2.weight.stride()
    strides = [p.stride() for p in last.parameters()]
    found = []
    for network in (plain, last):
        pruned = prune(network, layer_type)
        with torch.no_grad():  # coarse scores: most of the ranking is ties
            pruned.scores.copy_((2 * pruned.scores).round())
        pruned.update_mask_and_z()
        images, labels = random_batch(0, dtype=torch.float64)
        F.cross_entropy(network(images), labels).backward()
        pruned.take_gradient()
        g = pruned.gradient.clone()
        pruned.set_upper_gradient(0.1)
        found.append((pruned.weights, pruned.mask, *pruned.z, g, pruned.scores.grad))
    assert found[0][-1].norm() > 1e-3
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12, check_stride=False)
    assert torch.equal(found[0][1], found[1][1])
    assert [p.stride() for p in last.parameters()] == strides


# Accumulation


def full_gradient(accumulate: int, layer_type: str) -> tuple[Tensor, Tensor, Tensor]:
    network = small_net(dtype=torch.float64)
    network.eval()  # batch statistics would differ between micro-batches by nature
    pruned = prune(network, layer_type)
    config = make_config(accumulate=accumulate, label_smoothing=0.1)
    batch = random_batch(0, size=8, dtype=torch.float64)
    report = ForwardBackward(config, network, None, 0, CPU)(batch, "upper", 0)
    assert report.count == 8
    pruned.take_gradient()
    g = pruned.gradient.clone()
    pruned.set_upper_gradient(10.0)
    return g, pruned.scores.grad, report.loss.double()


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_give_the_same_g_and_the_same_square_of_it(
    accumulate: int, layer_type: str
) -> None:
    """Squaring each micro-batch's g would show in the implicit term, here the larger one."""
    (*whole, loss), (*parts, total) = (full_gradient(n, layer_type) for n in (1, accumulate))
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(total, loss)


# torch.compile


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on the CPU")
def test_a_compiled_network_sees_the_rewritten_z() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    pruned = prune(network, "unstructured")
    run = ForwardBackward(make_config(compile=True), network, None, 0, CPU)
    assert run.forward is not network, "it is compiled"
    losses = []
    for iteration in range(3):
        batch = random_batch(0)
        expected = loss_sum(network, batch, bf16=False)
        report = run(batch, "lower", iteration)
        torch.testing.assert_close(report.loss, expected, rtol=1e-4, atol=1e-4)
        losses.append(float(report.loss))
        pruned.take_gradient()
        with torch.no_grad():
            pruned.weights.sub_(pruned.gradient, alpha=0.5)
            pruned.mask.copy_(1 - pruned.mask)
        pruned.write_z()
    assert max(losses) - min(losses) > 0.1


def test_autograd_refuses_to_go_back_over_a_rewritten_z() -> None:
    network = small_net()
    pruned = prune(network, "unstructured")
    for rewrite in (pruned.write_z, pruned.update_mask_and_z):
        loss = network(random_batch(0)[0]).sum()
        rewrite()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# Any network at all


def test_the_network_stays_a_plain_module() -> None:
    """No hooks, no parametrisations, no new attributes, parameters or buffers."""
    network = small_net()
    before = {name: (type(m), set(vars(m))) for name, m in network.named_modules()}
    keys = list(network.state_dict())
    setup = make_setup("bip", "filter")
    setup.method.step(0)
    PrunedParameters(network, find_prunable(network, "filter"), setup.config.k, "layer")
    for checked in (network, setup.network):
        assert {n: (type(m), set(vars(m))) for n, m in checked.named_modules()} == before
        assert list(checked.state_dict()) == keys
        for module in checked.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
