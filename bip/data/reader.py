"""The interface of loaders, and the reading and decoding of stored images for them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bip.data import decode
from bip.data.options import DataOptions
from bip.data.stores.base import ArraySplit, DamagedImage, ImageStore
from bip.errors import UserError

Batch = tuple[Tensor, Tensor]  # images and labels
Item = tuple[Tensor, NDArray[np.int64], list[str]]  # images, labels, skipped ones
Split = ImageStore | ArraySplit
Layout = Literal["any", "lmdb", "archive", "folder"]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Request:
    """One rank's share of a batch.

    Attributes:
        indices: into the split, shape (n,).
        uniforms: the random numbers of the training view, shape (n, draws); None asks for the
            test view.
    """

    indices: NDArray[np.int64]
    uniforms: NDArray[np.float64] | None = None


class Loader(ABC):
    """Fetches one split's images. Each file of `bip.data.loaders` defines a subclass.

    Attributes:
        layout: the layout on disk that it reads.
        in_memory: it reads all images before training, so it suits small sets only; it also takes
            splits that come decoded.
    """

    layout: ClassVar[Layout] = "any"
    in_memory: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, split: Split, options: DataOptions, device: torch.device) -> None: ...

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def fetch(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """For each request uint8 images (n, C, H, W) and int64 labels (n,), on the device.

        It may take requests ahead of their batches. A batch is valid until the next one is taken.
        For "resized_crop" images are the random view. For "pad_crop" they are whole; its crop is
        applied to the batch afterwards.
        """


class Reader:
    """Reads and decodes the images of requests; each worker process has one."""

    def __init__(self, store: ImageStore, options: DataOptions) -> None:
        self.store = store
        self.spec = options.spec
        self.side = options.side
        self.skip_bad = options.skip_bad

    def read(self, request: Request, shared: bool = False) -> Item:
        """uint8 images (n, C, H, W), labels (n,), and a line for each image replaced.

        Labels are a NumPy array: every tensor from a worker costs a connection to it.

        Args:
            shared: decode into memory that other processes can map, which saves a copy.

        Raises:
            DamagedImage: an image is damaged, unless `skip_bad` and the request is for training.
            UserError: the store cannot be read.
            OSError: its file system is unreachable for now.
        """
        random = request.uniforms is not None and self.spec.augment == "resized_crop"
        shape = (len(request.indices), self.spec.channels, self.side, self.side)
        images = _shared_bytes(shape) if shared else torch.empty(shape, dtype=torch.uint8)

        def read_one(row: int) -> tuple[int, int]:
            index = int(request.indices[row])
            data, label = self.store.read(index)
            draws = request.uniforms[row] if request.uniforms is not None and random else None
            try:
                images[row] = torch.from_numpy(self._view(data, draws))
            except decode.DECODE_ERRORS as error:
                raise self.damaged(index, label, error) from error
            return row, label

        pairs, skipped = self.each(request, read_one)
        for row, (origin, _) in enumerate(pairs):
            if origin != row:
                images[row] = images[origin]
        return images, np.array([label for _, label in pairs], np.int64), skipped

    def each(
        self,
        request: Request,
        read_one: Callable[[int], _T],
        map_: Callable[[Callable[[int], _T | str], range], Iterable[_T | str]] = map,
    ) -> tuple[list[_T], list[str]]:
        """`read_one` of every row; with `skip_bad` a bad row becomes the nearest good one after it.

        It is taken from the same batch, so that it is never an image of the holdout.

        Args:
            read_one: returns no str.
            map_: like `map`; it may work on several rows at once.
        """

        def read_or_report(row: int) -> _T | str:
            try:
                return read_one(row)
            except DamagedImage as error:
                if request.uniforms is None:
                    raise
                if not self.skip_bad:
                    raise DamagedImage(f"{error}, or give --skip-bad") from error
                return str(error)

        self.store.check_unchanged()
        self.store.prefetch(request.indices.tolist())
        rows = list(map_(read_or_report, range(len(request.indices))))
        skipped = [row for row in rows if isinstance(row, str)]
        found = [None if isinstance(row, str) else row for row in rows]
        good = [item for item in found if item is not None]
        if not good and skipped:
            raise UserError(f"{skipped[0]}; all other images of its batch are damaged too")
        for row in reversed(range(len(found))):
            if found[row] is None:
                found[row] = found[(row + 1) % len(found)] or good[0]
        return [item for item in found if item is not None], skipped

    def damaged(self, index: int, label: int, error: Exception) -> DamagedImage:
        """The error for an image that does not decode."""
        return DamagedImage(
            f"{self.store.name(index)} (image {index}, class {self.store.classes[label]}) does not "
            f"decode ({decode.reason(error)}); repair or remove it and build the store again"
        )

    def _view(self, data: bytes, draws: NDArray[np.float64] | None) -> NDArray[np.uint8]:
        spec, side = self.spec, self.side
        if draws is None:
            return decode.test_view(decode.decode(data, spec.channels), side, spec.test_zoom)
        return decode.resized_crop(data, draws, spec.channels, side, spec.flip)


def _shared_bytes(shape: tuple[int, ...]) -> Tensor:
    # As DataLoader's own collation does in a worker. torch has no public call that saves the copy.
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


class Skips:
    """Prints a warning, once, for each image that was replaced, with the number so far."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def report(self, skipped: Iterable[str]) -> None:
        for line in skipped:
            if line not in self._known:
                self._known.add(line)
                print(f"warning: skipped ({len(self._known)} so far): {line}", flush=True)
