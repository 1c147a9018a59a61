"""The two splits of a data set: found on disk, checked against each other, copied to the node."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from bip.data.loaders import loader_class
from bip.data.options import DataOptions
from bip.data.reader import Layout, Split
from bip.data.sets import DatasetSpec, dataset_spec
from bip.data.stores.base import ArraySplit
from bip.data.stores.folder import FolderStore
from bip.data.stores.lmdb import LmdbStore
from bip.data.stores.published import open_store
from bip.data.stores.staging import network_filesystem, stage
from bip.errors import UserError
from bip.files import raise_passing


def open_split(name: str, data_dir: Path, train: bool, layout: Layout = "any") -> Split:
    """The training or the test split of a set, from what lies in `data_dir` or `data_dir`/NAME.

    Looked for in this order: LMDB (`train.lmdb`; `test.lmdb` or `val.lmdb`), the set's own archive
    (`bip.data.sets`; never downloaded), an ImageFolder tree (`train/`; `test/` or `val/`, whichever
    has class folders). `layout` narrows it to one of them. A set that an installed package brings
    takes no `data_dir`.

    Raises:
        UserError: nothing found, or what is found is damaged.
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
            if folders:  # ImageNet's and TinyImageNet's test/ has neither classes nor labels
                return FolderStore(next(filter(_has_classes, folders), folders[0]))
    raise UserError(_not_found(spec, data_dir, splits, layout))


def _has_classes(folder: Path) -> bool:
    """Whether there are folders in it, other than TinyImageNet's images/."""
    try:
        with os.scandir(folder) as entries:
            return any(
                entry.name != "images" and not entry.name.startswith(".") and entry.is_dir()
                for entry in entries
            )
    except OSError as error:
        raise_passing(error, folder)  # else a short failure would select the other folder
        return False


def _not_found(spec: DatasetSpec, data_dir: Path, splits: tuple[str, ...], layout: Layout) -> str:
    if not data_dir.is_dir():
        problem = f"data_dir: {data_dir} does not exist or is no folder"
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
    if train != test:
        odd = sorted(set(train) ^ set(test)) or train
        raise UserError(
            f"data_dir: the training and test splits of {dataset} in {data_dir} have different "
            f"classes ({len(train)} and {len(test)}; {odd[0]!r} is not in both alike); where the "
            f"images lie flat, build a store: python -m bip data build-lmdb {data_dir} OUT"
        )
    if len(train) != options.classes:
        raise UserError(
            f"num_classes: {options.classes}, but {dataset} in {data_dir} has {len(train)} "
            f"classes; use --num-classes {len(train)}"
        )


def identity(*splits: Split) -> dict[str, str]:
    """{"images": "50000 + 10000 images of 10 classes (1f6e0c2a)", ...}, whatever the loader.

    Of LMDB stores a digest of their totals, too.
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
    """Copy the stores to `stage_to`, the node's disk; nothing if that is None.

    Call it before the ranks meet: one node may copy for longer than others would wait.
    """
    if options.stage_to is None:
        return
    for train in (True, False):
        split = open_split(options.dataset, options.data_dir, train, _layout(options))
        if not isinstance(split, ArraySplit | FolderStore):
            stage(split.path, options.stage_to, give_up)


def local_copy(split: Split, options: DataOptions, in_memory: bool, first: bool) -> Split:
    """The split's copy on the node's disk, if asked for; else a hint where it would help.

    Args:
        in_memory: it will be read once, before training begins.
        first: print warnings.
    """
    stage_to = options.stage_to
    if isinstance(split, ArraySplit):
        if stage_to is not None and first:
            print("warning: stage_to: no effect, the images are in memory before training begins")
        return split
    if stage_to is not None:
        if isinstance(split, FolderStore):
            raise UserError(
                f"stage_to: copies LMDB stores, but {split.path} is a folder of images; build a "
                f"store first: python -m bip data build-lmdb {split.path.parent} OUT"
            )
        return open_store(stage(split.path, stage_to), split.classes)
    kind = network_filesystem(split.path)
    if kind is not None and first and not in_memory:
        hint = "build an LMDB store" if isinstance(split, FolderStore) else "give --stage-to DIR"
        print(f"warning: {split.path} lies on {kind}; {hint} to read from the node's own disk")
    return split
