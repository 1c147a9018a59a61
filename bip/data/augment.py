"""Random crops and flips as pure functions of uniform numbers, and their batched application.

The numbers come from `Order.uniforms`; every image has a fixed count of them, used or not.
Two kinds, both as in torchvision: "pad_crop" (RandomCrop with zero padding, then flip) for small
images, "resized_crop" (RandomResizedCrop, then flip) for ImageNet.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

PAD_CROP_DRAWS = 4  # top, left, flip; one unused
RESIZED_CROP_DRAWS = 24  # ten tries of (area, ratio), then top, left, flip; one unused

_CACHED = 1 << 18  # float32 numbers that stay in a core's cache
_TRIES = 10
_SCALE = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)


class Crops(NamedTuple):
    """One crop box and flip per image; each field has shape (n,). Pixels, int64; flip is bool."""

    top: NDArray[np.int64]
    left: NDArray[np.int64]
    height: NDArray[np.int64]
    width: NDArray[np.int64]
    flip: NDArray[np.bool_]


def pad_crop_params(
    uniforms: NDArray[np.float64], height: int, width: int, padding: int, flip: bool
) -> Crops:
    """Crops of the original size out of images padded by `padding` on each side.

    `top` and `left` are in the padded image, uniform on 0 ... 2 * padding.

    Args:
        uniforms: shape (n, PAD_CROP_DRAWS).
        flip: mirror half of the images.
    """
    offsets = (uniforms[:, :2] * (2 * padding + 1)).astype(np.int64)
    count = len(uniforms)
    return Crops(
        top=offsets[:, 0],
        left=offsets[:, 1],
        height=np.full(count, height),
        width=np.full(count, width),
        flip=(uniforms[:, 2] < 0.5) & flip,
    )


def resized_crop_params(
    uniforms: NDArray[np.float64],
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
    flip: bool,
) -> Crops:
    """Crops of 8-100% of the area and aspect 3/4-4/3; the largest central one after ten misses.

    The rule of torchvision's RandomResizedCrop (Szegedy et al., 2015), with the ten tries drawn
    beforehand.

    Args:
        uniforms: shape (n, RESIZED_CROP_DRAWS).
        heights, widths: of the original images, shape (n,).
    """
    tries = uniforms[:, : 2 * _TRIES].reshape(-1, _TRIES, 2)
    areas = (heights * widths)[:, None] * (_SCALE[0] + (_SCALE[1] - _SCALE[0]) * tries[:, :, 0])
    low, high = math.log(_RATIO[0]), math.log(_RATIO[1])
    ratios = np.exp(low + (high - low) * tries[:, :, 1])
    crop_widths = np.rint(np.sqrt(areas * ratios)).astype(np.int64)
    crop_heights = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    fits = (crop_widths > 0) & (crop_widths <= widths[:, None])
    fits &= (crop_heights > 0) & (crop_heights <= heights[:, None])
    rows, first = np.arange(len(uniforms)), fits.argmax(axis=1)
    found = fits[rows, first]

    # torchvision's fallback: the whole image, cut to the nearest allowed aspect, centred.
    aspect = widths / heights
    whole_width = np.where(aspect > _RATIO[1], np.rint(heights * _RATIO[1]), widths)
    whole_height = np.where(aspect < _RATIO[0], np.rint(widths / _RATIO[0]), heights)
    width = np.where(found, crop_widths[rows, first], whole_width).astype(np.int64)
    height = np.where(found, crop_heights[rows, first], whole_height).astype(np.int64)

    top, left, mirror = uniforms[:, 2 * _TRIES : 2 * _TRIES + 3].T
    return Crops(
        top=np.where(found, top * (heights - height + 1), (heights - height) // 2).astype(np.int64),
        left=np.where(found, left * (widths - width + 1), (widths - width) // 2).astype(np.int64),
        height=height,
        width=width,
        flip=(mirror < 0.5) & flip,
    )


def pad_crop(images: Tensor, crops: Crops, padding: int) -> Tensor:
    """Apply `pad_crop_params` to a batch on its own device.

    Args:
        images: uint8, shape (n, channels, height, width).

    Returns:
        A new tensor of the same shape and type. Where the crop leaves the image it is zero.
    """
    height, width = images.shape[2:]
    plan = torch.from_numpy(np.stack([np.arange(len(images)), crops.top, crops.left, crops.flip]))
    if images.is_cuda:  # one small transfer that does not wait for the device
        plan = plan.pin_memory().to(images.device, non_blocking=True)
    row, top, left, flip = plan
    padded = functional.pad(images, (padding,) * 4)
    cropped = padded.unfold(2, height, 1).unfold(3, width, 1)[row, :, top, left]
    return torch.where(flip.bool()[:, None, None, None], cropped.flip(-1), cropped)


def pad_crop_normalised(
    images: Tensor, crops: Crops, padding: int, scale: Tensor, shift: Tensor, out: Tensor
) -> None:
    """out = scale · pad_crop(images) + shift on the CPU, in one pass with the same bits.

    Args:
        images: uint8, contiguous, shape (n, channels, height, width).
        scale, shift: float32, shape (channels, 1, 1).
        out: float32, of the images' shape; its old content is lost.
    """
    from bip.compiled import share  # imports numba, which training on a GPU does without
    from bip.data import kernels

    kernels.pad_crop(
        share(images.numel()), images.reshape(-1).numpy(), tuple(images.shape),
        crops.top, crops.left, crops.flip, padding,
        scale.view(-1).numpy(), shift.view(-1).numpy(), out.view(-1).numpy(),
    )  # fmt: skip


def normalise(images: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """out = scale · images + shift on the CPU, in parts that stay in the cache.

    Args:
        images: uint8, shape (n, channels, height, width).
        scale, shift: float32, shape (channels, 1, 1).
        out: float32, of the images' shape; its old content is lost.
    """
    step = max(1, _CACHED // images[0].numel())
    for part, result in zip(images.split(step), out.split(step), strict=True):
        result.copy_(part).mul_(scale).add_(shift)
