"""Checkpoints: nothing lost, nothing half-written, nothing run."""

import contextlib
import errno
import io
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bip.__main__ import main
from bip.errors import UserError
from bip.training.checkpoint import (
    CheckpointFolder,
    pack_mask,
    read_checkpoint,
    seal,
    unpack_mask,
    write_checkpoint,
)
from tests.runs import arguments, train


def state(step: int) -> dict[str, Any]:
    torch.manual_seed(step)
    return {
        "state_dict": {"layer.weight": torch.randn(40), "layer.popup_scores": torch.randn(40)},
        "mask": pack_mask(torch.randint(0, 2, (41,))),
        "progress": {"iteration": step, "seconds": 1.5, "best_epoch": None},
        "optimizer": {"lower": {"state": {0: {"momentum_buffer": torch.randn(3)}}}},
    }


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    else:
        assert a == b


CALLS = ("open", "fsync", "replace", "rename", "symlink", "link", "unlink", "write", "mkdir")


# Saving and loading


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return filled(tmp_path / "checkpoint")


def filled(path: Path) -> CheckpointFolder:
    """Checkpoints of steps 1 and 2."""
    folder = CheckpointFolder(path)
    for step in (1, 2):
        folder.save(state(step), step)
    return folder


def newest(folder: CheckpointFolder) -> Path:
    return folder.newest.resolve()


def test_round_trip(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoint")
    assert folder.load() is None
    for step in (3, 5, 9):
        folder.save(state(step), step)
        assert_same(folder.load(), state(step))
        assert_same(read_checkpoint(folder.newest), state(step))
    names = sorted(path.name for path in folder.folder.glob("step-*"))
    assert [int("".join(filter(str.isdigit, name))) for name in names] == [5, 9]
    # It is what other programs can open too.
    assert torch.load(folder.newest, weights_only=True)["progress"]["iteration"] == 9


@pytest.mark.parametrize("size", [1, 7, 8, 9, 1000])
def test_masks_pack_to_bits(size: int) -> None:
    mask = torch.randint(0, 2, (size,), dtype=torch.uint8)
    bits = pack_mask(mask)
    assert bits.numel() == -(-size // 8)
    assert torch.equal(unpack_mask(bits, size), mask)


MODEL = {name: value for name, value in state(3).items() if name != "optimizer"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFolder:
    """Two checkpoints and a sealed model."""
    folder = filled(tmp_path_factory.mktemp("saved"))
    write_checkpoint(folder.best, seal(MODEL))
    return folder


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=150)
def test_a_flipped_bit_anywhere_is_found(saved: CheckpointFolder, place: float, bit: int) -> None:
    def flipped(name: str) -> CheckpointFolder:
        """A copy of the folder in which one bit of one file is another."""
        copy = saved.folder.with_name("flipped")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(saved.folder, copy, symlinks=True)
        data = bytearray((copy / name).read_bytes())
        data[int(place * len(data))] ^= 1 << bit
        (copy / name).write_bytes(data)
        return CheckpointFolder(copy)

    # In a checkpoint: it is set aside, and the one before is used.
    name = newest(saved).name
    bad = flipped(name)
    with pytest.raises(UserError, match="damaged"):
        read_checkpoint(bad.newest)  # as --source-net or --resume
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert_same(bad.load(), state(1))
    assert name in output.getvalue()
    assert output.getvalue().count("\n") == 1
    assert not (bad.folder / name).exists(), "set aside"
    assert len(list(bad.folder.glob(f"{name}*"))) == 1, "but kept"
    # In the manifest: it costs at most the newest.
    loaded = flipped("manifest.json").load()
    assert loaded is not None
    assert_same(loaded, state(loaded["progress"]["iteration"]))
    # In a model that others start from, wherever it lies: an error, or nothing that is read.
    path = flipped(saved.best.name).best
    path = path.rename(path.parent.parent / "elsewhere.pth.tar")
    try:
        assert_same(read_checkpoint(path), MODEL)
    except UserError as error:
        assert re.search(f"^{path}.*$", str(error))  # noqa: PT017


@pytest.mark.parametrize("damage", ["empty", "short", "gone"])
def test_a_torn_or_missing_newest_checkpoint(damage: str, folder: CheckpointFolder) -> None:
    path = newest(folder)
    data = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(b"" if damage == "empty" else data[:-1])
    assert_same(folder.load(), state(1))
    # Saving goes on from there, and the damaged one has not pushed out the good one.
    path = folder.save(state(3), 3)
    assert_same(folder.load(), state(3))
    path.write_bytes(b"?")
    assert_same(folder.load(), state(1))


def test_no_good_checkpoint_left_is_an_error_not_a_fresh_start(folder: CheckpointFolder) -> None:
    for path in folder.folder.glob("step-*"):
        path.write_bytes(b"?")
    with pytest.raises(UserError, match="checkpoint"):
        folder.load()


def test_a_step_saved_again_is_not_lost_before_the_manifest_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at the end of a run, whose final checkpoint replaces that of its last step."""
    folder = CheckpointFolder(tmp_path)
    folder.save(state(1), 1)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("bip.training.checkpoint.atomic_write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.save(state(2), 1, keep_before=0)
    assert_same(folder.load(), state(1))
    for number in (3, 4):
        folder.save(state(number), 1)
        assert_same(folder.load(), state(number))
    folder.save(state(5), 1, keep_before=0)
    assert len(list(tmp_path.glob("step-*"))) == 1


def test_what_a_killed_write_left_is_removed(folder: CheckpointFolder) -> None:
    (folder.folder / ".step-000000001.pth.tar.0123.tmp").write_bytes(b"half")
    folder.save(state(3), 3)
    assert not list(folder.folder.glob("*.tmp"))


def test_a_save_that_fails_anywhere_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each system call of a save fails in turn, as on a full disk."""
    done = fails_at = 0

    def failing(name: str) -> Any:
        original = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done == fails_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*args, **kwargs)

        return call

    while done >= fails_at:  # until a save makes no more calls than did not fail
        fails_at += 1
        folder = filled(tmp_path / str(fails_at))
        done = 0
        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, failing(name))
            with contextlib.suppress(OSError):
                folder.save(state(3), 3)
                assert not list(folder.folder.glob("*.tmp"))
        loaded = CheckpointFolder(folder.folder).load()
        assert loaded is not None
        step = loaded["progress"]["iteration"]
        assert step in ((2, 3) if done >= fails_at else (3,))
        assert_same(loaded, state(step))
        folder.save(state(4), 4)  # and the next save is none the worse
        assert len(list(folder.folder.glob("step-*"))) == 2
    assert fails_at > 5


# Files of others


@pytest.mark.parametrize(
    ("number", "unreachable", "used"),
    [(errno.ESTALE, 1, None), (errno.EIO, 1, 1), (errno.EIO, 2, None), (errno.EACCES, 1, 1)],
)
def test_an_unreachable_file_system_costs_no_steps(
    number: int, unreachable: int, used: int | None, folder: CheckpointFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """But one bad place of a disk costs no more than the newest."""
    gone = [entry["name"] for entry in folder.entries()[:unreachable]]
    read = Path.read_bytes

    def fails(path: Path) -> bytes:
        if path.name in gone:
            raise OSError(number, os.strerror(number))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fails)
        if used is None:
            with pytest.raises(OSError, match=os.strerror(number)):
                folder.load()
        else:
            assert_same(folder.load(), state(used))
    assert_same(folder.load(), state(2))


@pytest.mark.parametrize(
    "place",
    ["pathlib.Path.read_text", "pathlib.Path.read_bytes", "bip.run_folder.atomic_write_bytes"],
    ids=["config", "source", "run folder"],
)
def test_what_cannot_be_reached_for_a_while_is_tried_again(
    place: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """By the templates, which know it by 74."""

    def unreachable(*_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(place, unreachable)
    assert main(["train", *arguments("bip", tmp_path, source_net=source)]) == os.EX_IOERR
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "Stale file handle; try again" in error


def published(source: Path, folder: Path, pruned: bool) -> Path:
    """The shape of the published checkpoints, of our pretrained network's weights."""
    ours = torch.load(source, weights_only=True)
    state_dict = {f"module.{name}": value for name, value in ours["state_dict"].items()}
    if pruned:
        for name, value in ours["state_dict"].items():
            if value.dim() > 1:
                scores = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
                state_dict[f"module.{name.removesuffix('weight')}popup_scores"] = scores
    path = folder / "published.pth.tar"
    optimizer = {"state": {}, "param_groups": [{"lr": np.float64(0.1), "params": [0]}]}
    content = {
        "epoch": 200, "arch": "digits_net", "state_dict": state_dict,
        "best_prec1": torch.tensor(94.5), "optimizer": optimizer,
    }  # fmt: skip
    torch.save(content, path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    return path


def test_a_published_checkpoint_can_be_pruned_and_fine_tuned(source: Path, tmp_path: Path) -> None:
    """With scores or without. It holds no mask; the mask to fine-tune is the scores' top k."""
    ours = train("bip", tmp_path / "ours", source_net=source, max_steps=2)
    path = published(source, tmp_path, pruned=False)
    theirs = train("bip", tmp_path / "theirs", source_net=path, max_steps=2)
    for key in ("weights_sha256", "mask_sha256", "top1"):
        assert theirs.result[key] == ours.result[key]
    path = published(source, tmp_path, pruned=True)
    with pytest.raises(UserError, match=r"source_net: .*pruned.*k-1\.0"):
        train("bip", tmp_path / "twice", source_net=path, max_steps=2)
    pretrained = path.rename(path.with_name("pretrained-k-1.0.pth.tar"))
    theirs = train("bip", tmp_path / "scored", source_net=pretrained, max_steps=2)
    assert theirs.result["mask_sha256"] == ours.result["mask_sha256"]
    path = pretrained.rename(path)
    tuned = train("finetune", tmp_path, source_net=path, max_steps=2, k=0.25)
    weights = torch.load(path, weights_only=False)["state_dict"]
    scores = [weights[f"module.{name.replace('weight', 'popup_scores')}"] for name in tuned.masks]
    flat = torch.cat([score.flatten() for score in scores]).abs()
    kept = torch.cat([mask.flatten() for mask in tuned.masks.values()]) == 1
    assert int(kept.sum()) == -(-flat.numel() // 4) == tuned.result["kept"]
    assert flat[kept].min() > flat[~kept].max()


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["torch", "legacy", "pickle"])
def test_a_malicious_checkpoint_is_refused_without_running(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trap = tmp_path / "executed"
    path = tmp_path / "evil.pth.tar"
    content = {"arch": "digits_net", "state_dict": {}, "extra": Evil(trap)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    for option in ("source_net", "resume"):
        argv = ["train", *arguments("bip", tmp_path / "out", **{option: path})]
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert str(path) in error
    assert not trap.exists()
    assert not (tmp_path / "out").exists()
