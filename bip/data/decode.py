"""Encoded bytes to uint8 pixels, with Pillow. One module, so that every store decodes alike."""

import struct
import zlib
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from bip.data.augment import resized_crop_params

_MODES = {1: "L", 3: "RGB"}

# What Pillow raises on damaged images, in `open_image` and in the views.
DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def reason(error: BaseException) -> str:
    """A decoding error in a few words."""
    return "no known image format" if isinstance(error, UnidentifiedImageError) else str(error)


def open_image(data: bytes) -> Image.Image:
    """Read an image's header; pixels are decoded on first use.

    Raises:
        DECODE_ERRORS: not an image.
    """
    return Image.open(BytesIO(data))


def test_view(image: Image.Image, channels: int, image_dim: int, zoom: float) -> NDArray[np.uint8]:
    """The deterministic view: resize the short side to image_dim * zoom, then cut the centre.

    An image that already is image_dim x image_dim is left as it is when `zoom` is 1.

    Returns:
        Shape (channels, image_dim, image_dim).
    """
    image = image.convert(_MODES[channels])
    short = round(image_dim * zoom)
    width, height = image.size
    if min(width, height) != short:
        # torchvision's Resize truncates the long side.
        long = int(short * max(width, height) / min(width, height))
        size = (short, long) if width <= height else (long, short)
        image = image.resize(size, Image.Resampling.BILINEAR)
        width, height = size
    left, top = round((width - image_dim) / 2), round((height - image_dim) / 2)
    if (width, height) != (image_dim, image_dim):
        image = image.crop((left, top, left + image_dim, top + image_dim))
    return _planes(image)


def resized_crop(
    image: Image.Image, uniforms: NDArray[np.float64], channels: int, image_dim: int, flip: bool
) -> NDArray[np.uint8]:
    """The random view of "resized_crop".

    Args:
        uniforms: the image's random numbers, shape (RESIZED_CROP_DRAWS,).

    Returns:
        Shape (channels, image_dim, image_dim).
    """
    width, height = image.size
    crops = resized_crop_params(uniforms[None], np.array([height]), np.array([width]), flip)
    top, left = int(crops.top[0]), int(crops.left[0])
    box = (left, top, left + int(crops.width[0]), top + int(crops.height[0]))
    part = image.convert(_MODES[channels]).crop(box)
    planes = _planes(part.resize((image_dim, image_dim), Image.Resampling.BILINEAR))
    return planes[:, :, ::-1] if crops.flip[0] else planes


def _planes(image: Image.Image) -> NDArray[np.uint8]:
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def from_planes(planes: NDArray[np.uint8]) -> Image.Image:
    """The image of uint8 pixels (channels, height, width)."""
    return Image.fromarray(planes[0] if len(planes) == 1 else planes.transpose(1, 2, 0))
