"""LMDB's file format as `stores/pages.py` knows it, against files that LMDB itself wrote."""

import faulthandler
import multiprocessing
import os
import struct
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lmdb
import pytest

from bip.data.stores.environment import open_environment
from bip.data.stores.lmdb import LmdbStore, pack_record
from bip.data.stores.pages import open_pages
from bip.data.stores.published import load_plain, open_store
from bip.errors import UserError
from tests.data.conftest import read_all
from tests.data.test_published import write as write_published
from tests.data.test_stores import PAIRS, damaged_pages, images, write


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write(tmp_path / "train.lmdb", images())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """The places (start, length, advice) that the kernel is asked for."""
    places: list[tuple[int, int, int]] = []
    monkeypatch.setattr("os.posix_fadvise", lambda fd, *place: places.append(place))
    return places


def test_the_bytes_of_the_records_are_asked_for(store: Path, asked: list[tuple[int, ...]]) -> None:
    opened, content = LmdbStore(store), store.read_bytes()
    for index, record in enumerate(images()):
        asked.clear()
        opened.prefetch([index])
        value = pack_record(*record)
        if len(value) < 2020:  # on the leaf page itself, which is read by now
            assert asked == []
            continue
        ((start, length, advice),) = asked
        assert content[start + 16 : start + length] == value
        assert advice == os.POSIX_FADV_WILLNEED
    opened.prefetch([99, 7])  # no such record: `read` reports it
    assert read_all(opened) == PAIRS


def test_in_the_published_layout_too(tmp_path: Path, asked: list[tuple[int, ...]]) -> None:
    records = [(bytes([number]) * 9000, number) for number in range(12)]
    path = write_published(tmp_path / "train.lmdb", records)
    opened, content = open_store(path), path.read_bytes()
    opened.prefetch([11, 3])
    found = [load_plain(content[start + 16 : start + length]) for start, length, _ in asked]
    assert found == [records[11], records[3]]


@pytest.mark.parametrize("sizes", [(100,), (5000,), (20_000, 90), (4064, 4065, 2 << 20)])
@pytest.mark.parametrize("keys", [3, 2000])
def test_files_of_the_installed_lmdb_have_the_format(
    tmp_path: Path, asked: list[tuple[int, ...]], sizes: tuple[int, ...], keys: int
) -> None:
    """Plain LMDB as the writer: keys of several lengths, overwritten and deleted records."""
    path = tmp_path / "any.lmdb"
    name = {n: (b"%d" % n) * (1 + n % 5) for n in range(keys)}
    value = {n: os.urandom(sizes[n % len(sizes)] if n < 40 else 3000) for n in range(keys)}
    with lmdb.open(str(path), subdir=False, map_size=256 << 20, sync=False) as env:
        for turn in range(2):
            with env.begin(write=True) as transaction:
                for n in name:
                    transaction.put(name[n], value[n] if turn else value[n][::-1])
                transaction.delete(name[0])
    environment, content = open_environment(path), path.read_bytes()
    for n in [*range(1, min(keys, 40)), keys - 1]:
        asked.clear()
        environment.prefetch([name[n]])
        assert len(asked) == (len(value[n]) > 2020)
        assert all(content[start + 16 : start + size] == value[n] for start, size, _ in asked)
    environment.prefetch([name[0]])  # deleted


@pytest.mark.parametrize(("offset", "value"), [(16, 0xBEEFC0DF), (20, 2), (20, 999)])
def test_another_magic_or_version_falls_back(
    store: Path, tmp_path: Path, offset: int, value: int
) -> None:
    content = bytearray(store.read_bytes())
    struct.pack_into("=I", content, offset, value)
    (tmp_path / "other").write_bytes(content)
    env = open_environment(store).env
    assert open_pages(store, env) is not None
    assert open_pages(tmp_path / "other", env) is None
    os.truncate(tmp_path / "other", 10)
    assert open_pages(tmp_path / "other", env) is None


def test_the_switch_leaves_the_work_to_lmdb(
    store: Path, asked: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIP_LMDB_PREFETCH", "0")
    opened = LmdbStore(store)
    opened.prefetch(range(20))
    assert asked == []
    assert read_all(opened) == PAIRS


def _read_or_report(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except UserError as error:
        return str(error)


def _read_records(path: Path, hint: bool, pipe: Connection) -> None:
    faulthandler.disable()
    found = _read_or_report(lambda: LmdbStore(path))
    if isinstance(opened := found, LmdbStore):
        if hint:
            opened.prefetch(range(len(opened)))
        found = [_read_or_report(lambda i=i: opened.read(i)) for i in range(len(opened))]
    pipe.send(found)


def _outcome(path: Path, hint: bool) -> tuple[int | None, str]:
    """A child's exit code, and all that it read, errors too."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_read_records, args=(path, hint, there))
    child.start()
    there.close()
    try:
        found = repr(here.recv())
    except EOFError:
        found = ""
    child.join()
    return child.exitcode, found


def test_prefetch_changes_nothing_on_80_damaged_pages(store: Path) -> None:
    """Nor does it end the process where reading would not."""
    outcomes = set()
    for path in damaged_pages(store, 80):
        plain, hinted = (_outcome(path, hint) for hint in (False, True))
        assert plain == hinted
        outcomes.add(plain)
    codes = {code or 0 for code, _ in outcomes}
    assert max(codes) == 0
    assert min(codes) < 0  # a signal
    assert len(outcomes) > 20
