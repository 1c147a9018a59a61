"""A build that ended early goes on where it was, or starts again; it is never taken for whole."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bip.data.stores.lmdb import LmdbStore
from bip.data.tools.build import build_lmdb
from tests.data.conftest import as_folder, refused
from tests.data.test_layouts import CLASSES, STORED, bad_files, content, imagefolder, jpeg


@pytest.fixture
def ended(tmp_path: Path) -> tuple[Path, Path]:
    """(source, output) of a build that ended early, over images that are no images."""
    src, out = as_folder(tmp_path / "src", bad_files()), tmp_path / "out"
    with refused("cannot be stored"):
        build_lmdb(src, out)
    return src, out


def test_repaired_files_are_tried_again(ended: tuple[Path, Path]) -> None:
    src, out = ended
    (src / "train" / CLASSES[0] / "0_html.JPEG").write_bytes(jpeg(5))
    build_lmdb(src, out)
    assert len(LmdbStore(out / "train.lmdb")) == 14


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_build_goes_on_to_the_same_bytes(tmp_path: Path, number: int) -> None:
    files = {f"train/{i % 3}/{i:05}.ppm": b"P6 1 1 255 %03d" % (i % 999) for i in range(3000)}
    src, out = as_folder(tmp_path / "src", files), tmp_path / "out"
    whole = tmp_path / "whole"
    build_lmdb(src, whole)
    blocked = sorted(files)[2500]
    (src / blocked).unlink()
    os.mkfifo(src / blocked)  # the build waits there for its bytes
    command = [sys.executable, "-m", "bip", "data", "build-lmdb", src, out, "--workers", "1"]
    build = subprocess.Popen(command)
    note, deadline = out / ".train.lmdb.progress", time.monotonic() + 60
    while not note.exists() or json.loads(note.read_text())["count"] < 2000:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    build.send_signal(number)
    assert build.wait(timeout=60) == -number
    assert {path.name for path in out.iterdir()} == {".train.lmdb.partial", note.name}
    (src / blocked).unlink()
    as_folder(src, {blocked: files[blocked]})
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "resuming after 2000 images" in again.stderr
    assert content(out / "train.lmdb") == content(whole / "train.lmdb")
    assert LmdbStore(out / "train.lmdb").header == LmdbStore(whole / "train.lmdb").header
    assert [path.name for path in out.iterdir()] == ["train.lmdb"]


def test_another_source_does_not_go_on_with_an_ended_build(
    ended: tuple[Path, Path], tmp_path: Path
) -> None:
    build_lmdb(as_folder(tmp_path / "other", imagefolder()), ended[1], skip_bad=True)
    assert content(ended[1] / "train.lmdb") == STORED


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[:8192],
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:8192] + bytes(len(whole) - 8192),  # junk for pages
    ],
)
def test_a_half_built_store_that_is_damaged_is_built_again(
    ended: tuple[Path, Path], damage: Callable[[bytes], bytes]
) -> None:
    src, out = ended
    partial = out / ".train.lmdb.partial"
    partial.write_bytes(damage(partial.read_bytes()))
    build_lmdb(src, out, skip_bad=True)
    assert len(LmdbStore(out / "train.lmdb")) == 12 + 1  # cut short, but its header is whole


def test_a_build_that_fails_at_its_last_step_goes_on_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    src, out = as_folder(tmp_path / "src", imagefolder()), tmp_path / "out"
    replace = os.replace

    def fail(old: Path, new: Path) -> None:
        if new.suffix == ".lmdb":
            raise OSError(5, "Input/output error")
        replace(old, new)

    with monkeypatch.context() as patch, refused(r"train\.lmdb: cannot be written .*; build it"):
        patch.setattr("bip.data.stores.writer.LmdbWriter._BATCH", 5)
        patch.setattr(os, "replace", fail)
        build_lmdb(src, out)
    assert {path.name for path in out.iterdir()} == {".train.lmdb.partial", ".train.lmdb.progress"}
    build_lmdb(src, out)
    assert "resuming after 10 images" in capsys.readouterr().err
    assert content(out / "train.lmdb") == STORED
    assert {path.name for path in out.iterdir()} == {"train.lmdb", "val.lmdb"}
