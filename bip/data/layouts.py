"""The layouts that data sets come in: where the images of a tree are, and their classes."""

import codecs
import csv
import re
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bip.data.stores.base import MAX_BYTES
from bip.data.trees import SPLITS, FolderTree, Tree, is_image, is_system, open_tree, printable
from bip.errors import UserError

__all__ = ["Split", "describe_left_out", "different_classes", "find_splits", "open_tree"]

# Names that a split's folder has elsewhere, lower case.
_ALIASES = {
    **dict.fromkeys(("train", "training", "trainset", "train_set"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "val_set", "valset"), "val"),
    **dict.fromkeys(("test", "testing", "testset", "test_set"), "test"),
}
# Files that lie beside images and are none: it is no loss to leave them out.
_TEXTS = frozenset({".txt", ".csv", ".tsv", ".lst", ".xml", ".json", ".jsonl", ".md", ".yaml"})
_XML_LABEL = re.compile(rb"<object>.*?<name>\s*([^<]*?)\s*</name>", re.DOTALL)
_BOXES = re.compile(r"(\s+-?\d[\d.]*){4,}$")
_LONGEST_LINE = 20_000
# What the column of labels is called in a list with a header.
_LABEL_COLUMNS = frozenset(
    {"label", "labels", "class", "classes", "class_name", "classname", "class_id", "category"}
    | {"target", "wnid", "synset", "species", "breed"}
)
# What the column of images is called; the first of these counts.
_NAME_COLUMNS = (
    *("filename", "file_name", "file", "image", "img", "path", "filepath", "image_path"),
    *("image_name", "image_id", "img_id", "imageid", "name", "id"),
)
_BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


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
    - a split without class folders whose labels are in val_annotations.txt (TinyImageNet), else in
      LOC_val_solution.csv (ImageNet from Kaggle), else in one XML annotation per image, else in
      val.txt, val.csv, val.tsv or val.lst: see `_read_list`. Kaggle's ImageSets/CLS-LOC/val.txt
      holds no labels. TinyImageNet's test images have none either and are left out.

    Hidden and system files are ignored (`is_system`). `tree.left_out` gets every other file that
    may be meant as an image and is not used.

    Raises:
        UserError: a split or class would be lost; an image without a label, or with two.
    """
    names = [name for name in tree.names() if not is_system(name)]
    root = _find_root(names)
    found: dict[str, Split] = {}
    prefixes = {f"{root}{split}/": split for split in SPLITS}
    below: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in names:
        head = name.removeprefix(root or "").partition("/")[0]
        prefix = f"{root}{head}/"
        if root is not None and prefix in prefixes and name.startswith(prefix):
            below[head].append(name)
        elif is_image(name):
            tree.left_out[name] = "outside train/, test/ and val/"
        elif root is None:
            _leave_out(tree, name)
    for split in SPLITS:
        prefix = f"{root}{split}/"
        if not below[split]:
            continue
        images = list(filter(is_image, below[split]))
        if split == "test" and below["val"] and all(_is_flat(n, prefix) for n in images):
            tree.left_out |= dict.fromkeys(images, "a test/ without labels")
            continue
        train = found.get("train")
        found[split] = sort_split(
            tree, below[split], names, prefix, split, train.classes if train else None
        )
    return found


def folder_split(path: Path) -> tuple[Split, dict[str, str]]:
    """The split in a folder on disk, by the rules of `find_splits`, and what is left out.

    Names are relative to the folder above, where lists of labels may lie.

    Raises:
        UserError: as `find_splits`, or a folder cannot be read.
        OSError: its file system is unreachable.
    """
    tree = FolderTree(path.parent, path.name)
    names = [name for name in tree.names() if not is_system(name)]
    prefix = f"{path.name}/"
    classes = None
    if path.name != "train" and (path.parent / "train").is_dir():
        train = sorted(p.name for p in (path.parent / "train").iterdir() if p.is_dir())
        classes = [name for name in train if not is_system(name)]
        classes = None if classes in ([], ["images"]) else classes
    try:
        below = [name for name in names if name.startswith(prefix)]
        return sort_split(tree, below, names, prefix, path.name, classes), tree.left_out
    except UserError as error:
        raise UserError(f"{path.parent}/{error}") from error


def sort_split(
    tree: Tree,
    below: list[str],
    names: list[str],
    prefix: str,
    split: str,
    train_classes: list[str] | None,
) -> Split:
    """The images and classes of one split, in the order of an ImageFolder tree: by class, name.

    Args:
        below: the names below `prefix`.
        names: all names, for lists of labels.
        train_classes: those of the training split, if it is known.

    Raises:
        UserError: as `find_splits`.
    """
    images, flat, folders = [], [], set()
    for name in below:
        first, slash, _ = name.removeprefix(prefix).partition("/")
        if slash:
            folders.add(first)
        if is_image(name):
            images.append(name)
            if _is_flat(name, prefix):
                flat.append(name)
        else:
            _leave_out(tree, name)
    lost = {name: why for name, why in tree.left_out.items() if name.startswith(prefix)}
    if not images:
        raise UserError(
            f"{prefix}: holds no image{_because(lost)}; convert or add its images, or remove it"
        )
    named = {name.removeprefix(prefix).split("/")[0] for name in set(images) - set(flat)}
    if flat and not (named if train_classes is None else named & set(train_classes)):
        tree.left_out |= dict.fromkeys(set(images) - set(flat), "in a folder that is no class")
        return _flat_split(tree, names, prefix, split, flat, train_classes)
    found = []
    for name in images:
        class_name, slash, _ = name.removeprefix(prefix).partition("/")
        if slash:
            found.append((class_name, name))
        else:
            tree.left_out[name] = "beside the class folders"
    classes = sorted({class_name for class_name, _ in found})
    for class_name in sorted(folders.difference(classes)):
        inner = {n: why for n, why in lost.items() if n.startswith(f"{prefix}{class_name}/")}
        raise UserError(
            f"{prefix}{printable(class_name)}/: would be a class without images"
            f"{_because(inner)}; convert or add its images, or remove the folder"
        )
    for class_name in classes:
        if printable(class_name) != class_name:
            raise UserError(
                f"{prefix}{printable(class_name)}/: the name of this class is not UTF-8; rename it"
            )
    if twice := [name for name, n in Counter(map(_composed, classes)).items() if n > 1]:
        raise UserError(
            f"{prefix}{twice[0]}/: two classes have this name in different Unicode forms; merge "
            "their folders"
        )
    labels = {class_name: label for label, class_name in enumerate(classes)}
    found.sort()
    return Split([(name, labels[class_name]) for class_name, name in found], classes)


def describe_left_out(left_out: dict[str, str]) -> list[str]:
    """A phrase for each reason, with the number of files and the first of them."""
    first: dict[str, str] = {}
    for name in sorted(left_out):
        first.setdefault(left_out[name], name)
    counts = Counter(left_out.values())
    return [f"{counts[why]} x {why} ({printable(first[why])})" for why in sorted(counts)]


def different_classes(first: list[str], second: list[str]) -> str | None:
    """How two splits' classes differ, if they do."""
    if first == second:
        return None
    odd = sorted(set(first) ^ set(second)) or first
    form = {unicodedata.normalize("NFC", name) for name in odd}
    hint = " (the same letters in another Unicode form: rename one)" if len(form) < len(odd) else ""
    return f"{odd[0]!r}{hint}"


def _leave_out(tree: Tree, name: str) -> None:
    suffix = PurePosixPath(name).suffix.lower()
    if name[-1:] != "/" and suffix not in _TEXTS:
        tree.left_out[name] = f"{suffix} file, not read" if suffix else "file without a suffix"


def _because(left_out: dict[str, str]) -> str:
    return f": {', '.join(describe_left_out(left_out))}" if left_out else ""


def _is_flat(name: str, prefix: str) -> bool:
    """val/IMAGE or TinyImageNet's val/images/IMAGE."""
    return PurePosixPath(name.removeprefix(prefix)).parts[:-1] in ((), ("images",))


def _find_root(names: Sequence[str]) -> str | None:
    """The prefix of the split folders with images; None if there is none.

    Raises UserError if there are several, or if a split beside them has another name.
    """
    roots: dict[str, str] = {}
    aliases: dict[str, tuple[str, str]] = {}
    for name in names:
        folders = name.split("/")[:-1]
        if not is_image(name):
            continue
        depth = next((n for n, part in enumerate(folders) if part in SPLITS), None)
        if depth is not None:
            roots.setdefault("".join(f"{part}/" for part in folders[:depth]), name)
            continue
        depth = next((n for n, part in enumerate(folders) if part.lower() in _ALIASES), None)
        if depth is not None:
            root = "".join(f"{part}/" for part in folders[:depth])
            aliases.setdefault(root, (folders[depth], _ALIASES[folders[depth].lower()]))
    if len(roots) > 1:
        one, other = sorted(roots)[:2]
        raise UserError(
            f"images of splits are in {roots[one]} and in {roots[other]}: one of them would be "
            "lost; give the folder of one"
        )
    for root, (folder, right) in aliases.items():
        if not roots or root in roots:
            raise UserError(
                f"{root}{folder}/: would be lost, as splits are called train, test and val; "
                f"rename it to {right}"
            )
    return next(iter(roots), None)


def _flat_split(
    tree: Tree,
    names: list[str],
    prefix: str,
    split: str,
    flat: list[str],
    train_classes: list[str] | None,
) -> Split:
    known = train_classes or []
    labels = _Labels(split, flat, known, _numbered_classes(tree, names) or known)
    source = _read_labels(tree, names, prefix, split, labels)
    of = labels.of
    classes = known or _named_classes(set(of.values()), prefix)
    order = {name: number for number, name in enumerate(classes)}
    for name in sorted(flat):
        if of.get(name) not in order:
            label = of.get(name)
            what = "has no label" if label is None else f"is of class {label}, which train/ has not"
            raise UserError(
                f"{name}: {what}; {source} does not fit the images: add a line there, or remove "
                "the image"
            )
    members = [(name, order[of[name]]) for name in flat]
    return Split(sorted(members, key=lambda member: (member[1], member[0])), classes)


class _Labels:
    """The class of each image of a split without class folders, by names as lists write them.

    Args:
        known: the classes of the training split, or none.
        numbered: class names by the numbers in lists.

    Attributes:
        of: class name by the image's name in the tree.
    """

    def __init__(self, split: str, flat: list[str], known: list[str], numbered: list[str]) -> None:
        self.of: dict[str, str] = {}
        self._split = split
        self._known = frozenset(known)
        # Classes that are numbers are meant by their value.
        values = {int(name): name for name in known if name.isdecimal()}
        self._numbered = values or dict(enumerate(numbered))
        self._whole: dict[str, list[str]] = {}
        self._stems: dict[str, list[str]] = {}
        for name in flat:
            file = _composed(PurePosixPath(name).name)
            self._whole.setdefault(file, []).append(name)
            self._stems.setdefault(file.rpartition(".")[0], []).append(name)

    def find(self, fields: list[str], column: int | None = None) -> tuple[int, str] | None:
        """The first field that is the name of an image, or else its name without the suffix.

        Args:
            column: the only field that may be it.

        Raises UserError if it may be of two images.
        """
        paths = [_composed(field.strip()).replace("\\", "/") for field in fields]
        if column is not None:
            paths = [path if at == column else "" for at, path in enumerate(paths)]
        # A number in the line of an image that is not here is no image's name.
        stems = {} if any(map(is_image, paths)) else self._stems
        for table in (self._whole, stems):
            for at, path in enumerate(paths):
                *folders, file = path.split("/")
                splits = [folder for folder in folders if folder in SPLITS]
                if file not in table or (splits and splits[-1] != self._split):
                    continue
                if len(table[file]) > 1:
                    raise UserError(
                        f"{' and '.join(table[file][:2])}: a list has a label for {file!r}, which "
                        "may be either; write names with suffix, or rename one image"
                    )
                return at, table[file][0]
        return None

    def is_class(self, label: str) -> bool:
        return label in self._known

    def put(self, image: str, label: str, source: str) -> None:
        """Raises UserError if the image has another label already."""
        number = re.fullmatch(r"(\d{1,9})(\.0+)?", label)
        if number and label not in self._known:
            label = self._numbered.get(int(number[1]), label)
        if self.of.setdefault(image, label) != label:
            raise UserError(
                f"{source}: {image} has two labels, {self.of[image]} and {label}; remove one"
            )


def _read_labels(tree: Tree, names: list[str], prefix: str, split: str, labels: _Labels) -> str:
    """Fill `labels` from the first source there is. Returns its name."""
    wanted = [f"{split}_annotations.txt", f"LOC_{split}_solution.csv"]
    wanted += [f"{split}{suffix}" for suffix in (".txt", ".csv", ".tsv", ".lst")]
    lists: dict[str, str] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        if file in wanted and "ImageSets" not in folder.split("/"):
            lists[file] = min(name, lists.get(file, name))
    first = next((lists[file] for file in wanted if file in lists), None)
    if first is None or not first.endswith(tuple(wanted[:2])):
        source = None
        for name in names:
            if name.endswith(".xml") and (split in name.split("/")[:-1] or name.startswith(prefix)):
                found = labels.find([PurePosixPath(name).stem])
                if found is None:
                    continue
                for label in set(_XML_LABEL.findall(_read(tree, name))):
                    source = source or name
                    labels.put(found[1], _text(label), name)
        if source is not None:
            return source
    if first is None:
        raise UserError(
            f"{prefix}: its images lie in no class folders, and there is none of "
            f"{', '.join(wanted)} or XML annotations that name their classes; put one there, or "
            "give build-lmdb the folder that holds both"
        )
    _read_list(_text(_read(tree, first)), first, labels)
    return first


def _read_list(text: str, source: str, labels: _Labels, by_header: bool = True) -> None:
    """Labels from lines "NAME LABEL": the label a class name, or its number in the order of
    LOC_synset_mapping.txt or else of the names.

    Separators are tabs, commas, semicolons, bars or spaces; names may have folders, quotes and
    spaces, or lack their suffix. With a header, name and label are in the columns that it calls so
    (if `by_header`, which is given up where it finds nothing); else the label is in the column
    after the name, or before a name that is last (MXNet's .lst).

    Raises:
        UserError: an image has two labels; the list has a column for each class.
    """
    column = naming = None
    for line in re.split(r"\r\n|\r|\n", text):
        if len(line) > _LONGEST_LINE:
            raise UserError(f"{source}: has a line of {len(line)} characters; it is no list")
        for fields in _splits_of(line):
            lowered = [field.strip().lower() for field in fields]
            found = labels.find(fields, naming)
            if found is not None:
                at, image = found
                after = at + 1 if at + 1 < len(fields) and fields[at + 1].strip() else at - 1
                near = column if column is not None and column < len(fields) else after
                label = fields[near].strip()
                if label:
                    labels.put(image, _without_boxes(label, labels, source), source)
                break
            if column is None and not labels.of:
                column = next((n for n, cell in enumerate(lowered) if cell in _LABEL_COLUMNS), None)
                names = (lowered.index(name) for name in _NAME_COLUMNS if name in lowered)
                naming = next(names, None) if by_header and column is not None else None
                classes = {cell.strip() for cell in fields if labels.is_class(cell.strip())}
                if column is None and len(classes) > 1 and not any(map(is_image, fields)):
                    raise UserError(
                        f"{source}: has a column for each class; write lines NAME,CLASS instead: "
                        f"python -c \"import pandas as p; d=p.read_csv('{source}',index_col=0); "
                        f"d.idxmax(axis=1).to_csv('NEW.csv',header=False)\""
                    )
    if naming is not None and not labels.of:
        _read_list(text, source, labels, by_header=False)


def _without_boxes(label: str, labels: _Labels, source: str) -> str:
    """A label without the numbers of a box or the words that may follow it."""
    first = label.split()[0]
    if labels.is_class(label):
        return label
    if labels.is_class(first) or "LOC_" in source:
        return first
    return _BOXES.sub("", label)


def _splits_of(line: str) -> Iterator[list[str]]:
    """The ways to split a line into at least two fields."""
    for separator in "\t,;|":
        if separator in line:
            yield next(csv.reader([line], delimiter=separator, skipinitialspace=True))
    for gap in reversed(list(re.finditer(r"\s+", line.strip()))):
        yield [line.strip()[: gap.start()].strip("\"'"), line.strip()[gap.end() :].strip("\"'")]


def _composed(name: str) -> str:
    """macOS writes accents as characters of their own."""
    return unicodedata.normalize("NFC", name)


def _text(data: bytes) -> str:
    """A text file's content: UTF-8, UTF-16 or UTF-32, else Windows' Latin-1."""
    for mark, encoding in _BOMS.items():
        if data.startswith(mark):
            return data.decode(encoding, "replace")
    if data[1:2] == b"\0" or data[:1] == b"\0":
        return data.decode("utf-16-le" if data[1:2] == b"\0" else "utf-16-be", "replace")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def _read(tree: Tree, name: str) -> bytes:
    """A file that describes the images. Raises UserError if it cannot be read."""
    try:
        if tree.size(name) > MAX_BYTES:
            raise UserError(f"{name}: has {tree.size(name) / 1e6:.0f} MB, too many for a list")
        return tree.read(name)
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{name}: cannot be read ({error}); repair or copy it again") from error


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
            lines = _text(_read(tree, name)).splitlines()
            return [line.split()[0] for line in lines if line.strip()]
    return []
