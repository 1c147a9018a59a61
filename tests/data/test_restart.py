"""A build that ended early goes on where it was, or starts again; it is never taken for whole."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bip.data.stores.lmdb import LmdbStore
from bip.data.tools.build import build_lmdb
from bip.errors import UserError
from tests.data.test_layouts import (
    CLASSES,
    TRAIN,
    as_folder,
    bad_files,
    content,
    imagefolder,
    jpeg,
)


def test_repaired_files_are_tried_again(tmp_path: Path) -> None:
    src, out = as_folder(tmp_path / "src", bad_files()), tmp_path / "out"
    with pytest.raises(UserError, match="cannot be stored"):
        build_lmdb(src, out)
    (src / "train" / CLASSES[0] / "0_html.JPEG").write_bytes(jpeg(5))
    build_lmdb(src, out)
    assert len(LmdbStore(out / "train.lmdb")) == 14


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_build_goes_on_to_the_same_bytes(tmp_path: Path, number: int) -> None:
    files = {
        f"train/{CLASSES[i % 3]}/{i:05}.ppm": b"P6 1 1 255 %03d" % (i % 999) for i in range(3000)
    }
    src, out = as_folder(tmp_path / "src", files), tmp_path / "out"
    whole = tmp_path / "whole"
    build_lmdb(src, whole)
    blocked = src / sorted(files)[2500]
    data = blocked.read_bytes()
    blocked.unlink()
    os.mkfifo(blocked)  # the build waits there for its bytes
    command = [sys.executable, "-m", "bip", "data", "build-lmdb", src, out, "--workers", "1"]
    build = subprocess.Popen(command)
    note, deadline = out / ".train.lmdb.progress", time.monotonic() + 60
    while not note.exists() or json.loads(note.read_text())["count"] < 2000:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    build.send_signal(number)
    assert build.wait(timeout=60) == -number
    assert {path.name for path in out.iterdir()} == {".train.lmdb.partial", note.name}
    blocked.unlink()
    blocked.write_bytes(data)
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "resuming after 2000 images" in again.stderr
    assert content(out / "train.lmdb") == content(whole / "train.lmdb")
    assert LmdbStore(out / "train.lmdb").header == LmdbStore(whole / "train.lmdb").header
    assert [path.name for path in out.iterdir()] == ["train.lmdb"]


def test_another_source_does_not_go_on_with_a_killed_build(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="cannot be stored"):
        build_lmdb(as_folder(tmp_path / "src", bad_files()), out)
    other = as_folder(tmp_path / "other", imagefolder())
    build_lmdb(other, out, skip_bad=True)
    assert len(LmdbStore(out / "train.lmdb")) == len(TRAIN)


@pytest.mark.parametrize("keep", [0, 2, 0.5, None])
def test_a_half_built_store_that_is_damaged_is_built_again(
    tmp_path: Path, keep: float | None
) -> None:
    """Cut short, or (None) with junk for pages."""
    src, out = as_folder(tmp_path / "src", bad_files()), tmp_path / "out"
    with pytest.raises(UserError, match="cannot be stored"):
        build_lmdb(src, out)
    partial = out / ".train.lmdb.partial"
    content, page = partial.read_bytes(), 4096
    left = (
        int(keep * len(content) if keep == 0.5 else keep * page) if keep is not None else 2 * page
    )
    junk = b"" if keep is not None else bytes(len(content) - 2 * page)
    partial.write_bytes(content[:left] + junk)
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

    with monkeypatch.context() as patch:
        patch.setattr("bip.data.stores.writer.LmdbWriter._BATCH", 5)
        patch.setattr(os, "replace", fail)
        with pytest.raises(UserError, match=r"train\.lmdb: cannot be written .*; build it again"):
            build_lmdb(src, out)
    assert {path.name for path in out.iterdir()} == {".train.lmdb.partial", ".train.lmdb.progress"}
    build_lmdb(src, out)
    assert "resuming after 10 images" in capsys.readouterr().err
    assert content(out / "train.lmdb") == [(jpeg(n), CLASSES[y]) for n, y in TRAIN.items()]
    assert {path.name for path in out.iterdir()} == {"train.lmdb", "val.lmdb"}
