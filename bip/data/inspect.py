"""`python -m bip data info` and `verify`: what a store holds, and whether it is whole."""

from collections import Counter
from functools import partial
from pathlib import Path

from rich.console import Console

from bip.data import decode
from bip.data.build import in_order, progress_bar
from bip.data.published import PublishedStore, open_store
from bip.data.stores import LmdbStore
from bip.errors import UserError

_LISTED = 20  # damaged records that are shown


def _stores(path: Path) -> list[Path]:
    is_store = path.is_file() or (path / "data.mdb").exists()
    found = [path] if is_store else sorted(path.glob("*.lmdb"))
    if not found:
        raise UserError(
            f"{path}: no .lmdb store there; build one with: python -m bip data build-lmdb SRC OUT"
        )
    return found


def info(path: Path) -> None:
    """Print what a store holds; for a folder, each of its stores.

    Raises:
        UserError: no store there, or a damaged one.
    """
    for file in _stores(path):
        store = open_store(file)
        if isinstance(store, PublishedStore):
            print(
                f"{file}: {len(store)} images in the published layout of pickles; rewrite it with: "
                f"python -m bip data convert {file} OUT"
            )
            continue
        header = store.header
        counts = header["class_counts"]
        print(
            f"{file}: {header['count']} images, {len(header['classes'])} classes of "
            f"{min(counts)}-{max(counts)}, {header['image_bytes'] / 1e6:.1f} MB of images, "
            f"format version {header['version']}"
        )


def verify(path: Path, workers: int = 0) -> None:
    """Check every checksum and decode every image of a store; for a folder, of each store.

    Args:
        workers: threads; 0: one per core.

    Raises:
        UserError: a damaged record; the first ones are listed before. Or whole ones that do not
            fit the header.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    damaged = 0
    for file in _stores(path):
        store = open_store(file)
        before = damaged
        counts: Counter[int] = Counter()
        with progress_bar(file.name, console) as bar:
            task = bar.add_task("", total=len(store))
            for found in in_order(partial(_look, store), 0, len(store), workers):
                label, problem = found.result()
                counts[label] += 1
                if problem is not None:
                    damaged += 1
                    if damaged <= _LISTED:
                        console.print(problem)
                bar.advance(task)
        print(f"{file}: {len(store)} images, {damaged - before} damaged")
        if isinstance(store, LmdbStore) and damaged == before:
            told = store.header["class_counts"]
            wrong = [label for label, count in enumerate(told) if counts[label] != count]
            if wrong:
                raise UserError(
                    f"{file}: header tells of {told[wrong[0]]} images of class "
                    f"{store.classes[wrong[0]]}, but there are {counts[wrong[0]]}; build it again"
                )
    if damaged:
        raise UserError(f"{path}: {damaged} damaged records; copy or build the store again")


def _look(store: LmdbStore | PublishedStore, index: int) -> tuple[int, str | None]:
    """A record's label (-1: unknown), and what is wrong with it, in one line."""
    label = -1
    try:
        data, label = store.read(index)
        decode.decode(data, 3)
    except UserError as error:
        return label, str(error)
    except decode.DECODE_ERRORS as error:
        return label, f"{store.name(index)}: does not decode ({decode.reason(error)})"
    return label, None
