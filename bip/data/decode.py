"""Encoded bytes to uint8 pixels, the same way for every store.

simplejpeg decodes JPEGs (libjpeg-turbo: the same pixels as Pillow in less time), Pillow the rest.
All images are resized by torch's antialiased bilinear, within 2 levels of Pillow's.
"""

import re
import struct
import zlib
from io import BytesIO
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from bip.data.augment import resized_crop_params

_MODES = {1: "L", 3: "RGB"}
_COLORSPACES = {1: "GRAY", 3: "RGB"}
_JPEG_START = b"\xff\xd8\xff"
_MAX_SCALE = 8  # libjpeg's
_LONGEST = 32  # times the short side: of longer images only the middle is resized for a test
# The second byte of the segments that may occur in a JPEG with Huffman codes.
_FRAMES = (0xC0, 0xC1, 0xC2)
_PROGRESSIVE, _SCAN, _END = 0xC2, 0xDA, 0xD9
_SEGMENTS = frozenset({*_FRAMES, 0xC4, _SCAN, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE})
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]")  # what ends a scan
# No other formats: Pillow passes PostScript to Ghostscript, which runs the code in it.
_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "GIF", "WEBP")

# What the functions below raise for damaged images.
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
    """A decoding error, shortened."""
    if isinstance(error, UnidentifiedImageError):
        return "no known image format"
    return " ".join(str(error).split()) or type(error).__name__


def open_image(data: bytes) -> Image.Image:
    """Read an image's header with Pillow; pixels are decoded on first use.

    Raises:
        DECODE_ERRORS: not an image of the six formats in `bip.data.trees.IMAGE_SUFFIXES`.
    """
    return Image.open(BytesIO(data), formats=_FORMATS)


def is_deep(image: Image.Image) -> bool:
    """Whether its pixels are 16-bit numbers, which Pillow's `convert` clips to 255."""
    return image.mode.startswith("I")


def convert(image: Image.Image, mode: str) -> Image.Image:
    """`image` in "L" or "RGB"; 16-bit pixels are scaled to 8 bits.

    Raises:
        DECODE_ERRORS: damaged, or its pixels are floating-point numbers of no known range.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; convert it to 8 bits")
    if is_deep(image):
        pixels = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((pixels * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8))
    return image.convert(mode)


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a grayscale or colour JPEG; None for images that Pillow must decode.

    These are other formats, CMYK, damaged headers, and images so large that Pillow warns.
    """
    if not data.startswith(_JPEG_START):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    plain = colorspace in ("Gray", "YCbCr", "RGB") and height * width > 0
    return (height, width) if plain and height * width <= (Image.MAX_IMAGE_PIXELS or 0) else None


def is_sound_jpeg(data: bytes) -> bool:
    """Whether a JPEG is made of known segments and scans up to its end.

    libjpeg fails on damaged segments; for damage within a scan's codes it only warns. Decoders
    differ where it fails, so `decode` handles all JPEGs that are not sound. Some rare kinds of
    sound JPEGs count as not sound.
    """
    at, components, progressive, scans, more = 2, 0, False, 0, True
    try:
        while data[at] == 0xFF:
            code = data[at + 1]
            if code == _END:
                return scans > 0
            if code not in _SEGMENTS or not more:
                return False
            length, count = int.from_bytes(data[at + 2 : at + 4], "big"), data[at + 4]
            at += 2 + length
            if code in _FRAMES:
                progressive, components = code == _PROGRESSIVE, data[at - length + 7]
            elif code == _SCAN:
                found = _MARKER.search(data, at)
                if found is None or length != 6 + 2 * count:
                    return False
                at, scans = found.start(), scans + 1
                more = progressive or count < components
    except IndexError:  # cut short
        pass
    return False


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) from the header. Raises DECODE_ERRORS."""
    size = plain_jpeg_size(data)
    if size is None:
        with open_image(data) as image:
            size = image.height, image.width
    return size


def decode(data: bytes, channels: int, scale: int = 1) -> NDArray[np.uint8]:
    """Pixels, shape (height, width, channels).

    Args:
        scale: 1, 2, 4 or 8: JPEGs are decoded at this fraction of their size, rounded up, which
            costs less. Other formats are always decoded at full size: see the shape.

    Raises:
        DECODE_ERRORS: damaged, or no image.
    """
    size = plain_jpeg_size(data)
    if size is not None:
        height, width = (-(-side // scale) for side in size)
        try:
            return np.asarray(
                simplejpeg.decode_jpeg(
                    data,
                    _COLORSPACES[channels],
                    min_height=height if scale > 1 else 0,
                    min_width=width if scale > 1 else 0,
                    min_factor=scale,
                )
            )
        except ValueError:
            pass  # Pillow accepts what is harmless and raises on the rest
    with open_image(data) as image:
        pixels = np.array(convert(image, _MODES[channels]))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def test_view(pixels: NDArray[np.uint8], image_dim: int, zoom: float) -> NDArray[np.uint8]:
    """The test view: resize the short side to image_dim * zoom, then crop the centre.

    An image of image_dim x image_dim is unchanged when `zoom` is 1.

    Args:
        pixels: shape (height, width, channels).

    Returns:
        Shape (channels, image_dim, image_dim).
    """
    size, corner = test_geometry(pixels.shape[0], pixels.shape[1], image_dim, zoom)
    planes = torch.from_numpy(pixels).permute(2, 0, 1)
    planes = resize_window(planes, size, corner, image_dim)
    return np.ascontiguousarray(planes.numpy())


def resize_window(
    planes: Tensor, size: tuple[int, int], corner: tuple[int, int], image_dim: int
) -> Tensor:
    """Resize to `size`, then crop image_dim x image_dim at `corner` (top, left).

    A very long image that this would enlarge, perhaps to gigabytes, is cropped first. Its window
    is then right to half a pixel of the enlarged image.

    Args:
        planes: uint8, shape (channels, any, any).
    """
    top, left = corner
    height, width = planes.shape[1:]
    if (part := part_of_long((height, width), size, corner, image_dim)) is not None:
        (first, second), before = part.start, part.shape
        planes = planes[:, first : first + before[0], second : second + before[1]]
        planes = functional.interpolate(
            planes[None],
            scale_factor=[size[0] / height, size[1] / width],
            mode="bilinear",
            antialias=True,
        )[0]
        top, left = part.corner
    else:
        planes = resize(planes, *size)
    return planes[:, top : top + image_dim, left : left + image_dim]


class Part(NamedTuple):
    """The part of a very long image that its test view needs, each (vertical, horizontal)."""

    start: tuple[int, int]  # in the image
    shape: tuple[int, int]
    size: tuple[int, int]  # to resize it to
    corner: tuple[int, int]  # of the view in the resized part


def part_of_long(
    shape: tuple[int, int], size: tuple[int, int], corner: tuple[int, int], image_dim: int
) -> Part | None:
    """What `resize_window` resizes of an image that is cropped first; None for other images."""
    axis = 0 if size[0] > size[1] else 1
    if max(size) <= _LONGEST * min(size) or size[axis] <= shape[axis]:
        return None
    scale = size[axis] / shape[axis]
    begin = max(0, int(corner[axis] / scale) - 2)
    stop = min(shape[axis], int((corner[axis] + image_dim) / scale) + 3)

    def along(value: int, across: tuple[int, int]) -> tuple[int, int]:
        return (value, across[1]) if axis == 0 else (across[0], value)

    return Part(
        start=along(begin, (0, 0)),
        shape=along(stop - begin, shape),
        size=along(int((stop - begin) * scale), size),
        corner=along(round(corner[axis] - begin * scale), corner),
    )


def test_geometry(
    height: int, width: int, image_dim: int, zoom: float
) -> tuple[tuple[int, int], tuple[int, int]]:
    """For `test_view`: the (height, width) to resize to and the (top, left) of the crop."""
    short = round(image_dim * zoom)
    if min(height, width) != short:
        # torchvision's Resize truncates the long side.
        long = int(short * max(height, width) / min(height, width))
        height, width = (long, short) if width <= height else (short, long)
    return (height, width), (round((height - image_dim) / 2), round((width - image_dim) / 2))


def resized_crop(
    data: bytes, uniforms: NDArray[np.float64], channels: int, image_dim: int, flip: bool
) -> NDArray[np.uint8]:
    """Decode the random view of "resized_crop"; large crops at a smaller JPEG scale, to save time.

    Args:
        uniforms: the image's random numbers, shape (RESIZED_CROP_DRAWS,).

    Returns:
        Shape (channels, image_dim, image_dim).

    Raises:
        DECODE_ERRORS: damaged, or no image.
    """
    height, width = image_size(data)
    crops = resized_crop_params(uniforms[None], np.array([height]), np.array([width]), flip)
    top, left = int(crops.top[0]), int(crops.left[0])
    bottom, right = top + int(crops.height[0]), left + int(crops.width[0])
    scale = 1
    while scale < _MAX_SCALE and min(bottom - top, right - left) >= 2 * scale * image_dim:
        scale *= 2
    pixels = decode(data, channels, scale)
    if scale > 1 and pixels.shape[:2] != (height, width):
        top, left, bottom, right = (round(edge / scale) for edge in (top, left, bottom, right))
    planes = torch.from_numpy(pixels[top:bottom, left:right]).permute(2, 0, 1)
    planes = resize(planes, image_dim, image_dim)
    if crops.flip[0]:
        planes = planes.flip(-1)
    return planes.contiguous().numpy()


def resize(planes: Tensor, height: int, width: int) -> Tensor:
    """uint8 (channels, any, any) to (channels, height, width); unchanged if it has that size."""
    if planes.shape[1:] == (height, width):
        return planes
    resized: Tensor = functional.interpolate(
        planes[None], (height, width), mode="bilinear", antialias=True
    )
    return resized[0]
