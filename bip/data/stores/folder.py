"""Folders of images: `FolderStore`."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bip.data.layouts import folder_split
from bip.data.stores.base import MAX_BYTES, DamagedImage, too_large
from bip.data.trees import printable
from bip.errors import UserError
from bip.files import raise_passing


class FolderStore:
    """A split in a folder, `path`/CLASS/.../FILE or with a list of labels, as `build-lmdb` sees it.

    Names are kept in one block of bytes, not as objects, so that forked workers share them.

    Attributes:
        left_out: the reason for each file or folder that is not used, by its name.

    Raises:
        UserError: no images in `path`, or a layout that `bip.data.layouts` refuses.
        OSError: its file system is unreachable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        split, self.left_out = folder_split(path)
        self.classes = split.classes
        self._labels = np.array([label for _, label in split.members], np.int32)
        names = [os.fsencode(name) for name, _ in split.members]
        self._names = b"".join(names)
        self._ends = np.cumsum([len(name) for name in names], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._labels)

    def name(self, index: int) -> str:
        return printable(self._file(index))

    def check_unchanged(self) -> None:
        """Nothing to do: a missing file is found when it is read."""

    def prefetch(self, indices: Iterable[int]) -> None:
        """Nothing to do: a file is read in one piece anyway."""

    def read(self, index: int) -> tuple[bytes, int]:
        """The file's bytes and its label. Raises UserError if the file cannot be read, OSError if
        its file system is unreachable."""
        label = int(self._labels[index])
        what = f"image {index}, class {self.classes[label]}"
        try:
            with open(self._file(index), "rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                if size > MAX_BYTES:
                    raise DamagedImage(f"{self.name(index)} ({what}): {too_large(size)}; remove it")
                return stream.read(), label
        except OSError as error:
            raise_passing(error, f"{self.name(index)} ({what})")
            raise UserError(
                f"{self.name(index)}: cannot be read ({error.strerror}); {what}"
            ) from error

    def _file(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0
        return str(self.path.parent / os.fsdecode(self._names[start : int(self._ends[index])]))
