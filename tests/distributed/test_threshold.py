"""Both sharded selections on real gloo ranks: each rank's mask is the plain sort's."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bip.distributed.group import Group
from bip.pruning.layout import Segment
from bip.pruning.select import NanError
from tests.distributed.harness import run_ranks
from tests.unit.scores_for_ranking import (
    KINDS,
    WAYS,
    make_scores,
    select,
    selector_of,
    sorted_mask,
)

SIZES = (1, 2, 3, 5, 64, 1000, 30_011)


def check_all(group: Group, way: str) -> int:
    """Every kind, size and keep count, cold and warm, whole and in layers; how many."""
    checked = 0
    for kind in KINDS:
        for n in SIZES:
            for keep in sorted({1, -(-n // 20), n // 2, n} - {0}):
                first = make_scores(kind, n, keep)
                moved = first + 1e-4 * first.sign() * (torch.arange(n) % 7)
                cut = n // 3
                layouts = [(Segment("network", 0, n, keep),)]
                if cut:
                    low = Segment("a", 0, cut, max(1, keep * cut // n))
                    layouts.append((low, Segment("b", cut, n, max(1, keep * (n - cut) // n))))
                for segments in layouts:
                    selector = selector_of(way, segments, group)
                    for values in (first, moved):
                        mask = select(selector, values)
                        assert torch.equal(mask, sorted_mask(values, segments)), (
                            kind, n, keep, segments, group.rank, group.world, way,
                        )  # fmt: skip
                        checked += 1
    return checked


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_mask_is_the_sorts(world: int, way: str) -> None:
    assert len(set(run_ranks(world, check_all, way, timeout=240))) == 1


@st.composite
def problems(draw: st.DrawFn) -> tuple[tuple[Segment, ...], str, int, list[float]]:
    """(segments, kind of scores, seed, and how far they move each time)."""
    segments, start = [], 0
    for number, size in enumerate(draw(st.lists(st.integers(1, 30_000), min_size=1, max_size=3))):
        keep = draw(st.integers(1, size))
        segments.append(Segment(f"layer{number}", start, start + size, keep))
        start += size
    moves = draw(st.lists(st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 1e20]), max_size=5))
    return tuple(segments), draw(st.sampled_from(KINDS)), draw(st.integers(0, 99)), moves


def solve(group: Group, drawn: list[tuple[tuple[Segment, ...], str, int, list[float]]]) -> int:
    checked = 0
    for segments, kind, seed, moves in drawn:
        values = make_scores(kind, segments[-1].stop, seed)
        selector = selector_of("cpu", segments, group)
        for move in (0.0, *moves):
            values = (values + move * make_scores("normal", len(values), seed + 1)).nan_to_num()
            assert torch.equal(select(selector, values), sorted_mask(values, segments)), (
                segments,
                move,
            )
            checked += 1
    return checked


@given(st.integers(2, 4), st.lists(problems(), min_size=20, max_size=20))
@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_is_drawn_is_the_sorts(
    world: int, drawn: list[tuple[tuple[Segment, ...], str, int, list[float]]]
) -> None:
    assert len(set(run_ranks(world, solve, drawn))) == 1


def find_nan(group: Group, way: str) -> str:
    values = make_scores("normal", 1000, 0)
    values[900] = float("nan")  # in the last rank's slice
    segments = (Segment("a", 0, 500, 10), Segment("b", 500, 1000, 10))
    selector = selector_of(way, segments, group)
    with pytest.raises(NanError, match="NaN") as raised:
        select(selector, values)
    return str(raised.value)


@pytest.mark.parametrize(("way", "what"), [("cpu", "NaN in b"), ("cuda", "NaN")])
def test_a_nan_in_one_ranks_slice_is_every_ranks(way: str, what: str) -> None:
    assert run_ranks(3, find_nan, way) == [f"{what} (in the slice of rank 2)"] * 3
