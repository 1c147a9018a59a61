"""The known image sets, and how to find one on disk."""

import difflib
import importlib.util
import os
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bip.data.published import open_store
from bip.data.stores import FolderStore, ImageStore
from bip.errors import UserError
from bip.files import raise_passing

Layout = Literal["any", "lmdb", "archive", "folder"]


@dataclass(frozen=True)
class DatasetSpec:
    """What the program knows of an image set before it has seen it.

    Attributes:
        name: the name the user gives; its folder below data_dir, too.
        classes: number of classes.
        channels: 1 (grayscale) or 3 (RGB).
        image_dim: height and width of the network's input, pixels.
        mean, std: per channel, of pixels scaled to [0, 1].
        augment: the random view, "pad_crop" or "resized_crop" (`bip.data.augment`).
        padding: of pad_crop, pixels on each side.
        flip: mirror half of the training images.
        small: fits into memory whole, decoded.
    """

    name: str
    classes: int
    channels: int
    image_dim: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Literal["pad_crop", "resized_crop"]
    padding: int
    flip: bool
    small: bool

    @property
    def test_zoom(self) -> float:
        """Short side of the test image before its central crop, over image_dim."""
        return 256 / 224 if self.augment == "resized_crop" else 1.0


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_SPECS = (
    DatasetSpec(
        name="CIFAR10",
        classes=10,
        channels=3,
        image_dim=32,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        augment="pad_crop",
        padding=4,
        flip=True,
        small=True,
    ),
    DatasetSpec(
        name="CIFAR100",
        classes=100,
        channels=3,
        image_dim=32,
        mean=(0.5071, 0.4866, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        augment="pad_crop",
        padding=4,
        flip=True,
        small=True,
    ),
    DatasetSpec(
        name="TinyImageNet",
        classes=200,
        channels=3,
        image_dim=64,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        augment="pad_crop",
        padding=4,
        flip=True,
        small=True,
    ),
    DatasetSpec(
        name="ImageNet",
        classes=1000,
        channels=3,
        image_dim=224,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        augment="resized_crop",
        padding=0,
        flip=True,
        small=False,
    ),
    DatasetSpec(  # scikit-learn's copy of the UCI optical digits; a mirrored digit is no digit
        name="Digits",
        classes=10,
        channels=1,
        image_dim=8,
        mean=(0.3054,),
        std=(0.3753,),
        augment="pad_crop",
        padding=1,
        flip=False,
        small=True,
    ),
)
_ALIASES = {"ImageNetOrigin": "ImageNet", "ImageNetLMDB": "ImageNet"}

_DIGITS_TEST = 360

# torchvision's names: of the extracted folder, of the archive
CIFAR_ARCHIVES = {
    "CIFAR10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "CIFAR100": ("cifar-100-python", "cifar-100-python.tar.gz"),
}


def dataset_spec(name: str) -> DatasetSpec:
    """The set of that name or alias. Raises UserError for an unknown one, with the nearest."""
    specs = {spec.name: spec for spec in _SPECS}
    wanted = _ALIASES.get(name, name)
    if wanted in specs:
        return specs[wanted]
    known = [*specs, *_ALIASES]
    lowered = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), lowered, n=1)
    hint = f"perhaps you meant {lowered[near[0]]}" if near else f"known: {', '.join(known)}"
    raise UserError(f"dataset: unknown {name!r}; {hint}")


@dataclass(frozen=True)
class ArraySplit:
    """A split that lies decoded in memory.

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


def open_split(
    name: str, data_dir: Path, train: bool, layout: Layout = "any"
) -> ImageStore | ArraySplit:
    """The training or the test split of a set, from what lies in `data_dir` or `data_dir`/NAME.

    Looked for in this order: LMDB (`train.lmdb`; `test.lmdb` or `val.lmdb`), torchvision's
    archives (CIFAR; extracted or .tar.gz, never downloaded), an ImageFolder tree (`train/`;
    `test/` or `val/`, whichever has class folders). `layout` narrows it to one of them. Digits
    comes with scikit-learn and takes no `data_dir`.

    Raises:
        UserError: nothing found, or what is found is damaged.
        OSError: its file system is away.
    """
    spec = dataset_spec(name)
    if spec.name == "Digits":
        return _digits(train)
    splits = ("train",) if train else ("test", "val")
    for root in (data_dir, data_dir / spec.name):
        if layout in ("any", "lmdb"):
            for split in splits:
                if (root / f"{split}.lmdb").exists():
                    names = [str(number) for number in range(spec.classes)]
                    return open_store(root / f"{split}.lmdb", names)
        if layout in ("any", "archive") and spec.name in CIFAR_ARCHIVES:
            folder, archive = CIFAR_ARCHIVES[spec.name]
            if (root / folder).is_dir():
                return _cifar(spec.name, root, root, train)
            if (root / archive).is_file():
                # Array tasks share data_dir, so it is never written to.
                with tempfile.TemporaryDirectory(prefix="bip-") as scratch:
                    _extract(root / archive, Path(scratch))
                    return _cifar(spec.name, Path(scratch), root / archive, train)
        if layout in ("any", "folder"):
            folders = [root / split for split in splits if (root / split).is_dir()]
            if folders:  # ImageNet's and TinyImageNet's test/ has neither classes nor labels
                return FolderStore(next(filter(_has_classes, folders), folders[0]))
    raise UserError(_not_found(spec, data_dir, splits, layout))


def _has_classes(folder: Path) -> bool:
    """Whether there are folders in it, but for TinyImageNet's images/."""
    try:
        with os.scandir(folder) as entries:
            return any(
                entry.name != "images" and not entry.name.startswith(".") and entry.is_dir()
                for entry in entries
            )
    except OSError as error:
        raise_passing(error, folder)  # else another folder would be taken for a moment's failure
        return False


def _not_found(spec: DatasetSpec, data_dir: Path, splits: tuple[str, ...], layout: Layout) -> str:
    if not data_dir.is_dir():
        problem = f"data_dir: {data_dir} does not exist or is no folder"
    else:
        places: list[str] = []
        if layout in ("any", "lmdb"):
            places += [f"{split}.lmdb" for split in splits]
        if layout in ("any", "archive"):
            places += CIFAR_ARCHIVES.get(spec.name, ())
        if layout in ("any", "folder"):
            places += [f"{split}/" for split in splits]
        problem = f"data_dir: {data_dir} holds no {spec.name} ({' or '.join(places)})"
    return f"{problem}; build it with: python -m bip data build-lmdb SRC {data_dir}"


def _digits(train: bool) -> ArraySplit:
    # Its file alone: importing scikit-learn would take each rank most of a second.
    package = importlib.util.find_spec("sklearn")
    init = package and package.origin  # None of a folder that happens to be called so
    table = Path(init).parent / "datasets/data/digits.csv.gz" if init else None
    if table is None or not table.exists():
        raise UserError(
            "dataset: Digits comes with scikit-learn (its datasets/data/digits.csv.gz);"
            " pip install 'bip-hpc[demo]'"
        )
    rows = np.loadtxt(table, delimiter=",")  # (1797, 65): 64 values 0 ... 16, and the label
    pixels, labels = rows[:, :-1], rows[:, -1]
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    part = slice(None, -_DIGITS_TEST) if train else slice(-_DIGITS_TEST, None)
    return ArraySplit(images[part], labels[part].astype(np.int64), [str(i) for i in range(10)])


def _extract(archive: Path, folder: Path) -> None:
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise_passing(error, f"{archive}, being extracted to {folder}")
        raise UserError(f"{archive}: cannot be extracted ({error}); download it again") from error


def _cifar(name: str, root: Path, named: Path, train: bool) -> ArraySplit:
    from torchvision import datasets

    try:
        # torchvision checks each file's MD5 before it unpickles it.
        source = getattr(datasets, name)(root, train=train, download=False)
    except RuntimeError as error:
        try:  # torchvision takes a file that cannot be reached for missing
            for path in (root / CIFAR_ARCHIVES[name][0]).iterdir():
                path.stat()
        except OSError as away:
            raise_passing(away, named)
        raise UserError(
            f"{named}: {name} files are missing or damaged (MD5); download them again"
        ) from error
    images = np.ascontiguousarray(source.data.transpose(0, 3, 1, 2))
    return ArraySplit(images, np.array(source.targets, np.int64), list(source.classes))
