"""Feather: the threshold operator by hand, its straight-through gradient by autograd, its k."""

from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bip.pruning.layout import find_prunable, keep_count
from bip.pruning.state import PrunedParameters
from tests.unit.networks import make_setup, prune, random_batch, small_net
from tests.unit.test_gradients import flat, loss_of


class StraightThrough(torch.autograd.Function):
    """The definition, tensor by tensor, for a given T."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, cut: float, scale: float) -> Tensor:
        ctx.factor = torch.where(w.abs() > cut, 1.0, scale)
        return w.sign() * (w.abs() ** 3 - cut**3).clamp(min=0) ** (1 / 3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.factor * grads[0], None, None


def test_the_operator_by_hand() -> None:
    network = nn.Linear(6, 1, bias=False)
    pruned = PrunedParameters(
        network, find_prunable(network, "unstructured"), Decimal("0.5"), "global"
    )
    with torch.no_grad():
        pruned.scores.copy_(torch.tensor([2.0, -3.0, 1.0, -1.0, 0.0, -1.5]))
    pruned.update_mask()
    for power, expected in {
        1: [1.0, -2.0, 0, 0, 0, -0.5],  # the soft threshold
        3: [7 ** (1 / 3), -(26 ** (1 / 3)), 0, 0, 0, -(2.375 ** (1 / 3))],
        200: [2.0, -3.0, 0, 0, 0, -1.5],  # nearly the hard one
    }.items():
        pruned.shrink(power)
        torch.testing.assert_close(pruned.weights.detach(), torch.tensor(expected))
    pruned.keep([6])
    pruned.update_mask()
    pruned.shrink(3)
    assert torch.equal(pruned.weights, pruned.scores), "nothing is pruned"


def test_a_filter_shrinks_by_its_norm() -> None:
    pruned = prune(small_net(), "filter")
    pruned.update_mask()
    pruned.shrink(3)
    weights, scores = pruned.views(pruned.weights.detach()), pruned.views(pruned.scores.detach())
    for weight, score, segment in zip(weights, scores, pruned.segments, strict=True):
        norms = score.flatten(1).norm(dim=1)
        cut = norms.sort(descending=True).values[segment.keep]
        expected = (norms**3 - cut**3).clamp(min=0) ** (1 / 3) / norms
        torch.testing.assert_close(weight, score * expected.view(-1, 1, 1, 1))


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_gradient_is_autograds_of_the_straight_through_definition(scale: float) -> None:
    network = small_net(dtype=torch.float64)
    pruned = prune(network, "unstructured")
    pruned.update_mask()
    cut = float(pruned.scores.detach().abs()[pruned.mask == 0].max())
    pruned.shrink(3)
    pruned.write_z()
    names = [tensor.name for tensor in pruned.layout.tensors]
    leaves = [t.detach().clone().requires_grad_() for t in pruned.views(pruned.scores)]
    z = [StraightThrough.apply(w, cut, scale) for w in leaves]
    torch.testing.assert_close(flat(tuple(z)), flat(tuple(pruned.z)), rtol=1e-9, atol=1e-12)
    expected = flat(torch.autograd.grad(loss_of(network, names, z), leaves))

    images, labels = random_batch(7, dtype=torch.float64)
    F.cross_entropy(network(images), labels).backward()
    pruned.set_straight_gradient(scale)
    torch.testing.assert_close(pruned.scores.grad, expected, rtol=1e-9, atol=1e-12)
    assert expected[pruned.mask == 0].abs().max() > 1e-3, "pruned weights are trained too"


def test_k_follows_the_cubic_at_every_step_and_z_is_what_the_operator_leaves() -> None:
    setup = make_setup("feather", mask_end=0.5, k="0.1")
    pruned = setup.pruned
    assert pruned is not None
    size = pruned.layout.size
    for done in range(1, 61):
        setup.method.step(done - 1)
        left = max(Fraction(0), 1 - Fraction(done, 50))
        assert pruned.kept() == keep_count(1 - Fraction(9, 10) * (1 - left**3), size)
        assert torch.equal(flat(tuple(pruned.z)), pruned.weights * pruned.mask)
    sizes = pruned.scores.detach().abs()
    assert sizes[pruned.mask == 1].min() >= sizes[pruned.mask == 0].max()
    assert (pruned.weights.detach().abs() <= sizes).all()


@pytest.mark.parametrize(("k", "scale"), [("0.05", 1.0), ("0.0499", 0.5)])
def test_the_scale_goes_by_k_unless_given(k: str, scale: float) -> None:
    assert make_setup("feather", k=k).method.scale == scale  # type: ignore[attr-defined]
    assert make_setup("feather", k=k, feather_scale=0.3).method.scale == 0.3  # type: ignore[attr-defined]
