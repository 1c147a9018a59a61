"""AC/DC: its phases are the published ones; what a phase begins with."""

from itertools import groupby

import pytest
import torch

from bip.methods.acdc import AlternatingCompression
from bip.pruning.layout import keep_count
from bip.training.optim import Clock
from tests.unit.networks import make_setup

IMAGENET = {"acdc_warmup": 0.1, "acdc_phase": 0.05, "acdc_last": 0.15}
CIFAR10 = {"acdc_warmup": 0.05, "acdc_phase": 0.1, "acdc_last": 0.15}


@pytest.mark.parametrize(
    ("settings", "epochs", "published"),
    [
        (IMAGENET, 100, [*((start, start + 5) for start in range(10, 80, 10)), (85, 100)]),
        (CIFAR10, 200, [(10, 30), (50, 70), (90, 110), (130, 150), (170, 200)]),
        ({"acdc_warmup": 0.0, "acdc_last": 1.0}, 5, [(0, 5)]),
        ({}, 1, [(0, 1)]),
    ],
)
def test_sparse_phases(
    settings: dict[str, float], epochs: int, published: list[tuple[int, int]]
) -> None:
    method = make_setup("acdc", clock=Clock(epochs, 1), **settings).method
    assert isinstance(method, AlternatingCompression)
    spans = []
    for sparse, group in groupby(range(epochs), method.is_sparse):
        iterations = list(group)
        if sparse:
            spans.append((iterations[0], iterations[-1] + 1))
    assert spans == published


def test_phases_begin_with_the_largest_weights_and_with_zeros() -> None:
    """A rate of 0 shows what a phase does to θ: nothing but the zeros of a dense phase."""
    setup = make_setup("acdc", clock=Clock(20, 20), k="0.3", lr=0, **CIFAR10)
    pruned = setup.pruned
    assert pruned is not None
    dense = pruned.weights.detach().clone()
    few = keep_count("0.3", pruned.layout.size)
    top = torch.zeros_like(pruned.mask)
    top[dense.abs().argsort(descending=True, stable=True)[:few]] = 1
    for iteration in range(20):
        setup.method.step(iteration)
        sparse = setup.method.is_sparse(iteration)  # type: ignore[attr-defined]
        assert torch.equal(pruned.mask, top if sparse else torch.ones_like(top)), iteration
        first_dense = 3  # 1 of warm-up, 2 sparse
        expected = dense if iteration < first_dense else dense * top
        assert torch.equal(pruned.weights, expected), iteration
    assert pruned.kept() == few


def test_a_dense_phase_begins_without_momentum_and_moves_what_was_pruned() -> None:
    setup = make_setup("acdc", clock=Clock(20, 20), k="0.3", wd=0, **CIFAR10)
    pruned = setup.pruned
    assert pruned is not None
    for iteration in range(4):
        mask = pruned.mask.clone()
        setup.method.step(iteration)
    buffer = setup.method.optimizers["lower"].state[pruned.weights]["momentum_buffer"]
    torch.testing.assert_close(buffer, pruned.gradient, rtol=0, atol=0)
    torch.testing.assert_close(
        pruned.weights.detach()[mask == 0], -setup.config.lr * pruned.gradient[mask == 0],
        rtol=0.2, atol=0,
    )  # fmt: skip
