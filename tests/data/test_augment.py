"""Crops and flips against naive per-image loops and torchvision."""

import math
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional as tv

from bip.data import decode
from bip.data.augment import (
    normalise,
    pad_crop,
    pad_crop_normalised,
    pad_crop_params,
    resized_crop_params,
)
from bip.data.order import Order

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    ),
]


def naive_pad_crop(image: np.ndarray, top: int, left: int, flip: bool, padding: int) -> np.ndarray:
    """One image, pixel by pixel."""
    height, width = image.shape[1:]
    out = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            row = y + top - padding
            column = (width - 1 - x if flip else x) + left - padding
            if 0 <= row < height and 0 <= column < width:
                out[:, y, x] = image[:, row, column]
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("shape", "padding", "flip"),
    [
        ((40, 3, 9, 7), 4, True),
        ((30, 1, 8, 8), 1, False),
        ((5, 3, 6, 6), 0, True),
        ((13, 3, 5, 7), 9, True),
    ],
)
def test_pad_crop_is_the_naive_loop(
    device: str, shape: tuple[int, ...], padding: int, flip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, shape, dtype=np.uint8)
    crops = pad_crop_params(rng.random((shape[0], 4)), shape[2], shape[3], padding, flip)
    given = torch.from_numpy(images.copy()).to(device)
    cropped = pad_crop(given, crops, padding)
    got = cropped.cpu().numpy()
    np.testing.assert_array_equal(given.cpu().numpy(), images)  # left as it was
    for image, one, top, left, mirror in zip(
        images, got, crops.top, crops.left, crops.flip, strict=True
    ):
        np.testing.assert_array_equal(one, naive_pad_crop(image, top, left, mirror, padding))
    if device == "cpu":
        scale, shift = torch.rand(2, shape[1], 1, 1)
        shift[0] = -0.0  # of a mean of 0
        normalised, expected = torch.empty(2, *shape)
        normalise(cropped, scale, shift, expected)
        for parts in (1, 2):
            monkeypatch.setattr("bip.compiled.share", lambda _, parts=parts: parts)
            normalised.fill_(torch.nan)
            pad_crop_normalised(given, crops, padding, scale, shift, normalised)
            assert normalised.numpy().tobytes() == expected.numpy().tobytes()
        np.testing.assert_array_equal(given.numpy(), images)


def test_pad_crop_covers_all_offsets_and_both_flips_evenly() -> None:
    count = 81 * 2 * 200
    crops = pad_crop_params(Order(count, 1, 0).uniforms(0, 0, count, 4), 32, 32, 4, True)
    seen = np.zeros((9, 9, 2))
    np.add.at(seen, (crops.top, crops.left, crops.flip.astype(int)), 1)
    assert seen.min() > 200 - 5 * 200**0.5
    assert seen.max() < 200 + 5 * 200**0.5
    assert not pad_crop_params(Order(9, 1, 0).uniforms(0, 0, 9, 4), 8, 8, 1, False).flip.any()


def naive_resized_crop(draws: np.ndarray, height: int, width: int) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop.get_params, its random numbers taken from `draws`."""
    for attempt in range(10):
        area = height * width * (0.08 + 0.92 * draws[2 * attempt])
        low, high = math.log(3 / 4), math.log(4 / 3)
        ratio = math.exp(low + (high - low) * draws[2 * attempt + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[20] * (height - h + 1)), int(draws[21] * (width - w + 1)), h, w
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        w, h = round(height * (4 / 3)), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@given(
    st.lists(st.tuples(st.integers(1, 900), st.integers(1, 900)), min_size=1, max_size=20),
    st.integers(0, 2**32),
)
@example([(1000, 30), (30, 1000)], 0)  # no try fits: the central crop
def test_resized_crop_is_the_naive_loop(sizes: list[tuple[int, int]], seed: int) -> None:
    heights, widths = np.array(sizes).T
    draws = np.random.default_rng(seed).random((len(sizes), 24))
    crops = resized_crop_params(draws, heights, widths, True)
    for row, (height, width) in enumerate(sizes):
        box = tuple(int(field[row]) for field in crops[:4])
        assert box == naive_resized_crop(draws[row], height, width)
        top, left, h, w = box
        assert 0 <= top <= top + h <= height
        assert 0 <= left <= left + w <= width
        assert crops.flip[row] == (draws[row, 22] < 0.5)


@pytest.fixture(scope="module")
def photos(imagenet: Path) -> list[bytes]:
    files = sorted((imagenet / "val").rglob("*.JPEG"))
    return [file.read_bytes() for file in files[::20]]


def as_pillow(photo: bytes) -> Image.Image:
    return Image.open(BytesIO(photo)).convert("RGB")


def difference(got: np.ndarray, expected: Image.Image) -> np.ndarray:
    return np.abs(got.astype(int) - np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("dim", [64, 224])
def test_resized_crop_pixels_are_torchvisions(photos: list[bytes], dim: int) -> None:
    """Within 2 levels; where the JPEG is decoded at a scale, close to a box-filtered photo."""
    rng = np.random.default_rng(1)
    flips, scaled = 0, 0
    for photo in photos:
        draws = rng.random(24)
        image = as_pillow(photo)
        top, left, height, width = naive_resized_crop(draws, image.height, image.width)
        scale = max(s for s in (1, 2, 4, 8) if s == 1 or min(height, width) >= s * dim)
        edges = [round(edge / scale) for edge in (top, left, top + height, left + width)]
        box = (*edges[:2], edges[2] - edges[0], edges[3] - edges[1])
        expected = tv.resized_crop(image.reduce(scale), *box, [dim, dim])
        if draws[22] < 0.5:
            expected, flips = tv.hflip(expected), flips + 1
        distance = difference(decode.resized_crop(photo, draws, 3, dim, flip=True), expected)
        assert distance.max() <= 2 if scale == 1 else distance.mean() < 1.5
        scaled += scale > 1
    assert 0 < flips < len(photos)
    assert (scaled > 3) == (dim == 64)


def test_the_test_view_is_torchvisions_within_2_levels(photos: list[bytes]) -> None:
    for photo in photos:
        expected = tv.center_crop(tv.resize(as_pillow(photo), [256]), [224, 224])
        got = decode.test_view(decode.decode(photo, 3), 224, 256 / 224)
        assert difference(got, expected).max() <= 2
        assert difference(got, expected).mean() < 0.1


def test_jpegs_decode_to_pillows_pixels(photos: list[bytes]) -> None:
    for photo in photos[:4]:
        assert not difference(decode.decode(photo, 3).transpose(2, 0, 1), as_pillow(photo)).any()
        gray = np.asarray(Image.open(BytesIO(photo)).convert("L"))
        assert np.abs(decode.decode(photo, 1)[:, :, 0].astype(int) - gray).mean() < 1
        with pytest.raises(decode.DECODE_ERRORS):
            decode.decode(photo[: len(photo) // 2], 3)


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_a_jpeg_is_decoded_at_exactly_the_scale_asked_for(photos: list[bytes], scale: int) -> None:
    for photo in photos:
        height, width = decode.image_size(photo)
        expected = (-(-height // scale), -(-width // scale), 3)
        assert decode.decode(photo, 3, scale).shape == expected


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGBA"), ("JPEG", "CMYK"), ("GIF", "P")])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_no_plain_jpeg_goes_through_pillow(kind: str, mode: str, channels: int) -> None:
    stream = BytesIO()
    Image.new(mode, (20, 10), 3).save(stream, kind)
    data = stream.getvalue()
    assert decode.plain_jpeg_size(data) is None
    assert decode.image_size(data) == (10, 20)
    expected = np.asarray(Image.open(BytesIO(data)).convert("L" if channels == 1 else "RGB"))
    np.testing.assert_array_equal(decode.decode(data, channels).squeeze(), expected)


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.sampled_from([1, 256 / 224]))
def test_the_test_view_has_its_size(height: int, width: int, dim: int, zoom: float) -> None:
    for channels in (1, 3):
        image = np.zeros((height, width, channels), np.uint8)
        assert decode.test_view(image, dim, zoom).shape == (channels, dim, dim)
        fits = np.random.default_rng(0).integers(0, 256, (dim, dim, channels), dtype=np.uint8)
        np.testing.assert_array_equal(decode.test_view(fits, dim, 1.0), fits.transpose(2, 0, 1))
