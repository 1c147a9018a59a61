"""What goes wrong while batches are drawn: one clear line, never a hang, never a crash."""

import errno
import gc
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import time
from concurrent import futures
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any

import lmdb
import pytest
import torch
from PIL import Image, UnidentifiedImageError

from bip.data import decode
from bip.data.loaders import dali
from bip.data.stores.base import DamagedImage
from bip.data.stores.folder import FolderStore
from bip.data.stores.lmdb import LmdbStore, record_key
from bip.data.stores.published import open_store
from bip.errors import LostWorker, UserError
from bip.files import may_pass
from tests.data.conftest import opened
from tests.data.test_loaders import take

CIFAR: dict[str, Any] = {"dataset": "CIFAR10", "num_classes": 10, "loader": "lmdb"}


@pytest.fixture
def cifar(small_cifar: Path, tmp_path: Path) -> Path:
    for split in ("train", "test"):
        shutil.copy(small_cifar / f"{split}.lmdb", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGKILL, LostWorker), (signal.SIGBUS, OSError)]
)
def test_a_dead_worker_is_reported_within_seconds(
    cifar: Path, number: signal.Signals, kind: type[Exception]
) -> None:
    """Of SIGBUS it dies where a mapped store's file system is unreachable: that may pass."""
    data = opened(**CIFAR, data_dir=cifar, num_workers=2)
    batches = data.train()
    next(batches)
    worker = multiprocessing.active_children()[0]
    assert worker.pid is not None
    os.kill(worker.pid, number)
    started = time.monotonic()
    with pytest.raises(
        kind,
        match=rf"train\.lmdb: a loader process died over the batch of records \d+, \d+, \d+ and "
        rf"\d+ more \(killed by {number.name}\); .*num-workers",
    ) as error:
        take(batches, 50)
    assert not isinstance(error.value, OSError) or may_pass(error.value)
    assert "\n" not in str(error.value)
    assert time.monotonic() - started < 20
    data.close()
    assert multiprocessing.active_children() == []


def test_a_worker_s_death_interrupts_nothing_else(cifar: Path) -> None:
    """torch's own handler of SIGCHLD would raise here, in the middle of a training step."""
    data = opened(**CIFAR, data_dir=cifar, num_workers=1)
    batches = data.train()
    next(batches)
    worker = multiprocessing.active_children()[0]
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    for _ in range(50):
        time.sleep(0.01)
    assert not worker.is_alive()
    data.close()


class Bomb:
    """Ends the process that destroys it, as DALI's pipelines do in a forked child."""

    def __init__(self) -> None:
        self.me, self.home = self, os.getpid()

    def __del__(self) -> None:
        if os.getpid() != self.home:
            os._exit(11)


def test_workers_collect_nothing_that_they_inherited(cifar: Path) -> None:
    gc.disable()
    try:
        Bomb()  # garbage at once, but only the collector finds it
        data = opened(**CIFAR, data_dir=cifar, num_workers=1, skip_bad=True)
        data._train.reader.store.__class__ = CollectingStore  # type: ignore[attr-defined]
        assert len(take(data.train(), 3)) == 3
    finally:
        gc.enable()
    data.close()


class CollectingStore(LmdbStore):
    def read(self, index: int) -> tuple[bytes, int]:
        gc.collect()
        return super().read(index)


def replace(path: Path) -> None:
    other = path.with_name("other")
    shutil.copy(path, other)
    os.replace(other, path)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def remove(path: Path) -> None:
    path.unlink()


DALI = pytest.mark.skipif(not dali.is_installed(), reason="no DALI")
LOADERS = ["lmdb", pytest.param("dali", marks=DALI)]


@pytest.mark.parametrize("change", [replace, cut_short, remove])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("loader", LOADERS)
def test_a_store_that_changes_under_the_run_is_reported(
    cifar: Path, change: Any, workers: int, loader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = []

    class Watched(dali._Inputs):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            readers.append(self)

    monkeypatch.setattr(dali, "_Inputs", Watched)
    data = opened(**{**CIFAR, "loader": loader}, data_dir=cifar, num_workers=workers)
    batches = data.train()
    take(batches, 2)
    # In this process, a mapped file that is cut under a read is a bus error.
    assert len(readers) == (loader == "dali")
    for reader in readers:
        assert reader._ahead is not None
        futures.wait([reader._ahead])
    change(cifar / "train.lmdb")
    with pytest.raises(
        UserError, match=r"train\.lmdb: .*(replaced or cut short|gone) during the run"
    ):
        take(batches, 50)
    data.close()


def test_a_label_beyond_the_classes_is_reported(cifar: Path) -> None:
    path = cifar / "train.lmdb"
    with lmdb.open(str(path), subdir=False, lock=False) as env, env.begin(write=True) as txn:
        header = json.loads(txn.get(b"header"))
        counts = [*header["class_counts"][:8], sum(header["class_counts"][8:])]
        header |= {"classes": header["classes"][:9], "class_counts": counts}
        txn.put(b"header", json.dumps(header).encode())
    with pytest.raises(UserError, match=r"record 309 is of class 9, but the store has 9 classes"):
        LmdbStore(path).read(309)


def damage(path: Path, *indices: int) -> None:
    content = bytearray(path.read_bytes())
    store = LmdbStore(path)
    for index in indices:
        content[content.index(store.read(index)[0]) + 30] ^= 1
    del store
    path.write_bytes(content)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("loader", LOADERS)
def test_skip_bad_replaces_within_the_batch_and_counts(
    cifar: Path, workers: int, loader: str, capsys: pytest.CaptureFixture[str]
) -> None:
    case = {**CIFAR, "loader": loader, "data_dir": cifar, "holdout": 54}  # 4 batches of 64
    good = opened(**case)
    expected = take(good.train(), 8)
    good.close()
    damage(cifar / "train.lmdb", 5, 17, 123, 200)
    data = opened(**case, skip_bad=True, num_workers=workers)
    got = take(data.train(), 8)
    data.close()
    printed = [line for line in capsys.readouterr().out.splitlines() if "skipped (" in line]
    assert 1 <= len(printed) <= 4
    assert printed[-1].startswith(
        f"warning: skipped ({len(printed)} so far): {cifar}/train.lmdb: record "
    )
    same = sum(
        int(torch.equal(x, u))
        for (a, _), (b, _) in zip(got, expected, strict=True)
        for x, u in zip(a, b, strict=True)
    )
    # Crops belong to the place, so a replaced image is another one.
    assert 8 * 64 - 2 * len(printed) <= same < 8 * 64
    again = opened(**case, skip_bad=True)
    resumed = take(again.train("lower", 5), 3)
    assert all(torch.equal(x, u) for (x, _), (u, _) in zip(resumed, got[5:], strict=True))


def test_skip_bad_never_skips_in_evaluation(cifar: Path) -> None:
    damage(cifar / "test.lmdb", 60)
    data = opened(**CIFAR, data_dir=cifar, skip_bad=True)
    with pytest.raises(UserError, match="record 60 "):
        list(data.evaluate("test"))


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize(
    ("loader", "workers"), [("folder", 0), ("folder", 2), pytest.param("dali", 1, marks=DALI)]
)
def test_a_failing_disk_is_no_bad_image(
    imagenet: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    loader: str,
    workers: int,
    number: int,
) -> None:
    """--skip-bad would train on, over images that are sound. By its number a launcher knows what
    may pass."""
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(imagenet / "val")
    name = FolderStore(tmp_path / "train").name(17)

    class Away(FileIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(number, os.strerror(number))

    def fail(path: str, *how: Any) -> Any:
        if path != name:
            return open(path, *how)
        if number == errno.EACCES:
            raise OSError(number, os.strerror(number), path)
        return Away(path)

    monkeypatch.setattr("bip.data.stores.folder.open", fail, raising=False)
    case = {"dataset": "ImageNet", "num_classes": 171, "image_dim": 32, "batch_size": 57}
    case |= {"data_dir": tmp_path, "loader": loader, "num_workers": workers}
    data = opened(**case, skip_bad=True)
    with pytest.raises((OSError, UserError), match=rf"{re.escape(name)}.*image 17") as error:
        take(data.train(), 3)
    assert not isinstance(error.value, DamagedImage)
    if number == errno.ESTALE:
        assert isinstance(error.value, OSError)
        assert error.value.errno == number
    else:
        assert "cannot be read (Permission denied); image 17" in str(error.value)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOENT])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_store_whose_file_system_is_unreachable(
    cifar: Path, monkeypatch: pytest.MonkeyPatch, workers: int, number: int
) -> None:
    """It may come back: no error of the user's, as a store that is gone is."""
    data = opened(**CIFAR, data_dir=cifar, num_workers=workers)
    stat = Path.stat

    def fail(path: Path, **how: Any) -> os.stat_result:
        if path.name == "train.lmdb":
            raise OSError(number, os.strerror(number), str(path))
        return stat(path, **how)

    monkeypatch.setattr(Path, "stat", fail)
    kind, word = (UserError, "gone during") if number == errno.ENOENT else (OSError, "train.lmdb")
    for _ in range(2):
        with pytest.raises(kind, match=word) as error:
            take(data.train(), 3)
        assert getattr(error.value, "errno", number) == number


def test_what_lmdb_cannot_read_for_now() -> None:
    """An address that no process has is an I/O error of the kernel's; LMDB's exceptions are no
    OSError."""
    with pytest.raises(OSError, match="/proc/self/mem") as error:
        LmdbStore(Path("/proc/self/mem"))
    assert error.value.errno == errno.EIO


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_missing_record_is_no_bad_image(cifar: Path, skip_bad: bool) -> None:
    path = cifar / "train.lmdb"
    with open_env(path) as env, env.begin(write=True) as txn:
        txn.put(record_key(999), txn.pop(record_key(4)))
    data = opened(**CIFAR, data_dir=cifar, skip_bad=skip_bad)
    with pytest.raises(UserError, match=r"record 4 is missing; copy or build the store again$"):
        take(data.train(), 5)


def open_env(path: Path) -> lmdb.Environment:
    return lmdb.open(str(path), subdir=False, lock=False, map_size=64 << 20, sync=False)


def mutate(rng: random.Random, data: bytes, most: int) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, most)):
        at = rng.randrange(len(changed)) if changed else 0
        way = rng.randrange(4)
        if way == 0 and changed:
            changed[at] = rng.randrange(256)
        elif way == 1:
            del changed[at : at + rng.randint(1, 30)]
        elif way == 2:
            changed[at:at] = rng.randbytes(rng.randint(1, 8))
        else:
            changed[at : at + 2] = rng.choice([b"\xff\xff", b"\x00\x00", b"\x7f\xff", b"\x80\x00"])
    return bytes(changed)


def test_8_000_mutated_records_are_errors_with_their_index(cifar: Path) -> None:
    rng = random.Random(1)
    path, count = cifar / "train.lmdb", 310
    refused = 0
    for _ in range(26):
        with open_env(path) as env, env.begin(write=True) as txn:
            for index in range(count):
                key = record_key(index)
                txn.put(key, mutate(rng, txn.get(key), 2))
        store = LmdbStore(path)
        for index in range(count):
            with pytest.raises(UserError, match=f"record {index} ") as error:
                store.read(index)
            assert "\n" not in str(error.value)
            refused += 1
            del error  # its traceback holds the store open
        del store
    assert refused == 26 * 310


def test_2_000_mutated_headers_are_read_or_refused(cifar: Path) -> None:
    rng = random.Random(2)
    path = cifar / "train.lmdb"
    with open_env(path) as env, env.begin() as txn:
        header = txn.get(b"header")
    outcomes, truth = [], json.loads(header)
    for _ in range(2000):
        with open_env(path) as env, env.begin(write=True) as txn:
            txn.put(b"header", mutate(rng, header, 2))
        try:
            store = open_store(path)
            assert len(store) == 310
            assert len(store.classes) == 10
            assert isinstance(store, LmdbStore)
            assert store.header["class_counts"] == truth["class_counts"]
            del store
            outcomes.append("")
        except UserError as error:
            outcomes.append(str(error))
    refused = [text for text in outcomes if text]
    assert len(refused) > 1000
    assert all(str(path) in text and "\n" not in text for text in refused)


def seeds() -> list[bytes]:
    found = []
    for mode, kind in (
        ("RGB", "JPEG"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGB", "PNG"),
        ("P", "GIF"),
    ):
        stream = BytesIO()
        gradient = Image.linear_gradient("L").resize((48, 40)).convert("RGB")
        gradient.convert(mode).save(stream, kind)
        found.append(stream.getvalue())
    return found


@pytest.mark.filterwarnings("ignore::Warning")
def test_2_500_mutated_images_decode_or_raise_what_is_caught() -> None:
    """Headers above all: sizes that would take gigabytes are refused, not allocated."""
    rng = random.Random(3)
    draws = torch.rand(24, generator=torch.Generator().manual_seed(0)).double().numpy()
    originals = seeds()
    outcomes = {True: 0, False: 0}
    for number in range(2500):
        original = originals[number % len(originals)]
        head = 700 if number % 2 else len(original)
        data = mutate(rng, original[:head], 3) + original[head:]
        try:
            assert decode.resized_crop(data, draws, 3, 16, True).shape == (3, 16, 16)
            outcomes[True] += 1
        except decode.DECODE_ERRORS:
            outcomes[False] += 1
    assert min(outcomes.values()) > 200


def test_postscript_is_refused_and_never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for start in (subprocess, os):
        for name in ("Popen", "check_call", "system", "posix_spawn"):
            if hasattr(start, name):
                monkeypatch.setattr(start, name, lambda *_, **__: pytest.fail("ran a program"))
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    stream = BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "TIFF")
    for data in (script, stream.getvalue()):
        with pytest.raises(UnidentifiedImageError):
            decode.decode(data, 3)
        with pytest.raises(UnidentifiedImageError):
            decode.image_size(data)


@pytest.mark.parametrize("side", [30_000, 65_500])
def test_a_jpeg_that_claims_a_huge_size_is_refused_without_the_memory(side: int) -> None:
    data = bytearray(seeds()[0])
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    with pytest.raises(decode.DECODE_ERRORS):
        decode.decode(bytes(data), 3)


def _train_batch(folder: Path, level: str) -> float:
    data = opened(**CIFAR, data_dir=folder, num_workers=0)
    return float(next(data.train(level))[0].sum())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_two_pipelines_in_forked_and_spawned_processes(cifar: Path, method: str) -> None:
    """Each opens LMDB for itself, though the parent has it open and draws from both levels."""
    data = opened(**CIFAR, data_dir=cifar, num_workers=1)
    streams = [data.train(level) for level in ("lower", "upper")]
    here = [float(next(stream)[0].sum()) for stream in streams]
    with multiprocessing.get_context(method).Pool(2) as pool:
        there = pool.starmap(_train_batch, [(cifar, "lower"), (cifar, "upper")])
    assert there == here
    assert all(len(take(stream, 6)) == 6 for stream in streams)
    data.close()
