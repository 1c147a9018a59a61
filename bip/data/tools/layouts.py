"""The layouts that data sets come in: where the images of a source are, and their classes."""

import csv
import io
import os
import posixpath
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from PIL import Image

from bip.data.sets import specs
from bip.data.splits import open_split
from bip.data.stores.base import MAX_BYTES, ArraySplit, DamagedImage, too_large
from bip.data.stores.folder import IMAGE_SUFFIXES, image_tree, walk_files
from bip.errors import UserError

SPLITS = ("train", "test", "val")
_SYNSET_TAR = re.compile(r"(\./)?n\d{8}\.tar")
# Files that describe images: lists of labels and classes, archives of a class, annotations.
_ANNOTATIONS = re.compile(
    r"((train|test|val)(_annotations)?\.txt|LOC_\w+_solution\.csv|LOC_synset_mapping\.txt|"
    r"synsets\.txt|.*\.(tar|xml))$"
)
_XML_LABEL = re.compile(rb"<object>.*?<name>\s*([^<\s]+)\s*</name>", re.DOTALL)


class Tree(Protocol):
    """Files below a root, by their names relative to it, with forward slashes. Thread-safe."""

    def names(self) -> list[str]: ...

    def read(self, name: str) -> bytes: ...

    def size(self, name: str) -> int: ...


class FolderTree:
    """A folder on disk."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        return list(walk_files(self.root))

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def size(self, name: str) -> int:
        return (self.root / name).stat().st_size


class ZipTree:
    """The members of a .zip file."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive

    def names(self) -> list[str]:
        # Of members with the same name the last one counts, as in `read`.
        return [name for name in dict.fromkeys(self.archive.namelist()) if name[-1:] != "/"]

    def read(self, name: str) -> bytes:
        return self.archive.read(name)

    def size(self, name: str) -> int:
        return self.archive.getinfo(name).file_size


class TarTree:
    """The members of an uncompressed .tar file, and of the .tar files in it (ImageNet's).

    A member x.tar is read as a folder x; an archive of synset archives only
    (ILSVRC2012_img_train.tar) as their train/. Links are read as files. Threads share the file.

    Raises:
        UserError: an image, or a description of images, is stored sparse, or is a link to a file
            that the archive does not hold. Other such members are left out.
    """

    def __init__(self, path: Path, stream: io.BufferedReader) -> None:
        self._stream = stream
        self._places: dict[str, tuple[int, int]] = {}
        with tarfile.open(path, "r:") as archive:
            files = [member.name for member in archive if member.isfile()]
            packed = bool(files) and all(_SYNSET_TAR.fullmatch(name) for name in files)
            self._index(archive, "train/" if packed else "", 0)

    def _index(self, archive: tarfile.TarFile, prefix: str, base: int) -> None:
        links: dict[str, str] = {}
        for member in archive:
            name = prefix + member.name.removeprefix("./")
            if member.islnk():
                links[name] = posixpath.normpath(prefix + member.linkname)
            elif member.issym():
                target = posixpath.join(posixpath.dirname(name), member.linkname)
                links[name] = posixpath.normpath(target)
            elif member.issparse() and _matters(name):
                raise UserError(f"{name}: is stored sparse; pack the archive without --sparse")
            if not member.isfile() or member.issparse():
                continue
            start = base + member.offset_data
            if name.endswith(".tar"):
                inner = archive.extractfile(member)
                with tarfile.open(fileobj=inner, mode="r:") as nested:
                    self._index(nested, f"{name.removesuffix('.tar')}/", start)
            else:
                self._places[name] = start, member.size
        for name in links:
            target, seen = links[name], {name}
            while target in links and target not in seen:
                seen.add(target)
                target = links[target]
            if target not in self._places:
                if not _matters(name):
                    continue
                raise UserError(
                    f"{name}: links to {links[name]}, which is no file in the archive; pack it "
                    "with --dereference"
                )
            self._places[name] = self._places[target]

    def names(self) -> list[str]:
        return list(self._places)

    def read(self, name: str) -> bytes:
        start, size = self._places[name]
        data = os.pread(self._stream.fileno(), size, start)
        if len(data) != size:
            raise OSError(f"the archive ends within {name}")
        return data

    def size(self, name: str) -> int:
        return self._places[name][1]


def _matters(name: str) -> bool:
    """Whether a file of this name may be an image, or describe images."""
    path = PurePosixPath(name)
    return path.suffix.lower() in IMAGE_SUFFIXES or _ANNOTATIONS.match(path.name) is not None


class ArrayTree:
    """A set's own archive (`bip.data.sets`) as train/CLASS/NUMBER.png and test/CLASS/NUMBER.png."""

    def __init__(self, name: str, root: Path) -> None:
        self._places: dict[str, tuple[ArraySplit, int]] = {}
        for split, train in (("train", True), ("test", False)):
            arrays = open_split(name, root, train, "archive")
            assert isinstance(arrays, ArraySplit)
            for number, label in enumerate(arrays.labels.tolist()):
                path = f"{split}/{arrays.classes[label]}/{number:05}.png"
                self._places[path] = arrays, number

    def names(self) -> list[str]:
        return list(self._places)

    def read(self, name: str) -> bytes:
        arrays, number = self._places[name]
        stream = io.BytesIO()
        image = arrays.images[number].transpose(1, 2, 0)
        if image.shape[2] == 1:
            image = image[:, :, 0]
        Image.fromarray(np.ascontiguousarray(image)).save(stream, "PNG")
        return stream.getvalue()

    def size(self, name: str) -> int:
        return int(self._places[name][0].images[0].size)


def _find_archive(src: Path) -> tuple[str, Path] | None:
    """(data set, folder of its archive) if `src` is a set's own archive, or holds it extracted."""
    for name, spec in specs().items():
        places = spec.archive.places if spec.archive is not None else ()
        if src.name in places:
            return name, src.parent
        if any((src / place).is_dir() for place in places):
            return name, src
    return None


@contextmanager
def open_tree(src: Path) -> Iterator[Tree]:
    """The files of a folder, a .zip, a .tar or a set's own archive. Raises UserError."""
    if not src.exists():
        raise UserError(f"{src}: does not exist")
    own = _find_archive(src)
    if own is not None:
        yield ArrayTree(*own)
    elif src.is_dir():
        yield FolderTree(src)
    elif src.suffix.lower() == ".zip":
        try:
            archive = zipfile.ZipFile(src)
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{src}: not a readable .zip ({error})") from error
        with archive:
            yield ZipTree(archive)
    elif src.suffix.lower() == ".tar":
        with ExitStack() as stack:
            try:
                tree = TarTree(src, stack.enter_context(open(src, "rb")))
            except (tarfile.TarError, OSError) as error:
                raise UserError(f"{src}: not a readable .tar ({error})") from error
            yield tree
    elif "".join(src.suffixes[-2:]).lower() == ".tar.gz" or src.suffix.lower() == ".tgz":
        raise UserError(f"{src}: a compressed .tar cannot be read by position; unpack it first")
    else:
        raise UserError(f"{src}: neither a folder nor a .zip nor a .tar")


@dataclass(frozen=True)
class Split:
    """The images of one split.

    Attributes:
        members: (name in the tree, label) in the order of storage.
        classes: class names, by label.
    """

    members: list[tuple[str, int]]
    classes: list[str]


def find_splits(tree: Tree) -> dict[str, Split]:
    """The splits "train", "test", "val" of a tree, in any known layout.

    - SPLIT/CLASS/.../IMAGE (ImageFolder; TinyImageNet's training set), perhaps below other
      folders (ILSVRC/Data/CLS-LOC);
    - a val/ without class folders whose labels are in val_annotations.txt (TinyImageNet), else in
      LOC_val_solution.csv (ImageNet from Kaggle), else in one XML annotation per image, else in
      val.txt (Caffe: NAME LABEL, the label a class name, or its number in the order of
      LOC_synset_mapping.txt or else of the names). Kaggle's ImageSets/CLS-LOC/val.txt holds no
      labels. TinyImageNet's test images have none either and are left out.

    Raises:
        UserError: no split; a val/ without class folders and labels; an image without a label.
    """
    names = [name for name in tree.names() if not name.startswith("__MACOSX/")]
    root = _find_root(names)
    if root is None:
        return {}
    below: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in names:
        head, _, rest = name.removeprefix(root).partition("/")
        if name.startswith(root) and head in below and rest:
            below[head].append(rest)
    found: dict[str, Split] = {}
    for split in SPLITS:
        prefix = f"{root}{split}/"
        flat = [name for name in below[split] if _is_flat(name)]
        if flat and split != "train":
            if split == "test" and below["val"]:
                continue  # TinyImageNet, ImageNet: the labelled images are val's
            train = found.get("train")
            labels = _flat_labels(tree, names, prefix, split)
            found[split] = _flat_split(tree, names, prefix, flat, labels, train)
        else:
            members, classes = image_tree(below[split])
            if members:
                found[split] = Split([(prefix + name, y) for name, y in members], classes)
    return found


def _is_flat(name: str) -> bool:
    """val/IMAGE or TinyImageNet's val/images/IMAGE."""
    path = PurePosixPath(name)
    folders = path.parts[:-1]
    return folders in ((), ("images",)) and path.suffix.lower() in IMAGE_SUFFIXES


def _find_root(names: Iterable[str]) -> str | None:
    """The shortest prefix of split folders with images."""
    roots = set()
    for name in names:
        parts = name.split("/")
        if PurePosixPath(name).suffix.lower() not in IMAGE_SUFFIXES:
            continue
        for depth, part in enumerate(parts[:-1]):
            if part in SPLITS:
                roots.add("/".join(parts[:depth]) + "/" if depth else "")
                break
    return min(roots, key=lambda root: (root.count("/"), root), default=None)


def _flat_labels(tree: Tree, names: list[str], prefix: str, split: str) -> dict[str, str]:
    """Label as written, by image name without suffix."""
    wanted = [f"{split}_annotations.txt", f"LOC_{split}_solution.csv", f"{split}.txt"]
    lists: dict[str, str] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        if file in wanted and "ImageSets" not in folder.split("/"):
            lists[file] = min(name, lists.get(file, name))
    labels = {}
    for file in wanted[:2]:
        if file in lists:
            return _listed_labels(tree, lists[file])
    for name in names:
        parts = name.split("/")
        if name.endswith(".xml") and (split in parts[:-1] or name.startswith(prefix)):
            match = _XML_LABEL.search(_read(tree, name))
            if match:
                labels[parts[-1].removesuffix(".xml")] = match[1].decode("utf-8", "replace")
    if not labels and wanted[2] in lists:
        return _listed_labels(tree, lists[wanted[2]])
    if not labels:
        raise UserError(
            f"{prefix}: its images lie in no class folders, and there is none of "
            f"{', '.join(wanted)} or XML annotations that name their classes"
        )
    return labels


def _listed_labels(tree: Tree, name: str) -> dict[str, str]:
    lines = _read(tree, name).decode("utf-8", "replace").splitlines()
    rows = csv.reader(lines[1:]) if name.endswith(".csv") else (line.split() for line in lines)
    pairs = (row[:2] for row in rows if len(row) > 1 and row[1].strip())
    return {PurePosixPath(image).stem: label.split()[0] for image, label in pairs}


def read_image(tree: Tree, name: str) -> bytes:
    """A file of a tree. Raises DamagedImage if it is too large for an image: a small .zip may
    unpack to any size.
    """
    size = tree.size(name)
    if size > MAX_BYTES:
        raise DamagedImage(too_large(size))
    return tree.read(name)


def _read(tree: Tree, name: str) -> bytes:
    """A file that describes the images. Raises UserError if it cannot be read."""
    try:
        if tree.size(name) > MAX_BYTES:
            raise UserError(f"{name}: has {tree.size(name) / 1e6:.0f} MB, too many for a list")
        return tree.read(name)
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{name}: cannot be read ({error}); repair or copy it again") from error


def _flat_split(
    tree: Tree,
    names: list[str],
    prefix: str,
    flat: list[str],
    labels: dict[str, str],
    train: Split | None,
) -> Split:
    known = set(train.classes) if train else set()
    numbered = _numbered_classes(tree, names) or (train.classes if train else [])

    def class_of(label: str) -> str:
        number = int(label) if label.isdecimal() and len(label) < 10 else len(numbered)
        return label if label in known or number >= len(numbered) else numbered[number]

    labels = {image: class_of(label) for image, label in labels.items()}
    classes = train.classes if train else _named_classes(set(labels.values()), prefix)
    order = {name: number for number, name in enumerate(classes)}
    members = []
    for name in sorted(flat):
        label = labels.get(PurePosixPath(name).stem)
        if label not in order:
            what = "has no label" if label is None else f"is of class {label}, which train/ has not"
            raise UserError(f"{prefix}{name}: {what}; the annotations do not fit the images")
        members.append((prefix + name, order[label]))
    # In the order of an ImageFolder tree of the same images: by class, then name.
    return Split(sorted(members, key=lambda member: (member[1], member[0])), classes)


def _named_classes(classes: set[str], prefix: str) -> list[str]:
    """Class names that occur only in annotations, sorted; they may become names of folders."""
    for name in sorted(classes):
        if "/" in name or "\0" in name or name in (".", ".."):
            raise UserError(f"{prefix}: its annotations name a class {name!r}, which is no name")
        if name.isdecimal():
            raise UserError(
                f"{prefix}: its annotations have class number {name}, and neither a train/ nor "
                "LOC_synset_mapping.txt beside them names it; put one there"
            )
    return sorted(classes)


def _numbered_classes(tree: Tree, names: list[str]) -> list[str]:
    for name in names:
        if PurePosixPath(name).name in ("LOC_synset_mapping.txt", "synsets.txt"):
            lines = _read(tree, name).decode("utf-8", "replace").splitlines()
            return [line.split()[0] for line in lines if line.strip()]
    return []
