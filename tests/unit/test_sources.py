"""Checkpoints of every kind: each loads to the same network, and garbage is one line."""

import argparse
import copy
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.optim.swa_utils import AveragedModel

from bip import models, run
from bip.__main__ import main
from bip.checkpoint_path import checkpoint_of, k_in_name
from bip.config import load_config
from bip.errors import UserError
from bip.evaluation import evaluation_config
from bip.models.digits import DigitsNet
from bip.pruning.layout import find_prunable
from bip.pruning.state import PrunedParameters
from bip.training import sources
from bip.training.checkpoint import read_checkpoint, restore_model
from tests.runs import ALONE, LAYER_TYPES, Finished, arguments, train
from tests.unit.test_checkpoint import Evil

DIGITS = ["--arch", "digits_net", "--dataset", "Digits"]
State = dict[str, Any]


def evaluate(*argv: object) -> dict[str, Any]:
    return run.train(evaluation_config([str(word) for word in argv], "bip evaluate"))


@pytest.fixture(scope="module")
def weights(dense: Finished) -> dict[str, Tensor]:
    return dense.weights


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def averaged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    network = DigitsNet(10)
    network.load_state_dict(state)
    return dict(AveragedModel(network, use_buffers=True).state_dict())


def without_counters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return OrderedDict((n, v) for n, v in state.items() if "num_batches" not in n)


Make = Callable[[dict[str, Tensor]], Any]
# What programs save, of the same network, and the flags to load it with.
KINDS: dict[str, tuple[Make, list[str]]] = {
    "bare.pth": (lambda s: s, []),
    "bare.pt": (lambda s: OrderedDict(s), []),
    "double.pth": (lambda s: {n: v.double() if v.dim() else v for n, v in s.items()}, []),
    "old_batchnorm.pth": (without_counters, []),
    **{
        f"{key}.pth": ((lambda s, key=key: {key: s, "acc": 93.0, "epoch": 5}), [])
        for key in ("state_dict", "model", "net", "model_state", "model_state_dict")
    },
    **{
        f"{prefix}pth": ((lambda s, prefix=prefix: {"state_dict": prefixed(prefix, s)}), [])
        for prefix in ("module.", "_orig_mod.", "model.", "backbone.", "module._orig_mod.", "1.")
    },
    "imagenet_example.pth.tar": (
        lambda s: {
            "epoch": 90, "arch": "resnet18", "state_dict": prefixed("module.", s),
            "best_acc1": torch.tensor(69.7), "optimizer": {"state": {0: {"m": torch.ones(2)}}},
        }, [],
    ),
    "lightning.ckpt": (
        lambda s: {
            "state_dict": prefixed("model.", s) | {"criterion.weight": torch.ones(3)},
            "pytorch-lightning_version": "2.0", "hyper_parameters": {"lr": 0.1},
        }, [],
    ),
    "averaged.pth": (averaged, []),
    "ema.pth": (
        lambda s: {"model": {n: v * 0 for n, v in s.items()}, "model_ema": prefixed("module.", s)},
        ["--source-key", "model_ema"],
    ),
    "ema_shadow.pth": (
        lambda s: {"state_dict": {}, "ema": {"decay": 0.9, "shadow": s}},
        ["--source-key", "ema.shadow"],
    ),
    "two_networks.pth": (
        lambda s: prefixed("student.", s) | prefixed("teacher.", {n: v * 0 for n, v in s.items()}),
        ["--source-key", "student"],
    ),
    "namespace.pth": (
        lambda s: {"state_dict": s, "args": argparse.Namespace(lr=0.1), "log": np.ones(3)},
        ["--skip-objects"],
    ),
    "numpy_scalar.pth": (lambda s: {"net": s, "best": np.float64(94.5), "n": np.int64(3)}, []),
    "profiled.pth": (lambda s: s | {"total_ops": torch.ones(1)}, []),
    "tensors.safetensors": (lambda s: s, []),
    "wrapped.safetensors": (lambda s: prefixed("_orig_mod.", s), []),
}  # fmt: skip


def write(path: Path, content: Any, zipped: bool = True) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_loads(
    name: str, dense: Finished, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    make, flags = KINDS[name]
    path = write(tmp_path / name, make(weights), zipped="bare.pt" not in name)
    found = run.Run(evaluation_config([str(path), *DIGITS, *flags], ""), ALONE).network.state_dict()
    assert set(found) == set(weights)
    for entry, value in found.items():
        if "num_batches" not in entry:
            assert torch.equal(value, weights[entry]), entry


def test_our_own_files_evaluate_without_flags(
    dense: Finished, pruned_runs: dict[str, Finished], tmp_path: Path
) -> None:
    for finished in (dense, *pruned_runs.values()):
        for path in (finished.best, finished.newest, finished.folder):
            assert evaluate(path, "--test-batch-size", "500")["top1"] == finished.result["top1"]
        out = tmp_path / "out.safetensors"
        assert main(["export", str(finished.best), str(out)]) == 0
        assert evaluate(out, "--normalize")["top1"] == finished.result["top1"]


def test_a_weak_match_says_what_would_fit(tmp_path: Path) -> None:
    def refuse(arch: str, state: dict[str, Tensor]) -> str:
        network = models.build(arch, 10)
        with pytest.raises(UserError) as error:
            sources.fit(sources.recognise(state, {}, Path("x.pth")), network, "x.pth")
        assert "\n" not in str(error.value)
        return str(error.value)

    state = models.build("resnet20s", 10).state_dict()
    message = refuse("resnet32s", prefixed("module.", state))
    assert "72 missing" in message
    assert message.endswith("it fits resnet20s")
    assert "100 classes" in refuse("resnet20s", models.build("resnet20s", 100).state_dict())
    del state["layer1.0.conv1.weight"]
    assert "1 missing: layer1.0.conv1.weight" in refuse("resnet20s", state)
    state["layer1.0.conv1.weight"] = torch.zeros(3)
    assert "1 of another shape: layer1.0.conv1.weight (3,)" in refuse("resnet20s", state)
    state["layer1.0.conv1.weight"] = torch.zeros(16, 16, 3, 3)
    assert "1 unexpected: extra" in refuse("resnet20s", state | {"extra": torch.ones(1)})
    both = prefixed("a.", state) | prefixed("b.", state)
    assert refuse("resnet20s", both).startswith("source_key: ")
    state["fc.bias"][3] = torch.nan
    assert "fc.bias holds NaN" in refuse("resnet20s", state)


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (torch.int8, "int8"),
        (torch.int64, "int64"),
        (torch.complex64, "complex64"),
        ("meta", "without data"),
        (torch.float8_e4m3fn, ""),
    ],
)
def test_what_is_no_weight_is_refused(
    kind: Any, word: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    """Integers of a quantized network would be taken for weights, and imaginary parts lost."""
    state = weights | {"linear.weight": weights["linear.weight"].to(kind)}
    path = write(tmp_path / "a.pth", state)
    config = load_config(arguments("finetune", tmp_path, source_net=path, layer_type="dense"))
    if word:
        with pytest.raises(UserError, match=f"linear.weight is .*{word}.*; save"):
            run.Run(config, ALONE)
    else:
        found = run.Run(config, ALONE).network.state_dict()["linear.weight"]
        assert torch.equal(found, state["linear.weight"].float())


def test_a_head_of_other_classes_starts_fresh(weights: dict[str, Tensor], tmp_path: Path) -> None:
    state = weights | {"linear.weight": torch.ones(7, 36), "linear.bias": torch.ones(7)}
    path = write(tmp_path / "seven.pth", state)
    argv = arguments("finetune", tmp_path / "out", source_net=path, layer_type="dense", max_steps=1)
    with pytest.raises(UserError, match=r"7 classes.*--reset-head"):
        run.Run(load_config(argv), ALONE)
    network = run.Run(load_config([*argv, "--reset-head"]), ALONE).network.state_dict()
    assert torch.equal(network["conv1.weight"], weights["conv1.weight"])
    assert network["linear.weight"].std() > 0
    # Dense fine-tuning is plain training from there.
    finished = train(
        "finetune", tmp_path, source_net=path, layer_type="dense", max_steps=1, reset_head=True
    )
    assert finished.result["kept"] == finished.result["total"]
    # Its model has no mask, so methods may prune it; it does not fine-tune a pruned network.
    source = finished.folder
    start = run.Run(load_config(arguments("bip", tmp_path / "on", source_net=source)), ALONE)
    assert torch.equal(start.network.state_dict()["linear.bias"], finished.weights["linear.bias"])
    with pytest.raises(UserError, match="source_net"):
        run.Run(load_config(arguments("finetune", tmp_path / "no", source_net=source)), ALONE)


# Garbage


def torchscript(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


GARBAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "text": (lambda path: path.write_text("hello"), "not a readable checkpoint"),
    "lfs": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "LFS"),
    "page": (lambda path: path.write_text("<!DOCTYPE html>"), "web page"),
    "torchscript": (torchscript, "state_dict()"),
    "whole_model": (lambda path: torch.save(nn.Linear(2, 2), path), "state_dict()"),
    "tensor": (lambda path: torch.save(torch.ones(2), path), "no state_dict"),
    "no_tensors": (lambda path: torch.save({"epoch": 3}, path), "epoch"),
    "namespace": (
        lambda path: torch.save({"state_dict": {}, "args": argparse.Namespace(lr=1)}, path),
        "argparse.Namespace; --skip-objects",
    ),
    "safetensors": (lambda path: path.write_bytes(b"\x10" + b"\0" * 7 + b"{}"), "safetensors"),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.pth"
    make, word = GARBAGE[name]
    make(path)
    assert main(["evaluate", str(path), *DIGITS]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert word in error
    assert "bad.pth" in error
    assert "weights_only" not in error


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("flags", [[], ["--skip-objects"]])
def test_no_code_of_a_file_runs(
    flags: list[str], zipped: bool, weights: dict[str, Tensor], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    trap = tmp_path / "executed"
    path = write(tmp_path / "evil.pth", {"state_dict": weights, "x": Evil(trap)}, zipped)
    assert main(["evaluate", str(path), *DIGITS, *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    path.write_bytes(pickle.dumps({"x": Evil(trap)}))
    assert main(["evaluate", str(path), *DIGITS, *flags]) == 2
    # A class of an importable module, whose constructor would run.
    state = {"state_dict": weights, "args": argparse.Namespace(lr=1)}
    write(path, state, zipped)
    assert main(["evaluate", str(path), *DIGITS, *flags]) == (0 if flags else 2)
    # A recorded arch of a function is only run if a flag names it.
    save_file(weights, tmp_path / "own.safetensors", {"arch": "os:mkdir"})
    assert main(["evaluate", str(tmp_path / "own.safetensors"), "--dataset", "Digits"]) == 2
    assert "--arch os:mkdir" in capsys.readouterr().err
    assert not trap.exists()


@pytest.mark.parametrize("place", [100, 0.3, 0.99])
def test_a_truncated_file(
    place: float, weights: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("whole.pth", "whole.safetensors"):
        path = write(tmp_path / name, weights)
        data = path.read_bytes()
        path.write_bytes(data[: int(place if place > 1 else place * len(data))])
        assert main(["evaluate", str(path), *DIGITS]) == 2
        assert capsys.readouterr().err.count("\n") == 1


# Published files


def publish(network: nn.Module, layer_type: str, seed: int = 0) -> State:
    """A checkpoint in the published layout, of random scores."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        state[name] = value.clone()
        if value.dim() == 4 or (value.dim() == 2 and layer_type == "unstructured"):
            scores = torch.randn(value.shape, generator=generator)
            state[name.removesuffix("weight") + "popup_scores"] = scores
    return {"epoch": 3, "arch": "digits_net", "state_dict": state, "best_prec1": np.float64(9)}


def published_z(state: State, layer_type: str, k: float, per_layer: bool) -> dict[str, Tensor]:
    """The weights under the published code's masks: written from its description, by sorting."""
    entries = state["state_dict"]
    scores = {n: v.abs() for n, v in entries.items() if n.endswith("popup_scores")}
    masks: dict[str, Tensor] = {}
    if layer_type == "unstructured" and not per_layer:
        flat = torch.cat([v.flatten() for v in scores.values()])
        lowest = flat.sort(stable=True).indices[: int((1 - k) * flat.numel())]
        adjacency = torch.ones_like(flat)
        adjacency[lowest] = 0
        start = 0
        for name, score in scores.items():
            masks[name] = adjacency[start : start + score.numel()].view_as(score)
            start += score.numel()
    for name, score in scores.items() if not masks else ():
        norms = {
            "unstructured": score.flatten(),
            "filter": score.flatten(1).norm(dim=1),
            "channel": score.transpose(0, 1).flatten(1).norm(dim=1) if score.dim() > 2 else score,
        }[layer_type]
        kept = torch.ones_like(norms)
        kept[norms.sort(stable=True).indices[: int((1 - k) * norms.numel())]] = 0
        shape = {"unstructured": score.shape, "filter": (-1, 1, 1, 1), "channel": (1, -1, 1, 1)}
        masks[name] = kept.view(shape[layer_type]).expand_as(score)
    plain = {n: v for n, v in entries.items() if n not in scores}
    for name, mask in masks.items():
        weight = name.replace("popup_scores", "weight")
        plain[weight] = entries[weight] * mask
    return plain


@pytest.mark.parametrize("k", ["0.8", "0.3", "0.05"])
@pytest.mark.parametrize(
    ("layer_type", "scope"), [*((t, None) for t in LAYER_TYPES), ("unstructured", "layer")]
)
def test_published_masks_act_as_where_they_were_made(
    layer_type: str, scope: str | None, k: str, dense: Finished, tmp_path: Path
) -> None:
    """No bit of the outputs differs: the stem's colours are pruned, constants stay."""
    network = DigitsNet(10)
    network.load_state_dict(dense.weights)
    with torch.no_grad():
        network.bn1.bias.add_(0.3)
    state = publish(network, layer_type)
    path = write(tmp_path / f"x--k-{float(k):.4f}_y.pth.tar", state)
    expected = DigitsNet(10)
    expected.load_state_dict(published_z(state, layer_type, float(k), scope == "layer"))
    flags = ["--dataset", "Digits", "--layer-type", layer_type]
    flags += ["--scope", scope] if scope else []
    found = run.Run(evaluation_config([str(path), *flags], ""), ALONE).network
    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(found.eval()(images), expected.eval()(images))
    # A run that starts there keeps both, also in its own checkpoints.
    more = {"layer_type": layer_type, "k": k} | ({"scope": scope} if scope else {})
    tuned = train("finetune", tmp_path / "out", source_net=path, lr=0, wd=0, max_steps=1, **more)
    assert evaluate(tuned.best)["top1"] == tuned.result["top1"]
    for name, mask in tuned.masks.items():
        before = dict(published_z(state, layer_type, float(k), scope == "layer"))[name]
        assert torch.equal(mask > 0, before != 0)
    if layer_type == "filter":
        assert tuned.weights["bn1.bias"].all()


def test_scores_of_a_network_pretrained_with_k_1_are_no_mask(tmp_path: Path) -> None:
    path = write(tmp_path / "dense-k-1.0.pth.tar", publish(DigitsNet(10), "channel"))
    finished = train("bip", tmp_path, source_net=path, layer_type="channel", k=0.5, max_steps=1)
    assert set(finished.masks) == {f"layer1.{i}.conv{j}.weight" for i in (0, 1) for j in (1, 2)}


def test_a_wrong_or_unconfirmed_k_is_reported(
    dense: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = publish(DigitsNet(10), "unstructured")
    named = write(tmp_path / "R20_BiP_K0.1.pth.tar", state)
    plain = write(tmp_path / "plain.pth.tar", state)
    assert evaluation_config([str(named), *DIGITS], "").k == Decimal("0.1")
    assert load_config(arguments("finetune", tmp_path, source_net=named)).k == Decimal("0.1")

    def refuse(path: Path, *flags: str) -> str:
        assert main(["evaluate", str(path), *DIGITS, *flags]) == 2
        return capsys.readouterr().err

    assert "k 0.1, as its name says, but k is 0.2" in refuse(named, "--k", "0.2")
    assert "give --k" in refuse(plain)
    assert "unstructured, not filter" in refuse(plain, "--k", "0.1", "--layer-type", "filter")
    evaluate(plain, *DIGITS, "--k", "0.1")
    assert "warning: " in (line := capsys.readouterr().out.splitlines()[0])
    assert "--scope layer" in line
    evaluate(named, *DIGITS)
    assert "as its name says" in capsys.readouterr().out.splitlines()[0]
    # Scores that are exactly 0 where pruned need no k.
    for name, value in state["state_dict"].items():
        if name.endswith("popup_scores"):
            value.mul_(published_z(state, "unstructured", 0.1, False)[
                name.replace("popup_scores", "weight")] != 0)  # fmt: skip
    zeros = write(tmp_path / "zeros.pth.tar", state)
    before, after = evaluate(named, *DIGITS), evaluate(zeros, *DIGITS)
    assert before == after
    assert "not 0" in capsys.readouterr().out


def test_the_dead_block_of_a_published_wrn_is_left_out_but_counted(tmp_path: Path) -> None:
    """Its scores share the published top k."""
    torch.manual_seed(0)
    network = models.build("wrn_28_1", 10)
    theirs = copy.deepcopy(network)
    theirs.sub_block1 = copy.deepcopy(network.block1)
    state = publish(theirs, "unstructured")
    expected = {
        name: value
        for name, value in published_z(state, "unstructured", 0.2, False).items()
        if "sub_block1" not in name
    }
    found = sources.recognise(
        {"state_dict": prefixed("module.", state["state_dict"])}, {}, Path("x")
    )
    layout = find_prunable(network, "unstructured")
    pruned = PrunedParameters(network, layout, Decimal("0.2"), "global")
    fitted = sources.fit(found, network, "x")
    assert any("sub_block1" in note and "left out" in note for note in fitted["notes"])
    restore_model(network, pruned, fitted, "x")
    for name, value in network.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_masks_of_torch_prune_and_of_our_dense_export(
    pruned_runs: dict[str, Finished], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    network = DigitsNet(10)
    network.load_state_dict(weights)
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    torch_prune.global_unstructured(
        [(m, "weight") for m in layers], torch_prune.L1Unstructured, amount=0.75
    )
    expected = torch.cat([m.weight_mask.flatten() for m in layers])
    path = write(tmp_path / "torch.pth", {"state_dict": network.state_dict()})
    tuned = train("finetune", tmp_path, source_net=path, max_steps=1, k=0.25)
    assert torch.equal(torch.cat([m.flatten() for m in tuned.masks.values()]), expected.byte())
    for finished in pruned_runs.values():
        out = tmp_path / "ours.safetensors"
        assert main(["export", str(finished.best), str(out)]) == 0
        layer_type = finished.result["layer_type"]
        tuned = train("finetune", tmp_path / "2", source_net=out, k=0.3, max_steps=1,
                      layer_type=layer_type)  # fmt: skip
        for name, mask in finished.masks.items():
            assert torch.equal(tuned.masks[name], mask)


def test_scores_of_convolutions_alone_show_their_layer_types_by_what_has_none() -> None:
    """Unstructured pruning ranks linear layers too; a network may have none (squeezenet)."""
    entries = {"a.weight": torch.ones(4, 2, 3, 3), "a.popup_scores": torch.ones(4, 2, 3, 3)}
    state = {"facts": {}, "foreign": True, "state_dict": entries}
    assert sources.layer_types(state) == ("filter", "channel", "unstructured")
    entries["fc.weight"] = torch.ones(3, 4)
    assert sources.layer_types(state) == ("filter", "channel")
    entries["fc.popup_scores"] = torch.ones(3, 4)
    assert sources.layer_types(state) == ("unstructured",)


def test_masks_of_torch_prune_show_their_layer_types_by_their_shape() -> None:
    whole, single = torch.ones(4, 4, 3, 3), torch.ones(4, 4, 3, 3)
    whole[1], single[1, 2, 0, 0] = 0, 0
    for mask, kinds in (
        (whole, ("filter",)), (whole.transpose(0, 1), ("channel",)), (single, ("unstructured",)),
        (torch.ones(4, 4, 1, 1), ("filter", "channel")), (torch.ones(4, 4), ("unstructured",)),
    ):  # fmt: skip
        state = {"state_dict": {"a.weight_mask": mask}, "facts": {}}
        assert sources.layer_types(state) == kinds


# Paths


def test_a_run_folder_stands_for_its_checkpoint(dense: Finished, tmp_path: Path) -> None:
    experiment = dense.folder.parents[1]
    for path in (dense.folder, dense.folder.parent, experiment / "latest_exp"):
        config = load_config(arguments("bip", tmp_path, source_net=path))
        assert config.source_net is not None
        assert config.source_net.resolve() == dense.best.resolve()
        assert config.source_run == dense.folder.name
        assert (
            config.run_id == load_config(arguments("bip", tmp_path, source_net=dense.best)).run_id
        )
    assert load_config(arguments("pretrain", tmp_path, resume=dense.folder)).resume == dense.newest
    assert read_checkpoint(dense.folder)["arch"] == "digits_net"
    with pytest.raises(UserError, match="model_best"):
        checkpoint_of(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name / "checkpoint").mkdir(parents=True)
        (tmp_path / name / "checkpoint" / "model_best.pth.tar").touch()
    with pytest.raises(UserError, match=r"2 runs.*one, two"):
        checkpoint_of(tmp_path)


@pytest.mark.parametrize(
    ("path", "k"),
    [
        ("a/prune/0--k-0.1000_trainer-bilevel_epochs-100_arch-r/checkpoint/b.pth.tar", "0.1"),
        ("CIFAR10_resnet20s_Unstructured_BiP_K0.0092/prune/x/checkpoint/b.pth", "0.0092"),
        ("e/prune/digits_net-bilevel-unstructured-k0.25-s1-ab/checkpoint/b.pth.tar", "0.25"),
        ("e/pretrain/digits_net-base-dense-k1-s1234-52de/checkpoint/b.pth.tar", "1"),
        ("rank0.5/k20/mask2.pth", None),
    ],
)  # fmt: skip
def test_k_in_names(path: str, k: str | None) -> None:
    assert k_in_name(Path(path)) == (None if k is None else Decimal(k))


# Library weights


def test_library_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    torch.manual_seed(3)
    state = torchvision.models.resnet18(num_classes=1000).state_dict()
    asked = []

    def fetch(self: Any, *_: Any, **__: Any) -> Any:
        asked.append(self.name)
        return state

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", fetch)
    settings = {"arch": "ResNet18", "image_dim": 32, "reset_head": True, "layer_type": "dense"}
    cifar = ["--dataset", "CIFAR10", "--data-dir", str(tmp_path)]
    argv = [*arguments("finetune", tmp_path, **settings), *cifar, "--pretrained"]
    config = load_config(argv)
    assert config.source_run == "torchvision:DEFAULT"
    named = load_config([*argv[:-1], "--source-net", "torchvision:IMAGENET1K_V1"])
    assert named.run_id != config.run_id
    from bip.models import library

    assert library.weights("torchvision:DEFAULT", "ResNet18") is state
    assert asked == ["IMAGENET1K_V1"]
    for source, arch, word in (
        ("torchvision:V9", "torchvision/resnet18", "IMAGENET1K_V1"),
        ("torchvision:DEFAULT", "resnet20s", "resnet20s"),
        ("timm:v9", "timm/resnet18", "a1_in1k"),
    ):
        with pytest.raises(UserError, match=word):
            library.weights(source, arch)
    with pytest.raises(UserError, match=r"pretrained: .*digits_net"):
        load_config([*arguments("pretrain", tmp_path), "--pretrained"])
    with pytest.raises(UserError, match=r"pretrained: .*--source-net"):
        load_config([*argv, "--source-net", "other.pth"])
