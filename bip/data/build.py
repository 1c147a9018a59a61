"""`python -m bip data build-lmdb` and `info`: LMDB stores from ImageFolder trees."""

import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import lmdb
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bip.data import decode
from bip.data.stores import LmdbStore, image_tree, walk_files
from bip.data.writer import LmdbWriter
from bip.errors import UserError

_SPLITS = ("train", "test", "val")


def build_lmdb(src: Path, out: Path) -> None:
    """Make OUT/train.lmdb, OUT/test.lmdb or OUT/val.lmdb from the ImageFolder tree SRC.

    SRC is a folder or a .zip that holds train/CLASS/IMAGE and test/ or val/ likewise (any one of
    them will do), perhaps inside one top folder. Classes are numbered, and images stored, in
    sorted order; the images' bytes are kept as they are. A store that is already there with the
    same classes and count is kept.

    Raises:
        UserError: no such tree, splits with different classes, a file that is no image, a store
            in OUT that differs, a full disk.
    """
    console = Console(stderr=True)
    with _open_tree(src) as tree:
        splits = _find_splits(tree.names())
        if not splits:
            raise UserError(
                f"{src}: no train/CLASS/IMAGE, test/CLASS/IMAGE or val/CLASS/IMAGE in it"
            )
        for split, (_, _, classes) in splits.items():
            first, (_, _, expected) = next(iter(splits.items()))
            if classes != expected:
                odd = sorted(set(classes) ^ set(expected))[0]
                raise UserError(f"{src}: class {odd!r} is only in one of {first}/ and {split}/")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{out}: cannot be made ({error.strerror})") from error
        for split, (prefix, members, classes) in splits.items():
            path = out / f"{split}.lmdb"
            if path.exists():
                _check_same(path, len(members), classes)
                console.print(f"{path}: there already, kept", highlight=False, soft_wrap=True)
                continue
            try:
                _write(path, tree, prefix, members, classes, console)
            except (OSError, lmdb.Error) as error:
                raise UserError(f"{path}: cannot be written ({error}); build it again") from error
            size = path.stat().st_size / 1e6
            console.print(
                f"{path}: {len(members)} images, {len(classes)} classes, {size:.0f} MB",
                highlight=False,
                soft_wrap=True,
            )


def info(path: Path) -> None:
    """Print what a store holds; for a folder, each of its stores.

    Raises:
        UserError: no store there, or a damaged one.
    """
    is_store = path.is_file() or (path / "data.mdb").exists()
    found = [path] if is_store else sorted(path.glob("*.lmdb"))
    if not found:
        raise UserError(
            f"{path}: no .lmdb store there; build one with: python -m bip data build-lmdb SRC OUT"
        )
    for file in found:
        header = LmdbStore(file).header
        counts = header["class_counts"]
        print(
            f"{file}: {header['count']} images, {len(header['classes'])} classes of "
            f"{min(counts)}-{max(counts)}, {header['image_bytes'] / 1e6:.1f} MB of images, "
            f"format version {header['version']}"
        )


class Tree(Protocol):
    """Files below a root, by their names relative to it, with forward slashes."""

    def names(self) -> Iterable[str]: ...

    def read(self, name: str) -> bytes: ...


class FolderTree:
    """A folder on disk."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> Iterable[str]:
        return walk_files(self.root)

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()


class ZipTree:
    """The members of a .zip file."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive

    def names(self) -> Iterable[str]:
        return self.archive.namelist()

    def read(self, name: str) -> bytes:
        return self.archive.read(name)


@contextmanager
def _open_tree(src: Path) -> Iterator[Tree]:
    if src.is_dir():
        yield FolderTree(src)
    elif not src.exists():
        raise UserError(f"{src}: does not exist")
    elif src.suffix.lower() == ".zip":
        try:
            archive = zipfile.ZipFile(src)
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{src}: not a readable .zip ({error})") from error
        with archive:
            yield ZipTree(archive)
    else:
        raise UserError(f"{src}: neither a folder nor a .zip")


Split = tuple[str, list[tuple[str, int]], list[str]]  # prefix, (name below it, label), classes


def _find_splits(names: Iterable[str]) -> dict[str, Split]:
    files = [name for name in names if not name.startswith("__MACOSX/")]
    tops = {name.partition("/")[0] for name in files}
    root = "" if len(tops) != 1 or tops & set(_SPLITS) else f"{tops.pop()}/"
    found: dict[str, Split] = {}
    for split in _SPLITS:
        prefix = f"{root}{split}/"
        below = (name.removeprefix(prefix) for name in files if name.startswith(prefix))
        members, classes = image_tree(below)
        if members:
            found[split] = (prefix, members, classes)
    return found


def _check_same(path: Path, count: int, classes: list[str]) -> None:
    store = LmdbStore(path)
    if len(store) != count or store.classes != classes:
        raise UserError(
            f"{path}: exists with {len(store)} images of {len(store.classes)} classes, the source "
            f"has {count} of {len(classes)}; remove it or choose another folder"
        )


def _write(
    path: Path,
    tree: Tree,
    prefix: str,
    members: list[tuple[str, int]],
    classes: list[str],
    console: Console,
) -> None:
    bar = Progress(
        TextColumn(path.name),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar, LmdbWriter(path, classes) as writer:
        for name, label in bar.track(members):
            try:
                data = tree.read(prefix + name)
                width, height = decode.open_image(data).size
            except (*decode.DECODE_ERRORS, zipfile.BadZipFile, RuntimeError) as error:
                raise UserError(
                    f"{prefix}{name} cannot be stored ({decode.reason(error)}); "
                    f"repair or remove it and build {path.name} again"
                ) from error
            writer.add(data, label, width, height)
