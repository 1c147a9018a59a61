"""Resuming: a run that was stopped anywhere equals one that never was."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bip import run
from bip.__main__ import main
from bip.config import load_config
from bip.training.checkpoint import (
    CheckpointFolder,
    read_checkpoint,
)
from tests.runs import LAYER_TYPES, Finished, arguments, cases_of_rivals, source_for, train
from tests.unit.test_checkpoint import assert_same


class Stopped(BaseException):
    """Stands for a process that dies just after a checkpoint."""


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "pretrain": ("pretrain", {}),
    "bip": ("bip", {}),
    "bip-filter": ("bip", {"layer_type": "filter"}),
    "bip-channel-adam": ("bip", {"layer_type": "channel", "optimizer": "adam", "lr": 0.001}),
    "accelerate": ("bip", {"accelerate": True}),
    "lower-steps": ("bip", {"lower_steps": 2}),
    "hydra": ("hydra", {}),
    "hydra-rmsprop": ("hydra", {"optimizer": "rmsprop", "lr": 0.001}),
    "finetune": ("finetune", {}),
    "finetune-filter": ("finetune", {"layer_type": "filter"}),
    "holdout": ("bip", {"holdout": 100, "layer_type": "filter"}),
    **cases_of_rivals(),
}


def settings_of(kind: str, source: Path, pruned_runs: dict[str, Finished]) -> dict[str, Any]:
    name, extra = KINDS[kind]
    # 2 epochs of 1437 // 300 = 4 steps, or 1337 // 300
    settings = {"epochs": 2, "batch_size": 300, "k": 0.3} | extra
    if name == "pretrain":
        return settings | {"k": 1.0}
    before = pruned_runs[extra.get("layer_type", "unstructured")].newest
    return settings | source_for(name, source, before)


def stop_after(saves: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = CheckpointFolder.save
    count = 0

    def save(self: CheckpointFolder, *args: Any, **kwargs: Any) -> Path:
        nonlocal count
        path = original(self, *args, **kwargs)
        count += 1
        if count == saves:
            raise Stopped
        return path

    monkeypatch.setattr(CheckpointFolder, "save", save)


def test_resume_starts_from_the_file_and_never_goes_back(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A requeued task is given the same --resume again: it goes on from what it did since."""
    settings = {"source_net": source, "max_steps": 6, "checkpoint_minutes": 1e-9}
    whole = train("bip", tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(Stopped):
            train("bip", tmp_path / "first", **settings)
    (given,) = (tmp_path / "first").rglob("checkpoint.pth.tar")
    steps = []
    for _ in range(2):  # two attempts, each stopped after two saves, of a run elsewhere
        with monkeypatch.context() as patch:
            stop_after(2, patch)
            with pytest.raises(Stopped):
                train("bip", tmp_path / "second", resume=given, **settings)
        (newest,) = (tmp_path / "second").rglob("checkpoint.pth.tar")
        steps.append(read_checkpoint(newest)["progress"]["iteration"])
    assert steps[0] > read_checkpoint(given)["progress"]["iteration"]
    assert steps[1] > steps[0]
    assert "resumes there" in capsys.readouterr().out.replace("\n", " ")
    (older,) = [p for p in newest.parent.glob("step-*") if p.resolve() != newest.resolve()]
    finished = train("bip", tmp_path / "second", resume=older, **settings)
    assert "resumes there" in capsys.readouterr().out
    assert finished.result["weights_sha256"] == whole.result["weights_sha256"]


@pytest.mark.parametrize(("kind", "stop"), [("bip", 1), *((kind, 3) for kind in KINDS)])
def test_resumed_equals_uninterrupted(
    kind: str,
    stop: int,
    source: Path,
    pruned_runs: dict[str, Finished],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = KINDS[kind][0]
    settings = settings_of(kind, source, pruned_runs)
    whole = train(name, tmp_path / "whole", **settings)
    # A checkpoint after every step. How often one is saved is no part of a run's identity.
    settings |= {"checkpoint_minutes": 1e-9}
    with monkeypatch.context() as patch:
        stop_after(stop, patch)
        with pytest.raises(Stopped):
            train(name, tmp_path / "parts", **settings)
    resumed = train(name, tmp_path / "parts", **settings)

    assert resumed.folder.name == whole.folder.name
    losses = [record["loss"] for record in resumed.records()]
    assert losses == whole.losses, "each step's loss, bit for bit, none twice"
    differing = {"seconds", "attempts"}
    assert {k: v for k, v in resumed.result.items() if k not in differing} == {
        k: v for k, v in whole.result.items() if k not in differing
    }
    assert resumed.result["attempts"] == 2
    for a, b in ((resumed.newest, whole.newest), (resumed.best, whole.best)):
        states = [torch.load(path, weights_only=True) for path in (a, b)]
        assert_same(states[0]["state_dict"], states[1]["state_dict"])


def test_a_resumed_run_does_not_repeat_steps(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    settings = {"source_net": source, "max_steps": 5, "checkpoint_minutes": 1e-9}
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(Stopped):
            train("bip", tmp_path, **settings)
    capsys.readouterr()
    train("bip", tmp_path, **settings)
    out = capsys.readouterr().out
    assert "step 2/5" not in out
    assert "step 3/5" in out


@pytest.mark.parametrize("kind", ["pretrain", "bip", "hydra", "finetune"])
def test_resume_path_goes_on_elsewhere(
    kind: str,
    source: Path,
    pruned_runs: dict[str, Finished],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """--resume takes another run's checkpoint of the same settings, and needs no --source-net."""
    name = KINDS[kind][0]
    settings = settings_of(kind, source, pruned_runs)
    whole = train(name, tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(Stopped):
            train(name, tmp_path / "parts", **settings, checkpoint_minutes=1e-9)
    (checkpoint,) = (tmp_path / "parts").glob("*/*/*/checkpoint/checkpoint.pth.tar")
    settings.pop("source_net", None)
    there = train(name, tmp_path / "there", **settings, resume=checkpoint, exp_name="other")
    assert there.losses == whole.losses[2:]
    for key in ("weights_sha256", "mask_sha256", "top1"):
        assert there.result[key] == whole.result[key]


def test_resume_with_other_settings_names_the_first(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(Stopped):
            train("bip", tmp_path / "parts", source_net=source, checkpoint_minutes=1e-9)
    (checkpoint,) = (tmp_path / "parts").glob("*/*/*/checkpoint/checkpoint.pth.tar")
    argv = ["train", *arguments("bip", tmp_path / "out", resume=checkpoint, momentum=0.8)]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "momentum" in error
    assert "0.8" in error
    assert not (tmp_path / "out").exists()


def test_resume_of_a_finished_model_is_refused(
    pruned_runs: dict[str, Finished], tmp_path: Path, capsys: Any
) -> None:
    finished = pruned_runs["unstructured"]
    argv = ["train", *arguments("bip", tmp_path / "out", resume=finished.best, k=0.3, max_steps=6)]
    assert main(argv) == 2
    assert "resume" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
def test_finished_runs_drop_optimizer_state(
    pruned_runs: dict[str, Finished], layer_type: str
) -> None:
    finished = pruned_runs[layer_type]
    assert not finished.state["optimizer"]
    assert len(list(finished.newest.parent.glob("step-*"))) == 1


def test_a_run_killed_between_its_last_step_and_its_result_is_finished_by_the_next(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train("bip", tmp_path / "whole", source_net=source, max_steps=3, layer_type="filter")
    for stop in (1, 2):  # after the last checkpoint of training, and after the final one
        with monkeypatch.context() as patch:
            stop_after(stop, patch)
            with pytest.raises(Stopped):
                train(
                    "bip", tmp_path / str(stop), source_net=source, max_steps=3, layer_type="filter"
                )
        config = load_config(
            arguments(
                "bip", tmp_path / str(stop), source_net=source, max_steps=3, layer_type="filter"
            )
        )
        assert not (config.run_folder / "result.json").exists()
        result = run.train(config)
        for key in ("weights_sha256", "mask_sha256", "top1", "top1_before_bn_mask"):
            assert result[key] == whole.result[key], (stop, key)
