"""The interface of every store of images."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bip.errors import UserError

MAX_BYTES = (
    256 << 20
)  # of an encoded image; a larger file is not an image, and may not fit in memory


class DamagedImage(UserError):
    """The bytes or the label of one image are damaged. `skip_bad` skips this error only.

    Not for a failing disk, a missing file or damaged LMDB pages: there the image may be sound, and
    many more errors would follow.
    """


class ImageStore(Protocol):
    """A split of labelled, encoded images. Picklable, and cheap to pickle."""

    path: Path
    classes: list[str]

    def __len__(self) -> int: ...

    def prefetch(self, indices: Iterable[int]) -> None:
        """Hint that these images will be read soon. Does not change what is read."""
        ...

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded bytes and the label of one image.

        Raises:
            DamagedImage: the record is damaged.
            UserError: it cannot be read.
            OSError: its file system is unreachable.
        """
        ...

    def name(self, index: int) -> str:
        """The image's name in a message to the user."""
        ...

    def check_unchanged(self) -> None:
        """Raises UserError if the store's file is not the one that was opened, OSError if its file
        system is unreachable."""
        ...


@dataclass(frozen=True)
class ArraySplit:
    """A split that is decoded in memory.

    Attributes:
        images: uint8, shape (n, channels, height, width).
        labels: int64, shape (n,).
        classes: class names.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.images)


def too_large(size: int) -> str:
    """The message for a file of more than MAX_BYTES."""
    return f"is too large for an image: {size / 1e6:.0f} MB"
