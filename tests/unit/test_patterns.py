"""Layer types n:m: exact masks against a brute-force reference, k, every method, export."""

from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from bip.__main__ import main
from bip.config import RunConfig, load_config
from bip.errors import UserError
from bip.exporting.formats.semi_structured import rows, unfold
from bip.methods import methods
from bip.pruning.choices import PATTERNS
from bip.pruning.layout import Segment, find_prunable
from bip.pruning.select import Alone
from bip.pruning.select_cpu import CpuSelector
from bip.pruning.state import PrunedParameters
from bip.training.checkpoint import layer_masks, read_checkpoint
from tests.runs import Finished, arguments, often, source_for, train, train_until
from tests.unit.networks import small_net
from tests.unit.test_masks import VALUES

PRUNING = [name for name, method in methods().items() if method.mode == "prune"]
SHORT = {"layer_type": "2:4", "epochs": 2, "batch_size": 300}


def network() -> nn.Sequential:
    """Layers whose rows take groups of 4 and 8, and two that take neither."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 2), nn.Conv2d(8, 2, (1, 2)), nn.Conv1d(8, 3, 2), nn.Linear(16, 2),
        nn.Linear(6, 2), nn.Conv2d(16, 4, 1, groups=2),
    )  # fmt: skip


def reference(scores: Tensor, keep: int, of: int) -> Tensor:
    """Group by group along dimension 1, by a sort of (falling |score|, index)."""
    matrix = scores.movedim(1, -1).reshape(-1, scores.shape[1])
    mask = torch.zeros_like(matrix)
    for row, values in enumerate(matrix.abs().tolist()):
        for start in range(0, len(values), of):
            best = sorted(range(start, start + of), key=lambda i: (-values[i], i))
            mask[row, best[:keep]] = 1
    return mask.view(scores.movedim(1, -1).shape).movedim(-1, 1)


@pytest.mark.parametrize("layer_type", PATTERNS)
@given(data=st.data())
def test_masks_are_exact(layer_type: Any, data: st.DataObject) -> None:
    keep, of = PATTERNS[layer_type]
    layout = find_prunable(network(), layer_type)
    assert [t.name for t in layout.tensors] == [f"{n}.weight" for n in (1, 2, 3, 5)]
    assert layout.dense == ("0.weight", "4.weight")
    pruned = PrunedParameters(network(), layout, Decimal(keep) / of, "layer")
    values = data.draw(hnp.arrays(np.float32, layout.size, elements=VALUES))
    with torch.no_grad():
        pruned.scores.copy_(torch.from_numpy(values))
    pruned.update_mask_and_z()
    for scores, mask, z, weights in zip(
        *(pruned.views(flat) for flat in (pruned.scores.detach(), pruned.mask)),
        pruned.z, pruned.views(pruned.weights.detach()), strict=True,
    ):  # fmt: skip
        assert torch.equal(mask.float(), reference(scores, keep, of))
        assert torch.equal(z.detach(), mask * weights)
        groups = rows(mask).view(-1, of)  # side by side in the matrix that torch packs
        assert (groups.sum(1) == keep).all()
    ranked = CpuSelector((Segment("all", 0, layout.size, pruned.kept()),), Alone())
    again = ranked.update(pruned.mask.float(), torch.zeros_like(pruned.mask))
    assert torch.equal(again, pruned.proof), "the proof is that of the same mask by a ranking"


def test_a_nan_is_named() -> None:
    net = small_net()
    pruned = PrunedParameters(net, find_prunable(net, "1:4"), Decimal("0.25"), "layer")
    with torch.no_grad():
        pruned.scores[-1] = torch.nan
    with pytest.raises(UserError, match=r"scores of linear\.weight are NaN"):
        pruned.update_mask()


# k


def test_a_pattern_gives_k(tmp_path: Path) -> None:
    def config(*more: str, **settings: Any) -> RunConfig:
        return load_config([*arguments("random", tmp_path, **settings), *more])

    for layer_type, k in (("2:4", "0.5"), ("1:4", "0.25"), ("4:8", "0.5")):
        found = config(layer_type=layer_type)  # whatever k the file has
        assert (found.k_text, found.ranking_scope) == (k, "layer")
        assert config(layer_type=layer_type, k=float(k)).run_id == found.run_id
        assert not {":", "/"} & {*found.run_id}
    with pytest.raises(UserError, match=r"k: layer_type 2:4 keeps 0\.5, not 0\.3"):
        config(layer_type="2:4", k=0.3)
    assert any("scope" in line for line in config(layer_type="2:4", scope="global").warnings())
    saved = tmp_path / "saved.yml"
    for text in (found.to_yaml(), found.to_yaml().replace("'4:8'", "4:8")):  # YAML's number 248
        saved.write_text(text)
        assert load_config(["--configs", str(saved)]).run_id == found.run_id


# Runs


@pytest.mark.parametrize("name", PRUNING)
def test_every_method_keeps_the_pattern_or_is_refused(
    name: str, source: Path, tmp_path: Path
) -> None:
    settings = SHORT | often(name) | source_for(name, source, source)
    if name == "rigl":
        with pytest.raises(UserError, match=r"layer_type: rigl .* give unstructured"):
            load_config(arguments(name, tmp_path, **settings))
        return
    run = train(name, tmp_path, **settings)
    for mask in layer_masks(read_checkpoint(run.best)).values():
        assert (rows(mask).view(-1, 4).sum(1) == 2).all()
    assert run.result["kept"] * 2 == run.result["total"]
    assert run.result["empty_layers"] == []


@pytest.fixture(scope="module")
def pattern_run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return train("bip", tmp_path_factory.mktemp("2of4"), source_net=source, **SHORT)


def test_resumed_and_fine_tuned(pattern_run: Finished, source: Path, tmp_path: Path) -> None:
    train_until(3, "bip", tmp_path, source_net=source, **SHORT)
    resumed = train("bip", tmp_path, source_net=source, **SHORT)
    assert resumed.losses == pattern_run.losses
    assert resumed.result["weights_sha256"] == pattern_run.result["weights_sha256"]
    assert pattern_run.losses, "the mask moved"
    tuned = train("finetune", tmp_path, source_net=pattern_run.folder, layer_type="2:4")
    assert tuned.result["mask_sha256"] == pattern_run.result["mask_sha256"]


def test_commands(
    pattern_run: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best, top1 = str(pattern_run.best), f"top1 {pattern_run.result['top1']:.2f}%"
    for out in ("a.pth", "a.safetensors"):
        assert main(["export", best, str(tmp_path / out), "--batch", "0"]) == 0
    for path in (best, str(tmp_path / "a.pth"), str(tmp_path / "a.safetensors")):
        assert main(["evaluate", path]) == 0
        assert top1 in capsys.readouterr().out
    assert main(["inspect", best]) == 0
    shown = capsys.readouterr().out
    assert "2:4, k 0.5" in shown
    assert "above the threshold" not in shown
    assert main(["compare", best, str(tmp_path / "a.pth")]) == 0
    assert " 1.0000" in capsys.readouterr().out
    refused = {"2:4": ["GPU", "dense"], "reference": ["2:4", "dense"], "sparse": ["2:4", "dense"]}
    for name, named in refused.items():
        if name == "2:4" and torch.cuda.is_available():
            continue
        suffix = "pth.tar" if name == "reference" else "pt"
        words = ["export", best, str(tmp_path / f"b.{suffix}"), "--format", name]
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert all(word in error for word in named), error
    assert not list(tmp_path.glob("b.*"))


def test_a_convolution_by_the_matrix_that_is_packed() -> None:
    torch.manual_seed(0)
    options: Sequence[dict[str, Any]] = (
        {"kernel_size": 1}, {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 2), "stride": 2, "padding": (2, 0), "dilation": (1, 2), "bias": False},
    )  # fmt: skip
    for given_options in options:
        plain = nn.Sequential(nn.Conv2d(8, 6, **given_options))
        images = torch.randn(3, 8, 9, 11)
        expected = plain(images)
        assert list(unfold(plain, ["0.weight"])) == ["0.weight"]
        assert not isinstance(plain[0], nn.Conv2d)
        torch.testing.assert_close(plain(images), expected)
