"""`build-lmdb` and `info` on real images."""

import errno
import os
import random
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bip.data.decode import image_size
from bip.data.stores.folder import FolderStore
from bip.data.stores.lmdb import LmdbStore
from bip.data.tools.build import build_lmdb
from bip.data.tools.check import info
from bip.data.trees import ZipTree
from tests.data.conftest import as_folder, read_all, refused
from tests.data.test_layouts import sizes


def test_a_zip_becomes_stores_in_sorted_order(
    small_cifar_zip: Path, small_cifar: Path, tmp_path: Path
) -> None:
    """A folder of the same images becomes the same bytes."""
    assert sorted(path.name for path in small_cifar.iterdir()) == ["test.lmdb", "train.lmdb"]
    with zipfile.ZipFile(small_cifar_zip) as archive:
        archive.extractall(tmp_path)
        build_lmdb(tmp_path / "cifar", tmp_path / "out")
        for split, count in (("train", 310), ("test", 70)):
            path = small_cifar / f"{split}.lmdb"
            store = LmdbStore(path)
            names = sorted(n for n in archive.namelist() if n.startswith(f"cifar/{split}/"))
            expected = [(archive.read(name), name.split("/")[2]) for name in names]
            assert [(data, store.classes[label]) for data, label in read_all(store)] == expected
            assert (len(names), len(store.classes)) == (count, 10)
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_lmdb_and_folder_hold_the_same_images_in_the_same_order(imagenet: Path) -> None:
    stored = sizes(imagenet / "val.lmdb")
    store, folder = LmdbStore(imagenet / "val.lmdb"), FolderStore(imagenet / "val")
    assert store.classes == folder.classes
    pairs = read_all(store)
    assert len(pairs) == 171
    assert pairs == read_all(folder)
    assert stored == [image_size(data) for data, _ in pairs]


def test_building_again_keeps_what_is_there(
    small_cifar_zip: Path, small_cifar: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (small_cifar / "train.lmdb").stat()
    build_lmdb(small_cifar_zip, small_cifar)
    assert (small_cifar / "train.lmdb").stat().st_ino == before.st_ino
    assert "kept" in capsys.readouterr().err


def tree(root: Path, *names: str) -> Path:
    sound = {True: b"P5 1 1 255 \x07", False: b"junk"}
    return as_folder(root, {name: sound[name.endswith(".pgm")] for name in names})


PARTIAL = {".train.lmdb.partial", ".train.lmdb.progress"}


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


@pytest.mark.parametrize(
    ("names", "message", "left"),
    [
        (["train/a/1.pgm", "train/b/broken.jpg"], "train/b/broken.jpg cannot be stored", PARTIAL),
        (["train/a/1.pgm", "test/b/1.pgm"], "class 'a' is only in one of train/ and test/", set()),
        (["a/1.pgm", "b/1.pgm"], "no train/CLASS/IMAGE", set()),
        (["train/1.pgm"], "train/: its images lie in no class folders", set()),
    ],
)
def test_a_bad_tree_is_named_and_leaves_no_store(
    tmp_path: Path, names: list[str], message: str, left: set[str]
) -> None:
    with refused(message):
        build_lmdb(tree(tmp_path / "src", *names), tmp_path / "out")
    assert left_in(tmp_path / "out") == left


def test_a_damaged_zip_member_is_named(small_cifar_zip: Path, tmp_path: Path) -> None:
    content = bytearray(small_cifar_zip.read_bytes())
    name = b"cifar/train/cat/0003.jpg"
    content[content.index(name) + len(name) + 50] ^= 1
    (tmp_path / "bad.zip").write_bytes(content)
    with refused(r"cifar/train/cat/0003\.jpg cannot be stored .Bad CRC"):
        build_lmdb(tmp_path / "bad.zip", tmp_path / "out")
    assert left_in(tmp_path / "out") == PARTIAL


def test_an_output_that_is_no_folder_is_named(small_cifar_zip: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused(f"{tmp_path}/file: cannot be made"):
        build_lmdb(small_cifar_zip, tmp_path / "file")


@pytest.mark.parametrize(("records", "size"), [(500, 60_000), (2500, 300_000)])
def test_a_full_disk_keeps_what_was_built(
    tmp_path: Path, records: int, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Records are written a thousand at a time; of less nothing is kept."""
    image = b"P5 10 10 255 " + bytes(100)
    src = as_folder(tmp_path / "src", {f"train/a/{i:04}.pgm": image for i in range(records)})
    out = tmp_path / "out"
    full = subprocess.run(
        [sys.executable, "-m", "bip", "data", "build-lmdb", src, out],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert full.returncode == 2
    assert f"{out}/train.lmdb: cannot be written (" in full.stderr
    assert left_in(out) == (PARTIAL if records > 1000 else set())
    build_lmdb(src, out)
    assert ("resuming after" in capsys.readouterr().err) == (records > 1000)
    assert left_in(out) == {"train.lmdb"}
    build_lmdb(src, tmp_path / "whole")
    ours, theirs = (LmdbStore(folder / "train.lmdb") for folder in (out, tmp_path / "whole"))
    assert ours.header == theirs.header
    assert read_all(ours) == read_all(theirs)


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_failing_disk_is_no_bad_image(
    small_cifar_zip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    skip_bad: bool,
) -> None:
    read, out = ZipTree.read, tmp_path / "out"

    def fail(tree: ZipTree, name: str) -> bytes:
        if name.endswith("train/cat/0003.jpg"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(tree, name)

    with monkeypatch.context() as patch, refused(r"cat/0003\.jpg: .*Input/output", "resumes"):
        patch.setattr(ZipTree, "read", fail)
        build_lmdb(small_cifar_zip, out, skip_bad=skip_bad)
    assert not (out / "train.lmdb").exists()
    build_lmdb(small_cifar_zip, out, skip_bad=skip_bad)
    assert "resuming after 96 images" in capsys.readouterr().err
    assert len(LmdbStore(out / "train.lmdb")) == 310


def test_a_store_of_other_options_or_images_is_not_kept(
    small_cifar_zip: Path, small_cifar: Path, tmp_path: Path
) -> None:
    with refused(r"train\.lmdb: exists.* --short-side", "give the same, remove it"):
        build_lmdb(small_cifar_zip, small_cifar, short_side=16)
    src = tree(tmp_path / "src", "train/a/1.pgm", "train/a/2.pgm")
    with refused("exists with 310 images of 10 classes", "remove it or choose another folder"):
        build_lmdb(src, small_cifar)
    build_lmdb(src, tmp_path / "out")
    tree(src, "train/a/3.pgm")
    with refused("exists with 2 images of 1 classes, the source has 3 of 1"):
        build_lmdb(src, tmp_path / "out", skip_bad=True)


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_dangling_link_is_named(tmp_path: Path, skip_bad: bool) -> None:
    src = tree(tmp_path / "src", "train/a/1.pgm")
    (src / "train" / "a" / "2.pgm").symlink_to("nowhere")
    with refused(r"train/a/2\.pgm: links to nowhere, which does not exist", "remove the link"):
        build_lmdb(src, tmp_path / "out", skip_bad=skip_bad)


def test_a_source_without_one_good_image_gives_no_store(tmp_path: Path) -> None:
    with refused("no image in the source can be stored"):
        build_lmdb(tree(tmp_path / "src", "train/a/1.jpg"), tmp_path / "out", skip_bad=True)
    assert left_in(tmp_path / "out") <= PARTIAL


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("missing", ""), ("text.txt", ""), ("broken.zip", ""), ("x.tar.gz", "unpack it first")],
)
def test_a_bad_source_is_named(tmp_path: Path, name: str, remedy: str) -> None:
    if name != "missing":
        tree(tmp_path, name)
    with refused(name, remedy):
        build_lmdb(tmp_path / name, tmp_path / "out")


def test_info(small_cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info(small_cifar)
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"{small_cifar}/test.lmdb: 70 images, 10 classes of 7-7, ")
    assert out[1].startswith(f"{small_cifar}/train.lmdb: 310 images, 10 classes of 31-31, ")
    info(small_cifar / "test.lmdb")
    assert capsys.readouterr().out.splitlines() == out[:1]
    with refused("build-lmdb"):
        info(tmp_path)


def test_all_of_cifar10(cifar_zip: Path, tmp_path: Path) -> None:
    build_lmdb(cifar_zip, tmp_path)
    with zipfile.ZipFile(cifar_zip) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith("train/"))
        store = LmdbStore(tmp_path / "train.lmdb")
        assert len(store) == len(names) == 50_000
        for index in random.Random(0).sample(range(50_000), 500):
            assert store.read(index)[0] == archive.read(names[index])
