"""One run from the outside: what it leaves, what it repeats, what it never looks at."""

import dataclasses
import errno
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from bip import models, run_folder
from bip.__main__ import main
from bip.config import load_config
from bip.data.batches import Data
from bip.distributed.group import Group, Ranks
from bip.errors import UserError
from bip.pruning.layout import keep_count
from bip.run import Run
from bip.run import train as train_run
from bip.training import loop
from bip.training.checkpoint import read_checkpoint
from tests.runs import LAYER_TYPES, Finished, arguments, train
from tests.unit.test_resume import Stopped, stop_after

RESULT_KEYS = {
    "k", "kept", "total", "sparsity", "top1", "top5", "best_top1", "best_epoch", "epochs", "forward_backwards", "seed",
    "arch", "dataset", "trainer", "layer_type", "mask_sha256", "weights_sha256", "seconds",
    "attempts", "source_sha256",
}  # fmt: skip
SHA256 = re.compile("[0-9a-f]{64}")


def accuracy(network: torch.nn.Module) -> float:
    """Percent of Digits' 360 test images that a network gets right, without the project's loop."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float64).round(decimals=9)
    images = (torch.round(images * 255) / 255).float().view(-1, 1, 8, 8)
    images = (images - 0.3054) / 0.3753
    with torch.no_grad():
        hits = network.eval()(images[-360:]).argmax(1) == torch.tensor(labels[-360:])
    return 100 * float(hits.float().mean())


# The run folder


@pytest.mark.parametrize("kind", ["pretrain", *LAYER_TYPES])
def test_what_a_run_folder_holds(
    kind: str, dense: Finished, pruned_runs: dict[str, Finished]
) -> None:
    finished = dense if kind == "pretrain" else pruned_runs[kind]
    names = {path.name for path in finished.folder.iterdir()}
    expected = {"config.yml", "metrics.jsonl", "attempts.jsonl", "result.json", "checkpoint"}
    assert expected <= names
    assert list(finished.folder.rglob("events.out.tfevents.*"))
    assert not [path for path in finished.folder.rglob("*") if "tmp" in path.name]
    inside = {path.name for path in (finished.folder / "checkpoint").iterdir()}
    assert {"checkpoint.pth.tar", "model_best.pth.tar"} <= inside
    # RESULT_DIR/EXP_NAME/MODE/RUN_ID
    config = yaml.safe_load((finished.folder / "config.yml").read_text())
    assert finished.folder.parent.name == config["exp_mode"]
    assert finished.folder.parent.parent.name == config["exp_name"]
    run_id = finished.folder.name
    for part in (config["arch"], config["trainer"], config["layer_type"], "s1234"):
        assert part in run_id
    assert f"k{'1' if kind == 'pretrain' else '0.3'}-" in run_id


@pytest.mark.parametrize("kind", ["pretrain", *LAYER_TYPES])
def test_result_json(kind: str, dense: Finished, pruned_runs: dict[str, Finished]) -> None:
    finished = dense if kind == "pretrain" else pruned_runs[kind]
    result = finished.result
    extra = set() if kind == "pretrain" else {"empty_layers"}
    extra |= {"top1_before_bn_mask"} if kind == "filter" else set()
    assert set(result) == RESULT_KEYS | extra
    assert result["sparsity"] == pytest.approx(1 - result["kept"] / result["total"])
    assert result["best_top1"] is None
    assert result["best_epoch"] is None
    assert result["attempts"] == 1
    assert result["seconds"] > 0
    assert SHA256.fullmatch(result["weights_sha256"])
    if kind == "pretrain":
        assert result["mask_sha256"] is None
        assert result["kept"] == result["total"]
        assert result["sparsity"] == 0
        return
    assert SHA256.fullmatch(result["mask_sha256"])
    assert result["k"] == 0.3
    masks = finished.masks
    assert result["total"] == sum(mask.numel() for mask in masks.values())
    assert result["kept"] == sum(int(mask.sum()) for mask in masks.values())
    if kind == "unstructured":
        assert result["kept"] == keep_count(finished_k(finished), result["total"])


def finished_k(finished: Finished) -> Any:
    return load_config(["--configs", str(finished.folder / "config.yml")]).k


@pytest.mark.parametrize("kind", ["pretrain", *LAYER_TYPES])
def test_the_reported_accuracy_is_that_of_the_masked_weights(
    kind: str, dense: Finished, pruned_runs: dict[str, Finished]
) -> None:
    finished = dense if kind == "pretrain" else pruned_runs[kind]
    network = models.build("digits_net", 10, 1)
    masks = finished.masks
    network.load_state_dict({n: w * masks.get(n, 1) for n, w in finished.weights.items()})
    assert finished.result["top1"] == pytest.approx(accuracy(network), abs=1e-4)
    assert finished.result["top1"] > (80 if kind in ("pretrain",) else 5)


def test_metrics_and_attempts(pruned_runs: dict[str, Finished]) -> None:
    finished = pruned_runs["unstructured"]
    assert [record["step"] for record in finished.records()] == [1, 2, 3, 4, 5, 6]
    for record in finished.records():
        expected = {"loss", "top1", "lower_lr", "upper_lr", "implicit_over_direct", "epoch"}
        assert expected <= set(record)
    (epoch,) = finished.records("epoch")
    assert epoch["top1"] == finished.result["top1"], "unstructured masks are final at once"
    lines = (finished.folder / "attempts.jsonl").read_text().splitlines()
    start, end = (json.loads(line) for line in lines)
    assert start["world"] == 1
    assert {"host", "device", "num_workers", "loader", "data_dir", "source_net"} <= set(start)
    assert end["cause"] == "finished"
    assert end["step"] == 6


def test_a_step_that_is_not_finite_is_not_saved(source: Path, tmp_path: Path) -> None:
    """Even between two reports, where nobody looks at the loss."""
    line = arguments("bip", tmp_path, source_net=source, max_steps=6, print_freq=100)
    config = load_config([*line, "--checkpoint-minutes", "1e-9"])
    whole = Run(config, Group(Ranks(0, 1, 0, 1), torch.device("cpu")))
    assert whole.pruned is not None
    pruned = whole.pruned
    note = whole.heartbeat.note_step

    def spoil(step: int) -> None:
        note(step)
        if step == 4:
            pruned.z[0].data.view(-1)[3] = float("nan")

    whole.heartbeat.note_step = spoil  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"conv1\.weight: not finite at step 4; .*not saved"):
        whole.train()
    assert 0 < read_checkpoint(whole.folder.checkpoints.newest)["progress"]["iteration"] < 4


def test_other_data_are_refused_on_resume(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"source_net": source, "max_steps": 5, "checkpoint_minutes": 1e-9}
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(Stopped):
            train("bip", tmp_path, **settings)
    (checkpoint,) = tmp_path.glob("*/*/*/checkpoint/checkpoint.pth.tar")
    state = read_checkpoint(checkpoint)
    assert state["data"]["images"].startswith("1437 + 360 images of 10 classes")
    whole = Run(
        load_config(arguments("bip", tmp_path, **settings)),
        Group(Ranks(0, 1, 0, 1), torch.device("cpu")),
    )
    whole.data.identity["images"] = "1436 + 360 images"
    with pytest.raises(UserError, match=r"data_dir: the run was trained on 1437 \+ 360 images"):
        whole.train()


def test_config_yml_is_the_run(pruned_runs: dict[str, Finished]) -> None:
    """The merged settings: loading the file alone gives the same run."""
    for finished in pruned_runs.values():
        config = load_config(["--configs", str(finished.folder / "config.yml")])
        assert config.run_folder == finished.folder
        assert config.max_steps == 6


def test_checkpoints_have_the_published_names(pruned_runs: dict[str, Finished]) -> None:
    content = torch.load(pruned_runs["unstructured"].best, weights_only=True)
    assert content["arch"] == "digits_net"
    layers = ("conv1", "layer1.0.conv1", "layer1.1.conv2", "linear")
    for layer in layers:
        weight = content["state_dict"][f"{layer}.weight"]
        assert content["state_dict"][f"{layer}.popup_scores"].shape == weight.shape
        assert (weight != 0).all(), "θ, not z: masked weights keep their values"


# Twice


def test_a_finished_run_does_nothing_again(
    dense: Finished, pruned_runs: dict[str, Finished], capsys: pytest.CaptureFixture[str]
) -> None:
    for finished in (dense, *pruned_runs.values()):
        files = {p: p.stat().st_mtime_ns for p in finished.folder.rglob("*")}
        assert main(["train", "--configs", str(finished.folder / "config.yml")]) == 0
        assert {p: p.stat().st_mtime_ns for p in finished.folder.rglob("*")} == files
        out = capsys.readouterr().out
        assert "already finished" in out
        assert str(finished.folder) in out


NEUTRAL = {
    "num_workers": 0, "print_freq": 3, "test_batch_size": 100, "data_dir": "elsewhere",
    "checkpoint_minutes": 1, "save_dense": True, "loader": "memory", "exp_name": "other",
}  # fmt: skip
TELLING = {
    "lr": 0.02, "mask_lr": 0.02, "lr2": 0.1, "k": 0.2, "seed": 2, "wd": 0, "batch_size": 32,
    "epochs": 2, "max_steps": 5, "layer_type": "filter", "scope": "layer", "freeze_bn": True,
    "accumulate": 2, "lower_steps": 2, "momentum": 0.8, "accelerate": True, "holdout": 10,
    "normalize": False, "precision": "bf16", "label_smoothing": 0.1, "bn_wd": False,
    "lr_schedule": "step", "mask_lr_schedule": "cosine", "optimizer": "adam", "mask_wd": 0,
    "scaled_score_init": False, "recalibrate_bn": 1, "warmup_epochs": 1, "trainer": "base",
}  # fmt: skip


def run_id(source: Path, tmp_path: Path, **settings: Any) -> str:
    if settings.get("warmup_epochs"):
        settings |= {"epochs": 2}
    return load_config(arguments("bip", tmp_path, source_net=source, **settings)).run_id


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_changes_no_number_changes_no_run_id(name: str, source: Path, tmp_path: Path) -> None:
    assert run_id(source, tmp_path) == run_id(source, tmp_path, **{name: NEUTRAL[name]})


@pytest.mark.parametrize("name", TELLING)
def test_what_changes_numbers_changes_the_run_id(name: str, source: Path, tmp_path: Path) -> None:
    base = run_id(source, tmp_path)
    if name == "warmup_epochs":
        base = run_id(source, tmp_path, epochs=2)
    assert base != run_id(source, tmp_path, **{name: TELLING[name]})


def test_k_in_another_spelling_and_alias_is_the_same_run(source: Path, tmp_path: Path) -> None:
    assert run_id(source, tmp_path, k="0.10") == run_id(source, tmp_path, k="0.1")
    assert run_id(source, tmp_path, inv_gamma=0.1) == run_id(source, tmp_path, lr2=0.1)
    one, other = (run_id(source, tmp_path, test_batch_size=size) for size in (1, 512))
    assert one == other


def test_what_has_no_effect_is_no_other_run(tmp_path: Path) -> None:
    def named(**settings: Any) -> str:
        return load_config(arguments("pretrain", tmp_path, **settings)).run_id

    assert named() == named(mask_lr=0.5, lower_steps=3, warmup_lr=0.7)
    assert named(scale_rand_init=True) != named()
    imagenet = {"data_dir": tmp_path, "arch": "ResNet18"}
    aliases = [named(dataset=n, **imagenet) for n in ("ImageNet", "ImageNetLMDB", "ImageNetOrigin")]
    assert len(set(aliases)) == 1


def test_the_run_id_does_not_depend_on_where_results_go(source: Path, tmp_path: Path) -> None:
    assert run_id(source, tmp_path / "here") == run_id(source, tmp_path / "there")


def test_the_source_run_is_part_of_the_identity_wherever_it_lies(
    dense: Finished, source: Path, tmp_path: Path
) -> None:
    """Its folder may be moved; another pretrained network makes another run."""
    moved = tmp_path / dense.folder.name
    shutil.copytree(dense.folder, moved, symlinks=True)
    there = moved / "checkpoint" / source.name
    assert run_id(there, tmp_path) == run_id(source, tmp_path)
    other = train("pretrain", tmp_path, seed=5, max_steps=1)
    assert run_id(other.newest, tmp_path) != run_id(source, tmp_path)
    runs = [
        train("bip", tmp_path / str(n), source_net=p, max_steps=2)
        for n, p in enumerate((there, source))
    ]
    assert runs[0].result["weights_sha256"] == runs[1].result["weights_sha256"]


def test_another_file_under_the_same_name_is_an_error(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run that began from one network does not go on from another."""
    path = tmp_path / "net.pth.tar"
    path.write_bytes(source.read_bytes())
    settings = {"source_net": path, "max_steps": 5, "checkpoint_minutes": 1e-9}
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(Stopped):
            train("bip", tmp_path, **settings)
    path.write_bytes(train("pretrain", tmp_path, seed=5, max_steps=1).newest.read_bytes())
    assert main(["train", *arguments("bip", tmp_path, **settings)]) == 2
    error = capsys.readouterr().err
    assert "source_net" in error
    assert error.count("\n") == 1


def test_a_finished_run_is_not_the_result_of_another_source(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = tmp_path / "one.pth.tar", tmp_path / "two.pth.tar"
    paths[0].write_bytes(source.read_bytes())
    paths[1].write_bytes(train("pretrain", tmp_path, seed=5, max_steps=1).newest.read_bytes())
    settings = {"max_steps": 1, "source_net": paths[0]}
    finished = train("bip", tmp_path, **settings)
    capsys.readouterr()
    assert main(["train", *arguments("bip", tmp_path, **settings)]) == 0
    assert "already finished" in capsys.readouterr().out
    assert main(["train", *arguments("bip", tmp_path, **settings | {"source_net": paths[1]})]) == 2
    error = capsys.readouterr().err
    assert str(paths[1]) in error
    assert str(finished.folder) in error


# Holdout


def test_best_is_chosen_on_the_holdout(source: Path, tmp_path: Path) -> None:
    finished = train(
        "bip", tmp_path, source_net=source, epochs=3, holdout=200, k=0.05, mask_lr=0.3,
        layer_type="filter",
    )  # fmt: skip
    epochs = finished.records("epoch")
    held = [record["holdout_top1"] for record in epochs]
    assert len(held) == 3
    best = held.index(max(held)) + 1  # the first of equals
    assert finished.result["best_epoch"] == best
    content = torch.load(finished.best, weights_only=True)
    network = models.build("digits_net", 10, 1)
    weights = {n: t for n, t in content["state_dict"].items() if "popup_scores" not in n}
    masks = finished.masks
    if best == 3:
        assert finished.result["best_top1"] == finished.result["top1"]
        network.load_state_dict({n: w * masks.get(n, 1) for n, w in weights.items()})
        assert finished.result["best_top1"] == pytest.approx(accuracy(network), abs=1e-4)


@pytest.mark.parametrize("number", [None, errno.EIO, errno.ESTALE])
def test_a_best_model_that_cannot_be_read_costs_no_finished_run(
    number: int | None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged, or on a bad place of the disk; a file system that is away comes back."""
    original = run_folder.read_checkpoint

    def read(path: Path) -> Any:
        if path.name != "model_best.pth.tar":
            return original(path)
        if number is None:
            raise UserError(f"{path}: damaged")
        raise OSError(number, os.strerror(number))

    settings = {"source_net": source, "holdout": 200, "k": 0.3, "epochs": 1}
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "read_checkpoint", read)
        if number == errno.ESTALE:
            with pytest.raises(OSError, match="Stale"):
                train("bip", tmp_path, **settings)
        else:
            finished = train("bip", tmp_path, **settings)
            assert finished.result["best_top1"] is None
    assert train("bip", tmp_path, **settings).result["top1"] > 0


def test_the_best_model_is_the_one_of_the_best_epoch(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holdout's accuracy is made to peak after the first epoch of three."""
    settings = {"source_net": source, "holdout": 200, "k": 0.3}
    original = loop.Loop.evaluate
    peaks = iter([90.0, 50.0, 70.0])

    def evaluate(self: Any, split: Any) -> Any:
        seen = original(self, split)
        return dataclasses.replace(seen, top1=next(peaks)) if split == "holdout" else seen

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "evaluate", evaluate)
        finished = train("bip", tmp_path, epochs=3, **settings)
    assert finished.result["best_epoch"] == 1
    first = finished.records("epoch")[0]
    assert finished.result["best_top1"] == first["top1"]
    assert finished.result["best_top1"] != finished.result["top1"]
    best = torch.load(finished.best, weights_only=True)["state_dict"]
    assert not torch.equal(best["conv1.weight"], finished.weights["conv1.weight"])
    # model_best evaluates to best_top1, the final checkpoint to top1.
    for path, expected in ((finished.best, "best_top1"), (finished.newest, "top1")):
        argv = arguments("bip", tmp_path, source_net=path, evaluate=True, k=0.3)
        assert train_run(load_config(argv))["top1"] == finished.result[expected]


@pytest.mark.parametrize("kind", ["pretrain", "bip", "hydra"])
def test_test_images_are_only_reported(
    kind: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other test labels and images: nothing but the reported test accuracy may differ."""
    settings = {"epochs": 2, "holdout": 100, "max_steps": 30}
    settings |= {} if kind == "pretrain" else {"source_net": source}
    plain = train(kind, tmp_path / "plain", **settings)
    original = Data.evaluate

    def evaluate(self: Data, split: Any) -> Any:
        for images, labels in original(self, split):
            yield (images.flip(0), (labels + 1) % 10) if split == "test" else (images, labels)

    with monkeypatch.context() as patch:
        patch.setattr(Data, "evaluate", evaluate)
        other = train(kind, tmp_path / "other", **settings)
    assert other.result["top1"] != plain.result["top1"]
    for key in ("weights_sha256", "mask_sha256", "best_epoch"):
        assert other.result[key] == plain.result[key]
    assert other.losses == plain.losses
    contents = [torch.load(f.best, weights_only=True)["state_dict"] for f in (plain, other)]
    assert all(torch.equal(contents[0][n], contents[1][n]) for n in contents[0])


# Evaluate, export, compare, save_dense, recalibrate_bn


@pytest.mark.parametrize("option", ["source_net", "resume"])
@pytest.mark.parametrize("layer_type", LAYER_TYPES)
def test_evaluate_a_pruned_network(
    option: str,
    layer_type: str,
    pruned_runs: dict[str, Finished],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    finished = pruned_runs[layer_type]
    out = tmp_path / "out"
    settings = {"k": 0.3, "layer_type": layer_type, option: finished.newest}
    for argv in (
        ["evaluate", *arguments("bip", out, **settings)],
        ["train", *arguments("bip", out, evaluate=True, **settings)],
    ):
        assert main(argv) == 0
        said = capsys.readouterr().out
        assert f"top1 {finished.result['top1']:.2f}%" in said
        assert "360" in said
    assert not out.exists()


def test_a_filter_run_on_its_way_evaluates_alike_as_source_and_to_resume(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pruned filters' batch-norm is not zeroed yet: both ways do it."""
    settings = {"k": 0.3, "layer_type": "filter"}
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        with pytest.raises(Stopped):
            train("bip", tmp_path, source_net=source, checkpoint_minutes=1e-9, **settings)
    (newest,) = tmp_path.rglob("checkpoint.pth.tar")
    found = [
        train_run(
            load_config(arguments("bip", tmp_path, evaluate=True, **{option: newest}, **settings))
        )
        for option in ("source_net", "resume")
    ]
    assert found[0] == found[1]


def test_evaluate_a_dense_network(
    dense: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["evaluate", *arguments("pretrain", tmp_path / "out", source_net=dense.best)]
    assert main(argv) == 0
    assert f"top1 {dense.result['top1']:.2f}%" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
def test_export_writes_the_effective_weights(
    layer_type: str, pruned_runs: dict[str, Finished], tmp_path: Path
) -> None:
    finished = pruned_runs[layer_type]
    out = tmp_path / "net.safetensors"
    assert main(["export", str(finished.best), str(out)]) == 0
    network = models.build("digits_net", 10, 1)
    with safe_open(out, "pt") as stored:
        network.load_state_dict({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
        assert stored.metadata()["k"] == "0.3"
        assert stored.metadata()["layer_type"] == layer_type
    assert accuracy(network) == pytest.approx(finished.result["top1"], abs=1e-4)
    zeros = sum(int((network.state_dict()[name] == 0).sum()) for name in finished.masks)
    assert zeros == finished.result["total"] - finished.result["kept"]
    assert list(tmp_path.iterdir()) == [out]


def test_compare_prints_the_intersection_over_union(
    pruned_runs: dict[str, Finished],
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one = pruned_runs["unstructured"]
    other = train("hydra", tmp_path, source_net=source, max_steps=6, k=0.2, scope="layer")
    capsys.readouterr()
    assert main(["compare", str(one.newest), str(other.newest)]) == 0
    lines = capsys.readouterr().out.splitlines()
    a, b = (torch.cat([m.flatten() for m in f.masks.values()]) == 1 for f in (one, other))
    expected = float((a & b).sum() / (a | b).sum())
    assert 0.1 < expected < 0.9
    (total,) = [line for line in lines if line.startswith("all")]
    assert float(total.split()[-1]) == pytest.approx(expected, abs=1e-4)
    assert len(lines) == 1 + len(one.masks)
    assert main(["compare", str(one.newest), str(one.best)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[-1] == "1.0000"


@pytest.mark.parametrize("other", ["dense", "filter"])
def test_masks_that_cannot_be_compared(
    other: str,
    dense: Finished,
    pruned_runs: dict[str, Finished],
    capsys: pytest.CaptureFixture[str],
) -> None:
    second = dense if other == "dense" else pruned_runs["filter"]
    assert main(["compare", str(pruned_runs["unstructured"].newest), str(second.newest)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert str(second.newest) in error


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
def test_save_dense_is_a_plain_network_of_the_masked_weights(
    layer_type: str, source: Path, tmp_path: Path
) -> None:
    finished = train(
        "bip", tmp_path, source_net=source, max_steps=3, layer_type=layer_type, save_dense=True
    )
    path = finished.folder / "checkpoint" / "model_dense.pth.tar"
    network = models.build("digits_net", 10, 1)
    network.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    assert accuracy(network) == pytest.approx(finished.result["top1"], abs=1e-4)
    for name, mask in finished.masks.items():
        assert torch.equal(network.state_dict()[name], finished.weights[name] * mask)


def test_recalibrate_bn_re_estimates_the_statistics_alone(source: Path, tmp_path: Path) -> None:
    settings = {"source_net": source, "max_steps": 4, "k": 0.1}
    plain = train("hydra", tmp_path, **settings)
    fresh = train("hydra", tmp_path, **settings, recalibrate_bn=4)
    for name, value in plain.weights.items():
        changed = not torch.equal(value, fresh.weights[name])
        assert changed == name.endswith(("running_mean", "running_var", "num_batches_tracked")), (
            name
        )
    # They are those of the masked network on training images, near the test images' own.
    network = models.build("digits_net", 10, 1)
    masks = fresh.masks
    network.load_state_dict({n: w * masks.get(n, 1) for n, w in fresh.weights.items()})
    assert accuracy(network) == pytest.approx(fresh.result["top1"], abs=1e-4)
    assert fresh.weights["bn1.num_batches_tracked"] == 4


def test_a_dense_network_is_not_recalibrated(dense: Finished, tmp_path: Path) -> None:
    """As the warning says."""
    told = train("pretrain", tmp_path, epochs=2, recalibrate_bn=2)
    assert told.result["weights_sha256"] == dense.result["weights_sha256"]


def test_pretraining_may_start_from_a_network(
    source: Path, dense: Finished, tmp_path: Path
) -> None:
    again = train("pretrain", tmp_path, source_net=source, lr=0, wd=0, max_steps=1, freeze_bn=True)
    assert again.result["weights_sha256"] == dense.result["weights_sha256"]


def test_divergence_stops_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", *arguments("pretrain", tmp_path, lr=1e30, freeze_bn=True, max_steps=20)]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "lr" in error
    assert not list(tmp_path.rglob("result.json"))


def test_eval_every_and_max_steps(tmp_path: Path) -> None:
    finished = train("pretrain", tmp_path, epochs=5, eval_every=2, batch_size=400, print_freq=4)
    assert [record["epoch"] for record in finished.records("epoch")] == [2, 4, 5]
    assert [record["step"] for record in finished.records()] == [4, 8, 12, 15]  # 3 an epoch


def test_scale_rand_init_scales_by_k(tmp_path: Path) -> None:
    """Deviation sqrt(2 / (k · fan in)): k = 0.25 doubles the starting weights."""
    deviations = {}
    for k in (1.0, 0.25):
        config = load_config(arguments("pretrain", tmp_path, scale_rand_init=True, k=k))
        network = Run(config, Group(Ranks(0, 1, 0, 1), torch.device("cpu"))).network
        deviations[k] = float(
            dict(network.named_parameters())["layer1.0.conv1.weight"].detach().std()
        )
    assert deviations[1.0] == pytest.approx(math.sqrt(2 / (36 * 9)), rel=0.05)
    assert deviations[0.25] == pytest.approx(2 * deviations[1.0], rel=0.02)
