"""LMDB and folder stores: round trips, damage, processes."""

import contextlib
import errno
import json
import multiprocessing
import os
import pickle
import random
import signal
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import lmdb
import numpy as np
import pytest

from bip.data.stores.folder import FolderStore
from bip.data.stores.lmdb import LmdbStore, pack_record
from bip.data.stores.writer import LmdbWriter
from bip.data.tools.check import verify
from bip.errors import UserError
from tests.data.conftest import as_folder, read_all, refused

CLASSES = ["cat", "dog", "eel"]


def images(count: int = 20) -> list[tuple[bytes, int, int, int]]:
    """(bytes, label, width, height); some smaller than an LMDB page, some larger."""
    rng = np.random.default_rng(0)
    return [(rng.bytes(400 * i + 1), i % 3, i + 1, i + 2) for i in range(count)]


PAIRS = [record[:2] for record in images()]


def write(path: Path, records: list[tuple[bytes, int, int, int]]) -> Path:
    with LmdbWriter(path, CLASSES) as writer:
        for record in records:
            writer.add(*record)
    return path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write(tmp_path / "train.lmdb", images())


def test_round_trip(store: Path) -> None:
    opened = LmdbStore(store)
    assert opened.classes == CLASSES
    assert read_all(opened) == PAIRS
    assert opened.header["class_counts"] == [7, 7, 6]
    assert opened.header["image_bytes"] == sum(len(data) for data, _ in PAIRS)
    for index in (-1, 20):
        with pytest.raises(IndexError):
            opened.read(index)


def test_the_layout_is_the_documented_one(store: Path) -> None:
    with lmdb.open(str(store), subdir=False, readonly=True, lock=False) as env, env.begin() as txn:
        keys = list(txn.cursor().iternext(values=False))
        assert keys == [struct.pack(">Q", index) for index in range(20)] + [b"header"]
        value = txn.get(struct.pack(">Q", 7))
        header = json.loads(txn.get(b"header"))
    data, label, width, height = images()[7]
    assert struct.unpack(">iii", value[:12]) == (label, width, height)
    assert struct.unpack(">I", value[12:16]) == (zlib.crc32(value[:12] + data),)
    assert value[16:] == data
    assert (header["format"], header["version"], header["count"]) == ("bip-lmdb", 1, 20)


def damaged_pages(path: Path, count: int) -> Iterator[Path]:
    """`path`'s copies with damage in a page of LMDB's tree."""
    rng, content = random.Random(0), path.read_bytes()
    tree = [
        at
        for at in range(8192, len(content), 4096)
        if struct.unpack_from("<Q", content, at)[0] == at // 4096
        and struct.unpack_from("<H", content, at + 10)[0] in (1, 2)  # branch or leaf
    ]
    for _ in range(count):
        damaged = bytearray(content)
        page = rng.choice(tree)
        for _ in range(rng.randint(1, 3)):
            at = page + rng.choice([rng.randrange(16, 64), rng.randrange(4096)])
            damaged[at] = rng.choice([0, 255, damaged[at] ^ 1 << rng.randrange(8)])
        if rng.random() < 0.2:  # the size of the page's third value: 1 GB
            damaged[page + struct.unpack_from("<H", content, page + 20)[0] + 3] = 0x40
        copy = path.with_name("damaged.lmdb")
        copy.write_bytes(damaged)
        yield copy
        copy.unlink()


def test_verify_outlives_40_damaged_pages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [(b"P5 %d 1 255 " % n + bytes(n), 0, n, 1) for n in range(1, 8000, 400)]
    printed = []
    for path in damaged_pages(write(tmp_path / "train.lmdb", records), 40):
        try:
            verify(path, workers=1)
            printed.append(capsys.readouterr().out)
        except UserError as error:
            printed.append(str(error))
        assert str(path) in printed[-1]
    assert any("20 images, 0 damaged" in text for text in printed)
    assert any("reading it ended by SIG" in text for text in printed)


def test_the_map_grows(tmp_path: Path) -> None:
    records = [(bytes(1 << 20), 0, 1, 1) for _ in range(80)]  # more than the first 64 MiB
    opened = LmdbStore(write(tmp_path / "train.lmdb", records))
    assert len(opened) == 80
    assert opened.read(79) == (bytes(1 << 20), 0)


@pytest.mark.parametrize("place", ["label", "size", "checksum", "first byte", "last byte"])
def test_a_flipped_byte_is_found_and_its_record_named(store: Path, place: str) -> None:
    data, label, width, height = images()[9]
    content = bytearray(store.read_bytes())
    at = content.index(pack_record(data, label, width, height))
    offset = {"label": 3, "size": 4, "checksum": 12, "first byte": 16, "last byte": 15 + len(data)}
    content[at + offset[place]] ^= 1
    store.write_bytes(content)
    opened = LmdbStore(store)
    assert opened.read(8) == PAIRS[8]
    known = CLASSES[label] if place != "label" else ""
    with refused(rf"{store}: record 9 \(class {known}"):
        opened.read(9)


@pytest.mark.parametrize("keep", [0, 100, 4096, 20_000, 0.5, 0.99])
def test_a_truncated_store_is_refused(store: Path, keep: float) -> None:
    size = store.stat().st_size
    os.truncate(store, int(keep * size) if isinstance(keep, float) else keep)
    with refused(str(store)):
        LmdbStore(store)


@pytest.mark.parametrize("content", [b"not a store", bytes(9000), b"\x80\x04K\x01." * 5000])
def test_a_file_that_is_no_store_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "train.lmdb"
    path.write_bytes(content)
    with refused(str(path)):
        LmdbStore(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2.*build it"),
        ({"format": "other"}, "not a bip-lmdb store.*build it"),
        *(
            (change, "lacks count, classes or totals")
            for change in (
                *({"count": "20"}, {"classes": [1, 2, 3]}, {"class_counts": [20]}),
                *({"class_counts": [-7, 21, 6]}, {"classes": [], "class_counts": []}),
            )
        ),
        ({"count": 12}, "counts 12 records, 20 by class, but there are 20"),
        ({"count": -3}, "counts -3 records"),
        ({"class_counts": [7, 7, 7]}, "20 records, 21 by class"),
        ({"count": 21, "class_counts": [7, 7, 7]}, "21 records, 21 by class, but there are 20"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(
    store: Path, change: dict[str, object], message: str
) -> None:
    with lmdb.open(str(store), subdir=False, lock=False) as env, env.begin(write=True) as txn:
        header = json.loads(txn.get(b"header")) | change
        txn.put(b"header", json.dumps(header).encode())
    with refused(message):
        LmdbStore(store)


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), LmdbWriter(tmp_path / "a.lmdb", ["a"]) as writer:
        writer.add(*images()[0])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_killed_build_is_no_store_and_does_not_stop_the_next(tmp_path: Path) -> None:
    path = tmp_path / "train.lmdb"

    def build() -> None:
        with LmdbWriter(path, ["cat"]) as writer:
            for _ in range(2500):
                writer.add(b"x" * 100, 0, 1, 1)
            os.kill(os.getpid(), signal.SIGKILL)

    killed = multiprocessing.get_context("fork").Process(target=build)
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    (partial,) = tmp_path.iterdir()
    assert partial.name == ".train.lmdb.partial"
    assert partial.stat().st_size > 100_000
    with refused("half-built"):
        LmdbStore(partial)
    assert len(LmdbStore(write(path, images(3)))) == 3
    assert list(tmp_path.iterdir()) == [path]


def test_a_store_is_never_overwritten(store: Path) -> None:
    before = store.read_bytes()
    with refused("exists; remove it"):
        write(store, images(2))
    assert store.read_bytes() == before
    assert list(store.parent.iterdir()) == [store]


def test_two_builds_of_one_store_exclude_each_other(tmp_path: Path) -> None:
    path = tmp_path / "train.lmdb"
    with LmdbWriter(path, CLASSES) as writer:
        writer.add(*images()[0])
        with refused("another process"):
            write(path, images(2))
        writer.add(*images()[1])
    assert len(LmdbStore(path)) == 2


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_filesystem_without_locks_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with refused("no file locks; build on a local disk"):
        write(tmp_path / "train.lmdb", images(2))


def test_stores_of_one_file_live_side_by_side(store: Path) -> None:
    first, second = LmdbStore(store), LmdbStore(store.parent / "." / store.name)
    assert first.read(1) == second.read(1)
    del first
    assert second.read(2) == PAIRS[2]
    store.unlink()
    assert len(LmdbStore(write(store, images(3)))) == 3  # another file of the same name
    assert second.read(19) == PAIRS[19]  # its file lives on until it is closed


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_open_store_works_in_child_processes(store: Path, method: str) -> None:
    opened = LmdbStore(store)
    opened.read(0)
    assert len(pickle.dumps(opened)) < 1000
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(read_all, [opened] * 4) == [PAIRS] * 4
        assert read_all(opened) == PAIRS


def test_a_child_does_not_use_its_parents_environment(store: Path) -> None:
    first, second = LmdbStore(store), LmdbStore(store)
    first.read(0)
    inherited = first._opened

    def child() -> None:
        assert first.read(1) == second.read(1) == PAIRS[1]
        assert inherited is not first._opened is second._opened

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert first._opened is inherited
    assert first.read(3) == PAIRS[3]


def test_folder_store(tmp_path: Path) -> None:
    """Sorted by class first: "a-b/..." sorts before "a/..." as text."""
    names = ("a/y.jpg", "a/z/1.jpeg", "a-b/10.PNG", "a-b/2.jpg")
    others = ("a/notes.txt", "a/.hidden.jpg", "stray.jpg")
    as_folder(tmp_path, {name: name.encode() for name in (*reversed(names), *others)})
    opened = pickle.loads(pickle.dumps(FolderStore(tmp_path)))
    assert opened.classes == ["a", "a-b"]
    assert read_all(opened) == [(name.encode(), n // 2) for n, name in enumerate(names)]
    assert opened.name(1) == str(tmp_path / "a/z/1.jpeg")
    (tmp_path / "a-b/2.jpg").unlink()
    with refused(r"a-b/2\.jpg: cannot be read .No such file"):
        opened.read(3)


def test_an_empty_tree_is_refused(tmp_path: Path) -> None:
    with refused("holds no image", "add its images"):
        FolderStore(tmp_path)


def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_folder(tmp_path, {"a/1.jpg": b"", "b/1.jpg": b""})
    scandir = os.scandir

    def refuse(folder: str) -> object:
        if folder == str(tmp_path / "b"):
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with refused("/b: cannot be read .Permission denied"):
        FolderStore(tmp_path)
