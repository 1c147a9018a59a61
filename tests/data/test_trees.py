"""What folders and archives of users hold beside images; both loaders see the same."""

import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from PIL import Image

from bip.data import decode
from bip.data.splits import open_split
from bip.data.stores.folder import FolderStore
from bip.data.stores.lmdb import LmdbStore
from bip.data.tools.build import build_lmdb
from tests.data.conftest import as_folder, opened, read_all, refused
from tests.data.test_layouts import as_tar, as_zip, caffe, tiny


def image(number: int) -> bytes:
    return b"P5 1 1 255 " + bytes([number])


# train/ has images 0 to 3, val/ 10 to 13; of classes a and b.
FILES = {
    f"{split}/{'ab'[number % 2]}/{number}.pgm": image(number + start)
    for split, start in (("train", 0), ("val", 10))
    for number in range(4)
}
Pairs = list[tuple[bytes, int]]


def built(src: Path) -> dict[str, Pairs]:
    """The splits that a build stores, which are those of the folder loader."""
    out = src.with_name("out")
    build_lmdb(src, out)
    found = {path.stem: LmdbStore(path) for path in sorted(out.glob("*.lmdb"))}
    for split, store in found.items() if src.is_dir() else ():
        folder = FolderStore(src / split)
        assert (folder.classes, read_all(folder)) == (store.classes, read_all(store))
    return {split: read_all(store) for split, store in found.items()}


EXPECTED = {
    split: [(image(start + n), n % 2) for n in (0, 2, 1, 3)]
    for split, start in (("train", 0), ("val", 10))
}


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("train/train", "../train"),
        ("self", "."),
        ("train/a/up", ".."),
        ("val/b/deep", "../../../src"),
        ("train/b/other", "../../val/loop"),
    ],
)
def test_a_loop_of_links_is_named(tmp_path: Path, link: str, target: str) -> None:
    src = as_folder(tmp_path / "src", FILES)
    if "loop" in target:
        (src / "val/loop").symlink_to("../train")
    (src / link).symlink_to(target)
    with refused(f"src/.*{Path(link).name}.*a loop; remove the link"):
        build_lmdb(src, tmp_path / "out")
    if link != "self":
        with refused("a loop; remove the link"):
            FolderStore(src / link.split("/")[0])


def test_a_folder_that_is_reached_twice_is_stored_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = as_folder(tmp_path / "src", FILES)
    as_folder(src / "train/b/part", {"9.pgm": image(9)})
    for link in ("train/a/x", "train/b/again"):  # of several names the real one counts
        (src / link).symlink_to("../b/part")
    assert [data for data, _ in built(src)["train"]].count(image(9)) == 1
    assert "left out 2 x the same folder as train/b/part/" in capsys.readouterr().err


@pytest.mark.parametrize(
    "place",
    [
        *("._1.pgm", "a/._1.pgm", ".hidden/1.pgm", "__MACOSX/1.pgm", ".AppleDouble/1.pgm"),
        *("@eaDir/1.pgm/SYNOPHOTO_THUMB_M.jpg", "a/@eaDir/1.jpg", "a/@__thumb/1.jpg"),
        *("$RECYCLE.BIN/1.jpg", "System Volume Information/x.dat", "#recycle/1.jpg"),
        *("lost+found/x", ".ipynb_checkpoints/1-checkpoint.jpg", "a/Thumbs.db", "desktop.ini"),
        *("~snapshot/1.jpg", "__pycache__/x.pyc", "Icon\r", "a/~$1.jpg"),
    ],
)
def test_files_of_systems_are_no_images(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    junk = {f"{split}{place}": b"junk" for split in ("", "train/", "val/")}
    assert built(as_folder(tmp_path / "src", FILES | junk)) == EXPECTED
    assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("preview.png", "beside the class folders"),
        ("a/9.tif", ".tif file"),
        ("b/9", "file without a suffix"),
        ("b/9.jpg.part", ".part file"),
        ("../extra/9.jpg", "outside train/"),
    ],
)
def test_what_is_left_out_is_counted_and_named(
    tmp_path: Path, split: str, name: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    src = as_folder(tmp_path / "src", FILES)
    place = as_folder(src / split, {name: image(99), "a/notes.txt": b""}) / name
    assert built(src) == EXPECTED
    printed = capsys.readouterr().err
    assert f"left out 1 x {why}" in printed
    assert f"({os.path.normpath(place.relative_to(src))})" in printed
    if "extra" not in name:
        opened(dataset="TinyImageNet", num_classes=2, data_dir=src, batch_size=2)
        assert f"left out 1 x {why}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("renamed", "message"),
    [
        (tuple(f"{n}.{s}" for n in range(4) for s in ("pgm", "tif")), "no train/.* 8 x .tif"),
        (("val/a/", "val/x/a.zip/", "val/b/", "val/x/"), "only in one of train/ and val/"),
        (("train/b/1.pgm", "train/b/1.tif", "train/b/3.pgm", "x"), "train/b/: would be .*tif"),
        (("val/b/1.pgm", "val/x", "val/b/3.pgm", "val/c/1.heic"), "val/c/: would be .*heic"),
        (("train/a/", "train/"), "class 'a' is only in one of"),
        (("val/", "valid/"), "valid/: would be lost.* rename it to val"),
        (("val/", "Validation/"), "Validation/: .* rename it to val"),
        (("train/", "TRAIN/", "val/", "Val/"), "TRAIN/: .* rename it to train"),
        (("train/a/", "train/", "train/b/", "train/"), "train/: its images lie in no class fold"),
        (("train/", "one/train/", "val/", "two/val/"), "one/train/.* and in two/val/.*: one of"),
        (("train/b/", "train/B/"), "class 'B' is only in one of train/ and val/"),
        (("train/b/", "train/\u00e9/", "val/b/", "val/e\u0301/"), "another Unicode form"),
        (("/b/", "/caf\udce9/"), r"caf\\xe9/: .* not UTF-8; rename"),
    ],
)
def test_no_split_or_class_is_lost(tmp_path: Path, renamed: tuple[str, ...], message: str) -> None:
    files = {}
    for name, data in FILES.items():
        for old, new in zip(renamed[::2], renamed[1::2], strict=True):
            name = name.replace(old, new)
        files[name] = data
    with refused(message):
        build_lmdb(as_folder(tmp_path / "src", files), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["train/c", "val/c", "both"])
def test_an_empty_class_folder_is_named(tmp_path: Path, place: str) -> None:
    src = as_folder(tmp_path / "src", FILES)
    for split in ("train", "val"):
        if place in ("both", f"{split}/c"):
            (src / split / "c").mkdir()
    (src / "train/d").symlink_to("nowhere")
    with refused("/[cd]/: would be a class without images", "remove the folder"):
        build_lmdb(src, tmp_path / "out")


def flat(listed: dict[str, bytes], *names: str) -> dict[str, bytes]:
    """A val/ without class folders."""
    train = {name: data for name, data in FILES.items() if name.startswith("train")}
    return train | {f"val/{name}": image(n) for n, name in enumerate(names)} | listed


ROWS = [("1.pgm", "a"), ("my dog.pgm", "b"), ("c.1.pgm", "b"), ("caf\u00e9.pgm", "a")]
NAMES = [name for name, _ in ROWS]


def lines(form: str) -> str:
    numbers = {"a": 0, "b": 1}
    return "".join(form.format(n=n, y=y, i=numbers[y], s=n[:-4]) + "\n" for n, y in ROWS)


@pytest.mark.parametrize(
    ("file", "text", "encoding"),
    [
        *(("val.txt", lines("{n} {y}"), code) for code in ("utf-8-sig", "utf-16", "cp1252")),
        *(("val.txt", lines("{n} {y}"), code) for code in ("utf-16-le", "utf-16-be", "utf-32")),
        ("val.txt", lines("{n}\t{y}").replace("\n", "\r\n"), "utf-8"),
        ("val.txt", lines("{n},{i}").replace("\n", "\r"), "utf-8"),
        ("val.txt", lines("{n};{y}"), "utf-8"),
        ("val.txt", lines("{n} | {i}"), "utf-8"),
        ("val.txt", lines("val/{n}   {i}") + lines("train/{n} 1"), "utf-8"),
        ("val.txt", lines(r"D:\data\val\{n} {i}"), "utf-8"),
        ("val.txt", lines("{s} {y}"), "utf-8"),
        ("val.txt", lines("cafe\u0301 {y}")[-8:] + lines("{n} {y}"), "utf-8"),
        ("val.csv", "file,width,class\n" + lines('"{n}",1,{y}'), "utf-8"),
        ("val.csv", "label,image\n" + lines("{y},{n}"), "utf-8"),
        ("val.tsv", lines("{s}\t{y}"), "utf-8"),
        ("val.lst", lines("7\t{i}.000000\tval/{n}"), "utf-8"),
        ("val/val_annotations.txt", lines("{n} {y} 0 0 3 3"), "utf-8"),
    ],
)
def test_lists_of_labels_as_people_write_them(
    tmp_path: Path, file: str, text: str, encoding: str
) -> None:
    src = as_folder(tmp_path / "src", flat({file: text.encode(encoding)}, *NAMES))
    expected = sorted((label == "b", name, n) for n, (name, label) in enumerate(ROWS))
    assert built(src)["val"] == [(image(n), int(label)) for label, _, n in expected]


@pytest.mark.parametrize(
    ("names", "text", "message"),
    [
        ("1.pgm 1.ppm", "1 a\n", r"1\.pgm and val/1\.ppm: .*'1'.* may be either"),
        ("1.pgm 1.ppm", "1.pgm a\n", r"1\.ppm: has no label; val\.txt does not fit"),
        ("1.pgm 2.pgm", "1.pgm 0\n2.pgm 1\n1.pgm 1\n", r"val\.txt: val/1\.pgm has two labels, a"),
        ("1.pgm images/1.pgm", "1.pgm a\n", r"val/images/1\.pgm: .* may be either"),
        ("1.pgm preview.pgm", "1.pgm a\n", r"preview\.pgm: has no label; val\.txt"),
        ("1.pgm", "1.pgm " + 30_000 * "x", "characters; it is no list"),
    ],
)
def test_contradictions_of_lists_are_errors(
    tmp_path: Path, names: str, text: str, message: str
) -> None:
    src = as_folder(tmp_path / "src", flat({"val.txt": text.encode()}, *names.split()))
    with refused(message):
        build_lmdb(src, tmp_path / "out")
    with refused(message):
        open_split("TinyImageNet", src, train=False)


def test_the_suffix_tells_images_of_one_stem_apart(tmp_path: Path) -> None:
    src = flat({"val.txt": b"1.pgm b\n1.ppm a\n"}, "1.pgm", "1.ppm")
    assert built(as_folder(tmp_path / "src", src))["val"] == [(image(1), 0), (image(0), 1)]


def test_numbers_mean_classes_that_are_numbers(tmp_path: Path) -> None:
    """Of the classes 0, 10 and 2 in the order of names, 2 is the last."""
    files = {f"train/{name}/1.pgm": image(9) for name in ("0", "2", "10")}
    files |= {f"val/{n}.pgm": image(n) for n in (0, 2, 10)}
    files["val.txt"] = b"0.pgm 00\n2.pgm 02\n10.pgm 10\n"
    expected = [(image(0), 0), (image(10), 1), (image(2), 2)]
    assert built(as_folder(tmp_path / "src", files))["val"] == expected


@pytest.mark.parametrize("layout", [tiny, caffe])
def test_sets_train_as_they_are_unpacked(tmp_path: Path, layout: object) -> None:
    src = as_folder(tmp_path / "src", tiny() if layout is tiny else caffe())
    data_dir = src / "tiny-imagenet-200" if layout is tiny else src
    build_lmdb(src, tmp_path / "out")
    for train, file in ((True, "train.lmdb"), (False, "val.lmdb")):
        store, split = (
            LmdbStore(tmp_path / "out" / file),
            open_split("TinyImageNet", data_dir, train),
        )
        assert isinstance(split, FolderStore)
        assert (split.classes, read_all(split)) == (store.classes, read_all(store))


@pytest.mark.parametrize("form", ["{}", "./{}", "/{}", "top\\{}"])
def test_names_in_a_zip(tmp_path: Path, form: str) -> None:
    with zipfile.ZipFile(tmp_path / "src.zip", "w") as archive:
        for name, data in FILES.items():
            member = zipfile.ZipInfo("x")
            member.filename = form.format(name)
            if "\\" in form:
                member.filename = member.filename.replace("/", "\\")
            archive.writestr(member, data)
    assert built(tmp_path / "src.zip") == EXPECTED


@pytest.mark.parametrize("mode", ["gz", "xz", "bz2"])
def test_a_compressed_tar_gets_the_command_that_unpacks_it(tmp_path: Path, mode: str) -> None:
    as_folder(tmp_path / "src", FILES)
    path = tmp_path / "src.tar"
    with tarfile.open(path, f"w:{mode}") as archive:  # type: ignore[call-overload]
        archive.add(tmp_path / "src", ".")
    with refused(f"unpack it first: mkdir DIR && tar -x[zJj]f {path} -C DIR"):
        build_lmdb(path, tmp_path / "out")


@pytest.mark.parametrize("kind", ["PNG", "PPM"])
@pytest.mark.parametrize("short_side", [0, 32])
def test_16_bits_are_scaled_to_8(
    tmp_path: Path, kind: str, short_side: int, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "src/train/a" / f"1.{'png' if kind == 'PNG' else 'pgm'}"
    place.parent.mkdir(parents=True)
    deep = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(deep).save(place, kind)
    build_lmdb(tmp_path / "src", tmp_path / "out", short_side=short_side, check=True)
    assert f"1 x 16-bit {kind} scaled to 8 bits" in capsys.readouterr().err
    pixels = decode.decode(LmdbStore(tmp_path / "out/train.lmdb").read(0)[0], 1)[:, :, 0]
    step = 64 // len(pixels)
    np.testing.assert_allclose(pixels, deep[step // 2 :: step, ::step] / 257, atol=4)
    if not short_side:
        np.testing.assert_array_equal(pixels, np.rint(deep / 257))


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    src = as_folder(tmp_path / "src", {"train/a/1.ppm": b"Pf\n1 1\n-1.0\n" + bytes(4)})
    with refused("1.ppm cannot be stored .*floating-point.* convert it"):
        build_lmdb(src, tmp_path / "out", check=True)


@pytest.mark.parametrize("shape", [(1, 700), (700, 1), (3, 1000), (1001, 7)])
def test_a_long_image_is_cropped_before_it_is_enlarged(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    cropped = decode.test_view(pixels, 64, 8 / 7).astype(int)
    monkeypatch.setattr(decode, "_LONGEST", 10**9)
    whole = decode.test_view(pixels, 64, 8 / 7)
    assert abs(cropped - whole).max() <= (0 if 1 in shape else 6)
    monkeypatch.undo()
    assert decode.test_view(np.zeros((1, 60_000, 3), np.uint8), 224, 1).shape == (3, 224, 224)


@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 3), (5, 700)])
def test_the_part_of_a_long_image_is_small_and_holds_its_view(shape: tuple[int, int]) -> None:
    """DALI decodes and resizes this part on the GPU."""
    size, corner = decode.test_geometry(*shape, 224, 1.0)
    part = decode.part_of_long(shape, size, corner, 224)
    assert part is not None
    for side in range(2):
        assert 0 <= part.start[side] <= part.start[side] + part.shape[side] <= shape[side]
        assert 0 <= part.corner[side] <= part.size[side] - 224
    assert part.size[0] * part.size[1] < 64 * 224 * 224
    assert decode.part_of_long((300, 900), (224, 672), (0, 224), 224) is None


def test_a_tar_that_was_cut_short_is_no_smaller_tar(tmp_path: Path) -> None:
    """`tarfile` takes a cut header for the end, and what follows is lost silently."""
    whole = as_tar(tmp_path / "src", FILES)
    whole.write_bytes(whole.read_bytes()[: 1024 * len(FILES) - 600])
    with refused("src.tar.*cut short", "download"):
        build_lmdb(whole, tmp_path / "out")
    outer = as_tar(tmp_path / "outer", {"train/a.tar": whole.read_bytes()})
    with refused("train/a.tar.*cut short"):
        build_lmdb(outer, tmp_path / "out")


@pytest.mark.parametrize("packed", [as_zip, as_tar])
def test_members_above_the_archive_are_read_below_it(
    packed: Callable[..., Path], tmp_path: Path
) -> None:
    above = {f"../{name}": data for name, data in FILES.items()}
    assert built(packed(tmp_path / "src", above)) == EXPECTED


def test_a_class_may_be_named_as_an_image(tmp_path: Path) -> None:
    files = {name.replace("/b/", "/b.gif/"): data for name, data in FILES.items()}
    assert built(as_folder(tmp_path / "src", files)) == EXPECTED


def test_one_class_in_two_unicode_forms_is_refused(tmp_path: Path) -> None:
    names = {"a": "caf\u00e9", "b": "cafe\u0301"}
    files = {
        name.replace("/a/", f"/{names['a']}/").replace("/b/", f"/{names['b']}/"): data
        for name, data in FILES.items()
    }
    with refused("train/caf.*Unicode", "merge"):
        build_lmdb(as_folder(tmp_path / "src", files), tmp_path / "out")


def with_list(tmp_path: Path, text: str) -> Path:
    flat = {
        f"val/{PurePosixPath(name).name}": data for name, data in FILES.items() if "val" in name
    }
    train = {name: data for name, data in FILES.items() if "train" in name}
    return as_folder(tmp_path / "src", train | flat | {"val.csv": text.encode()})


@pytest.mark.parametrize(
    "text",
    [
        '"","id","label"\n"3","0","a"\n"2","1","b"\n"1","2","a"\n"0","3","b"\n',  # R's row names
        "label,id\n0,0\n1,1\n0,2\n1,3\n",
        "id,photo,label\nx,0,0\ny,1,1\nz,2,0\nz,3,1\n",  # not by the header's name
    ],
)
def test_a_header_names_the_column_of_images(text: str, tmp_path: Path) -> None:
    """Else a number of another column counts as the name of an image."""
    assert built(with_list(tmp_path, text)) == EXPECTED


def test_a_list_with_a_column_for_each_class_is_refused(tmp_path: Path) -> None:
    """Its first 0 or 1 is no number of a class."""
    with refused("val.csv: has a column for each class", "NAME,CLASS"):
        build_lmdb(with_list(tmp_path, "image,a,b\n0,1,0\n1,0,1\n2,1,0\n3,0,1\n"), tmp_path / "out")


def test_imagenets_validation_archive_alone_needs_its_annotations(tmp_path: Path) -> None:
    files = {f"ILSVRC2012_val_{n:08}.JPEG": image(n) for n in range(3)}
    with refused("without their classes", "ILSVRC2012_bbox_val_v3.tgz", "build-lmdb DIR"):
        build_lmdb(as_tar(tmp_path / "ILSVRC2012_img_val", files), tmp_path / "out")
