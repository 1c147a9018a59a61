"""Trees of files: a folder, a .zip, a .tar or a set's own archive, read by relative names."""

import io
import os
import posixpath
import re
import tarfile
import zipfile
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from PIL import Image

from bip.data.sets import specs
from bip.data.stores.base import MAX_BYTES, ArraySplit, DamagedImage, too_large
from bip.errors import UserError
from bip.files import raise_passing

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".gif"})
SPLITS = ("train", "test", "val")
# What systems put into folders of the user's, lower case; names with a leading dot come on top.
_SYSTEM = frozenset(
    {
        *("__macosx", "icon\r", "network trash folder", "temporary items"),  # macOS
        *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini"),  # Windows
        *("$recycle.bin", "recycler", "recycled", "system volume information"),
        *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "@__thumb", "#recycle"),  # NAS
        *("#snapshot", "~snapshot", "lost+found"),
        "__pycache__",
    }
)
_SYSTEM_PREFIXES = (".", "synophoto_", "synofile_", "~$")
_SYNSET_TAR = re.compile(r"n\d{8}\.tar")
# Files that describe images: lists of labels and classes, archives of a class, annotations.
_ANNOTATIONS = re.compile(
    r"((train|test|val)\w*\.(txt|csv|tsv|lst)|LOC_\w+_solution\.csv|LOC_synset_mapping\.txt|"
    r"synsets\.txt|.*\.(tar|xml))$"
)
# The first bytes of archives that cannot be read by position, and the command that unpacks each.
_PACKED = {
    b"\x1f\x8b": "mkdir DIR && tar -xzf {} -C DIR",
    b"\xfd7zXZ": "mkdir DIR && tar -xJf {} -C DIR",
    b"BZh": "mkdir DIR && tar -xjf {} -C DIR",
    b"\x28\xb5\x2f\xfd": "mkdir DIR && tar --zstd -xf {} -C DIR",
    b"7z\xbc\xaf": "7z x -oDIR {}",
    b"Rar!": "unrar x {} DIR/",
}
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def is_system(name: str) -> bool:
    """Whether a file or one of its folders is hidden, or of macOS, Windows, a NAS or notebooks."""
    parts = name.lower().rstrip("/").split("/")
    return any(part.startswith(_SYSTEM_PREFIXES) or part in _SYSTEM for part in parts)


def is_image(name: str) -> bool:
    """Whether a file's suffix is that of an image format which is read. Folders are no images."""
    return name[-1:] != "/" and PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def printable(name: str) -> str:
    """A name on one line, with bytes that are not UTF-8 written as \\xNN."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class Tree(Protocol):
    """Files below a root, by their names relative to it, with forward slashes. Thread-safe.

    Attributes:
        left_out: the reason for each file or folder that is not read, by its name.
    """

    left_out: dict[str, str]

    def names(self) -> list[str]:
        """Files, and folders with a slash at the end."""
        ...

    def read(self, name: str) -> bytes: ...

    def size(self, name: str) -> int: ...


class FolderTree:
    """A folder on disk.

    Args:
        only: of its folders, list this one.
    """

    def __init__(self, root: Path, only: str = "") -> None:
        self.root = root
        self.only = only
        self.left_out: dict[str, str] = {}

    def names(self) -> list[str]:
        """Raises UserError and OSError as `_walk`."""
        names = list(self._walk())
        if self.only:
            names += [entry.name for entry in _scan(self.root) if _kind(entry) == "file"]
        return names

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def size(self, name: str) -> int:
        return (self.root / name).stat().st_size

    def _walk(self) -> Iterator[str]:
        """The files and folders below. Of each split every real folder is visited once.

        Folders that are links come last, so that a folder keeps its own name.

        Raises:
            UserError: a folder cannot be read, or is a link to a folder that it lies in.
            OSError: the file system is unreachable.
        """
        seen: dict[tuple[str, int, int], str] = {}
        # (name with a slash, identities of the folders that it lies in)
        folders: deque[tuple[str, tuple[tuple[int, int], ...]]] = deque()
        folders.append((f"{self.only}/" if self.only else "", ()))
        links: deque[tuple[str, tuple[tuple[int, int], ...]]] = deque()
        while folders or links:
            name, above = (folders or links).popleft()
            place = self.root / name
            try:
                status = place.stat()
            except OSError as error:
                raise _unreadable(error) from error
            identity = status.st_dev, status.st_ino
            if identity in above:
                raise UserError(
                    f"{place}: links to a folder that it lies in ({place.resolve()}), a loop; "
                    "remove the link"
                )
            split = next((part for part in name.split("/") if part in SPLITS), "")
            first = seen.setdefault((split, *identity), name)
            if first != name:
                self.left_out[name] = f"the same folder as {first}"
                continue
            if name:
                yield name
            for entry in sorted(_scan(place), key=lambda entry: entry.name):
                inner = name + entry.name
                kind = _kind(entry)
                if kind == "dangling" and is_image(inner):
                    target = os.readlink(self.root / inner)
                    raise UserError(
                        f"{printable(entry.path)}: links to {printable(target)}, which does not "
                        "exist; restore that file or remove the link"
                    )
                if kind != "folder":
                    yield f"{inner}/" if kind == "dangling" else inner
                elif is_system(entry.name):  # often unreadable, or as large as the rest
                    yield f"{inner}/"
                else:
                    queue = links if entry.is_symlink() else folders
                    queue.append((f"{inner}/", (*above, identity)))


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(str(folder)) as entries:
            return list(entries)
    except OSError as error:
        raise _unreadable(error) from error


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_dir():
            return "folder"
        return "dangling" if entry.is_symlink() and not entry.is_file() else "file"
    except OSError as error:  # a link to itself, among others
        raise _unreadable(error) from error


def _unreadable(error: OSError) -> UserError:
    raise_passing(error, error.filename)
    return UserError(f"{error.filename}: cannot be read ({error.strerror})")


def _clean(name: str) -> str:
    """A member's name without a leading ./, ../ or /."""
    return re.sub(r"^(\.{0,2}/)+", "", name)


class ZipTree:
    """The members of a .zip file. Of members with the same name the last one counts.

    Raises:
        UserError: it is encrypted, or compressed in a way that is not read.
    """

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        self.left_out: dict[str, str] = {}
        members = archive.infolist()
        # Some Windows programs write backslashes.
        windows = not any("/" in member.filename for member in members)
        self._members = {
            _clean(member.filename.replace("\\", "/") if windows else member.filename): member
            for member in members
        }
        for member in members:
            what = "is encrypted" if member.flag_bits & 1 else f"method {member.compress_type}"
            if member.flag_bits & 1 or member.compress_type not in _ZIP_METHODS:
                path = archive.filename
                raise UserError(
                    f"{path}: {member.filename} cannot be read ({what}); unpack it first: "
                    f"7z x -oDIR {path}"
                )

    def names(self) -> list[str]:
        return [name for name in self._members if name]

    def read(self, name: str) -> bytes:
        return self.archive.read(self._members[name])

    def size(self, name: str) -> int:
        return self._members[name].file_size


class TarTree:
    """The members of an uncompressed .tar file, and of the .tar files in it (ImageNet's).

    A member x.tar is read as a folder x; an archive of synset archives only
    (ILSVRC2012_img_train.tar) as their train/. Links are read as files. Threads share the file.

    Raises:
        UserError: the archive is cut short; an image, or a description of images, is stored sparse,
            or is a link to a file that the archive does not hold. Other such members are left out.
    """

    def __init__(self, path: Path, stream: io.BufferedReader) -> None:
        self._stream = stream
        self._places: dict[str, tuple[int, int]] = {}
        self._folders: list[str] = []
        self.left_out: dict[str, str] = {}
        with tarfile.open(path, "r:") as archive:
            files = [_clean(member.name) for member in archive if member.isfile()]
            _check_end(archive, str(path))
            packed = bool(files) and all(_SYNSET_TAR.fullmatch(name) for name in files)
            self._index(archive, "train/" if packed else "", 0)

    def _index(self, archive: tarfile.TarFile, prefix: str, base: int) -> None:
        links: dict[str, str] = {}
        for member in archive:
            name = prefix + _clean(member.name)
            if is_system(name):
                continue
            if member.islnk():
                links[name] = posixpath.normpath(prefix + _clean(member.linkname))
            elif member.issym():
                target = posixpath.join(posixpath.dirname(name), member.linkname)
                links[name] = posixpath.normpath(target)
            elif member.issparse() and _matters(name):
                raise UserError(f"{name}: is stored sparse; pack the archive without --sparse")
            if member.isdir() and name not in ("", "."):
                self._folders.append(f"{name}/")
            if not member.isfile() or member.issparse():
                continue
            start = base + member.offset_data
            if name.endswith(".tar"):
                inner = archive.extractfile(member)
                with tarfile.open(fileobj=inner, mode="r:") as nested:
                    self._index(nested, f"{name.removesuffix('.tar')}/", start)
                    _check_end(nested, name)
            else:
                self._places[name] = start, member.size
        for name in links:
            target, seen = links[name], {name}
            while target in links and target not in seen:
                seen.add(target)
                target = links[target]
            if target not in self._places:
                if not _matters(name):
                    self.left_out[name] = "a link that is not followed in a .tar"
                    continue
                raise UserError(
                    f"{name}: links to {links[name]}, which is no file in the archive; pack it "
                    "with --dereference"
                )
            self._places[name] = self._places[target]

    def names(self) -> list[str]:
        return [*self._places, *self._folders]

    def read(self, name: str) -> bytes:
        start, size = self._places[name]
        data = os.pread(self._stream.fileno(), size, start)
        if len(data) != size:
            raise OSError(f"the archive ends within {name}")
        return data

    def size(self, name: str) -> int:
        return self._places[name][1]


def _check_end(archive: tarfile.TarFile, what: str) -> None:
    """`tarfile` takes a cut or damaged header for the end; a whole archive ends with zeros.

    Call it after the last member was read. Raises UserError.
    """
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise UserError(
            f"{what}: cut short or damaged at byte {archive.offset}, and members after that would "
            "be lost; download or pack it again"
        )


def _matters(name: str) -> bool:
    """Whether a file of this name may be an image, or describe images."""
    return is_image(name) or _ANNOTATIONS.match(PurePosixPath(name).name) is not None


class ArrayTree:
    """A set's own archive (`bip.data.sets`) as train/CLASS/NUMBER.png and test/CLASS/NUMBER.png."""

    def __init__(self, name: str, place: Path) -> None:
        self._places: dict[str, tuple[ArraySplit, int]] = {}
        self.left_out: dict[str, str] = {}
        archive = specs()[name].archive
        assert archive is not None
        for split, train in (("train", True), ("test", False)):
            arrays = archive.read(place, train)
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
    """(data set, its archive) if `src` is a set's own archive, or holds it extracted."""
    for name, spec in specs().items():
        for place in spec.archive.places if spec.archive is not None else ():
            if src.name == place:
                return name, src
            if (src / place).is_dir():
                return name, src / place
    return None


@contextmanager
def open_tree(src: Path) -> Iterator[Tree]:
    """The files of a folder, a .zip, a .tar or a set's own archive. Raises UserError."""
    if not src.exists():
        raise UserError(f"{src}: does not exist")
    own = _find_archive(src)
    if own is not None:
        yield ArrayTree(*own)
        return
    if src.is_dir():
        yield FolderTree(src)
        return
    with ExitStack() as stack:
        try:
            stream = stack.enter_context(open(src, "rb"))
            start = stream.read(8)
            for magic, command in _PACKED.items():
                if start.startswith(magic):
                    raise UserError(
                        f"{src}: cannot be read by position; unpack it first: {command.format(src)}"
                    )
            tree: Tree
            if start.startswith(b"PK") or src.suffix.lower() == ".zip":
                tree = ZipTree(stack.enter_context(zipfile.ZipFile(src)))
            elif tarfile.is_tarfile(src) or src.suffix.lower() == ".tar":
                tree = TarTree(src, stream)
            else:
                raise UserError(f"{src}: neither a folder nor a .zip nor a .tar; unpack it first")
        except (zipfile.BadZipFile, tarfile.TarError, OSError) as error:
            kind = ".zip" if isinstance(error, zipfile.BadZipFile) else src.suffix or "file"
            raise UserError(f"{src}: not a readable {kind} ({error})") from error
        yield tree


def read_image(tree: Tree, name: str) -> bytes:
    """A file of a tree. Raises DamagedImage if it is too large for an image: a small .zip may
    unpack to any size.
    """
    size = tree.size(name)
    if size > MAX_BYTES:
        raise DamagedImage(too_large(size))
    return tree.read(name)
