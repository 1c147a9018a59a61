"""The two splits of a data set: find them on disk, compare them, copy them to the node."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from bip.data.layouts import describe_left_out, different_classes
from bip.data.loaders import loader_class
from bip.data.options import DataOptions
from bip.data.reader import Layout, Split
from bip.data.sets import DatasetSpec, dataset_spec
from bip.data.stores.base import ArraySplit
from bip.data.stores.folder import FolderStore
from bip.data.stores.lmdb import LmdbStore
from bip.data.stores.published import open_store
from bip.data.stores.staging import network_filesystem, stage
from bip.data.trees import is_system
from bip.errors import UserError
from bip.files import raise_passing
from bip.machine import expanded


def open_split(name: str, data_dir: Path, train: bool, layout: Layout = "any") -> Split:
    """The training or the test split of a set, from `data_dir` or `data_dir`/NAME.

    Searches in this order: LMDB (`train.lmdb`; `test.lmdb` or `val.lmdb`), the set's own archive
    (`bip.data.sets`; never downloaded), an ImageFolder tree (`train/`; `test/` or `val/`, the one
    that has class folders). `layout` limits the search to one of them. A set that is part of an
    installed package needs no `data_dir`.

    Raises:
        UserError: nothing is found, or it is damaged.
        OSError: its file system is unreachable.
    """
    spec = dataset_spec(name)
    archive = spec.archive
    if archive is not None and not archive.places:
        return archive.read(data_dir, train)
    splits = ("train",) if train else ("test", "val")
    for root in (data_dir, data_dir / spec.name):
        if layout in ("any", "lmdb"):
            for split in splits:
                if (root / f"{split}.lmdb").exists():
                    class_names = [str(number) for number in range(spec.classes)]
                    return open_store(root / f"{split}.lmdb", class_names)
        if layout in ("any", "archive") and archive is not None:
            for place in archive.places:
                if (root / place).exists():
                    return archive.read(root / place, train)
        if layout in ("any", "folder"):
            folders = [root / split for split in splits if (root / split).is_dir()]
            if folders:  # the test/ folders of ImageNet and TinyImageNet have no labels
                return FolderStore(next(filter(_has_classes, folders), folders[-1]))
    raise UserError(_not_found(spec, data_dir, splits, layout))


def _has_classes(folder: Path) -> bool:
    """Whether it holds class folders, that is, folders other than TinyImageNet's images/."""
    try:
        with os.scandir(folder) as entries:
            return any(
                entry.name != "images" and not is_system(entry.name) and entry.is_dir()
                for entry in entries
            )
    except OSError as error:
        raise_passing(error, folder)  # else a passing failure would select the other folder
        return False


def _not_found(spec: DatasetSpec, data_dir: Path, splits: tuple[str, ...], layout: Layout) -> str:
    if not data_dir.is_dir():
        problem = f"data_dir: {data_dir} does not exist or is not a folder"
    else:
        places: list[str] = []
        if layout in ("any", "lmdb"):
            places += [f"{split}.lmdb" for split in splits]
        if layout in ("any", "archive") and spec.archive is not None:
            places += spec.archive.places
        if layout in ("any", "folder"):
            places += [f"{split}/" for split in splits]
        problem = f"data_dir: {data_dir} holds no {spec.name} ({' or '.join(places)})"
    return f"{problem}; build it with: python -m bip data build-lmdb SRC {data_dir}"


def open_splits(options: DataOptions) -> tuple[Split, Split]:
    """The training and the test split, checked: classes, and that the loader can read them.

    Raises UserError and OSError as `open_split`.
    """
    loader = None if options.loader == "auto" else loader_class(options.loader)
    spec = options.spec
    if loader is not None and loader.in_memory and not spec.small:
        raise UserError(
            f"loader: {options.loader} is for small sets, not {spec.name}; use lmdb or folder"
        )
    layout = _layout(options)
    train, test = (
        open_split(options.dataset, options.data_dir, part, layout) for part in (True, False)
    )
    if loader is not None and not loader.in_memory and isinstance(train, ArraySplit):
        raise UserError(
            f"loader: {options.loader} does not apply to {spec.name}, whose images come "
            "decoded; use auto or memory"
        )
    _check_classes(options, train.classes, test.classes)
    return train, test


def _layout(options: DataOptions) -> Layout:
    return "any" if options.loader == "auto" else loader_class(options.loader).layout


def _check_classes(options: DataOptions, train: list[str], test: list[str]) -> None:
    dataset, data_dir = options.dataset, options.data_dir
    odd = different_classes(train, test)
    if odd is not None:
        raise UserError(
            f"data_dir: the training and test splits of {dataset} in {data_dir} have different "
            f"classes ({len(train)} and {len(test)}; {odd} differs); add or remove its images"
        )
    if len(train) != options.classes:
        raise UserError(
            f"num_classes: {options.classes}, but {dataset} in {data_dir} has {len(train)} "
            f"classes; use --num-classes {len(train)}"
        )


def identity(*splits: Split) -> dict[str, str]:
    """{"images": "50000 + 10000 images of 10 classes (1f6e0c2a)", ...}, for any loader.

    For LMDB stores also a digest of their totals.
    """
    counts = (len(s.labels if isinstance(s, ArraySplit) else s) for s in splits)
    classes = splits[0].classes
    digest = hashlib.sha256("\n".join(classes).encode()).hexdigest()[:8]
    counted = f"{' + '.join(map(str, counts))} images of {len(classes)} classes ({digest})"
    found = {"images": counted}
    headers = [split.header for split in splits if isinstance(split, LmdbStore)]
    if len(headers) == len(splits):
        totals = [(header["class_counts"], header["image_bytes"]) for header in headers]
        digest = hashlib.sha256(json.dumps(totals).encode()).hexdigest()[:8]
        found["stores"] = f"LMDB stores with totals {digest}"
    return found


def stage_data(options: DataOptions, give_up: Callable[[], None]) -> None:
    """Copy the stores to `stage_to`, on the node's disk, if it is set.

    Call it before the ranks meet: a node may copy for longer than the others would wait.
    """
    if (folder := _stage_folder(options)) is None:
        return
    for train in (True, False):
        split = open_split(options.dataset, options.data_dir, train, _layout(options))
        if not isinstance(split, ArraySplit | FolderStore):
            stage(split.path, folder, give_up)


def _stage_folder(options: DataOptions) -> Path | None:
    """`stage_to` on this node, whose variables it may name."""
    return options.stage_to and Path(expanded(str(options.stage_to), "stage_to"))


def local_copy(split: Split, options: DataOptions, in_memory: bool, first: bool) -> Split:
    """The split's copy on the node's disk, if requested; else the split, perhaps with a hint.

    Args:
        in_memory: the split is read once, before training.
        first: print warnings.
    """
    stage_to = _stage_folder(options)
    if isinstance(split, ArraySplit):
        if stage_to is not None and first:
            print("warning: stage_to: no effect, the images are in memory before training")
        return split
    if stage_to is not None:
        if isinstance(split, FolderStore):
            raise UserError(
                f"stage_to: copies LMDB stores, but {split.path} is a folder of images; build a "
                f"store first: python -m bip data build-lmdb {split.path.parent} OUT"
            )
        return open_store(stage(split.path, stage_to), split.classes)
    if isinstance(split, FolderStore) and first:
        for phrase in describe_left_out(split.left_out):
            print(f"warning: {split.path}: left out {phrase}")
    kind = network_filesystem(split.path)
    if kind is not None and first and not in_memory:
        hint = "build an LMDB store" if isinstance(split, FolderStore) else "give --stage-to DIR"
        print(f"warning: {split.path} lies on {kind}; {hint} to read from the node's own disk")
    return split
