"""Networks without their pruned channels: the same outputs, and no channel that does nothing."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import bip
from bip import models
from bip.__main__ import main
from bip.errors import UserError
from bip.exporting.shrink import Shrunk, rebuild, shrink
from bip.pruning.layout import find_prunable
from bip.training.macs import macs_of
from tests.runs import Finished

NETWORKS = ["torchvision/densenet121", "torchvision/resnet18"] + [
    name
    for name in ("digits_net", "resnet20s", "resnet18", "vgg8_bn", "vgg6", "wrn_28_1")
    if name in models.names()
]


class Block(nn.Module):
    """(N, channels, H, W) -> (N, more, H', W'), by one of several ways that networks are built."""

    def __init__(self, channels: int, draw: random.Random) -> None:
        super().__init__()
        self.kind = draw.choice(["sum", "pre", "cat", "gate", "pad", "depthwise", "grouped"])
        self.inplace, self.pool = draw.random() < 0.5, draw.choice(["max", "avg", "none"])
        width = draw.randint(2, 6)
        stride = draw.choice([1, 2])
        options: dict[str, Any] = {
            "padding": draw.choice([0, 1]), "bias": draw.random() < 0.5,
            "padding_mode": draw.choice(["zeros", "zeros", "reflect"]),
        }  # fmt: skip
        self.trim = 1 - options["padding"]
        self.norm0, self.norm1 = nn.BatchNorm2d(channels), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, **options)
        self.step = stride
        groups = {"depthwise": width, "grouped": 2}.get(self.kind, 1)
        if self.kind == "grouped":
            width += width % 2
            self.conv1 = nn.Conv2d(channels, width, 3, stride, **options)
            self.norm1 = nn.BatchNorm2d(width)
        self.middle = nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=options["bias"])
        out = channels + draw.choice([0, 2])
        self.extra = (out - channels) // 2 if self.kind == "pad" else 0
        out = out if self.kind == "pad" else channels
        self.conv2, self.norm2 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.gate = nn.Conv2d(out, out, 1)
        self.out = channels + out if self.kind == "cat" else out

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norm0(x)) if self.kind == "pre" else x
        inner = F.relu(self.norm1(self.conv1(inner)), inplace=self.inplace)
        if self.kind in ("depthwise", "grouped"):
            inner = torch.sigmoid(self.middle(inner))  # of 0 it is a half
        inner = self.norm2(self.conv2(inner))
        if self.kind == "gate":
            inner = inner * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(inner, 1)))
        short = x[:, :, self.trim :, self.trim :] if self.trim else x
        short = short[:, :, : short.shape[2] - self.trim, : short.shape[3] - self.trim]
        short = F.pad(short[:, :, :: self.step, :: self.step], (0, 0, 0, 0, self.extra, self.extra))
        out = torch.cat([short, inner], 1) if self.kind == "cat" else inner + short
        if self.pool == "max":
            out = F.max_pool2d(out, 2, 1, 1)
        elif self.pool == "avg":
            out = F.avg_pool2d(out, 3, 1, 1)
        return F.relu(out, inplace=self.inplace)


class RandomNet(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.stem = nn.Conv2d(3, draw.randint(3, 6), 3, padding=1)
        channels, blocks = self.stem.out_channels, []
        for _ in range(draw.randint(1, 3)):
            blocks.append(Block(channels, draw))
            channels = blocks[-1].out
        self.blocks = nn.Sequential(*blocks)
        self.side = draw.choice([1, 2])
        self.head = nn.Linear(channels * self.side**2, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.blocks(torch.tanh(self.stem(x)))
        out = F.adaptive_avg_pool2d(out, self.side)
        logits: Tensor = self.head(out.view(out.size(0), -1))
        return logits


@torch.no_grad()
def masked(network: nn.Module, layer_type: Any, k: float, seed: int = 0) -> nn.Module:
    """Random groups at 0, batch-norm away from its start: pruned filters give other constants."""
    draw = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean):
                values.normal_(0.5, 0.5, generator=draw)
            module.running_var.uniform_(0.5, 2, generator=draw)
            module.weight[torch.rand(len(module.weight), generator=draw) < 0.1] = 0
    weights = dict(network.named_parameters())
    for tensor in find_prunable(network, layer_type).tensors:
        shape = [n if tensor.axis in (None, d) else 1 for d, n in enumerate(tensor.shape)]
        weights[tensor.name].mul_((torch.rand(shape, generator=draw) < k).float())
    return network.double().eval()


@torch.no_grad()
def compacted(network: nn.Module, images: Tensor) -> tuple[nn.Module, Shrunk]:
    """The smaller network, made from plain types and tensors alone as from a file."""
    before = network(images)
    shrunk = shrink(network, images)
    small = rebuild(network, json.loads(json.dumps(shrunk.spec)))
    small.load_state_dict(shrunk.state)
    assert torch.allclose(small(images), before, rtol=0, atol=1e-9)
    assert torch.equal(network(images), before), "the network itself is left as it was"
    return small, shrunk


@given(st.integers(0, 10**6), st.sampled_from(["filter", "unstructured"]), st.floats(0, 1))
@settings(max_examples=60)
def test_a_random_network_keeps_its_outputs(seed: int, layer_type: str, k: float) -> None:
    torch.manual_seed(seed)
    network = masked(RandomNet(seed), layer_type, k, seed)
    compacted(network, torch.randn(2, 3, 14, 14, dtype=torch.float64))


@pytest.mark.parametrize("layer_type", ["filter", "channel"])
@pytest.mark.parametrize("k", [0.5, 0.0])
@pytest.mark.parametrize("arch", NETWORKS)
def test_networks_keep_their_outputs_and_lose_the_rest(
    arch: str, k: float, layer_type: Any
) -> None:
    """With k = 0 nothing is kept of any layer: the output is one constant."""
    torch.manual_seed(0)
    network = models.build(arch, 5)
    network = masked(network, layer_type, k)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    small, shrunk = compacted(network, images)
    assert not shrunk.whole
    weights = dict(network.named_parameters())
    for name, layer in small.named_modules():
        if isinstance(layer, nn.Conv2d):
            whole = (weights[f"{name}.weight"] != 0).flatten(2).any(2)
            assert layer.out_channels <= max(1, int(whole.any(1).sum()))
            assert layer.in_channels <= 1 + int(whole.any(0).sum()), "and one of ones at most"
    ratio = macs_of(small, images)[""] / macs_of(network, images)[""]
    assert ratio < (0.55 if k else 0.1)


def test_shapes_are_those_of_the_arithmetic() -> None:
    """As the mask is final a pruned filter gives 0: kept filters times kept inputs are left."""
    torch.manual_seed(0)
    network = masked(models.build("resnet20s", 10), "filter", 0.4)
    convs = {n: m for n, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    kept = {n: (m.weight != 0).flatten(1).any(1) for n, m in convs.items()}
    with torch.no_grad():
        for name, filters in kept.items():
            norm = network.get_submodule(name.replace("conv", "bn"))
            assert isinstance(norm, nn.BatchNorm2d)
            norm.weight.fill_(1.5).mul_(filters)
            norm.bias.mul_(filters)
    small, _ = compacted(network, torch.randn(2, 3, 32, 32, dtype=torch.float64))
    for name, layer in small.named_modules():
        if isinstance(layer, nn.Conv2d) and name.endswith("conv2"):
            inside = kept[name.replace("conv2", "conv1")]
            assert layer.weight.shape[:2] == (kept[name].sum(), inside.sum())


class Undecided(nn.Module):
    """Cannot be traced: its way depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if float(x.sum()) > 0 else -self.conv(x)


def test_a_part_that_cannot_be_traced_stays_whole() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), Undecided(), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 4, 3)]
    network = masked(nn.Sequential(*layers), "filter", 0.5)
    small, shrunk = compacted(network, torch.randn(2, 3, 14, 14, dtype=torch.float64))
    assert shrunk.whole == ["2"]
    kept = [int((network.get_submodule(n).weight != 0).flatten(1).any(1).sum()) for n in "034"]
    convs = [small.get_submodule(n) for n in "034"]
    assert [conv.weight.shape[0] for conv in convs[:2]] == kept[:2]
    assert small.get_submodule("2.conv").weight.shape[:2] == (6, 6)


def test_the_command_writes_what_load_compact_reads(
    pruned_runs: dict[str, Finished], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for layer_type in ("filter", "channel"):
        run, out = pruned_runs[layer_type], tmp_path / f"{layer_type}.safetensors"
        assert main(["export", str(run.best), str(out), "--format", "compact"]) == 0
        rows = {line[:18].strip(): line.split() for line in capsys.readouterr().out.splitlines()}
        assert int(rows["bytes"][-2].replace(",", "")) == out.stat().st_size
        small = bip.load_compact(out)
        assert int(rows["parameters"][-2].replace(",", "")) == sum(
            p.numel() for p in small.parameters()
        )
        assert float(rows["MACs of an image"][-1]) < 0.5
        network = models.build("digits_net", 10, 1).eval()
        weights = {n: w * run.masks[n] if n in run.masks else w for n, w in run.weights.items()}
        network.load_state_dict(weights)
        images = torch.randn(4, 1, 8, 8)
        with torch.no_grad():
            assert torch.allclose(small(images), network(images), atol=1e-5)


def test_files_that_load_compact_refuses(
    pruned_runs: dict[str, Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no code that a file names is run."""
    dense, garbage = tmp_path / "dense.safetensors", tmp_path / "garbage.safetensors"
    assert main(["export", str(pruned_runs["filter"].best), str(dense), "--batch", "0"]) == 0
    garbage.write_bytes(dense.read_bytes()[:1000])
    foreign, changed = tmp_path / "foreign.safetensors", tmp_path / "changed.safetensors"
    facts = {"format": "compact", "version": "1", "num_classes": "10", "channels": "1"}
    code = tmp_path / "harm.py"
    code.write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    save_file({}, foreign, facts | {"arch": "harm:net", "shapes": "{}"})
    save_file({}, changed, facts | {"arch": "digits_net", "shapes": '{"conv9": {}}'})
    files = {dense: "compact", garbage: "safetensors", tmp_path / "no": "No such"}
    for path, word in (files | {foreign: "harm:net", changed: "conv9"}).items():
        with pytest.raises(UserError, match=word) as error:
            bip.load_compact(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
