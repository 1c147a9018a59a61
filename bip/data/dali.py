"""The `dali` loader: an NVIDIA DALI pipeline that decodes just the crop of each image.

DALI gets encoded bytes and the project's own crop boxes, so its batches are a function of the
requests like those of every other source. With a GPU the decoding is DALI's "mixed" (nvJPEG) and
DALI resizes and flips too. Without one `decode.resize` does that: it takes a third of the time.
"""

import importlib.util
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bip.data import decode
from bip.data.augment import resized_crop_params
from bip.data.sources import Batch, Reader, Request, Skips
from bip.errors import UserError

_DEPTH = 2  # batches in the pipeline at once
_JPEG_END = b"\xff\xd9"


def is_installed() -> bool:
    """Whether the package nvidia.dali is there; it is not imported."""
    return bool(importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"))


class DaliSource:
    """A split decoded by DALI; every `fetch` has a pipeline of its own.

    On the CPU images are bit for bit the other sources', except training crops so large that those
    decode them at a JPEG scale. On a GPU decoding and resizing are other arithmetic.

    Args:
        num_threads: of one pipeline; at least one is used.

    Raises:
        UserError: DALI is not installed.
    """

    def __init__(self, reader: Reader, num_threads: int, device: torch.device) -> None:
        if not is_installed():
            raise UserError("loader: dali is not installed; pip install 'bip-hpc[dali]'")
        self.reader = reader
        self.num_threads = max(1, num_threads)
        self.device = device
        self._on_gpu = device.type == "cuda"

    def __len__(self) -> int:
        return len(self.reader.store)

    def fetch(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """As `Source.fetch`; no batch may be larger than the first."""
        rest = iter(requests)
        first = next(rest, None)
        if first is None:
            return
        skips = Skips()
        with (
            _Inputs(self.reader, itertools.chain([first], rest), self._on_gpu) as inputs,
            ThreadPoolExecutor(self.num_threads, "dali-resize") as pool,
        ):
            pipeline = self._build(len(first.indices), inputs)
            while True:
                try:
                    (images,) = pipeline.run()
                except StopIteration:
                    return
                except UserError:
                    raise
                except Exception as error:  # DALI raises whatever its C++ side maps to
                    raise inputs.explain(error) from error
                batch = inputs.in_flight.popleft()
                skips.tell(batch.skipped)
                labels = torch.from_numpy(batch.labels)
                finish = (
                    self._from_gpu if self._on_gpu else partial(self._view, pool, batch.samples)
                )
                yield finish(images), labels.to(self.device, non_blocking=True)

    def _build(self, batch_size: int, inputs: "_Inputs") -> Any:
        from nvidia.dali import Pipeline, fn, types

        spec, dim = self.reader.spec, self.reader.image_dim
        pipeline = Pipeline(
            batch_size=batch_size,
            num_threads=self.num_threads,
            device_id=_index(self.device) if self._on_gpu else None,
            prefetch_queue_depth=_DEPTH,
        )
        with pipeline:
            encoded, start, shape, *rest = fn.external_source(
                inputs,
                num_outputs=6 if self._on_gpu else 3,
                dtype=[types.UINT8, *[types.INT32] * 2]
                + [types.FLOAT, *[types.INT32] * 2] * self._on_gpu,
                ndim=[1] * 3 + [1, 1, 0] * self._on_gpu,
            )
            images = fn.decoders.image_slice(
                encoded,
                device="mixed" if self._on_gpu else "cpu",
                start=start,
                shape=shape,
                axes=[0, 1],
                output_type=types.GRAY if spec.channels == 1 else types.RGB,
                adjust_orientation=False,  # nor does any other loader
            )
            if self._on_gpu:
                size, window, flip = rest
                images = fn.resize(
                    images, size=size, interp_type=types.INTERP_LINEAR, antialias=True
                )
                images = fn.slice(images, start=window, shape=[dim, dim], axes=[0, 1])
                images = fn.crop_mirror_normalize(
                    images,
                    mirror=flip,
                    dtype=types.UINT8,
                    output_layout="CHW",
                    mean=[0.0],
                    std=[1.0],
                )
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline

    def _view(self, pool: ThreadPoolExecutor, samples: "_Samples", images: Any) -> Tensor:
        """Resize, cut and flip the decoded crops of different sizes."""
        dim, channels = self.reader.image_dim, self.reader.spec.channels
        out = torch.empty((len(images), channels, dim, dim), dtype=torch.uint8)

        def view(row: int) -> None:
            planes = torch.from_numpy(np.asarray(images.at(row))).permute(2, 0, 1)
            height, width = samples.size[row].astype(int).tolist()
            top, left = samples.window[row].tolist()
            planes = decode.resize(planes, height, width)[:, top : top + dim, left : left + dim]
            out[row] = planes.flip(-1) if samples.flip[row] else planes

        list(pool.map(view, range(len(images))))  # asks for all results, and so for errors
        return out

    def _from_gpu(self, images: Any) -> Tensor:
        from nvidia.dali.plugin.pytorch import feed_ndarray

        dense = images.as_tensor()
        out = torch.empty(dense.shape(), dtype=torch.uint8, device=self.device)
        feed_ndarray(dense, out, cuda_stream=torch.cuda.current_stream(self.device))
        return out


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


class _Samples(NamedTuple):
    """A batch as the pipeline takes it. Sides and places are (vertical, horizontal), pixels."""

    encoded: list[NDArray[np.uint8]]
    start: NDArray[np.int32]  # (n, 2) crop box in the image
    shape: NDArray[np.int32]  # (n, 2)
    size: NDArray[np.float32]  # (n, 2) to resize that to
    window: NDArray[np.int32]  # (n, 2) place of the view in that
    flip: NDArray[np.int32]  # (n,)


class _Batch(NamedTuple):
    request: Request
    samples: _Samples
    labels: NDArray[np.int64]
    skipped: list[str]


class _Inputs:
    """What DALI asks for its next batch; a thread reads one batch ahead.

    `in_flight` holds the batches that DALI has taken and not yet returned.
    """

    def __init__(self, reader: Reader, requests: Iterator[Request], whole_view: bool) -> None:
        self.reader = reader
        self._fields = 6 if whole_view else 3  # else only what decoding takes
        self.in_flight: deque[_Batch] = deque()
        self._requests = requests
        self._thread = ThreadPoolExecutor(1, "dali-reader")
        self._ahead: Future[_Batch] | None = None

    def __enter__(self) -> Self:
        self._submit()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[Any, ...]:
        if self._ahead is None:
            raise StopIteration
        batch = self._ahead.result()
        self._submit()
        self.in_flight.append(batch)
        return batch.samples[: self._fields]

    def _submit(self) -> None:
        # The requests are drawn in the caller's thread: they come from a shared iterator.
        request = next(self._requests, None)
        self._ahead = None if request is None else self._thread.submit(self._read, request)

    def explain(self, error: Exception) -> UserError:
        """The image that DALI failed on, if the other decoder fails on it too."""
        try:
            for batch in self.in_flight:
                replace(self.reader, skip_bad=False).read(batch.request)
        except UserError as named:
            return named
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        what = next((line for line in lines if "rror" in line), type(error).__name__)
        return UserError(
            f"{self.reader.store.path}: DALI fails on an image ({what}); use --loader lmdb or "
            "folder, or build the store again with --check"
        )

    def _read(self, request: Request) -> _Batch:
        spec, dim = self.reader.spec, self.reader.image_dim

        def read_one(row: int) -> tuple[NDArray[np.uint8], tuple[int, int], int]:
            index = int(request.indices[row])
            data, label = self.reader.store.read(index)
            try:
                data, sides = _for_dali(data, spec.channels)
            except decode.DECODE_ERRORS as error:
                raise self.reader.damaged(index, label, error) from error
            return np.frombuffer(data, np.uint8), sides, label

        rows, skipped = self.reader.each(request, read_one)
        count = len(rows)
        encoded = [data for data, _, _ in rows]
        sides = np.array([pair for _, pair, _ in rows], np.int64)
        labels = np.array([label for _, _, label in rows], np.int64)
        if request.uniforms is not None and spec.augment == "resized_crop":
            crops = resized_crop_params(request.uniforms, sides[:, 0], sides[:, 1], spec.flip)
            samples = _Samples(
                encoded,
                start=np.stack([crops.top, crops.left], 1).astype(np.int32),
                shape=np.stack([crops.height, crops.width], 1).astype(np.int32),
                size=np.full((count, 2), dim, np.float32),
                window=np.zeros((count, 2), np.int32),
                flip=crops.flip.astype(np.int32),
            )
        else:
            views = [decode.test_geometry(h, w, dim, spec.test_zoom) for h, w in sides.tolist()]
            samples = _Samples(
                encoded,
                start=np.zeros((count, 2), np.int32),
                shape=sides.astype(np.int32),
                size=np.array([size for size, _ in views], np.float32),
                window=np.array([place for _, place in views], np.int32),
                flip=np.zeros(count, np.int32),
            )
        return _Batch(request, samples, labels, skipped)


def _for_dali(data: bytes, channels: int) -> tuple[bytes, tuple[int, int]]:
    """Bytes that DALI decodes to the pixels of `decode.decode`, and their (height, width).

    Whole JPEGs as they are. The rest (PNG, CMYK, cut short ...) is decoded here, or found
    damaged, and handed on as an uncompressed PPM or PGM.
    """
    size = decode.plain_jpeg_size(data)
    if size is not None and _JPEG_END in data[-1024:]:
        return data, size
    pixels = decode.decode(data, channels)
    height, width = pixels.shape[:2]
    head = b"P%d %d %d 255\n" % (6 if channels == 3 else 5, width, height)
    return head + pixels.tobytes(), (height, width)
