"""Copies of stores on local disk: made once, confirmed, safe under concurrent tasks."""

import fcntl
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bip.data.stores import staging
from bip.data.stores.lmdb import LmdbStore
from bip.data.stores.staging import network_filesystem, stage
from bip.errors import UserError
from tests.data.conftest import opened
from tests.data.test_stores import images, write

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


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/data/x", None),
        ("/home/user/train.lmdb", "nfs4"),
        ("/home/local/train.lmdb", None),
        ("/scratch", "lustre"),
        ("/mnt/with space/x", "fuse.sshfs"),
        ("/stacked/x", "beegfs"),
        ("/homework/x", None),
        ("/container/data", None),
        ("/image/data", None),
    ],
)
def test_network_filesystems_are_known(path: str, kind: str | None) -> None:
    assert network_filesystem(Path(path), MOUNTS) == kind


def test_this_machines_mounts_are_read(tmp_path: Path) -> None:
    network_filesystem(tmp_path)
    assert network_filesystem(Path("/proc/self")) is None


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
    assert LmdbStore(first).read(7) == images()[7][:2]
    assert stage(store, tmp_path / "local") == first
    assert first.stat().st_ino == inode
    assert capsys.readouterr().out == ""


def test_a_store_that_is_a_folder(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder.lmdb"
    folder.mkdir()
    store.rename(folder / "data.mdb")
    assert LmdbStore(stage(folder, tmp_path / "local")).read(7) == images()[7][:2]


def test_a_store_that_was_built_again_is_copied_again(store: Path, tmp_path: Path) -> None:
    old = stage(store, tmp_path / "local")
    store.unlink()
    write(store, images(3))
    new = stage(store, tmp_path / "local")
    assert new != old
    assert len(LmdbStore(new)) == 3


CODE = """
    import sys
    from pathlib import Path
    from bip.data.stores.lmdb import LmdbStore
    from bip.data.stores.staging import stage

    print("ready", flush=True)
    sys.stdin.readline()
    copy = stage(Path(sys.argv[1]), Path(sys.argv[2]))
    print(copy, len(LmdbStore(copy)), flush=True)
"""


def test_four_processes_stage_one_copy(tmp_path: Path) -> None:
    store = write(tmp_path / "train.lmdb", [(os.urandom(1 << 20), 0, 1, 1) for _ in range(60)])
    command = [sys.executable, "-c", textwrap.dedent(CODE), store, tmp_path / "local"]
    tasks = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for task in tasks:
        assert task.stdout is not None
        task.stdout.readline()
    outputs = []
    for task in tasks:  # all at once
        assert task.stdin is not None
        task.stdin.write("go\n")
        task.stdin.flush()
    for task in tasks:
        outputs.append(task.communicate(timeout=60)[0].splitlines())
        assert task.returncode == 0
    (copy,) = (tmp_path / "local").glob("*.lmdb")
    assert [lines[-1] for lines in outputs] == [f"{copy} 60"] * 4
    printed = [line for lines in outputs for line in lines]
    assert sum("SHA-256 confirmed" in line for line in printed) == 1, "one of them copied"
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
    code = """
import os, pathlib, sys
from bip.data.stores.staging import stage
store, folder = map(pathlib.Path, sys.argv[1:])
stage(store, folder, lambda: os.kill(os.getpid(), 9) if list(folder.glob(".*.partial")) else None)
"""
    local = tmp_path / "local"
    killed = subprocess.run([sys.executable, "-c", code, store, local], check=False)
    assert killed.returncode == -9
    assert list(local.glob(".*.partial"))
    assert not list(local.glob("*.lmdb"))
    assert LmdbStore(stage(store, local)).read(7) == images()[7][:2]


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


class ToldToStop(Exception):
    pass


def test_copying_and_waiting_end_on_request(store: Path, tmp_path: Path) -> None:
    def give_up() -> None:
        raise ToldToStop

    with pytest.raises(ToldToStop):
        stage(store, tmp_path, give_up)
    assert not list(tmp_path.glob("*lmdb"))
    assert not list(tmp_path.glob(".*.partial"))
    (lock,) = tmp_path.glob(".*.lock")
    with open(lock) as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(ToldToStop):
            stage(store, tmp_path, give_up)


def test_a_copy_that_differs_is_refused(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "sha256_file", lambda _: "0" * 64)
    with pytest.raises(UserError, match="differs from it"):
        stage(store, tmp_path / "local")
    assert not list((tmp_path / "local").glob("*lmdb"))


def test_a_full_or_missing_disk_is_reported(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"stage_to: .* cannot be copied to"):
        stage(store, tmp_path / "file")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("usage", (), {"free": 10})())
    with pytest.raises(UserError, match=r"0\.00 GB free"):
        stage(store, tmp_path / "local")


@pytest.mark.parametrize("loader", ["lmdb", "memory", "dali"])
def test_training_from_a_copy_is_the_same(small_cifar: Path, tmp_path: Path, loader: str) -> None:
    case: dict[str, Any] = {"dataset": "CIFAR10", "data_dir": small_cifar, "loader": loader}
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    staged = next(opened(**case, stage_to=tmp_path).train())
    assert len(list(tmp_path.glob("*.lmdb"))) == 2
    plain = next(opened(**case).train())
    assert torch.equal(staged[0], plain[0])
    assert torch.equal(staged[1], plain[1])


def test_folders_of_images_are_not_staged(imagenet: Path, tmp_path: Path) -> None:
    case: dict[str, Any] = {"dataset": "ImageNet", "num_classes": 171, "data_dir": imagenet}
    with pytest.raises(UserError, match="stage_to: copies LMDB stores"):
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
