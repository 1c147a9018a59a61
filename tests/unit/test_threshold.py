"""The sharded selection against a plain sort: exact for any n, k, W, distribution and history."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bip.errors import UserError
from bip.pruning import kernels
from bip.pruning.layout import Segment
from bip.pruning.select_cpu import (
    ALL_TIES,
    LARGEST,
    Alone,
    Cut,
    Threshold,
    add_proofs,
    move_mask_and_z,
    own_slice,
    write_mask,
)
from bip.pruning.select_cuda import write_mask as write_mask_on_device
from tests.unit.ranks_in_threads import ThreadRank, on_threads
from tests.unit.scores_for_ranking import KINDS, Selector, make_scores, sorted_mask

BOTH = pytest.mark.parametrize("device_way", [False, True], ids=["cpu", "device"])


@st.composite
def problems(draw: st.DrawFn) -> tuple[tuple[Segment, ...], int, str, int]:
    """(segments that cover n without gaps, world size, kind of scores, seed)."""
    sizes = draw(st.lists(st.integers(1, 400), min_size=1, max_size=4))
    segments, start = [], 0
    for number, size in enumerate(sizes):
        keep = draw(st.integers(1, size))
        segments.append(Segment(f"layer{number}.weight", start, start + size, keep))
        start += size
    return (
        tuple(segments),
        draw(st.integers(1, 6)),
        draw(st.sampled_from(KINDS)),
        draw(st.integers(0, 1000)),
    )


@BOTH
@given(problem=problems())
@settings(max_examples=120, deadline=None)
def test_selection_is_the_sorts(
    device_way: bool, problem: tuple[tuple[Segment, ...], int, str, int]
) -> None:
    segments, world, kind, seed = problem
    values = make_scores(kind, segments[-1].stop, seed)
    masks = on_threads(
        world, lambda ranks: Selector(segments, len(values), ranks, device_way)(values)
    )
    right = sorted_mask(values, segments)
    for mask in masks:
        assert torch.equal(mask, right)


@BOTH
@pytest.mark.parametrize("world", [1, 3])
def test_selection_stays_exact_as_scores_move(device_way: bool, world: int) -> None:
    """The bracket around the last threshold is a hint: small moves, jumps and rescalings."""
    n = 20_000
    segments = (Segment("network", 0, n, 1234),)
    history = [make_scores("normal", n, 0)]
    for move in (1e-4, 1e-3, 0.0, 1e-6, 0.5, 1e-3):
        history.append(history[-1] + move * make_scores("normal", n, len(history)))
    history += [history[-1] * 1e6, history[-1] * 1e-30, make_scores("equal", n, 0), history[0]]

    def masks(ranks: object) -> list[Tensor]:
        selector = Selector(segments, n, ranks, device_way)  # type: ignore[arg-type]
        return [selector(values) for values in history]

    for found in on_threads(world, masks):
        for values, mask in zip(history, found, strict=True):
            assert torch.equal(mask, sorted_mask(values, segments))


def test_a_steady_move_is_foreseen_and_a_turn_is_found() -> None:
    """Where the threshold moves evenly, however fast, one gather selects; it may turn or leap."""
    n = 20_000
    segments = (Segment("network", 0, n, 1234),)
    start, drift = make_scores("normal", n, 0).abs() + 1, 0.01
    places = [*range(40), 60, 39, 38, *range(37, 0, -1)]  # on, a leap, back, and on the way back
    history = [start + drift * place for place in places]

    def select(ranks: ThreadRank) -> tuple[list[int], list[Tensor]]:
        selector, rounds, masks = Selector(segments, n, ranks), [0], []
        for values in history:
            masks.append(selector(values))
            rounds.append(ranks.rounds)
        return [after - before for before, after in pairwise(rounds)], masks

    for gathers, masks in on_threads(2, select):
        for values, mask in zip(history, masks, strict=True):
            assert torch.equal(mask, sorted_mask(values, segments))
        assert gathers[30:40] == [1] * 10
        assert gathers[-5:] == [1] * 5
        assert max(gathers) <= 6


@pytest.mark.parametrize("kind", KINDS)
def test_large_slices_are_shared_by_threads(kind: str) -> None:
    """Above a million elements a slice is counted by several threads; the result is the same."""
    n = 1_300_003
    values = make_scores(kind, n, 3)
    segments = (Segment("a", 0, 1_100_000, 55_000), Segment("b", 1_100_000, n, 200_003))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(Selector(segments, n, Alone())(values), sorted_mask(values, segments))
    finally:
        torch.set_num_threads(before)


def test_more_scores_than_can_be_counted_are_refused() -> None:
    for size, least in ((9_000_000_000, 5), (4 * LARGEST, 5), (4 * LARGEST - 1, 4)):
        with pytest.raises(UserError, match=f"{size:,} scores need {least} ranks or more"):
            own_slice(size, SimpleNamespace(rank=0, world=least - 1))  # type: ignore[arg-type]
        own_slice(size, SimpleNamespace(rank=0, world=least))  # type: ignore[arg-type]


@BOTH
def test_keeping_all_and_one(device_way: bool) -> None:
    for n, keep in ((1, 1), (5, 5), (5, 1), (70_000, 70_000), (70_000, 1)):
        values = make_scores("ties", n, 1)
        segments = (Segment("x", 0, n, keep),)
        mask = Selector(segments, n, Alone(), device_way)(values)
        assert torch.equal(mask, sorted_mask(values, segments))


@pytest.mark.parametrize("place", [0, 63, 64, 1000, 4999])
@pytest.mark.parametrize("nan", [0x7F800001, 0x7FC00000, 0x7FFFFFFF])
def test_nan_is_an_error_that_names_segment_and_rank(place: int, nan: int) -> None:
    values = make_scores("normal", 5000, 0)
    selectors_segments = (Segment("a.weight", 0, 2000, 10), Segment("b.weight", 2000, 5000, 10))
    bad = values.clone()
    bad.view(torch.int32)[place] = nan

    def select(ranks: object) -> str:
        threshold = Threshold(selectors_segments, 5000, ranks)  # type: ignore[arg-type]
        threshold.select(values)  # warm
        with pytest.raises(ValueError, match="NaN") as raised:
            threshold.select(bad)
        return str(raised.value)

    rank = next(r for r in range(4) if r * 5000 // 4 <= place < (r + 1) * 5000 // 4)
    name = "a.weight" if place < 2000 else "b.weight"
    for message in on_threads(4, select):
        assert f"NaN in {name} (in the slice of rank {rank})" in message


def test_device_selection_flags_nan() -> None:
    values = make_scores("normal", 100, 0)
    selector = Selector((Segment("x", 0, 100, 10),), 100, Alone(), device_way=True)
    selector(values)
    assert not selector.inner.nan.any()  # type: ignore[union-attr]
    values[50] = float("nan")
    selector(values)
    assert selector.inner.nan.tolist() == [True]  # type: ignore[union-attr]


@given(
    keys=st.lists(st.integers(0, 0x7FFFFFFF), min_size=1, max_size=300),
    low=st.integers(0, 0x7FFFFFFF),
    width=st.integers(0, 1 << 20),
    room=st.integers(0, 300),
)
@settings(max_examples=200, deadline=None)
def test_sweep_counts_and_collects(keys: list[int], low: int, width: int, room: int) -> None:
    high = min(low + width, 0x7FFFFFFF)
    bits = np.array(keys, np.uint32)
    bits[::2] |= np.uint32(1 << 31)  # the sign plays no part
    found = np.full(room, -1, np.int32)
    above, inside, top = kernels.sweep(bits.view(np.int32), np.int32(low), np.int32(high), found)
    expected = [key for key in keys if low <= key <= high]
    assert (above, inside, top) == (sum(k > high for k in keys), len(expected), max(keys))
    assert found[: min(room, inside)].tolist() == expected[:room]


@pytest.mark.parametrize(("n", "count"), [(1, 1), (63, 1), (64, 1), (1000, 1), (700_001, 3)])
def test_writing_proves_what_was_written(n: int, count: int) -> None:
    """The same from a first write and from moves of an earlier mask, few and many, on a CPU or
    not; with cuts at and around the seams between threads."""
    values, weights = make_scores("ties", n, 5), make_scores("normal", n, 6)
    key = torch.tensor(0.25).view(torch.int32)
    mask, moved, other = (torch.full((n,), fill, dtype=torch.uint8) for fill in (7, 1, 7))
    z = weights.clone()
    seams = [n * part // 2 + away for part in (0, 1, 2) for away in (-1, 0, 1)]
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        for last in (*seams, 4 * n // 10, int(ALL_TIES), 4 * n // 10):
            cut = Cut(int(key), last)
            proof = write_mask(values, cut, 0, mask)
            assert proof == move_mask_and_z(values, cut, 0, weights, moved, z)
            segments, lasts = (Segment("x", 0, n, 1),), torch.tensor([last])
            on_device = write_mask_on_device(values, segments, key.view(1), lasts, other)
            assert proof == tuple(on_device.tolist())
            right = (values.abs() > 0.25) | ((values.abs() == 0.25) & (torch.arange(n) <= last))
            for written in (mask, moved, other):
                assert torch.equal(written, right.to(torch.uint8))
            assert torch.equal(z, weights * mask)
            assert proof[0] == int(right.sum())
            half = n // 2
            halves = [
                write_mask(values[:half], cut, 0, mask[:half]),
                write_mask(values[half:], Cut(cut.key, last - half), half, mask[half:]),
            ]
            assert proof == add_proofs(halves)
    finally:
        torch.set_num_threads(before)


@given(st.sets(st.integers(0, 40), min_size=1), st.sets(st.integers(0, 40), min_size=1))
@settings(max_examples=300, deadline=None)
@example({0, 3}, {1, 2})
@example({0, 4, 5}, {1, 2, 6})
def test_other_masks_have_other_proofs(one: set[int], other: set[int]) -> None:
    """Also those with as many ones, whose places have the same sum or squares."""
    proofs = []
    for kept in (one, other):
        values = torch.zeros(41)
        values[list(kept)] = 1.0
        proofs.append(write_mask(values, Cut(0, -1), 1000, torch.empty(41, dtype=torch.uint8)))
    assert (proofs[0] == proofs[1]) == (one == other)


@pytest.mark.parametrize("layers", [1, 20])
def test_bytes_sent_do_not_depend_on_size_or_ranks(layers: int) -> None:
    """Cold and warm, per rank; and all segments share each gather."""
    sent, gathers = {}, set()
    for n, world in ((40_000, 2), (400_000, 2), (40_000, 4)):
        size = n // layers
        segments = tuple(
            Segment(f"l{i}", i * size, (i + 1) * size, size // 10) for i in range(layers)
        )
        first, second = make_scores("normal", n, 0), make_scores("normal", n, 1)

        def measure(ranks: object, segments=segments, n=n, a=first, b=second):  # type: ignore[no-untyped-def]
            threshold = Threshold(segments, n, ranks)
            threshold.select(a)
            cold = ranks.sent
            for step in range(4):
                threshold.select(a + 1e-5 * step * b)
            before = ranks.sent
            threshold.select(a + 5e-5 * b)
            gathers.add(ranks.rounds)
            return cold, ranks.sent - before

        costs = on_threads(world, measure)
        assert len(set(costs)) == 1, "every rank sends the same"
        sent[n, world] = costs[0]
    assert max(gathers) <= 25, "five selections, whatever the number of segments"
    for (_, world), (cold, warm) in sent.items():
        assert cold <= 32 * 1024 / world + layers * (4 * 1024 + 32) + (layers == 1) * 20 * 1024
        assert warm <= 8 * 1024 if layers == 1 else warm <= layers * 3 * 1024
