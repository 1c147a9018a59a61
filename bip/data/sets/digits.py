"""Digits: the UCI optical digits, 8 x 8 pixels, which come with scikit-learn."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from bip.data.sets import Archive, DatasetSpec
from bip.errors import UserError

if TYPE_CHECKING:
    from bip.data.stores.base import ArraySplit

_TEST = 360  # the last images


def _read(_: Path, train: bool) -> "ArraySplit":
    import numpy as np

    from bip.data.stores.base import ArraySplit

    # Read the table directly: importing scikit-learn would take most of a second.
    package = importlib.util.find_spec("sklearn")
    init = package and package.origin  # None if it is only a folder of this name
    table = Path(init).parent / "datasets/data/digits.csv.gz" if init else None
    if table is None or not table.exists():
        raise UserError(
            "dataset: Digits comes with scikit-learn (its datasets/data/digits.csv.gz);"
            " pip install 'bip-hpc[demo]'"
        )
    rows = np.loadtxt(table, delimiter=",")  # (1797, 65): 64 values 0 ... 16, and the label
    pixels, labels = rows[:, :-1], rows[:, -1]
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    part = slice(None, -_TEST) if train else slice(-_TEST, None)
    return ArraySplit(images[part], labels[part].astype(np.int64), [str(i) for i in range(10)])


SPEC = DatasetSpec(
    name="Digits",
    classes=10,
    channels=1,
    image_dim=8,
    mean=(0.3054,),
    std=(0.3753,),
    augment="pad_crop",
    padding=1,
    flip=False,  # a mirrored digit is not a digit
    archive=Archive(_read),
)
