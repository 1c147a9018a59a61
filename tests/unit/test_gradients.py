"""The gradients of both levels against autograd, in float64, through real convolutions.

θ and m are leaves and z = m ⊙ θ is built explicitly, so nothing here shares a formula with the
code. The implicit term is checked against hypergradients of lower levels solved in closed form.
"""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from bip.pruning.state import PrunedParameters
from tests.runs import LAYER_TYPES
from tests.unit.networks import prune, random_batch, small_net

DOUBLE = torch.float64


def leaves(pruned: PrunedParameters) -> tuple[list[Tensor], list[Tensor]]:
    """θ and m as autograd leaves, one pair per prunable tensor."""
    weights = [t.detach().clone().requires_grad_() for t in pruned.views(pruned.weights)]
    masks = [t.double().requires_grad_() for t in pruned.views(pruned.mask)]
    return weights, masks


def flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def loss_of(network: nn.Module, names: list[str], z: list[Tensor], seed: int = 7) -> Tensor:
    images, labels = random_batch(seed, dtype=DOUBLE)
    parameters = dict(zip(names, z, strict=True))
    return F.cross_entropy(functional_call(network, parameters, (images,)), labels)


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("training", [True, False], ids=["batch-stats", "running-stats"])
def test_both_levels_gradients_are_autograds(layer_type: str, training: bool) -> None:
    network = small_net(dtype=DOUBLE).train(training)
    pruned = prune(network, layer_type)
    assert 0 < pruned.kept() < pruned.layout.size
    names = [tensor.name for tensor in pruned.layout.tensors]
    weights, masks = leaves(pruned)
    loss = loss_of(network, names, [m * w for m, w in zip(masks, weights, strict=True)])
    by_weight = flat(torch.autograd.grad(loss, weights, retain_graph=True))
    by_mask = flat(torch.autograd.grad(loss, masks))
    assert by_weight.abs().max() > 1e-3
    assert by_mask.abs().max() > 1e-3

    images, labels = random_batch(7, dtype=DOUBLE)
    F.cross_entropy(network(images), labels).backward()
    pruned.set_upper_gradient(0.0)
    # The ranking is by |s|: its slope turns d/dm into d/ds.
    expected = by_mask * torch.where(pruned.scores < 0, -1.0, 1.0)
    torch.testing.assert_close(pruned.scores.grad, expected, rtol=1e-12, atol=1e-15)

    pruned.set_lower_gradient()
    torch.testing.assert_close(pruned.weights.grad, by_weight, rtol=1e-12, atol=1e-15)
    assert (pruned.weights.grad[pruned.mask == 0] == 0).all()


def test_a_score_of_zero_moves_and_has_the_positive_sign() -> None:
    network = small_net(dtype=DOUBLE)
    pruned = prune(network, "unstructured")
    with torch.no_grad():
        pruned.scores[0], pruned.scores[1] = 0.0, -0.0
        pruned.scores[2:] = 1.0
    images, labels = random_batch(1, dtype=DOUBLE)
    F.cross_entropy(network(images), labels).backward()
    pruned.take_gradient()
    product = pruned.weights.detach() * pruned.gradient
    assert (product[:2] != 0).all()
    pruned.set_upper_gradient(0.0)
    torch.testing.assert_close(pruned.scores.grad, product, rtol=1e-12, atol=0)


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("gamma", [1e-4, 1e-2, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "fractional"])
def test_hypergradient_of_a_linear_loss_is_exact(
    layer_type: str, gamma: float, binary: bool
) -> None:
    """l = cᵀz. Its lower level, min over θ of cᵀ(m⊙θ) + (γ/2)‖θ‖², is solved by −(1/γ) m⊙c."""
    network = small_net(dtype=DOUBLE)
    pruned = prune(network, layer_type)
    generator = torch.Generator().manual_seed(3)
    c = torch.randn(pruned.layout.size, generator=generator, dtype=DOUBLE)
    if not binary:
        pruned.mask = torch.rand(pruned.layout.size, generator=generator, dtype=DOUBLE)
    m = pruned.mask.double().requires_grad_()
    theta = -(1 / gamma) * m * c
    (exact,) = torch.autograd.grad(c @ (m * theta), m)

    with torch.no_grad():
        pruned.weights.copy_(theta)
        pruned.scores.abs_()
    pruned.write_z()
    (c @ flat(tuple(pruned.z))).backward()
    pruned.set_upper_gradient(1 / gamma)
    error = (pruned.scores.grad - exact).norm() / exact.norm()
    assert error < 1e-12


def test_hypergradient_of_a_quadratic_loss_errs_by_one_over_gamma() -> None:
    """l = zᵀAz/2 + bᵀz; θ*(m) solves (DAD + γI) θ = −Db, D = diag(m), differentiated exactly."""
    network = nn.Sequential(nn.Conv2d(2, 3, 2, bias=False), nn.Linear(3, 4, bias=False)).double()
    pruned = prune(network, "unstructured")
    n = pruned.layout.size
    generator = torch.Generator().manual_seed(5)
    root = torch.randn(n, n, generator=generator, dtype=DOUBLE) / n**0.5
    a, b = root @ root.T, torch.randn(n, generator=generator, dtype=DOUBLE)

    def quadratic(z: Tensor) -> Tensor:
        return z @ a @ z / 2 + b @ z

    errors = []
    for gamma in (1e2, 1e3, 1e4, 1e5, 1e6):
        m = pruned.mask.double().requires_grad_()
        identity = torch.eye(n, dtype=DOUBLE)
        theta = torch.linalg.solve(torch.outer(m, m) * a + gamma * identity, -m * b)
        (exact,) = torch.autograd.grad(quadratic(m * theta), m)
        with torch.no_grad():
            pruned.weights.copy_(theta)
            pruned.scores.abs_()
        pruned.write_z()
        network.zero_grad()
        quadratic(flat(tuple(pruned.z))).backward()
        pruned.set_upper_gradient(1 / gamma)
        errors.append(float((pruned.scores.grad - exact).norm() / exact.norm()))
    assert errors[0] < 0.1
    for before, after in itertools.pairwise(errors):
        assert 9 < before / after < 11


def test_the_implicit_term_is_half_of_the_hypergradient_at_the_linear_optimum() -> None:
    """There θ ⊙ g = −(1/γ) m ⊙ g ⊙ g, so the two norms that are logged must agree."""
    network = small_net(dtype=DOUBLE)
    pruned = prune(network, "unstructured")
    c = torch.randn(pruned.layout.size, dtype=DOUBLE)
    with torch.no_grad():
        pruned.weights.copy_(pruned.mask * c * -0.01)
    pruned.write_z()
    (c @ flat(tuple(pruned.z))).backward()
    implicit, direct = pruned.term_norms(0.01).norm(dim=1).tolist()
    assert implicit == pytest.approx(direct, rel=1e-12)
    assert direct == pytest.approx(0.01 * float((pruned.mask * c * c).norm()), rel=1e-12)
