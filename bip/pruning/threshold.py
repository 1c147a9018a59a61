"""The exact top-k threshold: which elements are the `keep` largest, ties to the lowest index."""

import numba
import numpy as np
import torch
from torch import Tensor

from bip.pruning.mask import Segment

# |x| of a float32 is its bits without the sign; as an integer it orders as the float does.
MAGNITUDE = np.int32(0x7FFFFFFF)
INFINITY = np.int32(0x7F800000)  # any larger key is NaN
ROUNDS = ((np.int32(19), np.int32(12)), (np.int32(8), np.int32(11)), (np.int32(0), np.int32(8)))


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _histogram(bits, prefix, prefix_shift, shift, width):  # type: ignore[no-untyped-def]
    """Counts of the `width` key bits above `shift`, among keys whose leading bits are `prefix`.

    One more count at the end: NaNs.
    """
    counts = np.zeros((1 << width) + 1, np.int64)
    low = np.int32((1 << width) - 1)
    for i in range(bits.size):
        key = bits[i] & MAGNITUDE
        if key >> prefix_shift == prefix:
            counts[(key >> shift) & low] += 1
        if key > INFINITY:
            counts[-1] += 1
    return counts


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _last_tie(bits, key, ties):  # type: ignore[no-untyped-def]
    """Index of the `ties`-th element equal to `key`."""
    for i in range(bits.size):
        if bits[i] & MAGNITUDE == key:
            ties -= 1
            if ties == 0:
                return i
    return -1


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _write(bits, key, last, mask):  # type: ignore[no-untyped-def]
    for i in range(bits.size):
        k = bits[i] & MAGNITUDE
        mask[i] = np.float32(1) if k > key or (k == key and i <= last) else np.float32(0)


def _select(bits: "np.ndarray[tuple[int], np.dtype[np.int32]]", keep: int) -> tuple[int, int]:
    """Radix select: (key of the `keep`-th largest magnitude, index of the last tie kept).

    Raises ValueError on NaN.
    """
    prefix, prefix_shift, wanted = 0, 31, keep
    for shift, width in ROUNDS:
        counts = _histogram(bits, np.int32(prefix), np.int32(prefix_shift), shift, width)
        if counts[-1]:
            raise ValueError("NaN")
        from_top = np.cumsum(counts[-2::-1])
        place = int(np.searchsorted(from_top, wanted))
        if place:
            wanted -= int(from_top[place - 1])
        prefix = (prefix << int(width)) | (len(from_top) - 1 - place)
        prefix_shift = int(shift)
    return prefix, int(_last_tie(bits, np.int32(prefix), wanted))


def write_top_k(values: Tensor, segments: tuple[Segment, ...], mask: Tensor) -> None:
    """Set `mask` (float32, same shape) to 1 on each segment's `keep` largest |values|, else 0.

    `values`: flat float32, the same on every rank. Ties go to the lowest index. On the CPU,
    raises ValueError if a value is NaN.
    """
    for segment in segments:
        part, out = values[segment.start : segment.stop], mask[segment.start : segment.stop]
        if values.is_cuda:
            _write_top_k_cuda(part, segment.keep, out)
            continue
        bits = part.view(torch.int32).numpy()
        key, last = _select(bits, segment.keep)
        _write(bits, np.int32(key), last, out.numpy())


def _write_top_k_cuda(values: Tensor, keep: int, mask: Tensor) -> None:
    """The same by torch operations that do not wait for the device."""
    keys = values.abs()
    threshold = torch.topk(keys, keep, sorted=False).values.min()
    above = keys > threshold
    ties = keys == threshold
    rank_of_tie = ties.cumsum(0)
    torch.logical_or(above, ties & (rank_of_tie <= keep - above.sum()), out=above)
    mask.copy_(above)
