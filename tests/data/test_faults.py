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
import time
from concurrent import futures
from io import FileIO
from pathlib import Path
from typing import Any

import lmdb
import pytest
import torch
from PIL import UnidentifiedImageError

from bip.data import decode
from bip.data.loaders import dali
from bip.data.stores.base import DamagedImage
from bip.data.stores.folder import FolderStore
from bip.data.stores.lmdb import LmdbStore, record_key
from bip.data.stores.published import open_store
from bip.errors import LostWorker, UserError
from bip.files import may_pass
from tests.data.conftest import DALI, damage, encoded, mutate, opened, refused, same, take

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
    """Of SIGBUS it dies where a mapped store's file system is unreachable: that may pass.

    torch's own handler of SIGCHLD would raise at once, in the middle of a training step.
    """
    data = opened(**CIFAR, data_dir=cifar, num_workers=2)
    batches = data.train()
    next(batches)
    worker = multiprocessing.active_children()[0]
    assert worker.pid is not None
    os.kill(worker.pid, number)
    started = time.monotonic()
    while worker.is_alive() or time.monotonic() < started + 0.1:
        time.sleep(0.01)
    died = rf"train\.lmdb: .* over the batch of records \d+, \d+, \d+ and \d+ more .*{number.name}"
    with pytest.raises(kind, match=f"{died}.*num-workers") as error:
        take(batches, 50)
    assert "\n" not in str(error.value)
    assert not isinstance(error.value, OSError) or may_pass(error.value)
    assert time.monotonic() - started < 20
    data.close()
    assert multiprocessing.active_children() == []


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


LOADERS = ["lmdb", pytest.param("dali", marks=DALI)]


@pytest.mark.parametrize("change", [replace, cut_short, Path.unlink])
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
    with refused(r"train\.lmdb: .*(replaced or cut short|gone) during the run"):
        take(batches, 50)
    data.close()


def test_a_label_beyond_the_classes_is_reported(cifar: Path) -> None:
    with open_env(cifar / "train.lmdb") as env, env.begin(write=True) as txn:
        header = json.loads(txn.get(b"header"))
        counts = [*header["class_counts"][:8], sum(header["class_counts"][8:])]
        header |= {"classes": header["classes"][:9], "class_counts": counts}
        txn.put(b"header", json.dumps(header).encode())
    with refused(r"record 309 is of class 9, but the store has 9 classes"):
        LmdbStore(cifar / "train.lmdb").read(309)


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
    assert f"({len(printed)} so far): {cifar}/train.lmdb: record " in printed[-1]
    (images, _), (others, _) = (map(torch.cat, zip(*part, strict=True)) for part in (got, expected))
    unequal = int((images != others).flatten(1).any(1).sum())
    # Crops belong to the place, so a replaced image is another one.
    assert 0 < unequal <= 2 * len(printed)
    assert same(take(opened(**case, skip_bad=True).train("lower", 5), 3), got[5:])


def test_skip_bad_never_skips_in_evaluation(cifar: Path) -> None:
    damage(cifar / "test.lmdb", 60)
    with refused("record 60 "):
        list(opened(**CIFAR, data_dir=cifar, skip_bad=True).evaluate("test"))


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
    passing = number == errno.ESTALE
    assert getattr(error.value, "errno", None) == (number if passing else None)
    assert passing or "Permission denied" in str(error.value)
    assert not isinstance(error.value, DamagedImage)


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
    with open_env(cifar / "train.lmdb") as env, env.begin(write=True) as txn:
        txn.put(record_key(999), txn.pop(record_key(4)))
    with refused(r"record 4 is missing; copy or build the store again$"):
        take(opened(**CIFAR, data_dir=cifar, skip_bad=skip_bad).train(), 5)


def open_env(path: Path) -> lmdb.Environment:
    return lmdb.open(str(path), subdir=False, lock=False, map_size=64 << 20, sync=False)


def test_8_000_mutated_records_are_errors_with_their_index(cifar: Path) -> None:
    rng = random.Random(1)
    path, count = cifar / "train.lmdb", 310
    for _ in range(26):
        with open_env(path) as env, env.begin(write=True) as txn:
            for index in range(count):
                key = record_key(index)
                txn.put(key, mutate(rng, txn.get(key), 2))
        store = LmdbStore(path)
        for index in range(count):
            with refused(f"record {index} "):
                store.read(index)
        del store


def test_2_000_mutated_headers_are_read_or_refused(cifar: Path) -> None:
    rng = random.Random(2)
    path = cifar / "train.lmdb"
    with open_env(path) as env, env.begin() as txn:
        header = txn.get(b"header")
    refusals, counts = [], json.loads(header)["class_counts"]
    for _ in range(2000):
        with open_env(path) as env, env.begin(write=True) as txn:
            txn.put(b"header", mutate(rng, header, 2))
        try:
            store = open_store(path)
            assert isinstance(store, LmdbStore)
            assert (len(store), len(store.classes)) == (310, 10)
            assert store.header["class_counts"] == counts
            del store
        except UserError as error:
            refusals.append(str(error))
    assert 1000 < len(refusals) < 2000
    assert all(str(path) in text and "\n" not in text for text in refusals)


@pytest.mark.filterwarnings("ignore::Warning")
def test_2_500_mutated_images_decode_or_raise_what_is_caught() -> None:
    """Headers above all: sizes that would take gigabytes are refused, not allocated."""
    rng = random.Random(3)
    draws = torch.rand(24, generator=torch.Generator().manual_seed(0)).double().numpy()
    originals = [encoded(mode, "JPEG") for mode in ("RGB", "L", "CMYK")]
    originals += [encoded("RGB", "PNG"), encoded("P", "GIF")]
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
    for start in ("subprocess.Popen", "subprocess.check_call", "os.system", "os.posix_spawn"):
        monkeypatch.setattr(start, lambda *_, **__: pytest.fail("ran a program"))
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    for data in (script, encoded("RGB", "TIFF")):
        with pytest.raises(UnidentifiedImageError):
            decode.decode(data, 3)
        with pytest.raises(UnidentifiedImageError):
            decode.image_size(data)


@pytest.mark.parametrize("side", [30_000, 65_500])
def test_a_jpeg_that_claims_a_huge_size_is_refused_without_the_memory(side: int) -> None:
    data = bytearray(encoded("RGB", "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    with pytest.raises(decode.DECODE_ERRORS):
        decode.decode(bytes(data), 3)
