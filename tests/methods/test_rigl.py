"""RigL: exact layer budgets, and drops and growths like those of a plain reference."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bip.methods.rigl import RigL
from bip.pruning.budgets import erk
from bip.pruning.layout import keep_count
from tests.runs import train
from tests.unit.networks import Setup, make_setup

DIMENSION = st.integers(1, 40)
SHAPE = st.one_of(
    st.tuples(DIMENSION, DIMENSION), st.tuples(DIMENSION, DIMENSION, st.just(3), st.just(3))
)


def published_densities(shapes: list[tuple[int, ...]], density: float) -> list[float]:
    """The loop of google-research/rigl: one more layer becomes dense until no density exceeds 1."""
    dense: set[int] = set()
    while True:
        sizes = [math.prod(shape) for shape in shapes]
        raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
        ones = sum(density * n for i, n in enumerate(sizes) if i not in dense)
        ones -= sum((1 - density) * sizes[i] for i in dense)
        divisor = sum(raw[i] * sizes[i] for i in range(len(sizes)) if i not in dense)
        epsilon = ones / divisor
        largest = max(raw[i] for i in range(len(sizes)) if i not in dense)
        if epsilon * largest <= 1:
            return [1.0 if i in dense else epsilon * raw[i] for i in range(len(sizes))]
        dense |= {i for i in range(len(sizes)) if raw[i] == largest}


def test_erk_is_the_published_budget() -> None:
    """Of a ResNet-20's layers; each count is within 1 of it."""
    shapes: list[tuple[int, ...]] = [(16, 3, 3, 3), *[(16, 16, 3, 3)] * 6, (32, 16, 3, 3)]
    shapes += [*[(32, 32, 3, 3)] * 5, (64, 32, 3, 3), *[(64, 64, 3, 3)] * 5, (10, 64)]
    sizes = [math.prod(shape) for shape in shapes]
    for density in (0.5, 0.2, 0.05, 0.01):
        counts = erk(shapes, sizes, keep_count(Fraction(str(density)), sum(sizes)))
        expected = [d * n for d, n in zip(published_densities(shapes, density), sizes, strict=True)]
        assert np.abs(np.array(counts) - expected).max() < 1.01
    assert counts[0] < sizes[0]


@given(shapes=st.lists(SHAPE, min_size=1, max_size=6), data=st.data())
def test_erk_keeps_exactly_the_total(shapes: list[tuple[int, ...]], data: st.DataObject) -> None:
    sizes = [math.prod(shape) for shape in shapes]
    total = data.draw(st.integers(len(sizes), sum(sizes)))
    counts = erk(shapes, sizes, total)
    assert sum(counts) == total
    assert all(1 <= count <= size for count, size in zip(counts, sizes, strict=True))


def test_erk_refuses_less_than_one_for_each_layer() -> None:
    with pytest.raises(ValueError, match="2 layers"):
        erk([(2, 2), (3, 3)], [4, 9], 1)


def layer_counts(setup: Setup) -> list[int]:
    assert setup.pruned is not None
    return [int(mask.sum()) for mask in setup.pruned.views(setup.pruned.mask)]


@pytest.mark.parametrize("layer_type", ["unstructured", "filter"])
def test_layers_keep_their_counts(layer_type: str) -> None:
    settings = {"k": "0.5", "mask_every": 5, "mask_end": 0.8, "rigl_drop": 0.6}
    setup = make_setup("rigl", layer_type, **settings)  # type: ignore[arg-type]
    assert setup.pruned is not None
    before, masks = layer_counts(setup), [setup.pruned.mask.clone()]
    if layer_type == "unstructured":
        assert sum(before) == keep_count("0.5", setup.pruned.layout.size)
        shapes = [tensor.shape for tensor in setup.pruned.layout.tensors]
        assert before == erk(shapes, [shape.numel() for shape in shapes], sum(before))
    for iteration in range(100):
        setup.method.step(iteration)
        assert layer_counts(setup) == before, iteration
        changes = not torch.equal(setup.pruned.mask, masks[-1])
        assert not changes or (iteration % 5 == 0 and iteration < 80), iteration
        masks.append(setup.pruned.mask.clone())
    assert len({mask.numpy().tobytes() for mask in masks}) > 2


def largest(values: Tensor, count: int) -> list[int]:
    """Places of the largest, ties to the first."""
    return sorted(range(len(values)), key=lambda i: (-float(values[i]), i))[:count]


def test_a_step_drops_the_smallest_weights_and_grows_the_largest_gradients() -> None:
    """Against sorted lists, layer by layer; f at t = 40 of 80 is half of α."""
    setup = make_setup("rigl", k="0.3", mask_every=5, mask_end=0.8, rigl_drop=0.4)
    pruned, method = setup.pruned, setup.method
    assert pruned is not None
    assert isinstance(method, RigL)
    for iteration in range(40):
        method.step(iteration)
    before = pruned.mask.clone()
    weights = pruned.weights.detach().clone()
    buffer = method.optimizers["lower"].state[pruned.weights]["momentum_buffer"]
    momentum = buffer.clone()
    method.step(40)
    g = torch.cat([z.grad.flatten() for z in pruned.z if z.grad is not None])

    expected = torch.zeros_like(before)
    for tensor in pruned.layout.tensors:
        part = slice(tensor.start, tensor.stop)
        old, size, slope = before[part] > 0, weights[part].abs(), g[part].abs()
        dropped = int(0.4 / 2 * int(old.sum()))
        stay = largest(torch.where(old, size, -1.0), int(old.sum()) - dropped)
        candidates = slope.clone()
        candidates[stay] = -1
        expected[part][stay + largest(candidates, dropped)] = 1
    assert torch.equal(pruned.mask, expected)
    grown = (expected > 0) & (before == 0)
    assert grown.any()
    # No gradient step in this iteration: nothing else moved.
    assert torch.equal(pruned.weights, weights * ~grown)
    assert torch.equal(buffer, momentum * ~grown)


def test_it_needs_no_source_and_its_first_mask_goes_by_the_seed(tmp_path: Path) -> None:
    """At no rate and with nothing replaced the last mask is the first."""
    still = {"k": 0.3, "max_steps": 1, "lr": 0, "rigl_drop": 0}
    masks = [train("rigl", tmp_path, seed=seed, **still).masks for seed in (1, 2)]
    for name, mask in masks[0].items():
        full = int(mask.sum()) in (0, mask.numel())
        assert full or not torch.equal(mask, masks[1][name]), name
        assert int(mask.sum()) == int(masks[1][name].sum())
