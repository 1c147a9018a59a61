"""Compiled CPU passes over images."""

from typing import Any

import numba
import numpy as np
from numba import uint64
from numpy.typing import NDArray

from bip.compiled import in_parts

Whole = NDArray[np.integer[Any]]


@in_parts
def pad_crop(
    parts: int,
    images: NDArray[np.uint8],
    shape: tuple[int, int, int, int],
    top: Whole,
    left: Whole,
    flip: NDArray[np.bool_],
    padding: int,
    scale: NDArray[np.float32],
    shift: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """out = scale · crop + shift in one pass, for the crops of `augment.pad_crop_params`.

    `images` and `out` are flat: views of rows would take most of the time. Indices are unsigned,
    as the compiler does not vectorise a loop whose index might be negative.
    """
    count, channels, height, width = shape
    for part in numba.prange(parts):
        for n in range(part * count // parts, (part + 1) * count // parts):
            start = left[n] - padding  # in the image, of the crop's first column
            first, last = max(0, -start), min(width, width - start)  # of the crop, in the image
            for c in range(channels):
                times, plus = scale[c], shift[c]
                outside = times * np.float32(0) + plus  # never -0
                for y in range(height):
                    plane, source = (n * channels + c) * height, top[n] - padding + y
                    to = (plane + y) * width
                    if source < 0 or source >= height or first > 0 or last < width:
                        for x in range(width):
                            out[uint64(to + x)] = outside
                    if source < 0 or source >= height:
                        continue
                    at = (plane + source) * width + start
                    if flip[n]:
                        at += width - 1
                        for x in range(width - last, width - first):
                            out[uint64(to + x)] = times * np.float32(images[uint64(at - x)]) + plus
                    else:
                        for x in range(first, last):
                            out[uint64(to + x)] = times * np.float32(images[uint64(at + x)]) + plus
