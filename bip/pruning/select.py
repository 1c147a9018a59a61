"""Selection of what is kept: the interface of every device's selector, and the choice of one.

A selector turns values into the mask, and z where it is given, in one call. It keeps exactly the
`keep` largest |values| of each segment; ties go to the lowest index. Values are the same on every
rank, and ranks share the work: rank r of W counts only in its slice [r·n/W, (r+1)·n/W), and the
counts are gathered. So the result is the same on every rank and does not depend on W.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bip.errors import UserError
from bip.pruning.layout import Segment

# The key of a float32 is its bits without the sign; as an integer it orders as |x| does.
MAGNITUDE = np.int32(0x7FFFFFFF)
INFINITY = np.int32(0x7F800000)  # a larger key is NaN
LARGEST = int(MAGNITUDE)
HASH = (0x9E3779B1, 0x85EBCA77)  # factors of a place's hash, for the mask's checksum


class NanError(ValueError):
    """A value is NaN. The message names the ranks whose slice holds it, and a known segment."""


class Exchange(Protocol):
    """What selection needs to exchange between ranks."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def gather(self, values: Tensor) -> Tensor:
        """Every rank's `values` (m,), the same m on all, as (W, m)."""
        ...


class Alone:
    """The only rank."""

    rank = 0
    world = 1

    def gather(self, values: Tensor) -> Tensor:
        return values[None]


class Selector(Protocol):
    """Selects among flat values, step after step. `segments` cover them without gaps, in order."""

    @property
    def segments(self) -> tuple[Segment, ...]: ...

    def keep(self, counts: Sequence[int]) -> None:
        """From the next update on keep `counts`, one for each segment. Allocates no buffers."""
        ...

    def update(
        self,
        values: Tensor,
        mask: Tensor,
        weights: Tensor | None = None,
        z: Sequence[Tensor] = (),
    ) -> Tensor:
        """mask (n,) uint8 = 1 on what is kept of float32 `values` (n,), else 0, in place.

        With `z`, tensors that follow one another in the flat `weights` (n,): also z = mask ·
        weights, in place; this must hold before the call too. Returns the proof (2,) int64: the
        number of ones, and the sum of their places' hashes modulo 2^32. It is equal on all
        devices and ranks.

        Raises NanError if a value is NaN; on CUDA only `check` does, so as not to wait.
        """
        ...

    def check(self) -> None:
        """Raise NanError if an update so far met a NaN. Waits for the device."""
        ...


def make_selector(
    segments: tuple[Segment, ...], exchange: Exchange, device: torch.device
) -> Selector:
    """The device's selector. Only the CPU's imports numba and its kernels."""
    if device.type == "cpu":
        from bip.pruning.select_cpu import CpuSelector

        return CpuSelector(segments, exchange)
    from bip.pruning.select_cuda import CudaSelector

    return CudaSelector(segments, exchange, device)


def own_slice(size: int, exchange: Exchange) -> tuple[int, int]:
    """(begin, end) of this rank's slice of `size` values.

    Raises UserError for more values than a 32-bit count can hold.
    """
    if size // exchange.world >= LARGEST:
        least = size // LARGEST + 1
        raise UserError(f"ranks: {size:,} scores need {least} ranks or more to be counted")
    return exchange.rank * size // exchange.world, (exchange.rank + 1) * size // exchange.world
