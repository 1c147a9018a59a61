"""Copies of stores on local disk: made once, confirmed, safe under concurrent tasks."""

import contextlib
import fcntl
import io
import multiprocessing
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bip.data.stores import staging
from bip.data.stores.lmdb import LmdbStore
from bip.data.stores.staging import network_filesystem, stage
from tests.data.conftest import DALI, opened, read_all, refused, same, take
from tests.data.test_stores import PAIRS, images, write

MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:25 / /home rw shared:3 - nfs4 server:/home rw,vers=4.2
31 30 0:26 / /home/local rw - xfs /dev/sdb rw
32 22 0:27 / /scratch rw shared:4 master:5 - lustre mds@tcp:/fs rw
33 22 0:28 / /mnt/with\\040space rw - fuse.sshfs host:/ rw
37 22 0:31 / /container rw - fuse.fuse-overlayfs fuse-overlayfs rw
38 22 0:32 / /image ro - fuse.squashfuse_ll squashfuse_ll ro
34 22 0:29 / /stacked rw - ext4 /dev/sdc rw
35 34 0:30 / /stacked rw - beegfs beegfs_nodev rw
36 22 0:31 / /homework rw - ext4 /dev/sdd rw
"""
KINDS = {"/home/user/train.lmdb": "nfs4", "/scratch": "lustre", "/stacked/x": "beegfs"}
KINDS |= {"/mnt/with space/x": "fuse.sshfs"}


def test_network_filesystems_are_known() -> None:
    local = ("/data/x", "/home/local/train.lmdb", "/homework/x", "/container/data", "/image/data")
    for path in (*KINDS, *local):
        assert network_filesystem(Path(path), MOUNTS) == KINDS.get(path), path
    assert network_filesystem(Path("/proc/self")) is None  # by this machine's own table


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "shared").mkdir()
    return write(tmp_path / "shared" / "train.lmdb", images(20))


def test_a_copy_reads_the_same_and_is_made_once(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = stage(store, tmp_path / "local")
    inode = first.stat().st_ino
    assert "SHA-256 confirmed" in capsys.readouterr().out
    assert first.read_bytes() == store.read_bytes()
    assert stage(store, tmp_path / "local") == first
    assert first.stat().st_ino == inode
    assert capsys.readouterr().out == ""


def test_a_store_that_is_a_folder(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder.lmdb"
    folder.mkdir()
    store.rename(folder / "data.mdb")
    assert read_all(LmdbStore(stage(folder, tmp_path / "local"))) == PAIRS


def test_a_store_that_was_built_again_is_copied_again(store: Path, tmp_path: Path) -> None:
    old = stage(store, tmp_path / "local")
    store.unlink()
    write(store, images(3))
    new = stage(store, tmp_path / "local")
    assert new != old
    assert len(LmdbStore(new)) == 3


def stage_when_all_are_there(store: Path, folder: Path, barrier: Any) -> tuple[Path, str]:
    barrier.wait()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        return stage(store, folder), printed.getvalue()


def test_four_processes_stage_one_copy(tmp_path: Path) -> None:
    store = write(tmp_path / "train.lmdb", [(os.urandom(1 << 20), 0, 1, 1) for _ in range(60)])
    fork = multiprocessing.get_context("fork")
    with fork.Manager() as manager, fork.Pool(4) as pool:
        task = (store, tmp_path / "local", manager.Barrier(4))
        copies, printed = zip(*pool.starmap(stage_when_all_are_there, [task] * 4), strict=True)
    (copy,) = (tmp_path / "local").glob("*.lmdb")
    assert copies == (copy,) * 4
    assert "".join(printed).count("SHA-256 confirmed") == 1, "one of them copied"
    assert copy.read_bytes() == store.read_bytes()
    assert not list((tmp_path / "local").glob(".*.partial"))


def test_a_lock_file_that_is_removed_locks_nobody_out_nor_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One who locked the file that was removed holds no lock."""
    path, flock, removed = tmp_path / "lock", fcntl.flock, []

    def remove_first(stream: Any, how: int) -> None:
        if not removed:
            removed.append(path.unlink())
        flock(stream, how)

    monkeypatch.setattr("fcntl.flock", remove_first)
    with staging._locked(path, lambda: None, "x"), open(path) as other:
        assert removed
        with pytest.raises(BlockingIOError):
            flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(FileNotFoundError), staging._locked(path, lambda: None, "x"):
        raise FileNotFoundError


def test_a_killed_copy_is_made_again(store: Path, tmp_path: Path) -> None:
    local = tmp_path / "local"

    def die() -> None:
        if list(local.glob(".*.partial")):
            os.kill(os.getpid(), signal.SIGKILL)

    killed = multiprocessing.get_context("fork").Process(target=stage, args=(store, local, die))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert list(local.glob(".*.partial"))
    assert not list(local.glob("*.lmdb"))
    assert read_all(LmdbStore(stage(store, local))) == PAIRS


def test_a_killed_copy_s_bytes_are_free_again(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = tmp_path / "local"
    size = store.stat().st_size
    name = stage(store, local).name
    (local / name).rename(local / f".{name}.partial")

    def usage(folder: Path) -> SimpleNamespace:  # a disk with room for one and a half
        used = sum(p.stat().st_size for p in folder.iterdir())
        return SimpleNamespace(free=size * 3 // 2 - used)

    monkeypatch.setattr(staging.shutil, "disk_usage", usage)
    assert stage(store, local).name == name


def test_copying_and_waiting_end_on_request(store: Path, tmp_path: Path) -> None:
    def give_up() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage(store, tmp_path, give_up)
    assert not list(tmp_path.glob("*lmdb"))
    assert not list(tmp_path.glob(".*.partial"))
    (lock,) = tmp_path.glob(".*.lock")
    with open(lock) as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(KeyboardInterrupt):
            stage(store, tmp_path, give_up)


def test_a_copy_that_differs_is_refused(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "sha256_file", lambda _: "0" * 64)
    with refused("differs from it", "choose another folder"):
        stage(store, tmp_path / "local")
    assert not list((tmp_path / "local").glob("*lmdb"))


def test_a_full_or_missing_disk_is_reported(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remedy = "choose another folder or leave --stage-to out"
    (tmp_path / "file").write_bytes(b"")
    with refused(r"stage_to: .* cannot be copied to", remedy):
        stage(store, tmp_path / "file")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with refused(r"stage_to: .*0\.00 GB free", remedy):
        stage(store, tmp_path / "local")


@pytest.mark.parametrize("loader", ["lmdb", "memory", pytest.param("dali", marks=DALI)])
def test_training_from_a_copy_is_the_same(small_cifar: Path, tmp_path: Path, loader: str) -> None:
    case: dict[str, Any] = {"dataset": "CIFAR10", "data_dir": small_cifar, "loader": loader}
    staged = take(opened(**case, stage_to=tmp_path).train(), 1)
    assert len(list(tmp_path.glob("*.lmdb"))) == 2
    assert same(staged, take(opened(**case).train(), 1))


def test_folders_of_images_are_not_staged(imagenet: Path, tmp_path: Path) -> None:
    case: dict[str, Any] = {"dataset": "ImageNet", "num_classes": 171, "data_dir": imagenet}
    with refused("stage_to: copies LMDB stores", "build-lmdb"):
        opened(**case, batch_size=8, loader="folder", stage_to=tmp_path)


def test_a_network_filesystem_is_pointed_out(
    small_cifar: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bip.data.splits.network_filesystem", lambda _: "nfs4")
    case: dict[str, Any] = {"dataset": "CIFAR10", "data_dir": small_cifar, "loader": "lmdb"}
    opened(**case)
    assert "lies on nfs4; give --stage-to DIR" in capsys.readouterr().out
    opened(**case, rank=1, world=2)
    assert capsys.readouterr().out == ""
