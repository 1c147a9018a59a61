"""`bip export` in every format but compact, `bip inspect` and `bip compare`, from the outside."""

import dataclasses
import json
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from safetensors import safe_open

from bip import models
from bip.__main__ import main
from bip.distributed.group import Group
from bip.evaluation import evaluate
from bip.exporting import smaller
from bip.exporting.formats import formats, reference
from bip.exporting.formats.sparse import load_sparse
from bip.exporting.inspect import inspection
from bip.exporting.model import Facts, read_model
from bip.training.checkpoint import pack_mask, write_checkpoint
from tests.distributed.harness import run_ranks
from tests.runs import LAYER_TYPES, Finished, train

IMAGES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["pretrain", *LAYER_TYPES])
def finished(
    request: pytest.FixtureRequest, dense: Finished, pruned_runs: dict[str, Finished]
) -> Finished:
    return {"pretrain": dense, **pruned_runs}[request.param]


def effective(run: Finished) -> dict[str, torch.Tensor]:
    """z = m ⊙ θ."""
    return {n: w * run.masks[n] if n in run.masks else w for n, w in run.weights.items()}


class Grouped(torch.nn.Module):
    """Of one grouped convolution; called by --arch."""

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(channels, 4, 3)
        self.second = torch.nn.Conv2d(4, 4, 3, groups=2)
        self.linear = torch.nn.Linear(4, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(torch.relu(self.second(self.first(x))).mean((2, 3)))
        return logits


@torch.no_grad()
def outputs(state: dict[str, torch.Tensor]) -> torch.Tensor:
    network = models.build("digits_net", 10, 1).eval()
    network.load_state_dict(state)
    logits: torch.Tensor = network(IMAGES)
    return logits


def export(run: Finished, out: Path, *words: str) -> Path:
    assert main(["export", str(run.best), str(out), "--batch", "0", *words]) == 0
    return out


def published(run: Finished, folder: Path) -> Path:
    """The run's model in the published layout."""
    return export(run, folder / f"{run.result['layer_type']}.pth.tar", "--format", "reference")


def flags(run: Finished) -> list[str]:
    """What a published file does not record."""
    return ["--k", str(run.result["k"]), "--layer-type", run.result["layer_type"]]


def test_dense_is_an_ordinary_network(finished: Finished, tmp_path: Path) -> None:
    state = torch.load(export(finished, tmp_path / "a.pth"), weights_only=True)
    with safe_open(export(finished, tmp_path / "a.safetensors"), "pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        metadata = stored.metadata()
    assert metadata == state["metadata"]
    assert metadata["arch"] == "digits_net"
    assert json.loads(metadata["config"]) == finished.state["config"]
    for found in (tensors, state["state_dict"]):
        assert set(found) == set(finished.weights)
        assert all(torch.equal(found[n], z) for n, z in effective(finished).items())


def test_reference_gives_the_same_model_back(finished: Finished, tmp_path: Path) -> None:
    path = published(finished, tmp_path)
    state = torch.load(path, weights_only=True)
    assert {"state_dict", "epoch", "arch", "best_prec1"} == set(state)
    dims = {"dense": (), "unstructured": (2, 4)}.get(finished.result["layer_type"], (4,))
    layers = {n.removesuffix("weight") for n, w in finished.weights.items() if w.dim() in dims}
    scores = {n for n in state["state_dict"] if n.endswith("popup_scores")}
    assert scores == {f"{layer}popup_scores" for layer in layers}, "the first convolution's too"
    _, k, _, layer_type = flags(finished)
    given = Facts(k=k, layer_type=layer_type) if finished.masks else None  # type: ignore[arg-type]
    again = read_model(path, given)
    for name, mask in finished.masks.items():
        assert torch.equal(again.masks[name], mask)
    assert torch.equal(outputs(again.network.state_dict()), outputs(effective(finished)))


def test_reference_moves_scores_apart_that_do_not_give_the_mask(
    pruned_runs: dict[str, Finished], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mask that stopped moving before the scores did."""
    run, state = pruned_runs["unstructured"], pruned_runs["unstructured"].state
    flat = torch.cat([mask.flatten() for mask in run.masks.values()]).roll(7)
    path, out = tmp_path / "a.pth.tar", tmp_path / "b.pth.tar"
    write_checkpoint(path, state | {"mask": pack_mask(flat)})
    assert main(["export", str(path), str(out), "--format", "reference", "--batch", "0"]) == 0
    assert "moved apart" in capsys.readouterr().out
    again = read_model(out, Facts(k="0.3", layer_type="unstructured"))
    assert torch.equal(torch.cat([mask.flatten() for mask in again.masks.values()]), flat)


def test_what_the_published_rule_cannot_express_is_counted() -> None:
    """It prunes the image's colours in channel mode, and keeps 801 of 1,000 at 0.8."""
    stem, inner = torch.rand(4, 3, 3, 3) + 1, torch.rand(4, 4, 3, 3) + 1
    masks = {"inner": torch.ones(4, 4, 3, 3)}
    wrong = reference.differing(
        {"stem": stem, "inner": inner}, masks, "channel", "layer", Decimal("0.3")
    )
    assert wrong == {"stem": 2 * stem.numel() // 3, "inner": 2 * inner.numel() // 4}
    scores = {"a": torch.arange(1.0, 1001.0)}
    ours = {"a": (scores["a"] > 200).float()}
    assert reference.differing(scores, ours, "unstructured", "global", Decimal("0.8")) == {"a": 1}
    assert reference.differing(scores, ours, "unstructured", "layer", Decimal("0.7")) == {"a": 100}


@pytest.mark.parametrize("of", ["dense", "compact"])
def test_onnx_agrees_for_batches_of_any_size(
    of: str, pruned_runs: dict[str, Finished], tmp_path: Path
) -> None:
    run = pruned_runs["filter"]
    path = export(run, tmp_path / f"{of}.onnx", "--format", "onnx", "--of", of)
    session = onnxruntime.InferenceSession(path)
    expected = outputs(effective(run))
    for size in (1, 5):
        (found,) = session.run(None, {"images": IMAGES[:size].numpy()})
        assert torch.allclose(torch.from_numpy(found), expected[:size], atol=1e-4)
    assert path.stat().st_size < (70_000 if of == "compact" else 220_000)


@pytest.mark.parametrize("layer_type", ["unstructured", "filter"])
def test_networks_of_grouped_convolutions_are_exported(layer_type: str, tmp_path: Path) -> None:
    """Their channels cannot be pruned, which no other layer type asks for."""
    arch = f"{__name__}:Grouped"
    run = train("snip", tmp_path, arch=arch, layer_type=layer_type, k=0.5, max_steps=1)
    state = torch.load(export(run, tmp_path / "a.pth", "--arch", arch), weights_only=True)
    state = state.get("state_dict", state)
    assert torch.equal(state["second.weight"], effective(run)["second.weight"])


def test_sparse_multiplies_with_csr(pruned_runs: dict[str, Finished], tmp_path: Path) -> None:
    run = pruned_runs["unstructured"]
    path = export(run, tmp_path / "a.pt", "--format", "sparse")
    state = torch.load(path, weights_only=True)["state_dict"]
    for name, mask in run.masks.items():
        assert state[name].layout == torch.sparse_csr
        assert state[name].values().numel() == int(mask.sum())
    with torch.no_grad():
        assert torch.allclose(load_sparse(path)(IMAGES), outputs(effective(run)), atol=1e-4)


def test_the_report_of_an_export(
    pruned_runs: dict[str, Finished], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.pt"
    best = str(pruned_runs["unstructured"].best)
    assert main(["export", best, str(out), "--format", "sparse", "--batch", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines if str(out) not in line)
    rows = {line[:18].strip(): line.split()[-3:] for line in lines}
    assert int(rows["bytes"][1].replace(",", "")) == out.stat().st_size
    dense = models.build("digits_net", 10, 1)
    assert int(rows["parameters"][0].replace(",", "")) == sum(p.numel() for p in dense.parameters())
    assert float(rows["MACs of an image"][2]) == pytest.approx(0.3, abs=0.05)
    assert all(float(number) > 0 for number in rows["ms of a batch"])


@pytest.mark.parametrize(
    ("run", "out", "words", "named"),
    [
        ("filter", "a.pt", ["--format", "sparse"], ["format", "unstructured", "filter"]),
        ("filter", "a.pt", ["--format", "compact"], ["out", ".safetensors"]),
        ("filter", "a.pt", ["--format", "compakt"], ["format", "compact"]),
        ("filter", "no/a.pt", [], ["out", "no such folder"]),
        ("filter", "a.pt", ["--of", "compact"], ["of", "onnx"]),
        ("filter", "a.pt", ["--k", "0.2"], ["k", "0.3"]),
        ("filter", "a.pt", ["--arch", "resnet20s"], ["arch", "digits_net"]),
        ("published", "a.pt", [], ["--k"]),
        ("published", "a.pt", ["--k", "0.3"], ["--layer-type"]),
        ("published", "a.pt", ["--k", "x", "--layer-type", "filter"], ["k", "'x'"]),
        ("published", "a.pt", ["--k", "0.3", "--layer-type", "2:4"], ["layer_type", "filter"]),
    ],
)
def test_exports_that_are_refused(
    run: str, out: str, words: list[str], named: list[str], pruned_runs: dict[str, Finished],
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    filters = pruned_runs["filter"]
    path = published(filters, tmp_path) if run == "published" else filters.best
    before = sorted(tmp_path.iterdir())
    assert main(["export", str(path), str(tmp_path / out), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert all(word in error for word in named), error
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("package", ["onnxscript", "onnxruntime", "matplotlib.figure"])
def test_a_missing_extra_is_named(
    package: str, pruned_runs: dict[str, Finished], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, package, None)
    best = str(pruned_runs["filter"].best)
    if package.startswith("onnx"):
        argv, extra = ["export", best, str(tmp_path / "a.onnx"), "--format", "onnx"], "[onnx]"
    else:
        argv, extra = ["inspect", best, "--picture", str(tmp_path / "a.png")], "[report]"
    assert main(argv) == 2
    assert extra in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_every_format_has_a_name_of_its_own() -> None:
    assert set(formats()) >= {"dense", "reference", "compact", "onnx", "sparse"}


# inspect and compare


def report(command: str, *words: str, capsys: pytest.CaptureFixture[str]) -> Any:
    assert main([command, *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_inspect_counts_what_is_kept(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    found = report("inspect", str(finished.best), capsys=capsys)
    masks = finished.masks or {n: w != 0 for n, w in finished.weights.items() if w.dim() > 1}
    assert [layer["name"] for layer in found["layers"]] == list(masks)
    for layer in found["layers"]:
        mask = masks[layer["name"]] != 0
        assert (layer["kept"], layer["total"]) == (int(mask.sum()), mask.numel())
        assert layer["dead_filters"] == sum(not bool(row.any()) for row in mask)
    assert (found["kept"], found["dead_layers"]) == (finished.result["kept"], [])
    if finished.masks:
        counted = sum(found["scores"]["kept"]) + sum(found["scores"]["pruned"])
        groups = {"unstructured": found["total"], "filter": 5 * 36, "channel": 4 * 36}
        assert counted == groups[found["layer_type"]]
        assert found["scores"]["pruned_above_threshold"] == 0
        first = published(finished, tmp_path)
        capsys.readouterr()
        again = report("inspect", str(first), *flags(finished), capsys=capsys)
        # A published channel mask has the first convolution's colours too.
        assert [layer for layer in again["layers"] if layer["name"] in masks] == found["layers"]
    picture = tmp_path / "a.png"
    assert main(["inspect", str(finished.best), "--picture", str(picture)]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    assert picture.read_bytes()[1:4] == b"PNG"


def test_inspect_leaves_what_is_kept_by_force_out_of_the_threshold(
    pruned_runs: dict[str, Finished],
) -> None:
    """One balanced ranking keeps the largest filter of a layer however small it is."""
    model = read_model(pruned_runs["filter"].best)
    facts = dataclasses.replace(model.facts, scope="global")
    last = list(model.masks)[-1]
    generator = torch.Generator().manual_seed(0)
    scores = {n: torch.rand(m.shape, generator=generator) for n, m in model.masks.items()}
    scores[last] *= 1e-6
    norms = {n: s.flatten(1).norm(dim=1) / s[0].numel() ** 0.5 for n, s in scores.items()}
    cut = float(torch.cat([norms[n] for n in norms if n != last]).median())
    kept = {n: norm > cut for n, norm in norms.items()}
    kept[last] = norms[last] == norms[last].max()
    masks = {n: kept[n].byte().view(-1, 1, 1, 1).expand_as(s) for n, s in scores.items()}
    config = model.config | {"ranking": "balanced"}
    made = dataclasses.replace(model, facts=facts, scores=scores, masks=masks, config=config)
    found = {layer["threshold"] for layer in inspection(made)["layers"]}
    expected = min(float(norm[norm > cut].min()) for n, norm in norms.items() if n != last)
    assert list(found) == [pytest.approx(expected)]


def test_inspect_warns_of_layer_collapse(
    pruned_runs: dict[str, Finished], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pruned_runs["unstructured"]
    masks = {n: m * 0 if n == "layer1.0.conv2.weight" else m for n, m in run.masks.items()}
    mask = pack_mask(torch.cat([m.flatten() for m in masks.values()]))
    path = tmp_path / "a.pth.tar"
    write_checkpoint(path, run.state | {"mask": mask})
    assert main(["inspect", str(path)]) == 0
    (line,) = [li for li in capsys.readouterr().out.splitlines() if li.startswith("warning")]
    assert "layer1.0.conv2" in line


def test_compare_states_the_largest_iou(
    pruned_runs: dict[str, Finished], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pruned_runs["unstructured"]
    wide, narrow = str(published(run, tmp_path)), str(run.best)
    capsys.readouterr()
    words = ["--k", "0.6", "--layer-type", "unstructured"]
    assert main(["compare", wide, narrow, *words]) == 2, "ours records another k"
    assert "0.3" in capsys.readouterr().err
    words[1] = "0.6,0.3"
    picture = tmp_path / "a.png"
    found = report("compare", wide, narrow, *words, "--picture", str(picture), capsys=capsys)
    assert found["k"] == ["0.6", "0.3"]
    assert found["kept"] == [2 * run.result["kept"], run.result["kept"]]
    assert found["iou"] == found["largest_iou"] == pytest.approx(0.5), "one mask holds the other"
    assert all(layer["iou"] == layer["largest_iou"] for layer in found["layers"])
    assert picture.read_bytes()[1:4] == b"PNG"


# bip evaluate of files that are no checkpoint


def count_exported(group: Group, words: list[str]) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smaller, "join", lambda _folder: group)
        return evaluate(words, "bip evaluate")


@pytest.mark.parametrize("format", ["compact", "onnx", "sparse"])
def test_exports_evaluate_as_the_run_did(
    format: str, pruned_runs: dict[str, Finished], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = pruned_runs["unstructured" if format == "sparse" else "filter"]
    suffix = {"compact": "safetensors", "sparse": "pt"}.get(format, format)
    path = export(run, tmp_path / f"a.{suffix}", "--format", format)
    capsys.readouterr()
    assert main(["evaluate", str(path)]) == 0
    assert f"top1 {run.result['top1']:.2f}% " in capsys.readouterr().out
    if format == "sparse":
        return
    for found in run_ranks(2, count_exported, [str(path), "--test-batch-size", "50"]):
        assert found["top1"] == run.result["top1"], "exact over ranks"
    for words, key in ((["--num-classes", "7"], "num_classes"), (["--dataset", "CIFAR10"], None)):
        assert main(["evaluate", str(path), *words, "--data-dir", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert key is None or key in error
    path.write_bytes(path.read_bytes()[:500])
    assert main(["evaluate", str(path)]) == 2
    assert str(path) in capsys.readouterr().err
