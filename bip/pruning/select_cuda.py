"""CUDA's selector: torch operations that never wait for the device.

A radix select over the whole key, most significant digit first, all segments at once. Shapes
and the number of rounds are fixed, so the host never waits for a result. Runs on any device; on
the CPU it is slow, and tests compare `CpuSelector` with it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bip.pruning.layout import Segment, with_counts
from bip.pruning.passes import write_products
from bip.pruning.select import HASH, INFINITY, MAGNITUDE, Exchange, NanError, own_slice

CHUNK = 1 << 24  # elements handled at once, which bounds temporary memory
SPREAD = 4096  # counters for keys outside the search: with one, they would wait for each other


class CudaSelector:
    """See `Selector`. `update` is `select`, then `write`."""

    def __init__(
        self, segments: tuple[Segment, ...], exchange: Exchange, device: torch.device
    ) -> None:
        self.segments = segments
        self.exchange = exchange
        self.begin, self.end = own_slice(segments[-1].stop, exchange)
        self.digits = (12, 12, 7) if len(segments) == 1 else (8, 8, 8, 7)
        self.counts = torch.tensor([segment.keep for segment in segments], device=device)
        starts = [min(max(segment.start, self.begin), self.end) for segment in segments]
        stops = [min(max(segment.stop, self.begin), self.end) for segment in segments]
        lengths = torch.tensor(stops, device=device) - torch.tensor(starts, device=device)
        self.starts = torch.tensor(starts, device=device) - self.begin
        # The segment of each element of the slice.
        self.segment = torch.repeat_interleave(
            torch.arange(len(segments), device=device, dtype=torch.int32), lengths,
            output_size=self.end - self.begin,  # else the host waits for the sum
        )  # fmt: skip
        self.ones = torch.ones(1, dtype=torch.int32, device=device).expand(self.end - self.begin)
        # (W,): whether an update met a NaN in that rank's slice.
        self.nan = torch.zeros(exchange.world, dtype=torch.bool, device=device)

    def keep(self, counts: Sequence[int]) -> None:
        segments = with_counts(self.segments, counts)
        for row, (new, old) in enumerate(zip(segments, self.segments, strict=True)):
            if new.keep != old.keep:
                self.counts[row].fill_(new.keep)  # a copy from the host would wait for the device
        self.segments = segments

    @torch.no_grad()
    def update(
        self,
        values: Tensor,
        mask: Tensor,
        weights: Tensor | None = None,
        z: Sequence[Tensor] = (),
    ) -> Tensor:
        proof = self.write(*self.select(values), values, mask)
        if weights is not None:
            write_products(weights, mask, z)
        return proof

    def check(self) -> None:
        if self.nan.any():
            ranks = ", ".join(map(str, self.nan.nonzero().flatten().tolist()))
            raise NanError(f"NaN (in the slice of rank {ranks})")

    @torch.no_grad()
    def select(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Per segment the threshold's key (int32) and the flat index of the last tie kept."""
        keys = values[self.begin : self.end].view(torch.int32) & int(MAGNITUDE)
        segments = len(self.counts)
        prefix = torch.zeros(segments, dtype=torch.int32, device=keys.device)
        above = torch.zeros(segments, dtype=torch.int64, device=keys.device)
        shift = 31
        ties = torch.empty(0)
        for width in self.digits:
            bins = 1 << width
            # A non-negative key shifted by 31 is 0, so at first every key is in the search.
            inside = (keys >> shift) == prefix[self.segment]
            shift -= width
            index = torch.where(
                inside,
                self.segment.long() * bins + ((keys >> shift) & (bins - 1)),
                segments * bins + (keys & (SPREAD - 1)),
            )
            counts = torch.zeros(
                segments * bins + SPREAD, dtype=torch.int32, device=keys.device
            ).scatter_add_(0, index, self.ones)
            by_rank = self.exchange.gather(counts[: segments * bins]).view(-1, segments, bins)
            total = by_rank.sum(0)
            from_top = total.flip(1).cumsum(1)
            place = torch.searchsorted(from_top, (self.counts - above)[:, None])
            digit = bins - 1 - place
            above += (from_top.gather(1, place) - total.gather(1, digit))[:, 0]
            prefix = (prefix << width) | digit[:, 0].int()
            ties = by_rank.gather(2, digit[None].expand(len(by_rank), -1, -1))[:, :, 0]
        bad = (keys > int(INFINITY)).any()
        self.nan |= self.exchange.gather(bad[None].int())[:, 0] > 0
        return prefix, self._last_ties(keys, prefix, self.counts - above, ties)

    def _last_ties(self, keys: Tensor, key: Tensor, wanted: Tensor, ties: Tensor) -> Tensor:
        """Flat index of the `wanted`-th element equal to `key`; `ties` (W, S) counts by rank."""
        rank = self.exchange.rank
        quota = (wanted - ties[:rank].sum(0)).clamp(min=0).minimum(ties[rank])
        count = torch.cumsum(keys == key[self.segment], 0)
        count = torch.cat([count.new_zeros(1), count])
        place = torch.searchsorted(count, count[self.starts] + quota) - 1
        own = torch.where(quota > 0, place + self.begin, -1)
        return self.exchange.gather(own).amax(0)

    def write(self, keys: Tensor, lasts: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """The mask for these cuts, in place; returns the proof, still on the device."""
        for row, segment in enumerate(self.segments):
            for start in range(segment.start, segment.stop, CHUNK):
                part = slice(start, min(start + CHUNK, segment.stop))
                place = torch.arange(part.start, part.stop, device=values.device)
                own = values[part].view(torch.int32) & int(MAGNITUDE)
                kept = (own == keys[row]) & (place <= lasts[row])
                kept.logical_or_(own > keys[row])
                mask[part].copy_(kept)
        return proof_of(mask)


def proof_of(mask: Tensor) -> Tensor:
    """The proof (2,) of a flat mask; see `Selector.update`. Does not wait for the device."""
    proof = torch.zeros(2, dtype=torch.int64, device=mask.device)
    for start in range(0, len(mask), CHUNK):
        kept = mask[start : start + CHUNK]
        place = torch.arange(start, start + len(kept), device=mask.device)
        proof += torch.stack([kept.sum(), _hash(place).mul_(kept).sum()])
    proof[1] &= 0xFFFFFFFF
    return proof


def _hash(place: Tensor) -> Tensor:
    """`kernels._hash` of int64 `place`, which is overwritten."""
    place.mul_(HASH[0]).bitwise_and_(0xFFFFFFFF)
    place.bitwise_xor_(place >> 15).mul_(HASH[1]).bitwise_and_(0xFFFFFFFF)
    return place.bitwise_xor_(place >> 13)
