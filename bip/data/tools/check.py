"""`python -m bip data info` and `verify`: what a store holds, and whether it is damaged."""

import contextlib
import faulthandler
import gc
import multiprocessing
import signal
from collections import Counter
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from rich.console import Console

from bip.data import decode
from bip.data.stores.lmdb import LmdbStore
from bip.data.stores.published import PublishedStore, open_store
from bip.data.tools.build import in_order, progress_bar
from bip.errors import UserError
from bip.files import raise_passing

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
        UserError: there is no store, or it is damaged.
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
        UserError: records are damaged (the first ones are printed), or do not fit the header.
    """
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    damaged = 0
    for file in _stores(path):
        count, before = 0, damaged
        with _in_a_child(file, workers) as results, progress_bar(file.name, console) as bar:
            task = bar.add_task("", total=None)
            for result in results:
                if isinstance(result, int):
                    count = result
                    bar.update(task, total=count)
                    continue
                if result is not None:
                    damaged += 1
                    if damaged <= _LISTED:
                        console.print(result)
                bar.advance(task)
        print(f"{file}: {count} images, {damaged - before} damaged")
    if damaged:
        raise UserError(f"{path}: {damaged} damaged records; copy or build the store again")


# The number of records, then each record's fault (None: sound), then the error that ended it.
_Result = int | str | None


@contextlib.contextmanager
def _in_a_child(file: Path, workers: int) -> Iterator[Iterator[_Result]]:
    """The messages of `_read_all`, which runs in a process of its own.

    LMDB does not check its pages, so a damaged one may crash the process that reads it.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_read_all, args=(file, workers, there), daemon=True)
    child.start()
    there.close()

    def results() -> Iterator[_Result]:
        done = -1  # the first message is the number of records
        while True:
            try:
                result = here.recv()
            except EOFError:
                break
            if isinstance(result, UserError | OSError):
                raise result
            done += 1
            yield result
        child.join()
        if child.exitcode:
            how = signal.Signals(-child.exitcode).name if child.exitcode < 0 else "an error"
            where = f"at record {done} or soon after it" if done >= 0 else "as it was opened"
            raise UserError(
                f"{file}: reading it ended by {how} {where}: its pages are damaged, or the disk "
                "fails; copy or build the store again"
            )

    try:
        yield results()
    finally:
        child.kill()
        child.join()
        here.close()


def _read_all(file: Path, workers: int, pipe: Connection) -> None:
    """Send the number of records, each record's fault (None: sound), and the store's fault."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    faulthandler.disable()  # the parent reports it
    gc.freeze()  # inherited objects (DALI's pipelines) must not be destroyed here
    try:
        store = open_store(file, in_order=True)
        pipe.send(len(store))
        counts: Counter[int] = Counter()
        whole = True
        for found in in_order(partial(_look, store), 0, len(store), workers):
            label, problem = found.result()
            counts[label] += 1
            whole = whole and problem is None
            pipe.send(problem)
        if isinstance(store, LmdbStore) and whole:
            counted = store.header["class_counts"]
            wrong = [label for label, count in enumerate(counted) if counts[label] != count]
            if wrong:
                raise UserError(
                    f"{file}: header counts {counted[wrong[0]]} images of class "
                    f"{store.classes[wrong[0]]}, but there are {counts[wrong[0]]}; build it again"
                )
    except UserError as error:
        pipe.send(UserError(str(error)))
    except OSError as error:
        pipe.send(error)


def _look(store: LmdbStore | PublishedStore, index: int) -> tuple[int, str | None]:
    """A record's label (-1: unknown), and its fault in one line."""
    label = -1
    try:
        data, label = store.read(index)
        decode.decode(data, 3)
    except UserError as error:
        return label, str(error)
    except decode.DECODE_ERRORS as error:
        raise_passing(error, store.name(index))
        return label, f"{store.name(index)}: does not decode ({decode.reason(error)})"
    return label, None
