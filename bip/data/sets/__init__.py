"""The known data sets, one per file; to add a data set, add a file here.

Every file defines SPEC, a `DatasetSpec`. It imports torch, torchvision and the like only inside
functions: `bip.config` reads the names, and commands that do not train must start fast.
"""

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bip.errors import UserError

if TYPE_CHECKING:
    from bip.data.stores.base import ArraySplit

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Archive:
    """A data set's own files, all of which `read` decodes.

    Attributes:
        read: called with (path of one of `places`, whether to read the training split).
        places: names of files or folders, searched below data_dir in this order. Empty for a set
            that is part of an installed package: then `read` gets data_dir.
    """

    read: Callable[[Path, bool], "ArraySplit"]
    places: tuple[str, ...] = ()


@dataclass(frozen=True)
class DatasetSpec:
    """The facts of a data set that are known before its files are opened.

    Attributes:
        name: its name for --dataset, and of its folder below data_dir.
        aliases: other names of the same set.
        classes: number of classes.
        channels: 1 (grayscale) or 3 (RGB).
        image_dim: height and width of the network's input, pixels.
        mean, std: per channel, of pixels scaled to [0, 1].
        augment: the random view, "pad_crop" or "resized_crop" (`bip.data.augment`).
        padding: of pad_crop, pixels on each side.
        flip: mirror half of the training images.
        small: fits into memory, decoded.
        archive: for a set that comes in its own files, which are neither LMDB nor an ImageFolder.
    """

    name: str
    classes: int
    channels: int
    image_dim: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Literal["pad_crop", "resized_crop"]
    padding: int = 0
    flip: bool = True
    small: bool = True
    aliases: tuple[str, ...] = ()
    archive: Archive | None = None

    @property
    def test_zoom(self) -> float:
        """Short side of the test image before its central crop, over image_dim."""
        return 256 / 224 if self.augment == "resized_crop" else 1.0


@functools.cache
def specs() -> dict[str, DatasetSpec]:
    """Every data set by its name, in the order of the files."""
    found = [
        importlib.import_module(f"{__name__}.{module.name}").SPEC
        for module in pkgutil.iter_modules(__path__)
    ]
    return {spec.name: spec for spec in found}


def names() -> tuple[str, ...]:
    """All names that --dataset takes, aliases included."""
    return tuple(name for spec in specs().values() for name in (spec.name, *spec.aliases))


def canonical(name: str) -> str:
    """The set's own name for a name or alias. Raises UserError as `dataset_spec`."""
    return dataset_spec(name).name


def dataset_spec(name: str) -> DatasetSpec:
    """The set of that name or alias. Raises UserError for an unknown one, with the nearest."""
    for spec in specs().values():
        if name in (spec.name, *spec.aliases):
            return spec
    lowered = {known.lower(): known for known in names()}
    near = difflib.get_close_matches(name.lower(), lowered, n=1)
    hint = f"perhaps you meant {lowered[near[0]]}" if near else f"known: {', '.join(names())}"
    raise UserError(f"dataset: unknown {name!r}; {hint}")
