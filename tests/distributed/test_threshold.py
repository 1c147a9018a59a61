"""Both sharded selections on real gloo ranks: each rank's mask is the plain sort's."""

import itertools

import pytest
import torch

from bip.distributed.group import Group
from bip.pruning.layout import Segment
from bip.pruning.select import NanError
from tests.distributed.harness import run_ranks
from tests.unit.scores_for_ranking import KINDS, make_scores, select, selector_of, sorted_mask

SIZES = (1, 2, 3, 5, 64, 1000, 30_011)


def check_all(group: Group, way: str) -> tuple[int, str]:
    """Every kind, size and keep count, cold and warm, whole and in layers. (How many; what a NaN
    in the last rank's slice is reported as.)
    """
    checked = 0
    for kind, n in itertools.product(KINDS, SIZES):
        for keep in sorted({1, -(-n // 20), n // 2, n} - {0}):
            first = make_scores(kind, n, keep)
            layouts = [(Segment("network", 0, n, keep),)]
            if cut := n // 3:
                low = Segment("a", 0, cut, max(1, keep * cut // n))
                layouts.append((low, Segment("b", cut, n, max(1, keep * (n - cut) // n))))
            for segments in layouts:
                selector = selector_of(way, segments, group)
                for move in (0, 1e-4, 1.0, 0):
                    values = first + move * first.sign() * (torch.arange(n) % 7)
                    mask = select(selector, values)
                    assert torch.equal(mask, sorted_mask(values, segments)), (kind, segments, move)
                    checked += 1
    first[-9] = float("nan")
    with pytest.raises(NanError, match="NaN") as raised:
        select(selector, first)
    return checked, str(raised.value)


@pytest.mark.parametrize(("way", "what"), [("cpu", "NaN in b"), ("cuda", "NaN")])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_mask_is_the_sorts(world: int, way: str, what: str) -> None:
    ends = set(run_ranks(world, check_all, way, timeout=240))
    assert [message for _, message in ends] == [f"{what} (in the slice of rank {world - 1})"]
