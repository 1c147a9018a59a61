"""Every layout that ImageNet, TinyImageNet and CIFAR come in becomes the same stores."""

import errno
import io
import json
import multiprocessing
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import lmdb
import numpy as np
import pytest
from PIL import Image

from bip.__main__ import main
from bip.data import decode
from bip.data.stores.base import DamagedImage
from bip.data.stores.folder import FolderStore
from bip.data.stores.lmdb import LmdbStore, record_key
from bip.data.stores.writer import LmdbWriter
from bip.data.tools.build import build_lmdb, stored_size
from bip.data.tools.check import verify
from bip.data.tools.prepare import prepare_imagenet
from bip.errors import UserError
from tests.data.conftest import as_folder, damage, encoded, read_all, refused

CLASSES = ["n01440764", "n01443537", "n02102040"]
TRAIN = {f"{name}/{name}_{i}.JPEG": label for label, name in enumerate(CLASSES) for i in range(4)}
VAL = {f"ILSVRC2012_val_{i:08}.JPEG": (i * 7) % 3 for i in range(1, 8)}
Layout = Callable[[], dict[str, bytes]]
Packed = Callable[[Path, dict[str, bytes]], Path]


def jpeg(seed: object, size: tuple[int, int] = (30, 20), mode: str = "RGB", **how: object) -> bytes:
    stream = io.BytesIO()
    colour = np.random.default_rng(abs(hash(str(seed))) % 2**32).integers(0, 256, 4).tolist()
    bands = len(Image.new(mode, (1, 1)).getbands())
    Image.new(mode, size, tuple(colour[:bands])).save(stream, "JPEG", **how)
    return stream.getvalue()


def xml(label: str) -> bytes:
    text = f"<annotation><folder>val</folder><object>\n<name>{label}</name></object></annotation>"
    return text.encode()


def train_files(prefix: str) -> dict[str, bytes]:
    return {f"{prefix}train/{name}": jpeg(name) for name in TRAIN}


def imagefolder() -> dict[str, bytes]:
    files = {f"val/{CLASSES[label]}/{name}": jpeg(name) for name, label in VAL.items()}
    return train_files("") | files


def kaggle_xml() -> dict[str, bytes]:
    root, notes = "ILSVRC/Data/CLS-LOC/", "ILSVRC/Annotations/CLS-LOC/"
    files = train_files(root)
    files |= {f"{root}val/{name}": jpeg(name) for name in VAL}
    files |= {f"{root}test/ILSVRC2012_test_{i:08}.JPEG": jpeg(i) for i in range(3)}
    files |= {f"{notes}val/{Path(name).stem}.xml": xml(CLASSES[y]) for name, y in VAL.items()}
    files |= {f"{notes}train/{name.removesuffix('.JPEG')}.xml": xml("wrong") for name in TRAIN}
    for split, images in (("train_cls", TRAIN), ("val", VAL)):  # running numbers, no labels
        lines = [f"{name.removesuffix('.JPEG')} {i}\n" for i, name in enumerate(images, 1)]
        files[f"ILSVRC/ImageSets/CLS-LOC/{split}.txt"] = "".join(lines).encode()
    files["LOC_synset_mapping.txt"] = "".join(f"{name} fish, x\n" for name in CLASSES).encode()
    return files


def kaggle_csv() -> dict[str, bytes]:
    files = {name: data for name, data in kaggle_xml().items() if not name.endswith(".xml")}
    rows = [f"{name.removesuffix('.JPEG')},{CLASSES[y]} 1 2 3 4 " for name, y in VAL.items()]
    files["LOC_val_solution.csv"] = "\n".join(["ImageId,PredictionString", *rows]).encode()
    return files


def caffe() -> dict[str, bytes]:
    files = train_files("") | {f"val/{name}": jpeg(name) for name in VAL}
    files["val.txt"] = "".join(f"{name} {label}\n" for name, label in VAL.items()).encode()
    return files


def tiny() -> dict[str, bytes]:
    root = "tiny-imagenet-200/"
    files = {f"{root}train/{n.replace('/', '/images/')}": jpeg(n) for n in TRAIN}
    files |= {f"{root}train/{name}/{name}_boxes.txt": b"x 0 0 1 1\n" for name in CLASSES}
    files |= {f"{root}val/images/{name}": jpeg(name) for name in VAL}
    files |= {f"{root}test/images/test_{i}.JPEG": jpeg(i) for i in range(3)}
    lines = [f"{name}\t{CLASSES[label]}\t0\t32\t44\t62\n" for name, label in VAL.items()]
    files[f"{root}val/val_annotations.txt"] = "".join(lines).encode()
    files[f"{root}wnids.txt"] = "\n".join(reversed(CLASSES)).encode()
    return files


def as_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path.with_suffix(".zip")


def tar_of(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def as_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.with_suffix(".tar").write_bytes(tar_of(files))
    return path.with_suffix(".tar")


def content(path: Path) -> list[tuple[bytes, str]]:
    store = LmdbStore(path)
    return [(data, store.classes[label]) for data, label in read_all(store)]


STORED = [(jpeg(name), CLASSES[label]) for name, label in TRAIN.items()]  # of `train_files`


@pytest.mark.parametrize("layout", [imagefolder, kaggle_xml, kaggle_csv, caffe, tiny])
@pytest.mark.parametrize("packed", [as_folder, as_zip, as_tar])
def test_every_layout_in_every_wrapping(tmp_path: Path, layout: Layout, packed: Packed) -> None:
    build_lmdb(packed(tmp_path / "src", layout()), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train.lmdb", "val.lmdb"}
    ordered = sorted(VAL, key=lambda name: (VAL[name], name))
    expected = [(jpeg(name), CLASSES[VAL[name]]) for name in ordered]
    assert content(tmp_path / "out" / "val.lmdb") == expected
    assert content(tmp_path / "out" / "train.lmdb") == STORED


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_imagenets_tar_of_tars(tmp_path: Path, prefix: str) -> None:
    """ILSVRC2012_img_train.tar has the classes' archives at its root."""
    files = {}
    for class_name in CLASSES:
        inner = {n.split("/")[1]: jpeg(n) for n in TRAIN if n.startswith(class_name)}
        files[f"{prefix}{class_name}.tar"] = tar_of(inner)
    build_lmdb(as_tar(tmp_path / "src", files), tmp_path / "out")
    assert content(tmp_path / "out" / "train.lmdb") == STORED


def test_cifars_archive(cifar_archive: Path, tmp_path: Path) -> None:
    folder = cifar_archive / "cifar-10-batches-py"
    batch = pickle.loads((folder / "test_batch").read_bytes())
    order = sorted(range(6), key=lambda row: (batch["labels"][row], row))
    for src, out in ((cifar_archive, cifar_archive), (folder, tmp_path / "out")):
        build_lmdb(src, out)
        build_lmdb(src, out)  # kept
        for (data, class_name), row in zip(content(out / "test.lmdb"), order, strict=True):
            assert class_name == f"class{batch['labels'][row]}"
            pixels = decode.decode(data, 3).transpose(2, 0, 1)
            np.testing.assert_array_equal(pixels.ravel(), batch["data"][row])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # The running numbers in ImageSets are none either.
        ({"val.txt": None, "ImageSets/CLS-LOC/val.txt": caffe()["val.txt"]}, "none of val_annot"),
        ({"val.txt": None}, "val/: its images lie in no class folders, and there is none of"),
        ({"val.txt": b"ILSVRC2012_val_00000001.JPEG 1\n"}, "00000002.JPEG: has no label"),
        ({"val/extra.JPEG": b""}, r"val/extra\.JPEG: has no label"),
        ({"val.txt": caffe()["val.txt"].replace(b" 2", b" 9")}, "is of class 9, which train/ has"),
    ],
)
def test_annotations_that_do_not_fit(
    tmp_path: Path, change: dict[str, bytes | None], message: str
) -> None:
    files = {name: data for name, data in (caffe() | change).items() if data is not None}
    with refused(message):
        build_lmdb(as_folder(tmp_path / "src", files), tmp_path / "out")


def test_numbers_without_a_train_folder_are_named_by_the_mapping(tmp_path: Path) -> None:
    """Not by their order as text, in which 10 comes before 2."""
    names = [f"n{100 - number:08}" for number in range(12)]
    files = {f"val/{number:02}.JPEG": jpeg(number) for number in range(12)}
    files["val.txt"] = "".join(f"{n:02}.JPEG {n}\n" for n in range(12)).encode()
    with refused("val/: .* class number 0", "LOC_synset_mapping.txt"):
        build_lmdb(as_folder(tmp_path / "src", files), tmp_path / "out")
    files["LOC_synset_mapping.txt"] = "".join(f"{name} fish, x\n" for name in names).encode()
    build_lmdb(as_folder(tmp_path / "src", files), tmp_path / "out")
    assert LmdbStore(tmp_path / "out" / "val.lmdb").classes == sorted(names)
    expected = [(jpeg(number), names[number]) for number in reversed(range(12))]
    assert content(tmp_path / "out" / "val.lmdb") == expected


@pytest.mark.parametrize("name", ["../../../escaped", "..", ".", "a/b", "a\0b", "/tmp/escaped"])
def test_annotations_put_nothing_outside_the_folder(tmp_path: Path, name: str) -> None:
    files = {"val/1.JPEG": jpeg(1), "val.txt": f"1.JPEG {name}\n".encode()}
    src = as_folder(tmp_path / "a" / "b" / "src", files)
    before = sorted(tmp_path.rglob("*"))
    for act in (prepare_imagenet, build_lmdb):
        with refused(r"val/: its annotations name a class .* no name$"):
            act(src, tmp_path / "a" / "b" / "out")
    assert sorted(tmp_path.rglob("*")) == before


def pack(src: Path, *more: tarfile.TarInfo) -> Path:
    """A .tar of a folder, its links as they are, and of further members."""
    with tarfile.open(src.with_suffix(".tar"), "w", format=tarfile.GNU_FORMAT) as archive:
        archive.add(src, ".")
        for member in more:
            archive.addfile(member)
    return src.with_suffix(".tar")


def sparse(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = tarfile.GNUTYPE_SPARSE
    return member


def test_links_in_a_tar_are_files(tmp_path: Path) -> None:
    src = as_folder(tmp_path / "src", train_files(""))
    first, second = (src / "train" / name for name in CLASSES[:2])
    os.link(first / f"{CLASSES[0]}_1.JPEG", second / "hard.JPEG")
    (second / "soft.JPEG").symlink_to(f"../{CLASSES[0]}/{CLASSES[0]}_2.JPEG")
    (second / "a_chain.JPEG").symlink_to("soft.JPEG")
    for source, out in ((src, "folder"), (pack(src), "tar")):
        build_lmdb(source, tmp_path / out)
    assert content(tmp_path / "tar" / "train.lmdb") == content(tmp_path / "folder" / "train.lmdb")
    assert len(content(tmp_path / "tar" / "train.lmdb")) == 15


@pytest.mark.parametrize(
    ("name", "target"),
    [
        *(("link.JPEG", target) for target in ("nowhere.JPEG", "/etc/passwd", "../../..", ".")),
        ("link.JPEG", "link.JPEG"),
        *((name, "nowhere") for name in ("val_annotations.txt", "LOC_val_solution.csv", "n01.tar")),
    ],
)
def test_a_link_out_of_a_tar_is_named(tmp_path: Path, name: str, target: str) -> None:
    src = as_folder(tmp_path / "src", train_files(""))
    (src / "train" / CLASSES[0] / name).symlink_to(target)
    with refused(f"/{name}: links to .*no file in the archive", "--dereference"):
        build_lmdb(pack(src), tmp_path / "out")


def test_a_sparse_member_of_a_tar_is_reported(tmp_path: Path) -> None:
    src = as_folder(tmp_path / "src", train_files(""))
    with refused(r"sparse\.JPEG: is stored sparse", "without --sparse"):
        build_lmdb(pack(src, sparse(f"train/{CLASSES[0]}/sparse.JPEG")), tmp_path / "out")


def test_links_and_sparse_members_that_are_no_images_are_left_out(tmp_path: Path) -> None:
    src = as_folder(tmp_path / "src", train_files(""))
    (src / "README").symlink_to("nowhere")
    (src / "newest").symlink_to("train")
    build_lmdb(pack(src, sparse("holes.bin")), tmp_path / "out")
    assert content(tmp_path / "out" / "train.lmdb") == STORED


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_member_that_occurs_twice_is_stored_once(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "src.zip", "w") as archive:
        for seed in (1, 2):
            archive.writestr("train/a/1.jpg", jpeg(seed))
    build_lmdb(tmp_path / "src.zip", tmp_path / "out")
    assert content(tmp_path / "out" / "train.lmdb") == [(jpeg(2), "a")]


def test_huge_files_are_reported_and_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    huge, read = f"train/{CLASSES[0]}/0_huge.JPEG", zipfile.ZipFile.read
    files = train_files("") | {huge: bytes(3_000_000)}

    def checked(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
        assert member.file_size < 2_000_000
        return read(archive, member)

    for module in ("layouts", "trees", "stores.folder"):
        monkeypatch.setattr(f"bip.data.{module}.MAX_BYTES", 2_000_000)
    monkeypatch.setattr(zipfile.ZipFile, "read", checked)
    for number, packed in enumerate((as_folder, as_zip, as_tar)):
        src, out = packed(tmp_path / f"src{number}", files), tmp_path / f"out{number}"
        with refused(f"{huge} cannot be stored .is too large", "--skip-bad"):
            build_lmdb(src, out)
        build_lmdb(src, out, skip_bad=True)
        assert "1 skipped" in capsys.readouterr().err
    with refused(r"0_huge.* .image 0, class n01440764.: is too large", kind=DamagedImage):
        FolderStore(tmp_path / "src0" / "train").read(0)
    lists = caffe() | {"val.txt": bytes(3_000_000)}
    with refused(r"val\.txt: has 3 MB, too many for a list"):
        build_lmdb(as_zip(tmp_path / "lists", lists), tmp_path / "out")


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (tiny, "val_annotations.txt"),
        (kaggle_csv, "LOC_val_solution.csv"),
        (kaggle_xml, "ILSVRC2012_val_00000003.xml"),
        (kaggle_xml, "LOC_synset_mapping.txt"),
        (caffe, "val.txt"),
    ],
)
def test_damaged_annotations_are_named(tmp_path: Path, layout: Layout, name: str) -> None:
    files = layout()
    (full,) = (file for file in files if file.endswith(name) and "ImageSets" not in file)
    src = as_zip(tmp_path / "src", files)
    packed = bytearray(src.read_bytes())
    packed[packed.index(files[full]) + 5] ^= 1
    src.write_bytes(packed)
    with refused(rf"{full}: cannot be read \(Bad CRC", "repair or copy it again"):
        build_lmdb(src, tmp_path / "out")


def test_a_tar_that_cannot_be_opened_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = as_tar(tmp_path / "src", imagefolder())

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match=r"src\.tar: not a readable \.tar .*Permission denied"):
        build_lmdb(src, tmp_path / "out")


def test_cmyk_and_misnamed_images_are_repaired_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = train_files("") | {
        f"train/{CLASSES[0]}/cmyk.JPEG": encoded("CMYK", "JPEG"),
        f"train/{CLASSES[0]}/png.JPEG": encoded("P", "PNG"),
        f"train/{CLASSES[1]}/gray.JPEG": encoded("L", "JPEG"),
        f"train/{CLASSES[1]}/honest.png": encoded("P", "PNG") + b"trailing",
    }
    build_lmdb(as_folder(tmp_path / "src", files), tmp_path / "out", check=True)
    printed = capsys.readouterr().err
    assert "1 x CMYK JPEG repaired, 1 x PNG named as JPEG repaired" in printed
    stored = [data for data, _ in content(tmp_path / "out" / "train.lmdb")]
    assert len(stored) == len(files)
    changed = {Path(name).name for name, data in files.items() if data not in stored}
    assert changed == {"cmyk.JPEG", "png.JPEG"}
    for data in set(stored) - set(files.values()):
        assert decode.plain_jpeg_size(data) == (70, 90)
        with decode.open_image(data) as image:
            assert image.mode == "RGB"


def sizes(path: Path) -> list[tuple[int, int]]:
    """(height, width) of each record, as stored beside its image (bytes 4 to 12)."""
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as env, env.begin() as txn:
        values = [value for key, value in txn.cursor() if key != b"header"]
    return [struct.unpack_from(">ii", value, 4)[::-1] for value in values]


def test_shrinking(imagenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "val").symlink_to(imagenet / "val")
    build_lmdb(tmp_path / "src", tmp_path / "out", short_side=120, quality=80, check=True)
    printed = capsys.readouterr().err
    assert "at most 18 MB" in printed
    stored = sizes(tmp_path / "out" / "val.lmdb")
    small, whole = (LmdbStore(p / "val.lmdb") for p in (tmp_path / "out", imagenet))
    saved = 1 - small.header["image_bytes"] / whole.header["image_bytes"]
    assert f"({100 * saved:.0f}%) saved by shrinking" in printed
    assert saved > 0.8
    for index in range(0, 171, 9):
        data, before = small.read(index)[0], decode.image_size(whole.read(index)[0])
        height, width = stored[index]
        assert decode.image_size(data) == (height, width)
        assert min(height, width) == min(120, *before)
        assert abs(height / width - before[0] / before[1]) < 0.02
        if min(before) <= 120:
            assert data == whole.read(index)[0]


def bad_files() -> dict[str, bytes]:
    good = jpeg(0, (300, 200), quality=95)
    return train_files("") | {
        f"train/{CLASSES[0]}/0_html.JPEG": b"<html>",
        f"train/{CLASSES[1]}/0_cut.JPEG": good[: len(good) - 40],
    }


def test_undecodable_files_are_listed_and_an_error_unless_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src, out = as_folder(tmp_path / "src", bad_files()), tmp_path / "out"
    with refused(r"0_html\.JPEG and 1 others cannot.*--skip-bad"):
        build_lmdb(src, out, check=True)
    printed = capsys.readouterr().err
    assert f"train/{CLASSES[0]}/0_html.JPEG: no known image format" in printed
    assert f"train/{CLASSES[1]}/0_cut.JPEG: " in printed
    assert not (out / "train.lmdb").exists()
    for parts in (["resuming after 14 images", "12 images", "2 skipped"], ["kept"]):
        build_lmdb(src, out, check=True, skip_bad=True)
        printed = capsys.readouterr().err
        assert all(part in printed for part in parts)
    assert content(out / "train.lmdb") == STORED
    assert [path.name for path in out.iterdir()] == ["train.lmdb"]


def test_the_estimate_holds(imagenet: Path, small_cifar: Path) -> None:
    for path in (imagenet / "val.lmdb", small_cifar / "train.lmdb"):
        estimate = sum(stored_size(len(data)) for data, _ in read_all(LmdbStore(path)))
        assert 0.8 < estimate / path.stat().st_size < 1.1


def test_room_for_one_of_two_stores_is_too_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = as_folder(tmp_path / "src", imagefolder())
    needed = sum(stored_size(path.stat().st_size) for path in src.rglob("*.JPEG"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needed - 10))
    with refused(r"train\.lmdb and .*val\.lmdb: will take", "make room"):
        build_lmdb(src, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needed + 10))
    build_lmdb(src, tmp_path / "out")


def test_a_page_that_ends_its_reader_is_reported(tmp_path: Path) -> None:
    """A value of 1 GB, so its node has it: a bus error in LMDB's own get."""
    path = tmp_path / "train.lmdb"
    with LmdbWriter(path, ["a"]) as writer:
        data = jpeg(0, (150, 100)) + bytes(9000)  # on pages of its own
        for _ in range(60):
            writer.add(data, 0, 150, 100)
    content = bytearray(path.read_bytes())
    node = content.index(record_key(50)) - 8
    assert struct.unpack_from("=HHHH", content, node) == (16 + len(data), 0, 1, 8)
    struct.pack_into("=H", content, node + 2, 0x4000)
    path.unlink()
    path.write_bytes(content)
    with refused(r"train\.lmdb: reading it ended by SIGBUS at record \d+ or soon after it"):
        verify(path, workers=1)
    assert multiprocessing.active_children() == []


def test_verify_does_not_blame_a_store_that_is_unreachable(
    small_cifar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(small_cifar))

    monkeypatch.setattr("bip.data.tools.check.open_store", unreachable)
    assert main(["data", "verify", str(small_cifar)]) == os.EX_IOERR


def test_verify_finds_every_damaged_record(
    small_cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verify(small_cifar)
    assert "train.lmdb: 310 images, 0 damaged" in capsys.readouterr().out
    shutil.copy(small_cifar / "test.lmdb", tmp_path)
    damage(tmp_path / "test.lmdb", 3, 50)
    assert main(["data", "verify", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    for part in ("record 3 (class", "record 50 (class", "2 damaged records"):
        assert part in printed


def test_verify_recounts_the_classes(small_cifar: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(small_cifar / "test.lmdb", tmp_path))
    with lmdb.open(str(path), subdir=False, lock=False) as env, env.begin(write=True) as txn:
        header = json.loads(txn.get(b"header"))
        header["class_counts"][:2] = [6, 8]
        txn.put(b"header", json.dumps(header).encode())
    with refused(r"header counts 6 images of class airplane, .* are 7"):
        verify(path)


def test_prepare_imagenet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_imagenet()
    assert "ILSVRC2012_img_train.tar" in capsys.readouterr().out
    src, out = as_folder(tmp_path / "src", kaggle_xml()), tmp_path / "out"
    before = sorted((path, path.stat().st_mtime_ns) for path in src.rglob("*"))
    prepare_imagenet(src, out)
    assert sorted((path, path.stat().st_mtime_ns) for path in src.rglob("*")) == before
    for name, label in VAL.items():
        assert (out / "val" / CLASSES[label] / name).read_bytes() == jpeg(name)
    prepare_imagenet(src, out)
    assert "0 links made" in capsys.readouterr().out
    build_lmdb(out, tmp_path / "stores")
    assert content(tmp_path / "stores" / "train.lmdb") == STORED
    with refused("both --src and --out"):
        prepare_imagenet(src)
    inner = as_folder(src / "deep" / "ILSVRC2012_img_train", caffe())
    prepare_imagenet(src / "deep", out / "deep")
    assert (out / "deep" / "train").resolve() == inner / "train"
