"""The networks: published names, published sizes, any image size."""

import copy
import csv
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bip import models
from bip.__main__ import main
from bip.errors import UserError
from bip.methods import methods
from tests.runs import LAYER_TYPES
from tests.unit.networks import CLASSES, make_setup

ZOO = {  # counts of the published modules
    row["arch"]: row
    for row in csv.DictReader(
        (Path(__file__).parents[1] / "fixtures" / "zoo.tsv").open(), delimiter="\t"
    )
}
DEAD_BLOCK = {  # parameters of sub_block1, which the published WRNs hold and never use
    "wrn_28_10": 1_640_672, "wrn_28_4": 269_216, "wrn_28_1": 18_688, "wrn_34_10": 2_102_112,
    "wrn_40_2": 107_232,
}  # fmt: skip
CAPITALS_1000 = {"ResNet18": 11_689_512, "ResNet50": 25_557_032}  # torchvision's documentation


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def facts(network: nn.Module) -> dict[str, int]:
    """What zoo.tsv counts, of one network."""
    modules = list(network.modules())
    convs = [m for m in modules if isinstance(m, nn.Conv2d)]
    linears = [m for m in modules if isinstance(m, nn.Linear)]
    return {
        "total_params_10cls": count(network),
        "prunable_unstructured_10cls": sum(m.weight.numel() for m in [*convs, *linears]),
        "conv_layers": len(convs),
        "linear_layers": len(linears),
        "bn_layers": sum(isinstance(m, nn.BatchNorm2d) for m in modules),
        "buffer_elems": sum(b.numel() for b in network.buffers()),
        "state_dict_entries": len(network.state_dict()),
        "sum_conv_out_channels": sum(m.out_channels for m in convs),
        "sum_conv_in_channels": sum(m.in_channels for m in convs),
    }


@pytest.mark.parametrize("arch", ZOO)
def test_every_published_network_has_the_published_counts(arch: str) -> None:
    row = ZOO[arch]
    with torch.device("meta"):
        network = models.build(arch, 10)
        found = facts(network)
        if arch in DEAD_BLOCK:
            dead = copy.deepcopy(network.get_submodule("block1"))
            assert count(dead) == DEAD_BLOCK[arch]
            found = {name: found[name] + value for name, value in facts(dead).items()}
        assert found == {name: int(row[name]) for name in found}
        for classes in (100, 200, 1000):
            larger = count(models.build(arch, classes)) + DEAD_BLOCK.get(arch, 0)
            assert larger == int(row[f"total_params_{classes}cls"])
        layers = [n for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert f"{layers[0]}.weight" == row["first_weight"]
        assert f"{layers[-1]}.weight" == row["last_weight"]


def test_the_zoo_is_all_there() -> None:
    assert set(models.names()) == {*ZOO, "digits_net"}
    for arch, parameters in CAPITALS_1000.items():
        with torch.device("meta"):
            assert count(models.build(arch, 1000)) == parameters


def test_digits_net_is_small() -> None:
    assert 30_000 <= count(models.build("digits_net", 10, 1)) <= 60_000


def test_cifar_depths() -> None:
    """N in resnetNs counts the convolutions and the head."""
    for depth in (20, 32, 44, 56):
        with torch.device("meta"):
            network = models.build(f"resnet{depth}s", 10)
        layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert len(layers) == depth


@pytest.mark.parametrize("arch", models.names())
def test_every_name_builds_and_takes_several_image_sizes(arch: str) -> None:
    """Every linear layer has a bias, and no layer is special."""
    channels = 1 if arch == "digits_net" else 3
    # The meta device runs shape inference only, so that a ResNet50 costs nothing.
    with torch.device("meta"):
        network = models.build(arch, 7, channels)
        for size in (8, 9, 32, 64):
            assert network(torch.empty(2, channels, size, size)).shape == (2, 7)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            assert module.bias is not None
        if any(True for _ in module.parameters(recurse=False)):
            assert type(module) in (nn.Conv2d, nn.BatchNorm2d, nn.Linear)


def parameter_names(arch: str) -> list[str]:
    with torch.device("meta"):
        return [name for name, _ in models.build(arch, 10).named_parameters()]


def test_parameter_names_are_the_published_ones() -> None:
    expected = ["conv1", "bn1"]
    for stage, block in itertools.product((1, 2, 3, 4), (0, 1)):
        parts = [f"{part}{i}" for i in (1, 2) for part in ("conv", "bn")]
        parts += ["shortcut.0", "shortcut.1"] if stage > 1 and block == 0 else []
        expected += [f"layer{stage}.{block}.{part}" for part in parts]
    expected.append("linear")
    affine = {n for n in expected if ".bn" in f".{n}" or n.endswith("shortcut.1") or n == "linear"}
    assert parameter_names("resnet18") == [
        f"{name}.{part}" for name in expected for part in ("weight", "bias")[: 1 + (name in affine)]
    ]

    bottlenecks = parameter_names("resnet50")
    assert "layer1.0.shortcut.0.weight" in bottlenecks  # 64 -> 256 channels
    assert {"layer4.2.conv3.weight", "layer4.2.bn3.bias"} <= set(bottlenecks)
    assert "layer4.2.shortcut.0.weight" not in bottlenecks

    option_a = parameter_names("resnet20s")
    assert option_a[:3] == ["conv1.weight", "bn1.weight", "bn1.bias"]
    assert option_a[-2:] == ["fc.weight", "fc.bias"]
    assert "layer3.2.conv2.weight" in option_a
    assert not [name for name in option_a if "shortcut" in name]

    assert parameter_names("ResNet18") == parameter_names("torchvision/resnet18")
    assert "layer2.0.downsample.0.weight" in parameter_names("ResNet18")


def test_option_a_shortcut_subsamples_and_pads_with_zeros() -> None:
    network = models.build("resnet20s", 10)
    shortcut = network.get_submodule("layer2.0.shortcut")
    x = torch.randn(2, 16, 6, 6)
    out = shortcut(x)
    assert out.shape == (2, 32, 3, 3)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_resnet20s_initialisation_is_kaiming_normal_by_seed() -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        weights.append(models.build("resnet20s", 10).get_parameter("layer3.2.conv2.weight"))
    assert torch.equal(*weights)
    assert weights[0].std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    # Normal, not uniform: a uniform distribution of this std ends at 1.73 std.
    assert weights[0].abs().max() > 3 * weights[0].std()


@pytest.mark.parametrize(
    "arch", ["resnet20s", "resnet18", "digits_net", "vgg4_bn", "vgg16_bn", "vgg2", "wrn_28_1"]
)
def test_every_parameter_receives_a_gradient(arch: str) -> None:
    network = models.build(arch, 10, 1)
    network(torch.randn(4, 1, 8, 8)).logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


@pytest.mark.parametrize("name", ["vgg11_bn", "mobilenet_v2", "googlenet", "inception_v3"])
def test_torchvision_names_build_and_return_a_tensor_in_training_mode(name: str) -> None:
    with torch.device("meta"):
        network = models.build(f"torchvision/{name}", 7).train()
        logits = network(torch.empty(2, 3, 96, 96))
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (2, 7)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("resnet20", "resnet20s"),
        ("resnet_18", "resnet18"),
        ("ResNet-50", "ResNet50"),
        ("digitsnet", "digits_net"),
        ("vgg16_bm", "vgg16_bn"),
        ("torchvision/resnet-50", "torchvision/resnet50"),
        ("timm/resnet_18", "timm/resnet18"),
        ("densenet121", "torchvision/densenet121"),  # the same name, elsewhere
        ("wrn_28_2", None),  # wrn_28_1 and swin_v2_t are other networks
        ("vgg19_bn_", None),
        ("resnet20s_", "resnet20s"),
        ("", None),
    ],
)
def test_an_unknown_name_suggests_a_spelling_only(wrong: str, nearest: str | None) -> None:
    with pytest.raises(UserError, match="unknown network") as error:
        models.build(wrong, 10)
    assert f"'{wrong}'" in str(error.value)
    assert "\n" not in str(error.value)
    assert "bip archs" in str(error.value)
    quoted = str(error.value).split("`")[0].split("'")[1::2]
    assert quoted == [wrong] + [nearest] * (nearest is not None)


@pytest.mark.parametrize("arch", ["ResNet18", "torchvision/resnet18"])
def test_torchvision_networks_name_the_channels_they_need(arch: str) -> None:
    with pytest.raises(UserError, match=r"resnet18 .*3-channel"):
        models.build(arch, 10, channels=1)


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("arch", ["vgg4_bn", "wrn_28_1", "resnet20s"])
def test_one_step_of_every_method_on_a_small_member(arch: str, layer_type: Any) -> None:
    torch.manual_seed(0)
    start = models.build(arch, CLASSES)
    for name, method in methods().items():
        if not method.has_mask:
            continue
        kind = "finetune" if method.mode == "finetune" else name
        setup = make_setup(kind, layer_type, network=copy.deepcopy(start))
        reports = setup.method.step(0)
        assert all(torch.isfinite(report.loss) for report in reports)
        assert setup.pruned is not None
        for z, weights, mask in zip(
            setup.pruned.z, setup.pruned.views(setup.pruned.weights),
            setup.pruned.views(setup.pruned.mask), strict=True,
        ):  # fmt: skip
            assert torch.equal(z, weights * mask)


def test_timm_networks_take_any_channels() -> None:
    network = models.outline("timm/resnet18", 7, 1)
    assert network.get_parameter("conv1.weight").shape == (64, 1, 7, 7)
    assert network.get_parameter("fc.weight").shape == (7, 512)


def test_timm_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"bip-hpc\[timm\]"):
        models.build("timm/resnet18", 10)


OWN = """
from torch import nn

def small(num_classes, channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 4, num_classes))

def fixed(num_classes):
    return nn.Linear(3, num_classes)

def no_classes(width):
    return nn.Linear(3, width)

def wants_more(num_classes, width):
    return nn.Linear(width, num_classes)

def no_network(num_classes):
    return num_classes
"""


def test_your_own_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mynets.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    network = models.build("mynets:small", 7, 2)
    assert network(torch.zeros(3, 2, 2, 2)).shape == (3, 7)
    assert count(models.build("mynets:fixed", 7, 2)) == 28
    for arch, word in {
        "mynets:no_classes": "num_classes", "mynets:no_network": "int", "mynets:gone": "gone",
        "nowhere.mynets:f": "PYTHONPATH", "mynets:wants_more": "'width'.*defaults",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=word) as error:
            models.build(arch, 7, 2)
        assert arch.split(":")[0] in str(error.value)


def test_archs_lists_what_a_pattern_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["archs", "wrn_28*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["name", "wrn_28_10", "wrn_28_4", "wrn_28_1"]
    assert lines[-1].split()[1:4] == ["369,498", "367,664", "32"]
    assert main(["archs", "torchvision/resnet1[8]"]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split() == [
        "torchvision/resnet18",
        "11,181,642",
        "11,172,032",
        "224",
        "torchvision",
    ]
    assert main(["archs", "nothing"]) == 2
    assert "'nothing'" in capsys.readouterr().err
