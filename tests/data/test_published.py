"""The published layout of pickles: read as it is, converted, and never run."""

import contextlib
import io
import os
import pickle
import pickletools
import random
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path
from typing import Any

import lmdb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bip.data.stores.base import DamagedImage
from bip.data.stores.lmdb import LmdbStore
from bip.data.stores.published import PublishedStore, load_plain, open_store
from bip.data.tools.build import convert
from bip.data.tools.check import info, verify
from bip.errors import UserError
from tests.data.conftest import opened

plain = st.recursive(
    st.binary(max_size=300) | st.text(max_size=20) | st.integers(-(2**100), 2**100),
    lambda inner: st.lists(inner, max_size=5) | st.lists(inner, max_size=5).map(tuple),
    max_leaves=20,
)


@given(plain, st.integers(3, 5))
@settings(max_examples=300, deadline=None)
def test_plain_pickles_load(value: Any, protocol: int) -> None:
    assert load_plain(pickle.dumps(value, protocol), 1000) == value


def test_long_lists_and_bytes_load() -> None:
    for value in ([str(i).encode() for i in range(5000)], (bytes(70_000), 999)):
        for protocol in (3, 4, 5):
            assert load_plain(pickle.dumps(value, protocol), 15_100) == value


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/bip-evil-was-here",)


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(Evil()),
        pickle.dumps((b"image", Evil())),
        pickle.dumps([Evil()], 0),
        b"cos\nsystem\n(S'touch /tmp/bip-evil-was-here'\ntR.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x1btouch /tmp/bip-evil-was-here\x85R.",
        pickle.dumps({"a": 1}),
        pickle.dumps(1.5),
        pickle.dumps({1, 2}),
        pickle.dumps(True),
        pickle.dumps(None),
        pickle.dumps(bytearray(5), 5),
        b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"x.",  # bytes of 4 EiB
        b"\x80\x04B\xff\xff\xff\xffx.",
        b"\x80\x04\x96" + (2**40).to_bytes(8, "little") + b".",
        b"\x80\x04K\x01r\xff\xff\xff\xff\x85",  # a memo of 4 G places
        b"\x80\x04\x8b\xff\xff\xff\x7f1.",  # an integer of 2 GB
        b"\x80\x04\x8a\xff" + 255 * b"\x01" + b".",
        b"\x80\x04(((((",
        b"\x80\x04t.",
        b"\x80\x04K\x01e.",
        b"\x80\x04)(K\x01e.",
        b"\x80\x04h\x07.",
        b"\x80\x04(.",
        b"\x80\x09K\x01.",
        b"",
        b".",
        b"junk",
    ],
)
def test_what_is_not_plain_data_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"pickle"):
        load_plain(data)
    assert not Path("/tmp/bip-evil-was-here").exists()


SWELLING = {
    "lists": b"]",
    "numbered lists": b"]\x94",
    "tuples": b"K\x01\x85",
    "tuples in tuples": b"\x85",
    "marks": b"(",
    "numbered": b"\x94",
    "again": b"h\x00",
    "wide texts": b"\x8c\x03\xe4\xb8\xad",
    "bytes": b"C\x02ab\x94",
    "integers": b"M\xff\x7f",
    "long integers": b"\x8a\x02\xff\x7f",
}


@pytest.mark.parametrize("unit", SWELLING.values(), ids=SWELLING.keys())
@pytest.mark.parametrize("end", [b"e.", b""])
def test_memory_is_bounded_by_the_data_and_the_opcodes(unit: bytes, end: bytes) -> None:
    for start in (b"\x80\x04](K\x01\x94", b"\x80\x04K\x01"):
        data = start + unit * (200_000 // len(unit)) + end
        for opcodes in (64, 50_000, 300_000):
            tracemalloc.start()
            with contextlib.suppress(ValueError):
                load_plain(data, opcodes)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak < 3 * len(data) + 200 * min(opcodes, len(data)) + 40_000


def test_lists_in_lists_by_reference_are_bounded() -> None:
    """Each list holds the one before it twice: 2**60 paths to the first."""
    with pytest.raises(ValueError, match=r"pickle .*in each other"):
        load_plain(
            b"\x80\x04]\x94" + b"".join(b"](h%ch%ce\x94" % (n, n) for n in range(60)) + b".", 1000
        )
    with pytest.raises(ValueError, match=r"pickle .*in each other"):
        load_plain(b"\x80\x04]\x94h\x00a.")  # a list in itself


def test_the_size_limit_is_exact() -> None:
    data = memoryview(pickle.dumps(bytes(94), 3))
    assert load_plain(data, max_bytes=len(data)) == bytes(94)
    with pytest.raises(ValueError, match="larger than"):
        load_plain(data, max_bytes=len(data) - 1)


def test_a_record_of_many_opcodes_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "train.lmdb", [(photo(), 0), pickle.dumps([5] * 100)])
    with pytest.raises(DamagedImage, match=r"record 1 .*more than 64 opcodes"):
        open_store(path).read(1)


def test_10_000_mutations_neither_crash_nor_run_nor_swell() -> None:
    """In a process of its own with 1 GiB more address space than it starts with."""
    code = """
        import os, pickle, random, resource, subprocess, sys
        from bip.data.stores.published import load_plain

        def never(*_):
            os._exit(9)

        os.system = subprocess.Popen = os.fork = os.posix_spawn = never
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 30),) * 2)
        rng = random.Random(0)
        seeds = [
            pickle.dumps((rng.randbytes(200), 7), protocol) for protocol in (2, 3, 4, 5)
        ] + [pickle.dumps([b"%d" % i for i in range(40)], 4), pickle.dumps(1281167)]
        outcomes = {True: 0, False: 0}
        for _ in range(10_000):
            data = bytearray(rng.choice(seeds))
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(min(len(data), 40) if rng.random() < 0.7 else len(data))
                way = rng.randrange(3)
                if way == 0:
                    data[at] = rng.randrange(256)
                elif way == 1:
                    del data[at : at + rng.randint(1, 9)]
                else:
                    data[at:at] = rng.choice(
                        [b"cos\\nsystem\\n", b"R", b"\\x93", b"r\\xff\\xff\\xff\\x7f", b"\\x8e"]
                    )
                if not data:
                    break
            try:
                load_plain(bytes(data))
                outcomes[True] += 1
            except ValueError:
                outcomes[False] += 1
        print(outcomes[True], outcomes[False])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    loaded, refused = map(int, done.stdout.split())
    assert loaded + refused == 10_000
    assert refused > 3000


def write(path: Path, records: list[Any], keys: list[bytes] | None = None) -> Path:
    """As the published scripts do."""
    keys = [str(index).encode() for index in range(len(records))] if keys is None else keys
    with lmdb.open(str(path), subdir=False, map_size=64 << 20) as env, env.begin(write=True) as txn:
        for key, record in zip(keys, records, strict=True):
            txn.put(key, record if isinstance(record, bytes) else pickle.dumps(record))
        txn.put(b"__keys__", pickle.dumps(keys))
        txn.put(b"__len__", pickle.dumps(len(keys)))
    return path


@pytest.fixture
def published(small_cifar: Path, tmp_path: Path) -> Path:
    """train.lmdb and val.lmdb of `small_cifar`'s images, in no sorted order of keys."""
    for ours, theirs in (("train", "train"), ("test", "val")):
        store = LmdbStore(small_cifar / f"{ours}.lmdb")
        records = [store.read(index) for index in range(len(store))]
        write(tmp_path / f"{theirs}.lmdb", records)
    return tmp_path


def test_it_trains_as_it_is(published: Path, small_cifar: Path) -> None:
    case = {"dataset": "CIFAR10", "num_classes": 10, "loader": "lmdb", "num_workers": 1}
    theirs, ours = (opened(**case, data_dir=folder) for folder in (published, small_cifar))
    for _, (x, y), (u, v) in zip(range(6), theirs.train(), ours.train(), strict=False):
        assert torch.equal(x, u)
        assert torch.equal(y, v)
    labels = torch.cat([y for _, y in theirs.evaluate("test")])
    assert labels.tolist() == sorted(7 * list(range(10)))
    theirs.close()
    ours.close()


def test_convert(published: Path, small_cifar: Path, tmp_path: Path) -> None:
    before = (published / "train.lmdb").read_bytes()
    convert(published / "train.lmdb", tmp_path / "new" / "train.lmdb", check=True)
    converted, ours = (LmdbStore(p / "train.lmdb") for p in (tmp_path / "new", small_cifar))
    assert converted.classes == [str(number) for number in range(10)]
    assert len(converted) == len(ours) == 310
    assert all(converted.read(index) == ours.read(index) for index in range(310))
    assert (published / "train.lmdb").read_bytes() == before


def test_convert_skips_bad_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [b"junk", (photo(), -1), (photo(), 2**40), (b"no image", 1)]
    src = write(tmp_path / "train.lmdb", [(photo(), 3), *bad, (photo(), 0)])
    with pytest.raises(UserError, match=r"record 1 .* and 3 others cannot be stored") as error:
        convert(src, tmp_path / "new.lmdb")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new.lmdb").exists()
    convert(src, tmp_path / "new.lmdb", skip_bad=True)
    assert "label 1099511627776 is not in 0 ... 65535" in capsys.readouterr().err
    store = LmdbStore(tmp_path / "new.lmdb")
    assert store.classes == ["0", "1", "2", "3"]
    assert store.header["class_counts"] == [1, 0, 0, 1]
    assert [store.read(index) for index in range(2)] == [(photo(), 3), (photo(), 0)]


def test_convert_needs_a_source_and_a_free_name_and_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "new.lmdb"
    with pytest.raises(UserError, match="missing: not a readable LMDB store"):
        convert(tmp_path / "missing", out)
    with pytest.raises(UserError, match="no image in the source"):
        convert(write(tmp_path / "empty.lmdb", []), out)
    src = write(tmp_path / "train.lmdb", [(photo(), 0)])
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: type("usage", (), {"free": 100}))
        with pytest.raises(UserError, match="GB are free; make room"):
            convert(src, out)
        patch.setattr(PublishedStore, "read", None)
        with pytest.raises(UserError, match=r"train\.lmdb: exists"):
            convert(src, src)
    assert sorted(path.name for path in tmp_path.glob("*[!k]")) == ["empty.lmdb", "train.lmdb"]


def test_info_and_verify_know_it(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info(published)
    assert "310 images in the published layout" in capsys.readouterr().out
    verify(published)
    assert "train.lmdb: 310 images, 0 damaged" in capsys.readouterr().out


def photo() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (32, 32)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ((photo(), 10), "label 10, but there are 10 classes"),
        ((photo(), -1), "label -1"),
        ([photo(), 1], "record 1 .*no tuple"),
        ((photo(), "1"), "record 1 is no .image bytes, label"),
        ((photo(), 1, 2), "record 1 is no .image bytes, label"),
        (pickle.dumps((photo(), Evil())), "record 1 .*not plain data"),
        (pickle.dumps((photo(), 1))[:40], "record 1 .*cannot be read"),
        (b"junk", "record 1 .*cannot be read"),
    ],
)
def test_a_bad_record_is_named(tmp_path: Path, record: Any, message: str) -> None:
    path = write(tmp_path / "train.lmdb", [(photo(), 0), record])
    store = open_store(path, [str(number) for number in range(10)])
    assert isinstance(store, PublishedStore)
    assert store.read(0) == (photo(), 0)
    with pytest.raises(UserError, match=message) as error:
        store.read(1)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"__len__", pickle.dumps(3)),
        (b"__len__", pickle.dumps("2")),
        (b"__len__", pickle.dumps(Evil())),
        (b"__keys__", pickle.dumps([b"0", 1])),
        (b"__keys__", pickle.dumps(Evil())),
        (b"__keys__", pickle.dumps([b"0", b"0"])),
        (b"__keys__", pickle.dumps([b"0", bytes(512)])),
        (b"__keys__", b""),
        (b"__keys__", None),
    ],
)
def test_bad_totals_are_refused(tmp_path: Path, key: bytes, value: bytes | None) -> None:
    path = write(tmp_path / "train.lmdb", [(photo(), 0)] * 2)
    with lmdb.open(str(path), subdir=False) as env, env.begin(write=True) as txn:
        txn.delete(key)
        if value is not None:
            txn.put(key, value)
    with pytest.raises(UserError) as error:
        open_store(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_keys_that_swell_are_refused(tmp_path: Path) -> None:
    """160 KB of pickle that name one key of 100 KB 30,000 times: 3 GB, if they were joined."""
    path = write(tmp_path / "train.lmdb", [(photo(), 0)])
    keys = b"\x80\x04](B" + (100_000).to_bytes(4, "little") + bytes(100_000) + b"q\x00"
    with lmdb.open(str(path), subdir=False) as env, env.begin(write=True) as txn:
        txn.put(b"__keys__", keys + 29_999 * b"h\x00" + b"e.")
        txn.put(b"__len__", pickle.dumps(30_000))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"more than \d+ opcodes") as error:
        open_store(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20e6
    assert "\n" not in str(error.value)


def read_all(path: Path) -> list[tuple[bytes, int]]:
    store = open_store(path)
    return [store.read(index) for index in range(len(store))]


def test_2_000_mutated_stores_are_read_or_refused(tmp_path: Path) -> None:
    rng = random.Random(4)
    path = write(tmp_path / "train.lmdb", [(photo(), label) for label in range(10)])
    with lmdb.open(str(path), subdir=False) as env, env.begin() as txn:
        good = dict(txn.cursor())
    refused = []
    for number in range(2000):
        data = bytearray(good[key := (b"__keys__", b"__len__", b"3")[number % 3]])
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            data[at : at + rng.randrange(2)] = rng.choice(
                [b"", rng.randbytes(1), b"h\x00" * 500, b"\x94", b"\x8e", b"\xff\xff\xff\x7f"]
            )
        with lmdb.open(str(path), subdir=False, sync=False) as env, env.begin(write=True) as txn:
            for name, value in good.items():
                txn.put(name, bytes(data) if name == key else value)
        try:
            pairs = read_all(path)
            assert len(pairs) == 10
            if key == b"__keys__":  # whole records, though of other keys there are none
                assert sorted(label for _, label in pairs) == list(range(10))
        except UserError as error:
            refused.append(str(error))
    assert 1000 < len(refused) < 2000
    assert all(str(path) in text and "\n" not in text for text in refused)


def test_the_reader_knows_every_opcode_that_pickle_writes_for_plain_data() -> None:
    rng = random.Random(0)
    seen = set()
    for protocol in (3, 4, 5):
        for value in ([], (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [1] * 2000, 2**40, -5, 300):
            shared = [value, value, rng.randbytes(5), "é", bytes(300), "x" * 300]
            data = pickle.dumps(shared, protocol)
            seen |= {opcode.name for opcode, *_ in pickletools.genops(data)}
            assert load_plain(data, 5000) == shared
    assert {"MEMOIZE", "BINPUT", "BINGET", "LONG1", "APPENDS", "TUPLE3", "FRAME"} <= seen
