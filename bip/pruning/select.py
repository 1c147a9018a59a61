"""The choice of what is kept: what every device's selector does, and which one a device gets.

A selector goes from values to the mask, and to z where it is given, in one call. It keeps exactly
the `keep` largest |values| of each segment; ties go to the lowest index. Values are the same on
every rank, the work is not: rank r of W counts in its slice [r·n/W, (r+1)·n/W) alone, and counts
are gathered, so the result is the same on every rank and does not depend on W.
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
HASH = (0x9E3779B1, 0x85EBCA77)  # factors of the hash of a place, for the mask's checksum


class NanError(ValueError):
    """A value is NaN; the message names the ranks in whose slice, and the segment if known."""


class Exchange(Protocol):
    """What selection needs of the ranks."""

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
        """From the next update on keep `counts`, one for each segment. Makes no buffers."""
        ...

    def update(
        self,
        values: Tensor,
        mask: Tensor,
        weights: Tensor | None = None,
        z: Sequence[Tensor] = (),
    ) -> Tensor:
        """mask (n,) uint8 = 1 on what is kept of float32 `values` (n,), else 0, in place.

        With `z`, tensors that follow one another in the flat `weights` (n,): z = mask · weights,
        in place, which must hold before too. Returns the proof (2,) int64: the ones and, modulo
        2^32, the sum of their places' hashes; equal on all devices and ranks.

        Raises NanError if a value is NaN, on CUDA only in `check`: nothing waits for the device.
        """
        ...

    def check(self) -> None:
        """Raise NanError if an update so far met a NaN. Waits for the device."""
        ...


def make_selector(
    segments: tuple[Segment, ...], exchange: Exchange, device: torch.device
) -> Selector:
    """The device's selector. numba and its kernels are imported for the CPU's alone."""
    if device.type == "cpu":
        from bip.pruning.select_cpu import CpuSelector

        return CpuSelector(segments, exchange)
    from bip.pruning.select_cuda import CudaSelector

    return CudaSelector(segments, exchange, device)


def own_slice(size: int, exchange: Exchange) -> tuple[int, int]:
    """(begin, end) of what this rank counts of `size` values.

    Raises UserError for more than 32-bit counts can hold.
    """
    if size // exchange.world >= LARGEST:
        least = size // LARGEST + 1
        raise UserError(f"ranks: {size:,} scores need {least} ranks or more to be counted")
    return exchange.rank * size // exchange.world, (exchange.rank + 1) * size // exchange.world
