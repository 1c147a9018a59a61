"""Folders of images, CLASS/IMAGE: `FolderStore`, and the order of images in any such tree."""

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np

from bip.data.stores.base import MAX_BYTES, DamagedImage, too_large
from bip.errors import UserError
from bip.files import raise_passing

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".gif"})


class FolderStore:
    """An ImageFolder tree, `path`/CLASS/.../FILE: classes and files in sorted order.

    Names are kept in one block of bytes, not as objects, so that forked workers share them.

    Raises:
        UserError: no images in `path`.
        OSError: its file system is unreachable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        members, self.classes = image_tree(walk_files(path))
        if not members:
            raise UserError(
                f"{path}: no CLASS/IMAGE files below it; if it has no class folders, build a "
                f"store: python -m bip data build-lmdb {path.parent} OUT"
            )
        self._labels = np.array([label for _, label in members], np.int32)
        names = [os.fsencode(name) for name, _ in members]
        self._names = b"".join(names)
        self._ends = np.cumsum([len(name) for name in names], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._labels)

    def name(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0
        return str(self.path / os.fsdecode(self._names[start : int(self._ends[index])]))

    def check_unchanged(self) -> None:
        """Nothing to do: a missing file is found when it is read."""

    def prefetch(self, indices: Iterable[int]) -> None:
        """Nothing to do: a file is read in one piece anyway."""

    def read(self, index: int) -> tuple[bytes, int]:
        """The file's bytes and its label. Raises UserError if the file cannot be read, OSError if
        its file system is unreachable."""
        name, label = self.name(index), int(self._labels[index])
        what = f"image {index}, class {self.classes[label]}"
        try:
            with open(name, "rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                if size > MAX_BYTES:
                    raise DamagedImage(f"{name} ({what}): {too_large(size)}; remove it")
                return stream.read(), label
        except OSError as error:
            raise_passing(error, f"{name} ({what})")
            raise UserError(f"{name}: cannot be read ({error.strerror}); {what}") from error


def image_tree(names: Iterable[str]) -> tuple[list[tuple[str, int]], list[str]]:
    """Sort relative names CLASS/.../IMAGE into ((name, label) of each image, class names).

    The same rule for folders and archives, so that both give the same order. Leaves out hidden
    files, and files without an image's suffix.
    """
    found: list[tuple[str, str]] = []
    for name in names:
        path = PurePosixPath(name)
        hidden = any(part.startswith(".") for part in path.parts)
        if len(path.parts) > 1 and not hidden and path.suffix.lower() in IMAGE_SUFFIXES:
            found.append((path.parts[0], name))
    found.sort()
    classes = sorted({class_name for class_name, _ in found})
    labels = {class_name: label for label, class_name in enumerate(classes)}
    return [(name, labels[class_name]) for class_name, name in found], classes


def walk_files(root: Path) -> Iterable[str]:
    """The files below a folder, by their names relative to it. Follows links.

    Raises:
        UserError: a folder cannot be read.
        OSError: its file system is unreachable.
    """
    for folder, _, files in os.walk(root, onerror=_unreadable, followlinks=True):
        prefix = os.path.relpath(folder, root)
        for file in files:
            yield file if prefix == "." else f"{prefix}/{file}"


def _unreadable(error: OSError) -> None:
    raise_passing(error, error.filename)
    raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
