"""Score vectors that are hard to rank, and the plain sort that is the oracle."""

import numpy as np
import torch
from torch import Tensor

from bip.pruning.layout import Segment
from bip.pruning.select import Exchange, Selector
from bip.pruning.select_cpu import CpuSelector
from bip.pruning.select_cuda import CudaSelector

WAYS = ("cpu", "cuda")
KINDS = ("normal", "heavy", "equal", "ties", "denormal", "zeros", "infinite", "one_large")


def make_scores(kind: str, n: int, seed: int) -> Tensor:
    """n float32 scores of one kind; the same for the same arguments."""
    rng = np.random.default_rng([seed, n])
    values = rng.standard_normal(n)
    if kind == "heavy":
        values = np.clip(rng.standard_cauchy(n) ** 3, -1e38, 1e38)
    elif kind == "equal":
        values = np.full(n, -0.37)
    elif kind == "ties":  # 99.9%
        values = np.where(rng.random(n) < 0.999, 0.25 * rng.choice([-1, 1], n), values)
    elif kind == "denormal":
        values = rng.integers(-3, 4, n) * 1e-45
    elif kind == "zeros":
        values = rng.choice([0.0, -0.0], n)
    elif kind == "infinite":
        values = np.where(rng.random(n) < 0.3, rng.choice([-np.inf, np.inf], n), values)
    elif kind == "one_large":
        values = np.zeros(n)
        values[rng.integers(n)] = 1e30
    return torch.from_numpy(values.astype(np.float32))


def sorted_mask(values: Tensor, segments: tuple[Segment, ...]) -> Tensor:
    """The right mask, by a stable sort of each segment: larger first, then lower index."""
    mask = torch.zeros(len(values), dtype=torch.uint8)
    for segment in segments:
        magnitudes = values[segment.start : segment.stop].abs()
        order = torch.argsort(magnitudes, descending=True, stable=True)
        mask[segment.start + order[: segment.keep]] = 1
    return mask


def selector_of(way: str, segments: tuple[Segment, ...], exchange: Exchange) -> Selector:
    """The selector of one of WAYS, on the CPU."""
    if way == "cpu":
        return CpuSelector(segments, exchange)
    return CudaSelector(segments, exchange, torch.device("cpu"))


def select(selector: Selector, values: Tensor) -> Tensor:
    """The mask of `values`, written over anything. Raises NanError if one is NaN."""
    mask = torch.full((len(values),), 7, dtype=torch.uint8)
    selector.update(values, mask)
    selector.check()
    return mask
