"""LMDB's file format as `stores/pages.py` knows it, against files that LMDB itself wrote."""

import faulthandler
import hashlib
import os
import pickle
import struct
from pathlib import Path

import lmdb
import pytest

from bip.data.stores.environment import open_environment
from bip.data.stores.lmdb import LmdbStore, pack_record
from bip.data.stores.pages import open_pages
from bip.data.stores.published import load_plain, open_store
from bip.errors import UserError
from tests.data.test_published import write as write_published
from tests.data.test_stores import damaged_pages, images, read_all, write


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
    assert read_all(opened) == [record[:2] for record in images()]


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
    assert read_all(opened) == [record[:2] for record in images()]


def _outcome(path: Path, hint: bool) -> tuple[int, bytes]:
    """A child's wait status, and a digest of all that it read, errors too."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()
            seen = hashlib.sha256()
            try:
                opened = LmdbStore(path)
                if hint:
                    opened.prefetch(range(len(opened)))
                for index in range(len(opened)):
                    try:
                        seen.update(pickle.dumps(opened.read(index)))
                    except UserError as error:
                        seen.update(str(error).encode())
            except UserError as error:
                seen.update(str(error).encode())
            os.write(writer, seen.digest())
            os._exit(0)
        finally:  # anything else that was raised
            os._exit(9)
    os.close(writer)
    with open(reader, "rb") as stream:
        digest = stream.read()
    return os.waitpid(child, 0)[1], digest


def test_prefetch_changes_nothing_on_80_damaged_pages(store: Path) -> None:
    """Nor does it end the process where reading would not."""
    outcomes = set()
    for path in damaged_pages(store, 80):
        plain, hinted = (_outcome(path, hint) for hint in (False, True))
        assert plain == hinted
        outcomes.add(plain)
    statuses = {status for status, _ in outcomes}
    assert 0 in statuses
    assert any(os.WIFSIGNALED(status) for status in statuses)
    assert all(os.WIFSIGNALED(status) for status in statuses - {0})
    assert len(outcomes) > 20
