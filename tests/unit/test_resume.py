"""Resuming: a run that was stopped anywhere equals one that never was."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bip.__main__ import main
from bip.training.checkpoint import read_checkpoint
from tests.runs import Finished, arguments, cases_of_rivals, source_for, train, train_until
from tests.unit.test_checkpoint import assert_same

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


@pytest.fixture(scope="module")
def whole(
    source: Path, pruned_runs: dict[str, Finished], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """`whole(KIND)`: its command, its settings, and the run that nobody stopped, made once."""
    folder, made = tmp_path_factory.mktemp("whole"), {}

    def run(kind: str) -> tuple[str, dict[str, Any], Finished]:
        name, extra = KINDS[kind]
        # 2 epochs of 1437 // 300 = 4 steps, or 1337 // 300
        settings = {"epochs": 2, "batch_size": 300, "k": 1.0 if name == "pretrain" else 0.3} | extra
        if name != "pretrain":
            before = pruned_runs[extra.get("layer_type", "unstructured")].newest
            settings |= source_for(name, source, before)
        if kind not in made:
            made[kind] = train(name, folder / kind, **settings)
        return name, settings, made[kind]

    return run


@pytest.mark.parametrize(("kind", "stop"), [("bip", 1), *((kind, 3) for kind in KINDS)])
def test_resumed_equals_uninterrupted(kind: str, stop: int, whole: Any, tmp_path: Path) -> None:
    name, settings, expected = whole(kind)
    train_until(stop, name, tmp_path, **settings)
    resumed = train(name, tmp_path, **settings)
    # How often a checkpoint is saved is no part of a run's identity.
    assert resumed.folder.name == expected.folder.name
    assert resumed.losses == expected.losses, "each step's loss, bit for bit, none twice"
    differing = {"seconds": 0, "attempts": 2}
    assert resumed.result | {"seconds": 0} == expected.result | differing
    for a, b in ((resumed.newest, expected.newest), (resumed.best, expected.best)):
        states = [torch.load(path, weights_only=True) for path in (a, b)]
        assert_same(states[0]["state_dict"], states[1]["state_dict"])


@pytest.mark.parametrize("kind", ["pretrain", "bip", "hydra", "finetune"])
def test_resume_path_goes_on_elsewhere(
    kind: str, whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--resume takes another run's checkpoint of the same settings, and needs no --source-net."""
    name, settings, expected = whole(kind)
    checkpoint = train_until(2, name, tmp_path / "parts", **settings)
    settings.pop("source_net", None)
    capsys.readouterr()
    there = train(name, tmp_path / "there", **settings, resume=checkpoint, exp_name="other")
    out = capsys.readouterr().out
    assert "step 2/" not in out, "no step is repeated"
    assert "step 3/" in out
    assert there.losses == expected.losses[2:]
    for key in ("weights_sha256", "mask_sha256", "top1"):
        assert there.result[key] == expected.result[key]


def test_resume_starts_from_the_file_and_never_goes_back(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A requeued task is given the same --resume again: it goes on from what it did since."""
    settings = {"source_net": source, "max_steps": 6}
    whole = train("bip", tmp_path / "whole", **settings)
    given = train_until(2, "bip", tmp_path / "first", **settings)
    steps = [read_checkpoint(given)["progress"]["iteration"]]
    for _ in range(2):  # two attempts, each stopped after two saves, of a run elsewhere
        newest = train_until(2, "bip", tmp_path / "second", resume=given, **settings)
        steps.append(read_checkpoint(newest)["progress"]["iteration"])
    assert steps[0] < steps[1] < steps[2]
    assert "resumes there" in capsys.readouterr().out.replace("\n", " ")
    (older,) = [p for p in newest.parent.glob("step-*") if p.resolve() != newest.resolve()]
    finished = train("bip", tmp_path / "second", resume=older, **settings)
    assert "resumes there" in capsys.readouterr().out
    assert finished.result["weights_sha256"] == whole.result["weights_sha256"]


def test_what_cannot_be_resumed_is_refused(
    source: Path, pruned_runs: dict[str, Finished], tmp_path: Path, capsys: Any
) -> None:
    """Other settings, of which the first is named; and a finished model."""
    checkpoint = train_until(2, "bip", tmp_path / "parts", source_net=source)
    for settings, words in (
        ({"resume": checkpoint, "momentum": 0.8}, ("momentum", "0.8")),
        ({"resume": pruned_runs["unstructured"].best, "k": 0.3, "max_steps": 6}, ("resume",)),
    ):
        assert main(["train", *arguments("bip", tmp_path / "out", **settings)]) == 2
        error = capsys.readouterr().err
        assert all(word in error for word in words)
        assert not (tmp_path / "out").exists()


def test_finished_runs_drop_optimizer_state(pruned_runs: dict[str, Finished]) -> None:
    for finished in pruned_runs.values():
        assert not finished.state["optimizer"]
        assert len(list(finished.newest.parent.glob("step-*"))) == 1


def test_a_run_killed_between_its_last_step_and_its_result_is_finished_by_the_next(
    source: Path, tmp_path: Path
) -> None:
    settings = {"source_net": source, "max_steps": 3, "layer_type": "filter"}
    whole = train("bip", tmp_path / "whole", **settings)
    for saves in (3, 4):  # after the last checkpoint of training, and after the final one
        newest = train_until(saves, "bip", tmp_path / str(saves), **settings)
        assert read_checkpoint(newest)["progress"]["iteration"] == 3
        assert not (newest.parents[1] / "result.json").exists()
        finished = train("bip", tmp_path / str(saves), **settings)
        for key in ("weights_sha256", "mask_sha256", "top1", "top1_before_bn_mask"):
            assert finished.result[key] == whole.result[key], (saves, key)
