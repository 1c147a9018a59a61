"""How many weights each layer keeps, where that is not the same ratio for all."""

from collections.abc import Sequence
from fractions import Fraction
from math import floor, prod


def erk(shapes: Sequence[Sequence[int]], sizes: Sequence[int], total: int) -> list[int]:
    """How many of each layer's `sizes` are kept, `total` in all: the Erdős-Rényi-Kernel budget.

    A layer's density is ε · (n_in + n_out + kernel sides) / (n_in · n_out · kernel sides), the sum
    of its weight's `shapes` over their product; a layer that this would fill is kept whole, and ε
    shares out the rest (RigL, arXiv 1911.11134, section 3). Exact: rounded in rational arithmetic
    so that the sum is `total`, with at least 1 in each layer.
    Raises ValueError if `total` is less than 1 for each layer or more than there is.
    """
    if not len(sizes) <= total <= sum(sizes):
        raise ValueError(f"cannot keep {total} of {sum(sizes)} in {len(sizes)} layers")
    raw = [Fraction(sum(shape), prod(shape)) for shape in shapes]
    whole: set[int] = set()
    while True:
        others = [i for i in range(len(sizes)) if i not in whole]
        rest = total - sum(sizes[i] for i in whole)
        epsilon = rest / sum(raw[i] * sizes[i] for i in others) if others else Fraction(0)
        over = {i for i in others if epsilon * raw[i] > 1}
        if not over:
            break
        whole |= over
    exact = [Fraction(n) if i in whole else epsilon * raw[i] * n for i, n in enumerate(sizes)]
    counts = [max(1, floor(share)) for share in exact]
    while missing := total - sum(counts):
        step = 1 if missing > 0 else -1
        free = [i for i, n in enumerate(sizes) if 1 <= counts[i] + step <= n]
        counts[max(free, key=lambda i: step * (exact[i] - counts[i]))] += step
    return counts
