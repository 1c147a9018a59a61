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
from bip.errors import UserError
from bip.pruning.layout import keep_count
from bip.run import train as train_run
from bip.training import loop
from bip.training.checkpoint import read_checkpoint
from tests.runs import LAYER_TYPES, Finished, arguments, make_run, train, train_until

RESULT_KEYS = {
    "k", "kept", "total", "sparsity", "top1", "top5", "best_top1", "best_epoch", "epochs", "seed",
    "forward_backwards", "arch", "dataset", "trainer", "layer_type", "mask_sha256",
    "weights_sha256", "seconds", "attempts", "source_sha256", "macs", "macs_kept", "parameters",
    "parameters_kept", "git_commit", "host", "gpu", "versions",
}  # fmt: skip
SHA256 = re.compile("[0-9a-f]{64}")
DENSE = Path("checkpoint", "model_dense.pth.tar")


def accuracy(state: dict[str, Any], masks: dict[str, Any] | None = None) -> Any:
    """Percent of Digits' 360 test images that the masked weights get right, without our loop."""
    from sklearn.datasets import load_digits

    network = models.build("digits_net", 10, 1)
    network.load_state_dict({n: w * (masks or {}).get(n, 1) for n, w in state.items()})
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float64).round(decimals=9)
    images = (torch.round(images * 255) / 255).float().view(-1, 1, 8, 8)
    images = (images - 0.3054) / 0.3753
    with torch.no_grad():
        hits = network.eval()(images[-360:]).argmax(1) == torch.tensor(labels[-360:])
    return pytest.approx(100 * float(hits.float().mean()), abs=1e-4)


@pytest.fixture(params=["pretrain", *LAYER_TYPES])
def finished(
    request: pytest.FixtureRequest, dense: Finished, pruned_runs: dict[str, Finished]
) -> Finished:
    """A dense run, and one of each layer type."""
    return {"pretrain": dense, **pruned_runs}[request.param]


# The run folder


def test_what_a_run_folder_holds(finished: Finished) -> None:
    names = {path.name for path in finished.folder.iterdir()}
    expected = {"config.yml", "metrics.jsonl", "attempts.jsonl", "result.json", "checkpoint"}
    assert expected <= names
    assert list(finished.folder.rglob("events.out.tfevents.*"))
    assert not [path for path in finished.folder.rglob("*") if "tmp" in path.name]
    inside = {path.name for path in (finished.folder / "checkpoint").iterdir()}
    assert {"checkpoint.pth.tar", "model_best.pth.tar"} <= inside
    # RESULT_DIR/EXP_NAME/MODE/RUN_ID
    config = yaml.safe_load((finished.folder / "config.yml").read_text())
    assert finished.folder.parts[-3:-1] == (config["exp_name"], config["exp_mode"])
    k = "1" if config["exp_mode"] == "pretrain" else "0.3"
    for part in (config["arch"], config["trainer"], config["layer_type"], f"k{k}-", "s1234"):
        assert part in finished.folder.name
    # The merged settings: loading the file alone gives the same run.
    again = load_config(["--configs", str(finished.folder / "config.yml")])
    assert again.run_folder == finished.folder
    assert again.max_steps == config.get("max_steps")


def test_result_json(finished: Finished) -> None:
    result, masks = finished.result, finished.masks
    extra = set() if result["mask_sha256"] is None else {"empty_layers"}
    extra |= {"top1_before_bn_mask"} if result["layer_type"] == "filter" else set()
    assert set(result) == RESULT_KEYS | extra
    assert result["sparsity"] == pytest.approx(1 - result["kept"] / result["total"])
    assert (result["best_top1"], result["best_epoch"], result["attempts"]) == (None, None, 1)
    assert result["seconds"] > 0
    assert SHA256.fullmatch(result["weights_sha256"])
    assert result["top1"] == accuracy(finished.weights, masks), "that of the masked weights"
    if result["layer_type"] == "dense":
        assert result["mask_sha256"] is None
        assert (result["kept"], result["sparsity"]) == (result["total"], 0)
        assert result["top1"] > 80
        return
    assert SHA256.fullmatch(result["mask_sha256"])
    assert result["k"] == 0.3
    assert result["total"] == sum(mask.numel() for mask in masks.values())
    assert result["kept"] == sum(int(mask.sum()) for mask in masks.values())
    if result["layer_type"] == "unstructured":
        assert result["kept"] == keep_count("0.3", result["total"])


def test_metrics_and_attempts(pruned_runs: dict[str, Finished]) -> None:
    finished = pruned_runs["unstructured"]
    assert [record["step"] for record in finished.records()] == [1, 2, 3, 4, 5, 6]
    for record in finished.records():
        assert {"loss", "top1", "lower_lr", "upper_lr", "epoch"} <= set(record)
        assert ("implicit_over_direct" in record) == (record["step"] <= 3), "the mask moves"
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
    settings = {"max_steps": 6, "print_freq": 100, "checkpoint_minutes": 1e-9}
    whole = make_run("bip", tmp_path, source_net=source, **settings)
    assert whole.pruned is not None
    pruned = whole.pruned
    note = whole.heartbeat.note_step

    def spoil(step: int) -> None:
        note(step)
        if step == 4:
            pruned.z[0].data.view(-1)[3] = float("nan")

    whole.heartbeat.note_step = spoil  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"conv1\.weight.*step 4.*not saved"):
        whole.train()
    assert 0 < read_checkpoint(whole.folder.checkpoints.newest)["progress"]["iteration"] < 4


def test_other_data_are_refused_on_resume(source: Path, tmp_path: Path) -> None:
    settings = {"source_net": source, "max_steps": 5}
    checkpoint = train_until(2, "bip", tmp_path, **settings)
    identity = read_checkpoint(checkpoint)["data"]
    assert identity["images"].startswith("1437 + 360 images of 10 classes")
    whole = make_run("bip", tmp_path, **settings)
    whole.data.identity["images"] = "1436 + 360 images"
    with pytest.raises(UserError, match=r"data_dir: .* 1437 \+ 360 images"):
        whole.train()


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
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
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
CHANGING = {
    "lr": 0.02, "mask_lr": 0.02, "lr2": 0.1, "k": 0.2, "seed": 2, "wd": 0, "batch_size": 32,
    "epochs": 2, "max_steps": 5, "layer_type": "filter", "scope": "layer", "freeze_bn": True,
    "accumulate": 2, "lower_steps": 2, "momentum": 0.8, "accelerate": True, "holdout": 10,
    "normalize": False, "precision": "bf16", "label_smoothing": 0.1, "bn_wd": False,
    "lr_schedule": "step", "mask_lr_schedule": "cosine", "optimizer": "adam", "mask_wd": 0,
    "scaled_score_init": False, "recalibrate_bn": 1, "warmup_epochs": 1, "trainer": "base",
}  # fmt: skip


def run_id(source: Path | None, **settings: Any) -> str:
    kind = "bip" if source else "pretrain"
    given = {"source_net": source} if source else {}
    return load_config(arguments(kind, Path("out"), **given | settings)).run_id


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_changes_no_number_changes_no_run_id(name: str, source: Path) -> None:
    assert run_id(source) == run_id(source, **{name: NEUTRAL[name]})


@pytest.mark.parametrize("name", CHANGING)
def test_what_changes_numbers_changes_the_run_id(name: str, source: Path) -> None:
    base = {"epochs": 2} if name == "warmup_epochs" else {}
    assert run_id(source, **base) != run_id(source, **base | {name: CHANGING[name]})


def test_other_spellings_and_what_has_no_effect_are_no_other_run(source: Path) -> None:
    assert run_id(source, k="0.10") == run_id(source, k="0.1")
    assert run_id(source, inv_gamma=0.1) == run_id(source, lr2=0.1)
    assert run_id(None) == run_id(None, mask_lr=0.5, lower_steps=3, warmup_lr=0.7)
    assert run_id(None) != run_id(None, scale_rand_init=True)
    names = ("ImageNet", "ImageNetLMDB", "ImageNetOrigin")
    assert len({run_id(None, dataset=n, data_dir=".", arch="ResNet18") for n in names}) == 1


def test_the_source_run_is_part_of_the_identity_wherever_it_lies(
    dense: Finished, source: Path, other_source: Path, tmp_path: Path
) -> None:
    """Its folder may be moved; another pretrained network makes another run."""
    moved = tmp_path / dense.folder.name
    shutil.copytree(dense.folder, moved, symlinks=True)
    there = moved / "checkpoint" / source.name
    assert run_id(there) == run_id(source) != run_id(other_source)
    first, second = (
        train("bip", tmp_path / str(n), source_net=path, max_steps=2)
        for n, path in enumerate((there, source))
    )
    assert first.result["weights_sha256"] == second.result["weights_sha256"]


@pytest.fixture(scope="module")
def other_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another pretrained network."""
    return train("pretrain", tmp_path_factory.mktemp("other"), seed=5, max_steps=1).newest


@pytest.mark.parametrize("name", ["one.pth.tar", "two.pth.tar"])
@pytest.mark.parametrize("is_finished", [False, True])
def test_a_run_is_not_that_of_another_source(
    is_finished: bool, name: str, source: Path, other_source: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Begun or finished from one network, it does not go on from another, wherever that lies."""
    settings = {"source_net": tmp_path / "one.pth.tar", "max_steps": 3}
    shutil.copy(source, settings["source_net"])
    if is_finished:
        folder = train("bip", tmp_path, **settings).folder
        assert main(["train", *arguments("bip", tmp_path, **settings)]) == 0
        assert "already finished" in capsys.readouterr().out
    else:
        folder = train_until(2, "bip", tmp_path, **settings).parent.parent
    shutil.copy(other_source, tmp_path / name)
    settings["source_net"] = tmp_path / name
    assert main(["train", *arguments("bip", tmp_path, **settings)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(part in error for part in ("source_net", str(tmp_path / name), str(folder)))


# Holdout


@pytest.mark.parametrize("number", [None, errno.EIO, errno.ESTALE])
def test_a_best_model_that_cannot_be_read_costs_no_finished_run(
    number: int | None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged, or on a bad place of the disk; an unreachable file system comes back."""
    original = run_folder.read_checkpoint

    def read(path: Path, *_: Any) -> Any:
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


@pytest.mark.parametrize(
    ("peaks", "best_epoch"), [([90.0, 50.0, 70.0], 1), ([50.0, 90.0, 90.0], 2), (None, None)]
)
def test_the_best_model_is_the_one_of_the_best_epoch(
    peaks: list[float] | None, best_epoch: int | None, source: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """By the holdout's accuracy, here as it is or made to peak: the first of equals."""
    settings = {"source_net": source, "holdout": 200, "k": 0.3, "layer_type": "filter"}
    original, held = loop.Loop.evaluate, iter(peaks or ())

    def evaluate(self: Any, split: Any) -> Any:
        seen = original(self, split)
        return dataclasses.replace(seen, top1=next(held)) if split == "holdout" else seen

    with monkeypatch.context() as patch:
        if peaks:
            patch.setattr(loop.Loop, "evaluate", evaluate)
        finished = train("bip", tmp_path, epochs=3, mask_lr=0.3, **settings)
    epochs = finished.records("epoch")
    seen = [record["holdout_top1"] for record in epochs]
    best_epoch = best_epoch or seen.index(max(seen)) + 1
    assert finished.result["best_epoch"] == best_epoch
    best = torch.load(finished.best, weights_only=True)["state_dict"]
    assert torch.equal(best["linear.weight"], finished.weights["linear.weight"]) == (
        best_epoch == 3
    )
    # model_best evaluates to best_top1, the final checkpoint to top1.
    for path, expected in ((finished.best, "best_top1"), (finished.newest, "top1")):
        argv = arguments("bip", tmp_path, evaluate=True, **settings | {"source_net": path})
        assert train_run(load_config(argv))["top1"] == finished.result[expected]


@pytest.mark.parametrize("kind", ["pretrain", "bip", "hydra"])
def test_test_images_are_only_reported(
    kind: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other test labels and images: nothing but the reported test accuracy may differ."""
    settings = {"epochs": 2, "holdout": 100, "batch_size": 200}
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
def test_evaluate(
    option: str, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, layer_type = tmp_path / "out", finished.result["layer_type"]
    settings = {option: finished.newest}
    if layer_type != "dense":
        settings |= {"k": 0.3, "layer_type": layer_type}
    kind = "pretrain" if layer_type == "dense" else "bip"
    for argv in (
        ["evaluate", *arguments(kind, out, **settings)],
        ["train", *arguments(kind, out, evaluate=True, **settings)],
    ):
        assert main(argv) == 0
        report = capsys.readouterr().out
        assert f"top1 {finished.result['top1']:.2f}%" in report
        assert "360" in report
    assert not out.exists()


def test_a_filter_run_on_its_way_evaluates_alike_as_source_and_to_resume(
    source: Path, tmp_path: Path
) -> None:
    """Its pruned filters' batch-norm is not zeroed yet: both ways do it."""
    settings = {"k": 0.3, "layer_type": "filter"}
    newest = train_until(1, "bip", tmp_path, source_net=source, **settings)
    first, second = (
        train_run(
            load_config(arguments("bip", tmp_path, evaluate=True, **settings, **{option: newest}))
        )
        for option in ("source_net", "resume")
    )
    assert first == second


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
def test_export_and_save_dense_write_the_effective_weights(
    layer_type: str, source: Path, tmp_path: Path
) -> None:
    settings = {"source_net": source, "max_steps": 3, "layer_type": layer_type, "k": 0.3}
    finished = train("bip", tmp_path / "run", save_dense=True, **settings)
    out = tmp_path / "net.safetensors"
    assert main(["export", str(finished.best), str(out)]) == 0
    with safe_open(out, "pt") as stored:
        exported = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        metadata = stored.metadata()
    assert (metadata["k"], metadata["layer_type"]) == ("0.3", layer_type)
    dense = torch.load(finished.folder / DENSE, weights_only=True)["state_dict"]
    for state in (exported, dense):
        assert accuracy(state) == finished.result["top1"]
        for name, mask in finished.masks.items():
            assert torch.equal(state[name], finished.weights[name] * mask)
    assert sorted(tmp_path.iterdir()) == [out, tmp_path / "run"]


def test_compare_prints_the_intersection_over_union(
    finished: Finished,
    pruned_runs: dict[str, Finished],
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Or refuses masks that cannot be compared."""
    one = pruned_runs["unstructured"]
    if finished.result["layer_type"] != "unstructured":
        assert main(["compare", str(one.newest), str(finished.newest)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert str(finished.newest) in error
        return
    other = train("hydra", tmp_path, source_net=source, max_steps=6, k=0.2, scope="layer")
    capsys.readouterr()
    assert main(["compare", str(one.newest), str(other.newest)]) == 0
    lines = capsys.readouterr().out.splitlines()
    a, b = (torch.cat([m.flatten() for m in f.masks.values()]) == 1 for f in (one, other))
    expected = float((a & b).sum() / (a | b).sum())
    assert 0.1 < expected < 0.9
    (total,) = [line for line in lines if line.startswith("all")]
    assert float(total.split()[-2]) == pytest.approx(expected, abs=1e-4)
    assert float(total.split()[-1]) == pytest.approx(float(b.sum() / a.sum()), abs=1e-4)
    assert len(lines) == 2 + len(one.masks)
    assert main(["compare", str(one.newest), str(one.best)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[-1] == "1.0000"


def test_recalibrate_bn_re_estimates_the_statistics_alone(
    source: Path, dense: Finished, tmp_path: Path
) -> None:
    """Those of the masked network on training images. A dense one keeps its own."""
    settings = {"source_net": source, "max_steps": 4, "k": 0.1}
    plain = train("hydra", tmp_path, **settings)
    fresh = train("hydra", tmp_path, **settings, recalibrate_bn=4)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    for name, value in plain.weights.items():
        assert torch.equal(value, fresh.weights[name]) != name.endswith(statistics), name
    assert fresh.result["top1"] == accuracy(fresh.weights, fresh.masks)
    assert fresh.weights["bn1.num_batches_tracked"] == 4
    warned = train("pretrain", tmp_path, epochs=2, recalibrate_bn=2)
    assert warned.result["weights_sha256"] == dense.result["weights_sha256"]


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
        network = make_run("pretrain", tmp_path, scale_rand_init=True, k=k).network
        deviations[k] = float(network.get_parameter("layer1.0.conv1.weight").detach().std())
    assert deviations[1.0] == pytest.approx(math.sqrt(2 / (36 * 9)), rel=0.05)
    assert deviations[0.25] == pytest.approx(2 * deviations[1.0], rel=0.02)
