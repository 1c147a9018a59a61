"""The published layout of pickles: read as it is, converted, and never run."""

import contextlib
import itertools
import multiprocessing
import os
import pickle
import pickletools
import random
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bip.data.stores.base import DamagedImage
from bip.data.stores.lmdb import LmdbStore
from bip.data.stores.published import PublishedStore, load_plain, open_store
from bip.data.tools.build import convert
from bip.data.tools.check import info, verify
from bip.errors import UserError
from tests.data.conftest import mutate, opened, read_all, refused, same, take

plain = st.recursive(
    st.binary(max_size=300) | st.text(max_size=20) | st.integers(-(2**100), 2**100),
    lambda inner: st.lists(inner, max_size=5) | st.lists(inner, max_size=5).map(tuple),
    max_leaves=20,
)


@given(plain, st.integers(0, 5))
@settings(max_examples=400)
def test_plain_pickles_load(value: Any, protocol: int) -> None:
    assert load_plain(pickle.dumps(value, protocol), 2000) == value


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("label", [1, True, np.int64(1), np.uint8(1), np.dtype(">i4").type(1)])
@pytest.mark.parametrize("pack", [tuple, list, lambda pair: (bytearray(pair[0]), pair[1])])
@pytest.mark.parametrize("key", [str, lambda number: str(number).encode()])
def test_stores_as_other_programs_pickle_them(
    tmp_path: Path, protocol: int, label: Any, pack: Any, key: Any
) -> None:
    path, keys = tmp_path / "store", [key(number) for number in range(9)]
    records = {k if type(k) is bytes else k.encode(): pack((photo(), label)) for k in keys}
    with lmdb.open(str(path), subdir=False) as env, env.begin(write=True) as txn:
        for name, value in {**records, b"__keys__": keys, b"__len__": 9}.items():
            txn.put(name, pickle.dumps(value, protocol))
    assert read_all(open_store(path)) == [(photo(), 1)] * 9


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        ({b"0": pickle.dumps((b"", 1))}, "__len__ .*missing.* if it is whole, add it: python -c"),
        ({b"__len__": b"\1\0\0\0\0\0\0\0"}, "written by pyarrow; convert it: pip .* python -c"),
    ],
)
def test_other_stores_get_the_command_that_converts_them(
    tmp_path: Path, content: dict[bytes, bytes], remedy: str
) -> None:
    path = tmp_path / "a 'b'"
    with lmdb.open(str(path), subdir=False) as env, env.begin(write=True) as txn:
        for name, value in content.items():
            txn.put(name, value)
    for read in (open_store, lambda source: convert(source, tmp_path / "out")):
        with refused(remedy):
            read(path)
    if "add it" in remedy:
        with pytest.raises(UserError) as error:
            open_store(path)
        command = str(error.value).split("add it: ")[1].replace("python", sys.executable, 1)
        subprocess.run(command.replace("1<<40", "1<<24"), shell=True, check=True)
        assert read_all(open_store(path)) == [(b"", 1)]


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int]]:
    """A list that gets the most bytes that Python held within the block."""
    peak: list[int] = []
    tracemalloc.start()
    try:
        yield peak
    finally:
        peak.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/bip-evil-was-here",)


@pytest.mark.parametrize(
    "data",
    [
        *(pickle.dumps(Evil()), pickle.dumps((b"image", Evil())), pickle.dumps([Evil()], 0)),
        b"cos\nsystem\n(S'touch /tmp/bip-evil-was-here'\ntR.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x1btouch /tmp/bip-evil-was-here\x85R.",
        *map(pickle.dumps, ({"a": 1}, 1.5, {1, 2}, None, np.float64(1), np.zeros(3))),
        b"cbuiltins\nbytearray\n(L1099511627776L\ntR.",
        b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
        b"c_codecs\nencode\n(NNtb.",
        b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"x.",  # bytes of 4 EiB
        b"\x80\x04B\xff\xff\xff\xffx.",
        b"\x80\x04\x96" + (2**40).to_bytes(8, "little") + b".",
        b"\x80\x04K\x01r\xff\xff\xff\xff\x85",  # a memo of 4 G places
        b"\x80\x04\x8b\xff\xff\xff\x7f1.",  # an integer of 2 GB
        b"\x80\x04\x8a\xff" + 255 * b"\x01" + b".",
        *(
            b"\x80\x04" + code
            for code in (b"(((((", b"t.", b"K\x01e.", b")(K\x01e.", b"h\x07.", b"(.")
        ),
        *(b"\x80\x09K\x01.", b"", b".", b"junk"),
    ],
)
def test_what_is_not_plain_data_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"pickle"):
        load_plain(data)
    assert not Path("/tmp/bip-evil-was-here").exists()


@pytest.mark.parametrize(
    "unit",
    [
        *(b"]", b"]\x94", b"K\x01\x85", b"\x85", b"("),  # lists, tuples, marks
        *(b"\x94", b"h\x00"),  # numbered, and again
        *(b"\x8c\x03\xe4\xb8\xad", b"C\x02ab\x94", b"M\xff\x7f", b"\x8a\x02\xff\x7f"),
    ],
)
def test_memory_is_bounded_by_the_data_and_the_opcodes(unit: bytes) -> None:
    for start, end in itertools.product((b"\x80\x04](K\x01\x94", b"\x80\x04K\x01"), (b"e.", b"")):
        data = start + unit * (100_000 // len(unit)) + end
        for opcodes in (64, 50_000, 300_000):
            with peak_memory() as peak, contextlib.suppress(ValueError):
                load_plain(data, opcodes)
            assert peak[0] < 3 * len(data) + 200 * min(opcodes, len(data)) + 40_000


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


def load_mutations() -> None:
    """10,000, in 1 GiB of address space more than at the start."""

    def never(*_: Any) -> None:
        os._exit(9)

    for name in ("os.system", "subprocess.Popen", "os.fork", "os.posix_spawn"):
        pytest.MonkeyPatch().setattr(name, never)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 30),) * 2)
    rng = random.Random(0)
    seeds = [pickle.dumps((rng.randbytes(200), 7), protocol) for protocol in (2, 3, 4, 5)]
    seeds += [pickle.dumps([b"%d" % i for i in range(40)], 4), pickle.dumps(1281167)]
    words = [b"cos\nsystem\n", b"R", b"\x93", b"r\xff\xff\xff\x7f", b"\x8e"]
    refusals = 0
    for number in range(10_000):
        data = rng.choice(seeds)
        head = 40 if number % 2 else len(data)
        try:
            load_plain(mutate(rng, data[:head], 4, words) + data[head:])
        except ValueError:
            refusals += 1
    os._exit(0 if 3000 < refusals < 10_000 else 1)


def test_10_000_mutations_neither_crash_nor_run_nor_swell() -> None:
    child = multiprocessing.get_context("fork").Process(target=load_mutations)
    child.start()
    child.join()
    assert child.exitcode == 0


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
    case = {"dataset": "CIFAR10", "loader": "lmdb", "num_workers": 1}
    theirs, ours = (opened(**case, data_dir=folder) for folder in (published, small_cifar))
    assert same(take(theirs.train(), 6), take(ours.train(), 6))
    labels = torch.cat([y for _, y in theirs.evaluate("test")])
    assert labels.tolist() == sorted(7 * list(range(10)))
    theirs.close()
    ours.close()


def test_convert(published: Path, small_cifar: Path, tmp_path: Path) -> None:
    before = (published / "train.lmdb").read_bytes()
    convert(published / "train.lmdb", tmp_path / "new" / "train.lmdb", check=True)
    converted, ours = (LmdbStore(p / "train.lmdb") for p in (tmp_path / "new", small_cifar))
    assert converted.classes == [str(number) for number in range(10)]
    assert read_all(converted) == read_all(ours)
    assert (published / "train.lmdb").read_bytes() == before


def test_convert_skips_bad_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [b"junk", (photo(), -1), (photo(), 2**40), (b"no image", 1)]
    src = write(tmp_path / "train.lmdb", [(photo(), 3), *bad, (photo(), 0)])
    with refused(r"record 1 .* and 3 others cannot be stored", "--skip-bad"):
        convert(src, tmp_path / "new.lmdb")
    assert not (tmp_path / "new.lmdb").exists()
    convert(src, tmp_path / "new.lmdb", skip_bad=True)
    assert "label 1099511627776 is not in 0 ... 65535" in capsys.readouterr().err
    store = LmdbStore(tmp_path / "new.lmdb")
    assert store.classes == ["0", "1", "2", "3"]
    assert store.header["class_counts"] == [1, 0, 0, 1]
    assert read_all(store) == [(photo(), 3), (photo(), 0)]


def test_convert_needs_a_source_and_a_free_name_and_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "new.lmdb"
    with refused("missing: not a readable LMDB store"):
        convert(tmp_path / "missing", out)
    with refused("no image in the source"):
        convert(write(tmp_path / "empty.lmdb", []), out)
    src = write(tmp_path / "train.lmdb", [(photo(), 0)])
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    with refused("GB are free; make room"):
        convert(src, out)
    with refused(r"train\.lmdb: exists"):
        convert(src, src)
    assert sorted(path.name for path in tmp_path.glob("*[!k]")) == ["empty.lmdb", "train.lmdb"]


def test_info_and_verify_know_it(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info(published)
    assert "310 images in the published layout" in capsys.readouterr().out
    verify(published)
    assert "train.lmdb: 310 images, 0 damaged" in capsys.readouterr().out


def photo() -> bytes:
    return b"P6 32 32 255 " + bytes(32 * 32 * 3)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ((photo(), 10), "record 1 has label 10, but .* --num-classes"),
        ((photo(), -1), "record 1 has label -1"),
        (5, "record 1 .*not a tuple"),
        ((photo(), "1"), "record 1 is not .image bytes, label"),
        ((photo(), 1, 2), "record 1 is not .image bytes, label"),
        (pickle.dumps((photo(), Evil())), "record 1 .*it names posix.system"),
        (pickle.dumps((photo(), 1))[:40], "record 1 .*cannot be read"),
        (b"junk", "record 1 .*cannot be read"),
        (pickle.dumps([5] * 200), "record 1 .*more than 128 opcodes"),
    ],
)
def test_a_bad_record_is_named(tmp_path: Path, record: Any, message: str) -> None:
    path = write(tmp_path / "train.lmdb", [(photo(), 0), record])
    store = open_store(path, [str(number) for number in range(10)])
    assert isinstance(store, PublishedStore)
    assert store.read(0) == (photo(), 0)
    with refused(message, str(path), kind=DamagedImage):
        store.read(1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((b"__len__", pickle.dumps(value)) for value in (3, "2", Evil())),
        *((b"__keys__", pickle.dumps([b"0", other])) for other in (1, b"0", bytes(512))),
        *((b"__keys__", value) for value in (pickle.dumps(Evil()), b"", None)),
    ],
)
def test_bad_totals_are_refused(tmp_path: Path, key: bytes, value: bytes | None) -> None:
    path = write(tmp_path / "train.lmdb", [(photo(), 0)] * 2)
    with lmdb.open(str(path), subdir=False) as env, env.begin(write=True) as txn:
        txn.delete(key)
        if value is not None:
            txn.put(key, value)
    with refused(str(path)):
        open_store(path)


def test_keys_that_swell_are_refused(tmp_path: Path) -> None:
    """160 KB of pickle that name one key of 100 KB 30,000 times: 3 GB, if they were joined."""
    path = write(tmp_path / "train.lmdb", [(photo(), 0)])
    keys = b"\x80\x04](B" + (100_000).to_bytes(4, "little") + bytes(100_000) + b"q\x00"
    with lmdb.open(str(path), subdir=False) as env, env.begin(write=True) as txn:
        txn.put(b"__keys__", keys + 29_999 * b"h\x00" + b"e.")
        txn.put(b"__len__", pickle.dumps(30_000))
    with peak_memory() as peak, refused(r"more than \d+ opcodes"):
        open_store(path)
    assert peak[0] < 20e6


def test_2_000_mutated_stores_are_read_or_refused(tmp_path: Path) -> None:
    rng = random.Random(4)
    path = write(tmp_path / "train.lmdb", [(photo(), label) for label in range(10)])
    with lmdb.open(str(path), subdir=False) as env, env.begin() as txn:
        good = dict(txn.cursor())
    words = [b"h\x00" * 500, b"\x94", b"\x8e", b"\xff\xff\xff\x7f"]
    refusals = []
    for number in range(2000):
        key = (b"__keys__", b"__len__", b"3")[number % 3]
        bad = mutate(rng, good[key], 3, words)
        with lmdb.open(str(path), subdir=False, sync=False) as env, env.begin(write=True) as txn:
            for name, value in (good | {key: bad}).items():
                txn.put(name, value)
        try:
            pairs = read_all(open_store(path))
            assert len(pairs) == 10
            if key == b"__keys__":  # whole records, though of other keys there are none
                assert sorted(label for _, label in pairs) == list(range(10))
        except UserError as error:
            refusals.append(str(error))
    assert 1000 < len(refusals) < 2000
    assert all(str(path) in text and "\n" not in text for text in refusals)


def test_the_reader_knows_every_opcode_that_pickle_writes_for_plain_data() -> None:
    seen = set()
    for protocol in (3, 4, 5):
        long = [str(i).encode() for i in range(5000)]
        for value in (
            [],
            (),
            (1,),
            (1, 2),
            (1, 2, 3),
            (1, 2, 3, 4),
            long,
            2**40,
            -5,
            bytes(70_000),
        ):
            shared = [value, value, b"five!", "é", bytes(300), "x" * 300]
            data = pickle.dumps(shared, protocol)
            seen |= {opcode.name for opcode, *_ in pickletools.genops(data)}
            assert load_plain(data, 15_100) == shared
    assert {"MEMOIZE", "BINPUT", "BINGET", "LONG1", "APPENDS", "TUPLE3", "FRAME"} <= seen
