"""The CPU's selector: a search for each segment's threshold, then one pass that writes.

1. Guess a bracket: around the threshold extrapolated from the last two, with a width from recent
   errors of this guess; the first time, from a sample. One pass counts the keys above the bracket
   and collects those inside.
2. Narrow the bracket digit by digit (if the threshold is outside of it, the side where it is): the
   counts of the next bits, added up over all ranks, give the bin of the `keep`-th largest.
3. If the threshold falls among equal values, the last counts give the rank whose slice holds the
   cut; it publishes the flat index of the last value kept. Ties go to the lowest index.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import increment_version

from bip.compiled import share
from bip.pruning import kernels
from bip.pruning.kernels import Bits
from bip.pruning.layout import Segment, with_counts
from bip.pruning.passes import is_compiled, mask_out, spans
from bip.pruning.select import INFINITY, LARGEST, MAGNITUDE, Exchange, NanError, own_slice

ALL_TIES = np.iinfo(np.int64).max  # `last` where no tie is cut
SAMPLE = 1 << 13  # keys that the first bracket is estimated from, over all ranks
FIRST_SPREAD = 1 << 16  # half-width of the second bracket, in keys: 0.5 to 1% of the threshold
NOTHING = np.empty(0, np.float32)


@dataclass(frozen=True)
class Cut:
    """Where one segment is cut: kept are keys above `key`, and equal ones up to flat index `last`.

    `key` is the bits of the threshold |value|.
    """

    key: int
    last: int


@dataclass(frozen=True)
class _Hint:
    """The guess of a segment's next threshold, in keys."""

    key: int  # the last threshold
    move: int = 0  # its distance from the threshold before
    spread: int = FIRST_SPREAD

    @property
    def middle(self) -> int:
        return min(max(0, self.key + self.move), LARGEST)

    def after(self, key: int) -> "_Hint":
        """The next hint, once `key` is found. Its spread is four times the error of this hint, and
        at least three quarters of this spread. A miss was a jump, so its move is not repeated.
        """
        error = abs(key - self.middle)
        move = key - self.key if error <= self.spread else 0
        return _Hint(key, move, min(max(4 * error, 3 * self.spread // 4, 1), LARGEST // 2))


@dataclass
class _Search:
    """One segment's search on this rank."""

    segment: Segment
    bits: Bits  # this rank's part of the segment
    start: int  # flat index of its first element
    low: int = 0
    high: int = LARGEST
    above: int = 0  # keys above `high`, over all ranks
    source: Bits | None = None  # holds all keys in [low, high]
    ties: NDArray[np.int64] | None = None  # keys equal to the threshold, by rank

    def shift(self, digit_bits: int) -> int:
        """Bits below the next digit, so that [low, high] has at most 2^digit_bits digits."""
        return max(0, (self.high - self.low).bit_length() - digit_bits)

    def descend(self, by_rank: NDArray[np.int32], digit_bits: int) -> bool:
        """Narrow to the digit that holds the threshold; True if it is a single key."""
        shift = self.shift(digit_bits)
        total = by_rank.sum(0, dtype=np.int64)
        from_top = np.cumsum(total[::-1])
        place = int(np.searchsorted(from_top, self.segment.keep - self.above))
        digit = len(total) - 1 - place
        self.above += int(from_top[place] - total[digit])
        self.low += digit << shift
        self.high = min(self.high, self.low + (1 << shift) - 1)
        if shift == 0:
            self.ties = by_rank[:, digit].astype(np.int64)
        return shift == 0


class CpuSelector:
    """See `Selector`. Hints from the last thresholds save time; no result depends on them.

    `update` is `select`, then `write`.
    """

    def __init__(self, segments: tuple[Segment, ...], exchange: Exchange) -> None:
        self.segments = segments
        self.exchange = exchange
        self.begin, self.end = own_slice(segments[-1].stop, exchange)
        self.digit_bits = 11 if len(segments) == 1 else 8
        self.hints: list[_Hint | None] = [None] * len(segments)

    def keep(self, counts: Sequence[int]) -> None:
        self.segments = with_counts(self.segments, counts)

    def update(
        self,
        values: Tensor,
        mask: Tensor,
        weights: Tensor | None = None,
        z: Sequence[Tensor] = (),
    ) -> Tensor:
        return self.write(self.select(values), values, mask, weights, z)

    def check(self) -> None:
        """Nothing to do: `select` raises."""

    def select(self, values: Tensor) -> list[Cut]:
        """The cut of every segment of the flat float32 `values`.

        Raises NanError naming the segment and the ranks whose slice holds a NaN.
        """
        bits = values.detach().view(torch.int32).numpy()
        searches = [self._search(segment, bits) for segment in self.segments]
        self._bracket(searches)
        rest = self._count_brackets(searches)
        while rest:
            rest = self._narrow(rest)
        return self._cut_ties(searches)

    @torch.no_grad()
    def write(
        self,
        cuts: Sequence[Cut],
        values: Tensor,
        mask: Tensor,
        weights: Tensor | None = None,
        z: Sequence[Tensor] = (),
    ) -> Tensor:
        """Write mask and z for these cuts, one segment and one tensor of z at a time."""
        bits, flags = values.view(torch.int32).numpy(), mask.numpy()
        theta = NOTHING if weights is None else weights.numpy()
        fused = {span.start: t.detach().view(-1) for span, t in spans(z) if is_compiled(t)}
        starts = [segment.start for segment in self.segments]
        tensors = [0, *(span.start for span, _ in spans(z))]
        proof = np.zeros(2, np.int64)
        for start, stop in pairwise(sorted({*starts, *tensors, bits.size})):
            cut = cuts[bisect_right(starts, start) - 1]
            piece, first = slice(start, stop), tensors[bisect_right(tensors, start) - 1]
            target = fused.get(first)
            parts = share(stop - start)
            proofs = np.empty((parts, 2), np.int64)
            kernels.write(
                parts, bits[piece], np.int32(cut.key), cut.last - start, start, flags[piece],
                NOTHING if target is None else theta[piece],
                NOTHING if target is None else target[start - first : stop - first].numpy(),
                proofs,
            )  # fmt: skip
            proof += proofs.sum(0)
        for span, tensor in spans(z):
            if span.start in fused:
                increment_version(tensor)  # autograd does not see writes through numpy
            elif weights is not None:  # channels_last: in another order than the flat buffers
                shape = tensor.shape
                mask_out(weights[span].view(shape), mask[span].view(shape), tensor.detach())
        proof[1] &= 0xFFFFFFFF
        return torch.from_numpy(proof)

    def _search(self, segment: Segment, bits: Bits) -> _Search:
        start = min(max(segment.start, self.begin), segment.stop)
        stop = max(min(segment.stop, self.end), start)
        return _Search(segment, bits[start:stop], start)

    def _bracket(self, searches: list[_Search]) -> None:
        """The brackets: from the last thresholds, or from a sample."""
        if any(hint is None for hint in self.hints):
            self._bracket_by_sample(searches)
            return
        for search, hint in zip(searches, self.hints, strict=True):
            assert hint is not None
            search.low = max(0, hint.middle - hint.spread)
            search.high = min(LARGEST, hint.middle + hint.spread)

    def _bracket_by_sample(self, searches: list[_Search]) -> None:
        share = max(1, SAMPLE // (len(searches) * self.exchange.world))
        sample = np.full((len(searches), share), -1, np.int32)
        for row, search in zip(sample, searches, strict=True):
            step = max(1, -(-search.bits.size // share))
            taken = search.bits[::step] & MAGNITUDE
            row[: taken.size] = taken
        gathered = self._gather(sample).transpose(1, 0, 2).reshape(len(searches), -1)
        for keys, search in zip(gathered, searches, strict=True):
            keys = np.sort(keys[keys >= 0])[::-1]
            kept = search.segment.keep / search.segment.size
            middle = kept * keys.size
            margin = 4 * math.sqrt(keys.size * kept * (1 - kept)) + 2
            first, last = int(middle - margin), int(middle + margin)
            search.high = int(keys[first]) if first >= 0 else LARGEST
            search.low = int(keys[last]) if last < keys.size else 0

    def _count_brackets(self, searches: list[_Search]) -> list[_Search]:
        """Count keys above the brackets and the first digits inside, in one pass over this rank's
        slice and one gather. Returns the searches that are not down to one key yet.
        """
        counts = np.zeros((len(searches), 3), np.int64)
        for row, search in zip(counts, searches, strict=True):
            row[:] = self._sweep(search)
        tables = [self._digits(search) for search in searches]
        gathered = self._gather(np.concatenate([counts.view(np.int32).ravel(), *tables]))
        heads = np.ascontiguousarray(gathered[:, : counts.size * 2]).view(np.int64)
        heads = heads.reshape(self.exchange.world, *counts.shape)
        self._refuse_nan(heads[:, :, 2])
        rest = []
        by_rank = _split(gathered[:, counts.size * 2 :], tables)
        for search, (above, inside, _), digits in zip(
            searches, heads.sum(0).tolist(), by_rank, strict=True
        ):
            keep = search.segment.keep
            if above < keep <= above + inside:
                search.above = above
                if not search.descend(digits, self.digit_bits):
                    rest.append(search)
                continue
            search.source = None  # the threshold moved out of the bracket
            if keep <= above:
                search.low, search.high, search.above = search.high + 1, LARGEST, 0
            else:
                search.low, search.high, search.above = 0, search.low - 1, above + inside
            rest.append(search)
        return rest

    def _sweep(self, search: _Search) -> tuple[int, int, int]:
        """(keys above the bracket, keys in it, the largest key) in this slice. Sets `source` if it
        collected all keys in the bracket.
        """
        bits, parts = search.bits, share(search.bits.size)
        most = min(bits.size, max(4096, bits.size // (16 * parts)))
        found = np.empty((parts, most + kernels.SWEEP_BLOCK), np.int32)
        heads = np.empty((parts, 3), np.int64)
        kernels.sweep(parts, bits, np.int32(search.low), np.int32(search.high), found, heads)
        inside = heads[:, 1]
        if inside.max() <= most:
            kept = [row[:count] for row, count in zip(found, inside, strict=True)]
            search.source = np.concatenate(kept)
        return int(heads[:, 0].sum()), int(inside.sum()), int(heads[:, 2].max())

    def _refuse_nan(self, tops: NDArray[np.int64]) -> None:
        bad = tops > INFINITY
        if bad.any():
            names = [s.name for s, column in zip(self.segments, bad.T, strict=True) if column.any()]
            ranks = ", ".join(str(rank) for rank in np.flatnonzero(bad.any(1)))
            raise NanError(f"NaN in {', '.join(names)} (in the slice of rank {ranks})")

    def _narrow(self, searches: list[_Search]) -> list[_Search]:
        """Narrow every search by a digit. Returns those that are not down to one key yet."""
        tables = [self._digits(search) for search in searches]
        by_rank = _split(self._gather(np.concatenate(tables)), tables)
        return [
            search
            for search, digits in zip(searches, by_rank, strict=True)
            if not search.descend(digits, self.digit_bits)
        ]

    def _digits(self, search: _Search) -> Bits:
        """Counts on this rank of each next digit among the keys still in the search."""
        source = search.bits if search.source is None else search.source
        low, high = np.int32(search.low), np.int32(search.high)
        shift = search.shift(self.digit_bits)
        parts = share(source.size)
        counts = np.zeros((parts, ((search.high - search.low) >> shift) + 1), np.int32)
        kernels.count_digits(parts, source, low, high, np.int32(shift), counts)
        total: Bits = counts.sum(0, dtype=np.int32)
        return total

    def _cut_ties(self, searches: list[_Search]) -> list[Cut]:
        cuts = []
        lasts = np.full(len(searches), -1, np.int64)
        split = False
        for row, search in enumerate(searches):
            assert search.ties is not None
            wanted = search.segment.keep - search.above
            if wanted == search.ties.sum():
                lasts[row] = ALL_TIES
                continue
            split = True
            before = int(search.ties[: self.exchange.rank].sum())
            if before < wanted <= before + search.ties[self.exchange.rank]:
                found = kernels.find_tie(search.bits, np.int32(search.low), wanted - before)
                lasts[row] = search.start + found
        if split:
            lasts = self._gather(lasts).max(0)
        for row, search in enumerate(searches):
            hint = self.hints[row]
            self.hints[row] = hint.after(search.low) if hint else _Hint(search.low)
            cuts.append(Cut(search.low, int(lasts[row])))
        return cuts

    def _gather(self, values: NDArray[Any]) -> NDArray[Any]:
        flat = torch.from_numpy(np.ascontiguousarray(values).reshape(-1))
        gathered: NDArray[Any] = self.exchange.gather(flat).numpy()
        return gathered.reshape(self.exchange.world, *values.shape)


def _split(gathered: Bits, like: list[Bits]) -> list[Bits]:
    """The columns of a (W, m) array, split into parts of the lengths of `like`."""
    return np.split(gathered, np.cumsum([len(part) for part in like])[:-1], axis=1)
