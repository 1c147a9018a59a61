"""torchvision's archives of small sets, extracted or as downloaded."""

import contextlib
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bip.errors import UserError
from bip.files import raise_passing

if TYPE_CHECKING:
    from bip.data.stores.base import ArraySplit


def read_torchvision(name: str, folder: str, place: Path, train: bool) -> "ArraySplit":
    """A split of `torchvision.datasets.NAME`, whose files are in a folder called `folder`.

    Args:
        place: that folder, or a .tar file of it. It is never written to, as several processes may
            read it at the same time.

    Raises:
        UserError: files are missing or damaged.
        OSError: the file system is unreachable.
    """
    import numpy as np
    from torchvision import datasets

    from bip.data.stores.base import ArraySplit

    with contextlib.nullcontext(place.parent) if place.is_dir() else _extracted(place) as root:
        try:
            # torchvision checks each file's MD5 before it unpickles it.
            source = getattr(datasets, name)(root, train=train, download=False)
        except RuntimeError as error:
            try:  # torchvision reports an unreachable file as missing
                for path in (root / folder).iterdir():
                    path.stat()
            except OSError as unreachable:
                raise_passing(unreachable, place)
            raise UserError(
                f"{place}: {name} files are missing or damaged (MD5); download them again"
            ) from error
    images = np.ascontiguousarray(source.data.transpose(0, 3, 1, 2))
    return ArraySplit(images, np.array(source.targets, np.int64), list(source.classes))


@contextlib.contextmanager
def _extracted(archive: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bip-") as folder:
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
        except (tarfile.TarError, OSError, EOFError) as error:
            raise_passing(error, f"{archive}, being extracted to {folder}")
            raise UserError(
                f"{archive}: cannot be extracted ({error}); download it again"
            ) from error
        yield Path(folder)
