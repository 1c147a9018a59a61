"""Compiled CPU passes over scores. All read |x| as its key.

The key of a float32 is its bits without the sign; as an integer it orders as |x| does. Large
arrays are shared among the threads by OpenMP, whose threads are at work at once; a thread pool's
would first have to be woken, on cores where torch's own threads still spin.
"""

from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray

MAGNITUDE = np.int32(0x7FFFFFFF)
INFINITY = np.int32(0x7F800000)  # a larger key is NaN
BLOCK = 64  # counted without branches, then searched only if it holds a candidate

Bits = NDArray[np.int32]
Mask = NDArray[np.uint8]
Floats = NDArray[np.floating[Any]]
i32, u32 = numba.int32, numba.uint32
compiled: Any = numba.njit(cache=True, nogil=True, boundscheck=False)
parallel: Any = numba.njit(cache=True, nogil=True, boundscheck=False, parallel=True)
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # type: ignore[attr-defined]
THREAD_WORTH = 1 << 18  # elements that repay a thread


def use_threads(size: int) -> int:
    """How many threads are to share an array of this size; the parallel kernels then take them."""
    most = int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    count = min(torch.get_num_threads(), most, size // THREAD_WORTH)
    if count > 1:
        numba.set_num_threads(count)
    return max(1, count)


@compiled
def sweep(bits: Bits, low: np.int32, high: np.int32, found: Bits) -> tuple[int, int, int]:
    """One read pass: (keys above `high`, keys in [low, high], the largest key).

    The keys in [low, high] are put into `found` as far as it reaches. This is the pass of every
    step, and it runs at the speed of reading.
    """
    above = inside = 0
    top = i32(0)
    whole = bits.size // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        more, least = i32(0), i32(0)
        block_top = i32(0)
        for j in range(BLOCK):
            key = bits[start + j] & MAGNITUDE
            more += i32(key > high)
            least += i32(key >= low)
            block_top = max(block_top, key)
        above += int(more)
        top = max(top, block_top)
        if least != more:
            for j in range(BLOCK):
                key = bits[start + j] & MAGNITUDE
                if low <= key <= high:
                    if inside < found.size:
                        found[inside] = key
                    inside += 1
    for i in range(whole, bits.size):
        key = bits[i] & MAGNITUDE
        above += int(key > high)
        top = max(top, key)
        if low <= key <= high:
            if inside < found.size:
                found[inside] = key
            inside += 1
    return above, inside, int(top)


@compiled
def count_digits(bits: Bits, low: np.int32, high: np.int32, shift: np.int32, counts: Bits) -> None:
    """Add to `counts` the digits (key − low) >> shift of the keys in [low, high].

    Four tables, so that equal neighbours do not wait for each other's increment.
    """
    tables = np.zeros((4, counts.size + 1), np.int32)
    for i in range(bits.size):
        key = bits[i] & MAGNITUDE
        inside = (key >= low) & (key <= high)
        digit = (key - low) >> shift if inside else counts.size
        tables[i & 3, digit] += i32(1)
    for lane in range(4):
        for digit in range(counts.size):
            counts[digit] += tables[lane, digit]


@parallel
def sweep_parts(
    bits: Bits, low: np.int32, high: np.int32, found: Bits, heads: NDArray[np.int64]
) -> None:
    """`sweep` of equal parts of `bits`, one for each row of `heads` (parts, 3) and of `found`."""
    parts = heads.shape[0]
    for part in numba.prange(parts):
        piece = bits[part * bits.size // parts : (part + 1) * bits.size // parts]
        heads[part, 0], heads[part, 1], heads[part, 2] = sweep(piece, low, high, found[part])


@parallel
def count_digits_parts(
    bits: Bits, low: np.int32, high: np.int32, shift: np.int32, counts: NDArray[np.int32]
) -> None:
    """`count_digits` of equal parts of `bits`, one for each row of `counts` (parts, digits)."""
    parts = counts.shape[0]
    for part in numba.prange(parts):
        piece = bits[part * bits.size // parts : (part + 1) * bits.size // parts]
        count_digits(piece, low, high, shift, counts[part])


@compiled
def find_tie(bits: Bits, key: np.int32, which: int) -> int:
    """Index of the `which`-th (from 1) element whose key is `key`; −1 if there are fewer."""
    start = 0
    while start + BLOCK <= bits.size:
        equal = i32(0)
        for j in range(BLOCK):
            equal += i32((bits[start + j] & MAGNITUDE) == key)
        if equal >= which:
            break
        which -= int(equal)
        start += BLOCK
    for i in range(start, bits.size):
        if (bits[i] & MAGNITUDE) == key:
            which -= 1
            if which == 0:
                return i
    return -1


@compiled
def hash_place(place: int) -> np.uint32:
    """32 bits that no sum of other places' makes up for: the mask's checksum adds them."""
    x = u32(u32(place) * u32(0x9E3779B1))
    x = u32((x ^ (x >> u32(15))) * u32(0x85EBCA77))
    return u32(x ^ (x >> u32(13)))


@compiled
def write_mask(bits: Bits, key: np.int32, last: int, first: int, mask: Mask) -> tuple[int, int]:
    """mask = 1 where the key is larger than `key`, or equal to it and not past index `last`.

    Returns (ones, checksum): the sum modulo 2^32 of `hash_place` of the ones, `first` being the
    place of bits[0]. It costs nothing beside the writing.
    """
    kept, checksum = 0, u32(0)
    for i in range(bits.size):
        own = bits[i] & MAGNITUDE
        keep = (own > key) | ((own == key) & (i <= last))
        kept += int(keep)
        checksum = u32(checksum + u32(keep) * hash_place(first + i))
        mask[i] = np.uint8(keep)
    return kept, int(checksum)


@compiled
def mask_out(values: Floats, mask: Mask, out: Floats) -> None:
    """out = mask · values."""
    for i in range(values.size):
        out[i] = values.dtype.type(mask[i]) * values[i]


@parallel
def mask_out_parts(values: Floats, mask: Mask, out: Floats, parts: int) -> None:
    """`mask_out` of equal parts."""
    for part in numba.prange(parts):
        a, b = part * values.size // parts, (part + 1) * values.size // parts
        mask_out(values[a:b], mask[a:b], out[a:b])


@compiled
def move_mask_and_z(
    bits: Bits,
    key: np.int32,
    last: int,
    first: int,
    weights: Floats,
    mask: Mask,
    z: Floats,
) -> tuple[int, int]:
    """`write_mask`, and z = mask · weights, which must hold before too: from one step to the next
    few weights come or go, and only those are written.
    """
    kept, checksum = 0, u32(0)
    whole = bits.size // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        ties = i32(min(max(last - start, -1), BLOCK))  # equal keys are kept up to this place
        count, moved, hashes = i32(0), i32(0), u32(0)
        for j in range(BLOCK):
            own = bits[start + j] & MAGNITUDE
            keep = i32((own > key) | ((own == key) & (i32(j) <= ties)))
            count += keep
            hashes = u32(hashes + u32(keep) * hash_place(u32(first + start) + u32(j)))
            moved |= i32(mask[start + j]) ^ keep
        kept += int(count)
        checksum = u32(checksum + hashes)
        if moved:
            for j in range(BLOCK):
                own = bits[start + j] & MAGNITUDE
                keep = i32((own > key) | ((own == key) & (i32(j) <= ties)))
                if i32(mask[start + j]) != keep:
                    mask[start + j] = np.uint8(keep)
                    z[start + j] = weights.dtype.type(keep) * weights[start + j]
    for i in range(whole, bits.size):
        own = bits[i] & MAGNITUDE
        keep = (own > key) | ((own == key) & (i <= last))
        kept += int(keep)
        checksum = u32(checksum + u32(keep) * hash_place(first + i))
        mask[i] = np.uint8(keep)
        z[i] = weights.dtype.type(keep) * weights[i]
    return kept, int(checksum)


@parallel
def move_mask_and_z_parts(
    bits: Bits,
    key: np.int32,
    last: int,
    first: int,
    weights: Floats,
    mask: Mask,
    z: Floats,
    proofs: NDArray[np.int64],
) -> None:
    """`move_mask_and_z` of equal parts, one for each row of `proofs` (parts, 2)."""
    parts = proofs.shape[0]
    for part in numba.prange(parts):
        a, b = part * bits.size // parts, (part + 1) * bits.size // parts
        proofs[part, 0], proofs[part, 1] = move_mask_and_z(
            bits[a:b], key, last - a, first + a, weights[a:b], mask[a:b], z[a:b]
        )


@compiled
def upper_gradient(
    g: Floats, weights: Floats, mask: Mask, scores: Floats, inv_gamma: float, out: Floats
) -> None:
    """out = sign(s) ⊙ (θ − (1/γ) m ⊙ g) ⊙ g, with +1 at s = 0, in one pass."""
    for i in range(g.size):
        slope = (weights[i] - inv_gamma * g.dtype.type(mask[i]) * g[i]) * g[i]
        out[i] = -slope if scores[i] < 0 else slope


@parallel
def upper_gradient_parts(
    g: Floats, weights: Floats, mask: Mask, scores: Floats, inv_gamma: float, out: Floats,
    parts: int,
) -> None:  # fmt: skip
    """`upper_gradient` of equal parts."""
    for part in numba.prange(parts):
        a, b = part * g.size // parts, (part + 1) * g.size // parts
        upper_gradient(g[a:b], weights[a:b], mask[a:b], scores[a:b], inv_gamma, out[a:b])
