"""`python -m bip data build-lmdb` and `convert`: make stores."""

import hashlib
import io
import os
import re
import shutil
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

import lmdb
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bip.data import decode
from bip.data.layouts import Split, describe_left_out, different_classes, find_splits
from bip.data.stores.base import DamagedImage
from bip.data.stores.environment import open_environment, size_of
from bip.data.stores.lmdb import LmdbStore
from bip.data.stores.published import PublishedStore
from bip.data.stores.writer import LmdbWriter
from bip.data.trees import Tree, open_tree, printable, read_image
from bip.errors import UserError

_T = TypeVar("_T")

_PAGE = 4096
_SAMPLE = 500  # files whose sizes give the estimate
_MOST_CLASSES = 1 << 16  # of unnamed classes: a damaged label could be 2**40
_IMAGENET_VAL = re.compile(r"(.*/)?ILSVRC2012_val_\d{8}\.JPEG")  # ILSVRC2012_img_val.tar, alone
_AHEAD = 4  # images read ahead, per worker
READ_ERRORS = (*decode.DECODE_ERRORS, zipfile.BadZipFile, RuntimeError)


@dataclass(frozen=True)
class Options:
    """How images are changed and checked before they are stored."""

    short_side: int = 0
    quality: int = 90
    check: bool = False


class Ready(NamedTuple):
    """An image to store, and the fault that was repaired, if any."""

    data: bytes
    width: int
    height: int
    repaired: str | None


def build_lmdb(
    src: Path,
    out: Path,
    short_side: int = 0,
    quality: int = 90,
    check: bool = False,
    skip_bad: bool = False,
    workers: int = 0,
) -> None:
    """Make OUT/train.lmdb, and OUT/test.lmdb or OUT/val.lmdb, from the images of SRC.

    SRC is a folder, .zip or uncompressed .tar with train/CLASS/IMAGE and (or) test/ or val/ of the
    same form, perhaps below other folders. Or it has a val/ without class folders but with
    annotations, like ImageNet and TinyImageNet; or it is a set's own archive, like CIFAR's.
    `bip.data.layouts` has the rules; what it leaves out is counted and named.
    Classes are numbered, and images stored, in sorted order. Bytes are unchanged, except CMYK JPEGs
    and other formats named .jpg, which become RGB JPEGs. A store with the same classes and count is
    kept. A build that was interrupted resumes when the command is repeated; it detects files that
    were added or removed meanwhile, not files that changed.

    Args:
        short_side: shrink images to this short side, pixels, and re-encode them; 0: never.
        quality: JPEG quality of re-encoded images.
        check: decode every image, not only its header.
        skip_bad: leave out damaged images, instead of failing.
        workers: threads; 0: one per core.

    Raises:
        UserError: unknown layout, splits with different classes, a file that is not an image, a
            different store in OUT, a full disk.
    """
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    options = Options(short_side, quality, check)
    if short_side < 0 or not 1 <= quality <= 100:
        raise UserError("short_side must not be negative, and quality must be 1 to 100")
    with open_tree(src) as tree:
        splits = find_splits(tree)
        left_out = describe_left_out(tree.left_out)
        if not splits:
            if all(_IMAGENET_VAL.fullmatch(name) for name in tree.left_out) and tree.left_out:
                raise UserError(
                    f"{src}: holds ImageNet's validation images without their classes; put them "
                    "and their annotations (ILSVRC2012_bbox_val_v3.tgz of image-net.org, or a "
                    "val.txt with lines NAME CLASS) into one folder: mkdir -p DIR/val && tar -xf "
                    f"{src} -C DIR/val && tar -xzf ILSVRC2012_bbox_val_v3.tgz -C DIR; then: "
                    f"python -m bip data build-lmdb DIR {out}"
                )
            found = f"; it has {', '.join(left_out)}: unpack or arrange it" if left_out else ""
            raise UserError(
                f"{src}: no train/CLASS/IMAGE, test/CLASS/IMAGE or val/CLASS/IMAGE in it{found}; "
                "for ImageNet see: python -m bip data prepare-imagenet"
            )
        first, expected = next(iter(splits.items()))
        for name, split in splits.items():
            odd = different_classes(expected.classes, split.classes)
            if odd is not None:
                raise UserError(f"{src}: class {odd} is only in one of {first}/ and {name}/")
        for phrase in left_out:
            console.print(f"warning: {src}: left out {phrase}")
        _make_folder(out)
        missing, estimates = {}, {}
        for name, split in splits.items():
            path = out / f"{name}.lmdb"
            if path.exists():
                _check_same(path, split, options, skip_bad)
                console.print(f"{path}: there already, kept")
                continue
            missing[path] = split
            estimates[path] = len(split.members), _stored_size(tree, split)
        _report_sizes(estimates, short_side, console)
        for path, split in missing.items():
            source = _TreeImages(tree, split, options)
            plan = _plan(src, split, options)
            _write(path, split.classes, source, plan, skip_bad, workers, console)


def convert(src: Path, out: Path, check: bool = False, skip_bad: bool = False) -> None:
    """Rewrite SRC, a store of pickles in the published layout, as OUT in this program's layout.

    SRC is not changed, and no code from it is run. Classes are named by their numbers, from 0 to
    the highest.

    Args:
        check: decode every image, not only its header.
        skip_bad: leave out damaged images, instead of failing.

    Raises:
        UserError: SRC is not such a store, or a record of it is not (bytes, label); OUT exists, or
            there is no space for it.
    """
    if out.exists():
        raise UserError(f"{out}: exists; remove it or choose another name")
    environment = open_environment(src, in_order=True)  # the store shares it
    source = _StoreImages(PublishedStore(src), Options(check=check))
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    _make_folder(out.parent)
    _report_sizes({out: (len(source), size_of(environment.env))}, 0, console)
    _write(out, None, source, None, skip_bad, 0, console)


class _TreeImages:
    """The images of a split, by position, read and prepared."""

    def __init__(self, tree: Tree, split: Split, options: Options) -> None:
        self.tree, self.split, self.options = tree, split, options

    def __len__(self) -> int:
        return len(self.split.members)

    def name(self, index: int) -> str:
        return self.split.members[index][0]

    def get(self, index: int) -> tuple[Ready, int, int]:
        """The image, its label and its original size in bytes. Raises READ_ERRORS."""
        name, label = self.split.members[index]
        data = read_image(self.tree, name)
        return make_ready(data, name, self.options), label, len(data)


class _StoreImages:
    """The same for a store."""

    def __init__(self, store: PublishedStore, options: Options) -> None:
        self.store, self.options = store, options

    def __len__(self) -> int:
        return len(self.store)

    def name(self, index: int) -> str:
        return self.store.name(index)

    def get(self, index: int) -> tuple[Ready, int, int]:
        data, label = self.store.read(index)
        if not 0 <= label < _MOST_CLASSES:
            raise DamagedImage(f"label {label} is not in 0 ... {_MOST_CLASSES - 1}")
        return make_ready(data, "", self.options), label, len(data)


def make_ready(data: bytes, name: str, options: Options) -> Ready:
    """Repair, shrink and check one image. Raises READ_ERRORS."""
    size = decode.plain_jpeg_size(data)
    repaired = None
    if size is None:
        with decode.open_image(data) as image:
            size = image.height, image.width
            if image.format == "JPEG" and image.mode == "CMYK":
                repaired = "CMYK JPEG repaired"
            elif PurePosixPath(name).suffix.lower() in (".jpg", ".jpeg") and image.format != "JPEG":
                repaired = f"{image.format} named as JPEG repaired"
            if repaired:
                data = _as_jpeg(image, 95)
            elif decode.is_deep(image):
                repaired = f"16-bit {image.format} scaled to 8 bits"  # when it is decoded
    if options.short_side and min(size) > options.short_side:
        with decode.open_image(data) as image:
            scale = options.short_side / min(size)
            height, width = (max(1, round(side * scale)) for side in size)
            image.draft(image.mode, (width, height))
            small = _plain(image).resize((width, height), Image.Resampling.LANCZOS)
            data = _as_jpeg(small, options.quality)
            size = height, width
    if options.check:
        decode.decode(data, 3)
    return Ready(data, size[1], size[0], repaired)


def _as_jpeg(image: Image.Image, quality: int) -> bytes:
    stream = io.BytesIO()
    _plain(image).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def _plain(image: Image.Image) -> Image.Image:
    return image if image.mode in ("L", "RGB") else decode.convert(image, "RGB")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror})") from error


def _check_same(path: Path, split: Split, options: Options, skip_bad: bool) -> None:
    store = LmdbStore(path)
    count, stored = len(split.members), len(store)
    whole = stored + (store.header.get("skipped", 0) if skip_bad else 0) == count
    if store.classes != split.classes or not whole:
        raise UserError(
            f"{path}: exists with {stored} images of {len(store.classes)} classes, the source "
            f"has {count} of {len(split.classes)}; remove it or choose another folder"
        )
    if store.header.get("options") != asdict(options):
        raise UserError(
            f"{path}: exists, but was built with other --short-side, --quality or --check; give "
            "the same, remove it or choose another folder"
        )


def _stored_size(tree: Tree, split: Split) -> float:
    """Bytes that the images will take in a store, estimated from a sample. Raises UserError."""
    step = max(1, len(split.members) // _SAMPLE)
    sizes = []
    for name, _ in split.members[::step]:
        try:
            sizes.append(stored_size(tree.size(name)))
        except OSError as error:
            raise UserError(f"{name}: cannot be read ({error.strerror})") from error
    return sum(sizes) / len(sizes) * len(split.members)


def _report_sizes(stores: dict[Path, tuple[int, float]], short_side: int, console: Console) -> None:
    """Print the disk space that the stores of one folder, of (images, bytes), will take.

    Raises UserError if less is free.
    """
    if not stores:
        return
    folder = next(iter(stores)).parent
    free = shutil.disk_usage(folder).free
    for path, (count, estimate) in stores.items():
        most = "at most" if short_side else "about"
        console.print(f"{path}: {count} images will take {most} {estimate / 1e6:.0f} MB")
        partial = path.with_name(f".{path.name}.partial")
        free += partial.stat().st_size if partial.exists() else 0
    console.print(f"{folder}: {free / 1e6:.0f} MB are free")
    total = sum(estimate for _, estimate in stores.values())
    if total > free and not short_side:
        raise UserError(
            f"{' and '.join(map(str, stores))}: will take about {total / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free; make room or choose another folder "
            "(build-lmdb --short-side 400 shrinks the images)"
        )


def stored_size(size: int) -> int:
    """Bytes that LMDB takes for an image of `size` bytes; large values have pages of their own."""
    record = size + 48
    return record if record < _PAGE // 2 else -(-record // _PAGE) * _PAGE + 48


def _plan(src: Path, split: Split, options: Options) -> str:
    text = hashlib.sha256(f"{src.resolve()}\n{options}\n".encode())
    for name, label in split.members:
        text.update(f"{label} {name}\n".encode("utf-8", "surrogateescape"))
    return text.hexdigest()


def in_order(
    function: Callable[[int], _T], start: int, stop: int, workers: int
) -> Iterator[Future[_T]]:
    """Futures of function(start) ... function(stop - 1), in order, a few of them ahead."""
    threads = workers or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[_T]] = deque()
        try:
            for index in range(start, stop):
                ahead.append(pool.submit(function, index))
                if len(ahead) > _AHEAD * threads:
                    yield ahead.popleft()
            yield from ahead
        finally:
            pool.shutdown(cancel_futures=True)


def progress_bar(name: str, console: Console) -> Progress:
    """A bar with a count and the time left; nothing where the output is no terminal."""
    return Progress(
        TextColumn(name),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _write(
    path: Path,
    classes: list[str] | None,
    source: _TreeImages | _StoreImages,
    plan: str | None,
    skip_bad: bool,
    workers: int,
    console: Console,
) -> None:
    try:
        with (
            LmdbWriter(path, classes, plan, not skip_bad, asdict(source.options)) as writer,
            progress_bar(path.name, console) as bar,
        ):
            if writer.done:
                console.print(f"{path}: resuming after {writer.done} images, assumed unchanged")
            task = bar.add_task("", total=len(source), completed=writer.done)
            for image in in_order(source.get, writer.done, len(source), workers):
                try:
                    ready, label, before = image.result()
                except (*READ_ERRORS, DamagedImage) as error:
                    name, why = source.name(writer.done), decode.reason(error)
                    if (
                        isinstance(error, OSError) and error.errno is not None
                    ):  # not a damaged image
                        raise UserError(
                            f"{name}: cannot be read ({error.strerror}); the same command resumes "
                            "from here"
                        ) from error
                    name = printable(name)
                    console.print(f"{name}: {why}")
                    writer.skip(name, why)
                else:
                    writer.add(ready.data, label, ready.width, ready.height, before, ready.repaired)
                bar.advance(task)
            if writer.skipped and not skip_bad:
                name, why = writer.skipped[0]
                others = f" and {len(writer.skipped) - 1} others" if writer.skipped[1:] else ""
                raise UserError(
                    f"{name}{others} cannot be stored ({why}); repair or remove "
                    f"{'them' if others else 'it'} and build {path.name} again, or give --skip-bad"
                )
            if writer.done == len(writer.skipped):
                raise UserError(f"{path}: not built: no image in the source can be stored")
    except (OSError, lmdb.Error) as error:
        raise UserError(f"{path}: cannot be written ({error}); build it again") from error
    except MemoryError as error:
        raise UserError(f"{path}: no memory to build it; use fewer --workers") from error
    console.print(_summary(path, writer))


def _summary(path: Path, writer: LmdbWriter) -> str:
    stored = writer.done - len(writer.skipped)
    size = path.stat().st_size / 1e6
    parts = [f"{path}: {stored} images, {len(writer.classes)} classes, {size:.0f} MB"]
    parts += [f"{count} x {what}" for what, count in sorted(writer.repaired.items())]
    if writer.skipped:
        parts.append(f"{len(writer.skipped)} skipped")
    saved = writer.source_bytes - writer.image_bytes
    if saved > 0.001 * writer.source_bytes:
        percent = 100 * saved / writer.source_bytes
        parts.append(f"{saved / 1e6:.0f} MB ({percent:.0f}%) saved by shrinking")
    return ", ".join(parts)
