"""The `dali` loader: an NVIDIA DALI pipeline that decodes only the crop of each image.

DALI gets encoded bytes and this project's crop boxes, so its batches are a function of the
requests, as with every loader. On a GPU decoding is DALI's "mixed" (nvJPEG), and DALI resizes and
flips too. On a CPU `decode.resize` does that, in a third of DALI's time.
"""

import importlib.util
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bip.data import decode
from bip.data.augment import resized_crop_params
from bip.data.options import DataOptions
from bip.data.reader import Batch, Loader, Reader, Request, Skips, Split
from bip.data.stores.base import ArraySplit
from bip.errors import UserError

_T = TypeVar("_T")

_DEPTH = 2  # batches in the pipeline at once
_ROWS = 8  # images that a reading thread takes at once


def is_installed() -> bool:
    """Whether the package nvidia.dali is installed; it is not imported."""
    return bool(importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"))


class DaliLoader(Loader):
    """A split decoded by DALI; every `fetch` has a pipeline of its own.

    On the CPU images equal the other loaders' bit for bit, except large training crops, which the
    others decode at a smaller JPEG scale. On a GPU decoded pixels differ slightly.

    Raises:
        UserError: DALI is not installed.
    """

    def __init__(self, split: Split, options: DataOptions, device: torch.device) -> None:
        if not is_installed():
            raise UserError("loader: dali is not installed; pip install 'bip-hpc[dali]'")
        assert not isinstance(split, ArraySplit)
        self.reader = Reader(split, options)
        self.num_threads = max(1, options.num_workers)
        self.device = device
        self.on_gpu = device.type == "cuda"

    def __len__(self) -> int:
        return len(self.reader.store)

    def fetch(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """See `Loader.fetch`. No batch may be larger than the first.

        If DALI fails on a batch, it is read again, and the images that DALI refuses are decoded as
        the other loaders do. That depends only on the request, so a resumed run draws the same.
        """
        skips = Skips()
        batch_size = 0
        fresh = iter(requests)
        again: deque[_Task] = deque()

        def draw() -> _Task | None:
            if again:
                return again.popleft()
            request = next(fresh, None)
            return None if request is None else _Task(request)

        while (first := draw()) is not None:
            batch_size = batch_size or len(first.request.indices)
            again.appendleft(first)
            with (
                _Inputs(self, draw) as inputs,
                ThreadPoolExecutor(self.num_threads, "dali-resize") as pool,
            ):
                pipeline, images = self._start(batch_size, inputs), None
                while True:
                    try:
                        (images,) = pipeline.run()
                    except StopIteration:
                        return
                    except MemoryError as error:
                        raise self._no_memory() from error
                    except Exception as error:  # DALI's C++ errors map to many types
                        if error is inputs.error:
                            raise
                        failure = error.with_traceback(None)  # the traceback holds the pipeline
                        break
                    batch = inputs.in_flight.popleft()
                    skips.report(batch.skipped)
                    labels = torch.from_numpy(batch.labels)
                    finish = (
                        self._from_gpu if self.on_gpu else partial(self._view, pool, batch.samples)
                    )
                    yield finish(images), labels.to(self.device, non_blocking=True)
                del pipeline, images  # there may not be memory for two
                again.extendleft(reversed(self._again(inputs, failure)))

    def _no_memory(self) -> UserError:
        return UserError(
            f"{self.reader.store.path}: no memory for a batch; ask for more, or use a smaller "
            "--batch-size or fewer --num-workers"
        )

    def _again(self, inputs: "_Inputs", error: Exception) -> "list[_Task]":
        """The batches in flight, to be read again without the images that DALI refuses.

        DALI raises in order, so the first batch in flight is the cause.

        Raises:
            UserError: DALI refuses no further image, or all of several: DALI itself is the cause.
        """
        tasks = [batch.task for batch in inputs.in_flight]
        refused: set[int] = set()
        images = 0
        if tasks:
            first = inputs.in_flight[0]
            images = len(set(first.indices))
            refused = set(self._refused(first)) - tasks[0].refused
        if not refused or len(refused) == images > 1:
            raise UserError(
                f"{self.reader.store.path}: DALI fails on a batch ({_what(error)}); use --loader "
                "lmdb or folder"
            ) from error
        tasks[0] = tasks[0]._replace(refused=tasks[0].refused | refused)
        return tasks if inputs.queued is None else [*tasks, inputs.queued]

    def _refused(self, batch: "_Batch") -> Iterator[int]:
        """The indices of the batch's images that DALI refuses, found by decoding each alone."""
        rows = deque(range(len(batch.indices)))
        while rows:
            singles = iter([batch.samples.part(slice(row, row + 1), self.on_gpu) for row in rows])
            pipeline = self._start(1, singles)
            try:
                while rows:
                    pipeline.run()
                    rows.popleft()
            except MemoryError as error:
                raise self._no_memory() from error
            except Exception:
                del pipeline  # free its memory before the next pipeline
                yield batch.indices[rows.popleft()]

    def _start(self, batch_size: int, inputs: Iterator[tuple[Any, ...]]) -> Any:
        """A pipeline. Raises UserError if DALI or the GPU driver does not work."""
        try:
            return self._build(batch_size, inputs)
        except Exception as error:
            raise UserError(
                f"loader: DALI does not start here ({_what(error)}); use --loader lmdb or folder"
            ) from error

    def _build(self, batch_size: int, inputs: Iterator[tuple[Any, ...]]) -> Any:
        from nvidia.dali import Pipeline, fn, types

        spec, dim = self.reader.spec, self.reader.side
        pipeline = Pipeline(
            batch_size=batch_size,
            num_threads=self.num_threads,
            device_id=_index(self.device) if self.on_gpu else None,
            prefetch_queue_depth=_DEPTH,
        )
        with pipeline:
            encoded, start, shape, *rest = fn.external_source(
                inputs,
                num_outputs=6 if self.on_gpu else 3,
                dtype=[types.UINT8, *[types.INT32] * 2]
                + [types.FLOAT, *[types.INT32] * 2] * self.on_gpu,
                ndim=[1] * 3 + [1, 1, 0] * self.on_gpu,
            )
            images = fn.decoders.image_slice(
                encoded,
                device="mixed" if self.on_gpu else "cpu",
                start=start,
                shape=shape,
                axes=[0, 1],
                output_type=types.GRAY if spec.channels == 1 else types.RGB,
                adjust_orientation=False,  # as in the other loaders
            )
            if self.on_gpu:
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
        """Resize, crop and flip the decoded crops of different sizes."""
        dim, channels = self.reader.side, self.reader.spec.channels
        out = torch.empty((len(images), channels, dim, dim), dtype=torch.uint8)

        def view(row: int) -> None:
            planes = torch.from_numpy(np.asarray(images.at(row))).permute(2, 0, 1)
            height, width = samples.size[row].astype(int).tolist()
            top, left = samples.window[row].tolist()
            planes = decode.resize_window(planes, (height, width), (top, left), dim)
            out[row] = planes.flip(-1) if samples.flip[row] else planes

        list(pool.map(view, range(len(images))))  # reads all results, which raises their errors
        return out

    def _from_gpu(self, images: Any) -> Tensor:
        from nvidia.dali.plugin.pytorch import feed_ndarray

        dense = images.as_tensor()
        out = torch.empty(dense.shape(), dtype=torch.uint8, device=self.device)
        feed_ndarray(dense, out, cuda_stream=torch.cuda.current_stream(self.device))
        return out


def _what(error: Exception) -> str:
    """A DALI exception, which may have many lines, as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "rror" in line), next(iter(lines), repr(error)))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


class _Samples(NamedTuple):
    """A batch as the pipeline's input. Sizes and positions are (vertical, horizontal), pixels."""

    encoded: list[NDArray[np.uint8]]
    start: NDArray[np.int32]  # (n, 2) crop box in the image
    shape: NDArray[np.int32]  # (n, 2)
    size: NDArray[np.float32]  # (n, 2) to resize the crop to
    window: NDArray[np.int32]  # (n, 2) place of the view in the resized crop
    flip: NDArray[np.int32]  # (n,)

    def part(self, rows: slice, whole_view: bool) -> tuple[Any, ...]:
        """Some rows; without `whole_view` only the fields that decoding needs."""
        return tuple(field[rows] for field in self[: len(self) if whole_view else 3])


class _Task(NamedTuple):
    """A request, and the indices of its images that DALI refused."""

    request: Request
    refused: frozenset[int] = frozenset()


class _Batch(NamedTuple):
    task: _Task
    samples: _Samples
    indices: list[int]  # of the images; for a skipped one, of its replacement
    labels: NDArray[np.int64]
    skipped: list[str]


class _Inputs:
    """The iterator over DALI's batches. A thread reads one batch ahead, others its images.

    Attributes:
        in_flight: the batches that DALI has taken and not yet returned.
        queued: the task that is read ahead.
        error: what reading raised, through DALI.
    """

    def __init__(self, source: DaliLoader, draw: Callable[[], _Task | None]) -> None:
        self.reader = source.reader
        self._whole_view = source.on_gpu
        self.in_flight: deque[_Batch] = deque()
        self.queued: _Task | None = None
        self.error: Exception | None = None
        self._draw = draw
        self._thread = ThreadPoolExecutor(1, "dali-reader")
        self._rows = ThreadPoolExecutor(source.num_threads, "dali-images")
        self._ahead: Future[_Batch] | None = None

    def __enter__(self) -> Self:
        self._submit()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._rows.shutdown()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[Any, ...]:
        if self._ahead is None:
            raise StopIteration
        try:
            batch = self._ahead.result()
        except Exception as error:
            self.error = error
            raise
        self._submit()
        self.in_flight.append(batch)
        return batch.samples.part(slice(None), self._whole_view)

    def _submit(self) -> None:
        # Draw requests in the caller's thread, as they come from a shared iterator.
        self.queued = self._draw()
        self._ahead = None if self.queued is None else self._thread.submit(self._read, self.queued)

    def _map(self, function: Callable[[int], _T], rows: range) -> Iterator[_T]:
        """Like `map`, with a few rows at a time in each thread."""
        parts = (rows[at : at + _ROWS] for at in range(0, len(rows), _ROWS))
        return itertools.chain.from_iterable(
            self._rows.map(lambda part: [function(row) for row in part], parts)
        )

    def _part(self, height: int, width: int) -> decode.Part:
        """What to decode and resize for the test view of an image of this size."""
        dim = self.reader.side
        size, corner = decode.test_geometry(height, width, dim, self.reader.spec.test_zoom)
        # On the CPU `decode.resize_window` crops very long images.
        part = decode.part_of_long((height, width), size, corner, dim) if self._whole_view else None
        return part or decode.Part((0, 0), (height, width), size, corner)

    def _read(self, task: _Task) -> _Batch:
        request = task.request
        spec, dim = self.reader.spec, self.reader.side

        def read_one(row: int) -> tuple[NDArray[np.uint8], tuple[int, int], int, int]:
            index = int(request.indices[row])
            data, label = self.reader.store.read(index)
            try:
                data, sides = _for_dali(data, spec.channels, index in task.refused)
            except decode.DECODE_ERRORS as error:
                raise self.reader.damaged(index, label, error) from error
            return np.frombuffer(data, np.uint8), sides, label, row

        rows, skipped = self.reader.each(request, read_one, self._map)
        count = len(rows)
        encoded = [data for data, *_ in rows]
        sides = np.array([pair for _, pair, *_ in rows], np.int64)
        labels = np.array([label for *_, label, _ in rows], np.int64)
        rows_shown = [row for *_, row in rows]
        if request.uniforms is not None and spec.augment == "resized_crop":
            draws = request.uniforms[rows_shown]
            crops = resized_crop_params(draws, sides[:, 0], sides[:, 1], spec.flip)
            samples = _Samples(
                encoded,
                start=np.stack([crops.top, crops.left], 1).astype(np.int32),
                shape=np.stack([crops.height, crops.width], 1).astype(np.int32),
                size=np.full((count, 2), dim, np.float32),
                window=np.zeros((count, 2), np.int32),
                flip=crops.flip.astype(np.int32),
            )
        else:
            parts = [self._part(height, width) for height, width in sides.tolist()]
            samples = _Samples(
                encoded,
                start=np.array([part.start for part in parts], np.int32),
                shape=np.array([part.shape for part in parts], np.int32),
                size=np.array([part.size for part in parts], np.float32),
                window=np.array([part.corner for part in parts], np.int32),
                flip=np.zeros(count, np.int32),
            )
        return _Batch(task, samples, request.indices[rows_shown].tolist(), labels, skipped)


def _for_dali(data: bytes, channels: int, refused: bool) -> tuple[bytes, tuple[int, int]]:
    """Bytes that DALI decodes to the pixels of `decode.decode`, and their (height, width).

    Sound JPEGs are unchanged. Other images (PNG, CMYK, cut short, refused by DALI ...) are decoded
    here, which may raise, and returned as uncompressed PPM or PGM.
    """
    size = None if refused else decode.plain_jpeg_size(data)
    if size is not None and decode.is_sound_jpeg(data):
        return data, size
    pixels = decode.decode(data, channels)
    height, width = pixels.shape[:2]
    head = b"P%d %d %d 255\n" % (6 if channels == 3 else 5, width, height)
    return head + pixels.tobytes(), (height, width)
