"""The sharded selection against a plain sort: exact for any n, k, W, distribution and history."""

import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bip.errors import UserError
from bip.pruning.layout import Segment, with_counts
from bip.pruning.select import LARGEST, Alone, NanError, own_slice
from bip.pruning.select_cpu import CpuSelector
from tests.unit.ranks_in_threads import ThreadRank, on_threads
from tests.unit.scores_for_ranking import KINDS, WAYS, make_scores, select, selector_of, sorted_mask

BOTH = pytest.mark.parametrize("way", WAYS)


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
    way: str, problem: tuple[tuple[Segment, ...], int, str, int]
) -> None:
    segments, world, kind, seed = problem
    values = make_scores(kind, segments[-1].stop, seed)
    masks = on_threads(world, lambda ranks: select(selector_of(way, segments, ranks), values))
    right = sorted_mask(values, segments)
    for mask in masks:
        assert torch.equal(mask, right)


@BOTH
@pytest.mark.parametrize("world", [1, 3])
def test_selection_stays_exact_as_scores_and_counts_move(way: str, world: int) -> None:
    """The bracket around the last threshold is a hint: small moves, jumps and rescalings; and a
    count may change at any step."""
    n = 20_000
    segments = (Segment("a", 0, 15_000, 1234), Segment("b", 15_000, n, 100))
    history = [make_scores("normal", n, 0)]
    for move in (1e-4, 1e-3, 0.0, 1e-6, 0.5, 1e-3):
        history.append(history[-1] + move * make_scores("normal", n, len(history)))
    history += [history[-1] * 1e6, history[-1] * 1e-30, make_scores("equal", n, 0)]
    history += 4 * [history[0]]
    counts = [[1234, 100]] * 8 + [[1233, 100], [1233, 5000], [1, 1], [15_000, 1], [7000, 5000]]
    counts = [counts[0]] * (len(history) - len(counts)) + counts

    def masks(ranks: ThreadRank) -> list[Tensor]:
        selector, found = selector_of(way, segments, ranks), []
        for values, kept in zip(history, counts, strict=True):
            selector.keep(kept)
            found.append(select(selector, values))
        return found

    for found in on_threads(world, masks):
        for values, kept, mask in zip(history, counts, found, strict=True):
            assert torch.equal(mask, sorted_mask(values, with_counts(segments, kept)))


def test_a_steady_move_is_foreseen_and_a_turn_is_found() -> None:
    """Where the threshold moves evenly, however fast, one gather selects; it may turn or leap."""
    n = 20_000
    segments = (Segment("network", 0, n, 1234),)
    start, drift = make_scores("normal", n, 0).abs() + 1, 0.01
    places = [*range(40), 60, 39, 38, *range(37, 0, -1)]  # on, a leap, back, and on the way back
    history = [start + drift * place for place in places]

    def follow(ranks: ThreadRank) -> tuple[list[int], list[Tensor]]:
        selector, rounds, masks = CpuSelector(segments, ranks), [0], []
        for values in history:
            masks.append(select(selector, values))
            rounds.append(ranks.rounds)
        return [after - before for before, after in pairwise(rounds)], masks

    for gathers, masks in on_threads(2, follow):
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
        mask = select(CpuSelector(segments, Alone()), values)
        assert torch.equal(mask, sorted_mask(values, segments))
    finally:
        torch.set_num_threads(before)


def test_more_scores_than_can_be_counted_are_refused() -> None:
    for size, least in ((9_000_000_000, 5), (4 * LARGEST, 5), (4 * LARGEST - 1, 4)):
        with pytest.raises(UserError, match=f"{size:,} scores need {least} ranks or more"):
            own_slice(size, SimpleNamespace(rank=0, world=least - 1))  # type: ignore[arg-type]
        own_slice(size, SimpleNamespace(rank=0, world=least))  # type: ignore[arg-type]


@pytest.mark.parametrize("place", [0, 63, 64, 1000, 4999])
@pytest.mark.parametrize("nan", [0x7F800001, 0x7FC00000, 0x7FFFFFFF])
@BOTH
def test_nan_is_an_error_that_names_the_rank(way: str, place: int, nan: int) -> None:
    """And the segment, where nothing has to wait for it: on the CPU."""
    values = make_scores("normal", 5000, 0)
    segments = (Segment("a.weight", 0, 2000, 10), Segment("b.weight", 2000, 5000, 10))
    bad = values.clone()
    bad.view(torch.int32)[place] = nan

    def message(ranks: ThreadRank) -> str:
        selector = selector_of(way, segments, ranks)
        select(selector, values)
        with pytest.raises(NanError, match="NaN") as raised:
            select(selector, bad)
        return str(raised.value)

    rank = next(r for r in range(4) if r * 5000 // 4 <= place < (r + 1) * 5000 // 4)
    name = " in a.weight" if place < 2000 else " in b.weight"
    expected = f"NaN{name if way == 'cpu' else ''} (in the slice of rank {rank})"
    assert on_threads(4, message) == [expected] * 4


@pytest.mark.parametrize(("n", "threads"), [(1, 1), (63, 1), (64, 1), (1000, 1), (700_001, 3)])
def test_writing_proves_what_was_written(n: int, threads: int) -> None:
    """The same over anything and over an earlier mask and z, of which much or little changes; by
    every selector; in one segment and in two; with cuts at and around the seams between threads.
    """
    values, weights = make_scores("ties", n, 5), make_scores("normal", n, 6)
    seams = [n * part // 2 + away for part in (0, 1, 2) for away in (-1, 0, 1)]
    selectors = {way: selector_of(way, (Segment("x", 0, n, 1),), Alone()) for way in WAYS}
    masks = {way: torch.ones(n, dtype=torch.uint8) for way in WAYS}
    zs = {way: [part.clone() for part in weights.split(n // 3 + 1)] for way in WAYS}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for last in (*seams, 4 * n // 10, n, 4 * n // 10):
            kept = (values.abs() > 0.25) | ((values.abs() == 0.25) & (torch.arange(n) <= last))
            if not (count := int(kept.sum())):
                continue
            proofs = []
            for way, selector in selectors.items():
                selector.keep([count])
                over = torch.full((n,), 7, dtype=torch.uint8)
                proofs += [
                    selector.update(values, over).tolist(),
                    selector.update(values, masks[way], weights, zs[way]).tolist(),
                ]
                for mask in (over, masks[way]):
                    assert torch.equal(mask, kept.to(torch.uint8))
                assert torch.equal(torch.cat(zs[way]), weights * kept)
            half = n // 2
            if all(counts := [int(kept[:half].sum()), int(kept[half:].sum())]):
                segments = (Segment("a", 0, half, counts[0]), Segment("b", half, n, counts[1]))
                proofs.append(CpuSelector(segments, Alone()).update(values, over).tolist())
            assert proofs == [proofs[0]] * len(proofs)
            assert proofs[0][0] == count
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
        selector = CpuSelector((Segment("x", 0, 41, len(kept)),), Alone())
        proofs.append(selector.update(values, torch.empty(41, dtype=torch.uint8)).tolist())
    assert (proofs[0] == proofs[1]) == (one == other)


def test_nothing_that_a_gpu_needs_imports_numba() -> None:
    """Nor do the names of the choices import torch."""
    for modules, absent in (
        ("bip.pruning.state, bip.pruning.select_cuda", "numba"),
        ("bip.pruning.choices", "torch"),
    ):
        code = f"import sys, {modules}; assert {absent!r} not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True)


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

        def measure(ranks, segments=segments, a=first, b=second):  # type: ignore[no-untyped-def]
            selector = CpuSelector(segments, ranks)
            select(selector, a)
            cold = ranks.sent
            for step in range(4):
                select(selector, a + 1e-5 * step * b)
            before = ranks.sent
            select(selector, a + 5e-5 * b)
            gathers.add(ranks.rounds)
            return cold, ranks.sent - before

        costs = on_threads(world, measure)
        assert len(set(costs)) == 1, "every rank sends the same"
        sent[n, world] = costs[0]
    assert max(gathers) <= 25, "five selections, whatever the number of segments"
    for (_, world), (cold, warm) in sent.items():
        assert cold <= 32 * 1024 / world + layers * (4 * 1024 + 32) + (layers == 1) * 20 * 1024
        assert warm <= 8 * 1024 if layers == 1 else warm <= layers * 3 * 1024
