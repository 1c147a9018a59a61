"""The order of images is a pure function of (seed, epoch, level, position)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bip.data.order import Order, holdout_split, rank_slice

seeds = st.integers(0, 2**63 - 1)
levels = st.sampled_from(["lower", "upper"])


@st.composite
def orders(draw: st.DrawFn) -> Order:
    size = draw(st.integers(1, 300))
    return Order(size, draw(st.integers(1, size)), draw(seeds), draw(levels))


@given(orders(), st.integers(0, 3), st.integers(1, 5))
def test_an_epoch_shows_every_image_at_most_once_over_the_ranks(
    order: Order, epoch: int, world: int
) -> None:
    seen: list[int] = []
    first = epoch * order.batches_per_epoch
    for number in range(first, first + order.batches_per_epoch):
        got, _, indices = order.batch(number)
        assert got == epoch
        for rank in range(world):
            seen.extend(indices[rank_slice(order.batch_size, rank, world)].tolist())
    assert len(seen) == len(set(seen)) == order.size - order.size % order.batch_size
    assert set(seen) <= set(range(order.size))


@given(orders(), st.integers(0, 1000))
def test_a_batch_drawn_alone_is_the_batch_drawn_in_sequence(order: Order, number: int) -> None:
    number %= 3 * order.batches_per_epoch
    alone = Order(order.size, order.batch_size, order.seed, order.level).batch(number)
    *_, in_sequence = map(order.batch, range(number + 1))
    for found, expected in zip(alone, in_sequence, strict=True):
        np.testing.assert_array_equal(found, expected)


@given(st.integers(1, 300), st.integers(1, 300), seeds, levels)
def test_the_permutation_does_not_depend_on_the_batch_size(
    size: int, batch_size: int, seed: int, level: str
) -> None:
    batch_size = min(size, batch_size)
    _, _, whole = Order(size, size, seed, level).batch(0)
    _, _, part = Order(size, batch_size, seed, level).batch(0)
    np.testing.assert_array_equal(whole[:batch_size], part)


def test_permutations_are_uniform() -> None:
    places = np.zeros((5, 5))
    order = Order(5, 5, seed=3)
    for epoch in range(4000):
        places[np.arange(5), order.batch(epoch)[2]] += 1
    assert abs(places / 4000 - 0.2).max() < 5 * (0.2 * 0.8 / 4000) ** 0.5


@given(seeds, levels, st.integers(0, 500), st.integers(1, 64), st.sampled_from([4, 24]))
def test_uniforms_of_a_position_do_not_depend_on_the_range_drawn(
    seed: int, level: str, first: int, count: int, draws: int
) -> None:
    order = Order(600, 10, seed, level)
    whole = order.uniforms(2, 0, 600, draws)
    assert whole.shape == (600, draws)
    assert ((whole >= 0) & (whole < 1)).all()
    part = order.uniforms(2, first, count, draws)
    np.testing.assert_array_equal(part, whole[first : first + count])


def test_streams_differ_by_epoch_level_and_seed_and_are_uniform() -> None:
    streams = [
        (Order(5000, 5000, seed, level), epoch)
        for seed in (0, 1, 2**32)
        for level in ("lower", "upper")
        for epoch in range(3)
    ]
    shown = {tuple(order.batch(epoch)[2].tolist()) for order, epoch in streams}
    assert len(shown) == len(streams)
    draws = np.stack([order.uniforms(epoch, 0, 5000, 4).ravel() for order, epoch in streams])
    assert abs(draws.mean(axis=1) - 0.5).max() < 0.01
    assert abs(draws.var(axis=1) - 1 / 12).max() < 0.002
    assert abs(np.corrcoef(draws) - np.eye(len(draws))).max() < 0.04


def test_the_streams_stay_what_they_were() -> None:
    """Golden values: a changed stream would silently change every resumed run."""
    lower, upper = (Order(50_000, 8, 1234, level) for level in ("lower", "upper"))
    first = [24587, 769, 42830, 49049, 8910, 29683, 7440, 49432]
    later = [16614, 31673, 45525, 29273, 6940, 16313, 46360, 8808]
    draws = [0.840810735111229, 0.29661800909856206, 0.06261912818086224, 0.0079203923610216]
    assert lower.batch(0)[2].tolist() == first
    assert upper.batch(6250)[2].tolist() == later
    assert lower.uniforms(1, 9, 1, 4).ravel().tolist() == draws
    assert holdout_split(50_000, 5)[1].tolist() == [1775, 14465, 18369, 28642, 44165]


def test_programming_errors() -> None:
    with pytest.raises(ValueError, match="level"):
        Order(10, 2, 0, "middle")
    with pytest.raises(ValueError, match="multiple of 4"):
        Order(10, 2, 0).uniforms(0, 0, 1, 3)


@given(st.integers(0, 500), st.integers(1, 9))
def test_rank_slices_cover_everything_once(size: int, world: int) -> None:
    parts = [np.arange(size)[rank_slice(size, rank, world)] for rank in range(world)]
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(size))
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1


@given(st.integers(2, 500), st.data())
def test_holdouts_split_and_nest(size: int, data: st.DataObject) -> None:
    large = data.draw(st.integers(1, size - 1))
    small = data.draw(st.integers(0, large))
    train, held = holdout_split(size, large)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(size))
    assert len(held) == large
    assert set(holdout_split(size, small)[1].tolist()) <= set(held.tolist())


def test_a_holdout_is_spread_over_the_set() -> None:
    _, held = holdout_split(50_000, 5000)  # CIFAR's stores are sorted by class
    assert np.bincount(held // 5000, minlength=10).min() > 400
