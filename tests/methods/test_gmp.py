"""Gradual magnitude pruning: the cubic, the ranking, and that pruned weights stay as they are."""

from fractions import Fraction

import pytest
import torch

from bip.pruning.layout import keep_count
from tests.unit.networks import make_setup


@pytest.mark.parametrize("layer_type", ["unstructured", "filter"])
def test_the_count_follows_the_cubic(layer_type: str) -> None:
    """Of 100 iterations, a step every 10 from 20 to 60; t_0 = 10, n Δt = 50."""
    settings = {"mask_start": 0.1, "mask_end": 0.6, "mask_every": 10, "k": "0.1"}
    setup = make_setup("gmp", layer_type, **settings)  # type: ignore[arg-type]
    pruned = setup.pruned
    assert pruned is not None
    sizes = [segment.size for segment in pruned.segments]
    ratio = Fraction(1)
    for done in range(1, 101):
        setup.method.step(done - 1)
        if done in (20, 30, 40, 50, 60):
            s = Fraction(9, 10)
            ratio = 1 - (s + (0 - s) * (1 - Fraction(done - 10, 50)) ** 3)
        assert [s.keep for s in pruned.segments] == [keep_count(ratio, n) for n in sizes], done
        kept = [int(mask.flatten(1).amax(1).sum()) for mask in pruned.views(pruned.mask)]
        if layer_type == "unstructured":
            assert pruned.kept() == keep_count(ratio, sizes[0])
        else:
            assert kept == [keep_count(ratio, n) for n in sizes]
    assert ratio == Fraction(1, 10)


def test_a_step_keeps_the_largest_weights_and_leaves_the_others_where_they_are() -> None:
    setup = make_setup("gmp", mask_end=0.5, mask_every=25, k="0.3", wd=0, momentum=0)
    pruned = setup.pruned
    assert pruned is not None
    for iteration in range(25):
        setup.method.step(iteration)
    sizes = pruned.weights.detach().abs()
    kept = sizes.argsort(descending=True, stable=True)[: pruned.kept()]
    assert pruned.kept() < len(sizes)
    assert pruned.mask[kept].all()
    before, mask = pruned.weights.detach().clone(), pruned.mask.clone()
    for iteration in range(25, 49):
        setup.method.step(iteration)
    assert torch.equal(pruned.mask, mask)
    assert torch.equal(pruned.weights[mask == 0], before[mask == 0])
    assert not torch.equal(pruned.weights[mask == 1], before[mask == 1])
