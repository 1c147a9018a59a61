"""The sharded threshold on real gloo ranks: each rank's mask is the plain sort's."""

import pytest
import torch

from bip.distributed.group import Group
from bip.pruning.mask import Segment
from tests.distributed.harness import run_ranks
from tests.unit.scores_for_ranking import KINDS, Selector, make_scores, sorted_mask

SIZES = (1, 2, 3, 5, 64, 1000, 30_011)


def check_all(group: Group) -> int:
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
                    selector = Selector(segments, n, group)
                    for values in (first, moved):
                        assert torch.equal(selector(values), sorted_mask(values, segments)), (
                            kind, n, keep, segments, group.rank, group.world,
                        )  # fmt: skip
                        checked += 1
    return checked


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_mask_is_the_sorts(world: int) -> None:
    assert len(set(run_ranks(world, check_all, timeout=240))) == 1
