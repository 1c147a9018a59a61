"""Compiled CPU passes over weights, masks and scores.

Those over scores read |x| as its key (`select.MAGNITUDE`). numba makes 64 bits of a sum of 32-bit
integers, and the compiler then half as many lanes: so sums that are to be fast are cut to 32 bits.
"""

from typing import Any

import numba
import numba.extending
import numpy as np
from numba import types
from numpy.typing import NDArray

from bip.compiled import compiled, in_parts
from bip.pruning.select import HASH, MAGNITUDE

BLOCK = 64  # elements counted without branches; looked at again only if one changed or is sought
SWEEP_BLOCK = 128  # the same for `sweep`, where it is faster: fewer sums of vectors
_RUN = 16  # elements of such a block, collected only if one is sought

Bits = NDArray[np.int32]
Mask = NDArray[np.uint8]
Floats = NDArray[np.floating[Any]]
i32, u32 = numba.int32, numba.uint32


@compiled
def _collect(bits: Bits, start: int, low: np.int32, high: np.int32, found: Bits, place: int) -> int:
    """Append a block's keys in [low, high] to found[:place]; returns the new `place`."""
    for run in range(start, start + SWEEP_BLOCK, _RUN):
        sought = i32(0)
        for j in range(_RUN):
            key = i32(bits[run + j] & MAGNITUDE)
            sought = i32(sought + i32((low <= key) & (key <= high)))
        if sought:
            for j in range(_RUN):  # without branches, which nobody could predict
                key = bits[run + j] & MAGNITUDE
                found[place] = key
                place += int((low <= key) & (key <= high))
    return place


@compiled
def _sweep(bits: Bits, low: np.int32, high: np.int32, found: Bits) -> tuple[int, int, int]:
    above = inside = 0
    top = i32(0)
    whole = bits.size // SWEEP_BLOCK * SWEEP_BLOCK
    for start in range(0, whole, SWEEP_BLOCK):
        more, least, block_top = i32(0), i32(0), i32(0)
        for j in range(SWEEP_BLOCK):
            key = i32(bits[start + j] & MAGNITUDE)
            more = i32(more + i32(key > high))
            least = i32(least + i32(key >= low))
            block_top = i32(max(block_top, key))
        above += int(more)
        top = i32(max(top, block_top))
        if least != more:
            if inside + SWEEP_BLOCK <= found.size:
                _collect(bits, start, low, high, found, inside)
            inside += int(least) - int(more)
    for i in range(whole, bits.size):
        key = i32(bits[i] & MAGNITUDE)
        above += int(key > high)
        top = i32(max(top, key))
        if low <= key <= high:
            if inside < found.size:
                found[inside] = key
            inside += 1
    return above, inside, int(top)


@in_parts
def sweep(
    parts: int, bits: Bits, low: np.int32, high: np.int32, found: Bits, heads: NDArray[np.int64]
) -> None:
    """One read pass: (keys above `high`, keys in [low, high], the largest key) into `heads`.

    Puts the keys in [low, high] into `found` if they are at most m.
    `found` (parts, m + SWEEP_BLOCK) and `heads` (parts, 3) have a row for each part. Every step
    makes this pass; it is as fast as reading memory.
    """
    for part in numba.prange(parts):
        piece = bits[part * bits.size // parts : (part + 1) * bits.size // parts]
        heads[part, 0], heads[part, 1], heads[part, 2] = _sweep(piece, low, high, found[part])


@compiled
def _count_digits(bits: Bits, low: np.int32, high: np.int32, shift: np.int32, counts: Bits) -> None:
    # Four tables, so that equal neighbours do not wait for each other's increment.
    tables = np.zeros((4, counts.size + 1), np.int32)
    for i in range(bits.size):
        key = bits[i] & MAGNITUDE
        inside = (key >= low) & (key <= high)
        digit = (key - low) >> shift if inside else counts.size
        tables[i & 3, digit] += i32(1)
    for lane in range(4):
        for digit in range(counts.size):
            counts[digit] += tables[lane, digit]


@in_parts
def count_digits(
    parts: int, bits: Bits, low: np.int32, high: np.int32, shift: np.int32, counts: Bits
) -> None:
    """Add digits (key − low) >> shift of the keys in [low, high] to `counts` (parts, digits)."""
    for part in numba.prange(parts):
        piece = bits[part * bits.size // parts : (part + 1) * bits.size // parts]
        _count_digits(piece, low, high, shift, counts[part])


@compiled
def find_tie(bits: Bits, key: np.int32, which: int) -> int:
    """Index of the `which`-th (from 1) element whose key is `key`; −1 if there are fewer."""
    start = 0
    while start + BLOCK <= bits.size:
        equal = i32(0)
        for j in range(BLOCK):
            equal = i32(equal + i32((bits[start + j] & MAGNITUDE) == key))
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
def _hash(place: int) -> np.uint32:
    # A 32-bit hash: sums of other places' hashes are unlikely to equal it.
    x = u32(u32(place) * u32(HASH[0]))
    x = u32(u32(x ^ u32(x >> u32(15))) * u32(HASH[1]))
    return u32(x ^ u32(x >> u32(13)))


@compiled
def _write(
    bits: Bits, key: np.int32, last: int, first: int, mask: Mask, weights: Floats, z: Floats
) -> tuple[int, int]:
    kept, checksum = 0, u32(0)
    has_z = z.size == bits.size
    whole = bits.size // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        ties = i32(min(max(last - start, -1), BLOCK))  # equal keys are kept up to this place
        count, moved, hashes = i32(0), i32(0), u32(0)
        for j in range(BLOCK):
            own = i32(bits[start + j] & MAGNITUDE)
            keep = i32((own > key) | ((own == key) & (i32(j) <= ties)))
            count = i32(count + keep)
            place = u32(u32(first + start) + u32(j))
            hashes = u32(hashes + u32(u32(keep) * _hash(place)))
            moved = i32(moved | i32(i32(mask[start + j]) ^ keep))
        kept += int(count)
        checksum = u32(checksum + hashes)
        if moved:  # the whole block, without branches: faster than its few changes one by one
            for j in range(BLOCK):
                own = i32(bits[start + j] & MAGNITUDE)
                mask[start + j] = np.uint8((own > key) | ((own == key) & (i32(j) <= ties)))
            if has_z:
                for j in range(BLOCK):
                    z[start + j] = weights.dtype.type(mask[start + j]) * weights[start + j]
    for i in range(whole, bits.size):
        own = bits[i] & MAGNITUDE
        keep = (own > key) | ((own == key) & (i <= last))
        kept += int(keep)
        checksum = u32(checksum + u32(keep) * _hash(first + i))
        mask[i] = np.uint8(keep)
        if has_z:
            z[i] = weights.dtype.type(keep) * weights[i]
    return kept, int(checksum)


@in_parts
def write(
    parts: int,
    bits: Bits,
    key: np.int32,
    last: int,
    first: int,
    mask: Mask,
    weights: Floats,
    z: Floats,
    proofs: NDArray[np.int64],
) -> None:
    """mask = 1 where the key is larger than `key`, or equal to it and not past index `last`.

    Also z = mask · weights. That must hold before the call too: few weights change between two
    steps, and only those are written. With empty `z` and `weights` only the mask is written.
    `proofs` (parts, 2) get each part's number of ones and the sum modulo 2^32 of their places'
    hashes, where `first` is the place of bits[0]. Memory is the limit, so the hashes cost no time.
    """
    for part in numba.prange(parts):
        a, b = part * bits.size // parts, (part + 1) * bits.size // parts
        proofs[part, 0], proofs[part, 1] = _write(
            bits[a:b], key, last - a, first + a, mask[a:b], weights[a:b], z[a:b]
        )


@in_parts
def mask_out(parts: int, values: Floats, mask: Mask, out: Floats) -> None:
    """out = mask · values."""
    for part in numba.prange(parts):
        a, b = part * values.size // parts, (part + 1) * values.size // parts
        x, m, product = values[a:b], mask[a:b], out[a:b]
        for i in range(x.size):
            product[i] = x.dtype.type(m[i]) * x[i]


@in_parts
def upper_gradient(
    parts: int, inv_gamma: float, g: Floats, weights: Floats, mask: Mask, scores: Floats,
    out: Floats,
) -> None:  # fmt: skip
    """out = sign(s) ⊙ (θ − (1/γ) m ⊙ g) ⊙ g, with +1 at s = 0, in one pass."""
    for part in numba.prange(parts):
        a, b = part * g.size // parts, (part + 1) * g.size // parts
        x, w, m, s, result = g[a:b], weights[a:b], mask[a:b], scores[a:b], out[a:b]
        for i in range(x.size):
            slope = (w[i] - inv_gamma * x.dtype.type(m[i]) * x[i]) * x[i]
            result[i] = -slope if s[i] < 0 else slope


intrinsic: Any = numba.extending.intrinsic
carray: Any = numba.carray  # type: ignore[attr-defined]


@intrinsic
def _fma(_context, a, b, c):  # type: ignore[no-untyped-def]
    """a · b + c, rounded once."""
    return a(a, b, c), lambda _context, builder, _signature, values: builder.fma(*values)


@intrinsic
def _pointer(_context, address):  # type: ignore[no-untyped-def]
    """The float32 values at an address."""
    signature = types.CPointer(types.float32)(address)  # type: ignore[no-untyped-call]

    def cast(context, builder, signature, values):  # type: ignore[no-untyped-def]
        return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

    return signature, cast


@compiled
def _values(address: int, first: int, last: int) -> Floats:
    values: Floats = carray(_pointer(address), (last,), np.float32)[first:]
    return values


@compiled
def _sgd(
    slope: np.float32, value: np.float32, old: np.float32, sgd: Floats, decays: bool
) -> tuple[np.float32, np.float32]:
    """SGD's new (value, momentum) by torch's formula, and rounded where torch rounds."""
    if decays:
        slope = _fma(sgd[2], value, slope)
    momentum = sgd[1] * old + slope
    return _fma(-sgd[0], momentum, value), momentum


@compiled
def _lower(
    g: Floats, mask: Mask, weights: Floats, momentum: Floats, z: Floats, sgd: Floats
) -> None:
    decays = sgd[2] != 0
    for i in range(g.size):
        kept = np.float32(mask[i])
        weight, momentum[i] = _sgd(kept * g[i], weights[i], momentum[i], sgd, decays)
        weights[i] = weight
        z[i] = kept * weight


@in_parts
def lower_step(
    parts: int, size: int, starts: NDArray[np.int64], gradients: NDArray[np.int64],
    targets: NDArray[np.int64], mask: Mask, weights: Floats, momentum: Floats, sgd: Floats,
) -> None:  # fmt: skip
    """SGD's step of θ by m ⊙ g, and z = m ⊙ θ, in one pass over the first `size` weights.

    One call for all layers: layer t has the flat places starts[t] to starts[t + 1], its g is at the
    address gradients[t], its z at targets[t]. `sgd`: learning rate, momentum, weight decay. All
    floats are float32.
    """
    for part in numba.prange(parts):
        begin, end = part * size // parts, (part + 1) * size // parts
        for t in range(gradients.size):
            a, b = max(begin, starts[t]), min(end, starts[t + 1])
            if a < b:
                g = _values(gradients[t], a - starts[t], b - starts[t])
                z = _values(targets[t], a - starts[t], b - starts[t])
                _lower(g, mask[a:b], weights[a:b], momentum[a:b], z, sgd)


@compiled
def _upper(
    inv_gamma: np.float32, g: Floats, weights: Floats, mask: Mask, scores: Floats,
    momentum: Floats, sgd: Floats,
) -> None:  # fmt: skip
    decays = sgd[2] != 0
    for i in range(g.size):
        slope = (weights[i] - inv_gamma * np.float32(mask[i]) * g[i]) * g[i]
        slope = -slope if scores[i] < 0 else slope
        scores[i], momentum[i] = _sgd(slope, scores[i], momentum[i], sgd, decays)


@compiled
def _move(gradient: Floats, scores: Floats, momentum: Floats, sgd: Floats) -> None:
    decays = sgd[2] != 0
    for i in range(gradient.size):
        scores[i], momentum[i] = _sgd(gradient[i], scores[i], momentum[i], sgd, decays)


@in_parts
def upper_step(
    parts: int, size: int, starts: NDArray[np.int64], gradients: NDArray[np.int64],
    given: NDArray[np.bool_], inv_gamma: np.float32, weights: Floats, mask: Mask, scores: Floats,
    momentum: Floats, sgd: Floats,
) -> None:  # fmt: skip
    """SGD's step of the scores by `upper_gradient`, in one pass; see `lower_step`.

    Where given[t], the gradient itself, not g, is at the address gradients[t].
    """
    for part in numba.prange(parts):
        begin, end = part * size // parts, (part + 1) * size // parts
        for t in range(gradients.size):
            a, b = max(begin, starts[t]), min(end, starts[t + 1])
            if a < b:
                g = _values(gradients[t], a - starts[t], b - starts[t])
                s, v = scores[a:b], momentum[a:b]
                if given[t]:
                    _move(g, s, v, sgd)
                else:
                    _upper(inv_gamma, g, weights[a:b], mask[a:b], s, v, sgd)
