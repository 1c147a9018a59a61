"""The networks: published names, published sizes, any image size."""

import pytest
import torch
from torch import nn

from bip import models
from bip.errors import UserError

SIZES = {  # (arch, classes, channels) -> parameters, with the source of the number
    # He et al. table 6 say 0.27 M and 0.85 M. Exactly, option A: the often quoted 272,474 and
    # 855,770 have two 1x1 shortcuts with batch norm (option B), 2,752 parameters more.
    ("resnet20s", 10, 3): 272_474 - 2_752,
    ("resnet56s", 10, 3): 855_770 - 2_752,
    ("resnet18", 10, 3): 11_173_962,  # the usual CIFAR count
    ("ResNet18", 1000, 3): 11_689_512,  # torchvision's documentation
    ("ResNet50", 1000, 3): 25_557_032,  # torchvision's documentation
}


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(("key", "expected"), SIZES.items(), ids=lambda v: str(v))
def test_sizes_are_the_published_ones(key: tuple[str, int, int], expected: int) -> None:
    with torch.device("meta"):
        assert count(models.build(*key)) == expected


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
    channels = 1 if arch == "digits_net" else 3
    # The meta device runs shape inference only, so that a ResNet50 costs nothing.
    with torch.device("meta"):
        network = models.build(arch, 7, channels)
        for size in (8, 32, 64):
            assert network(torch.empty(2, channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize("arch", models.names())
def test_every_linear_layer_has_a_bias_and_no_layer_is_special(arch: str) -> None:
    with torch.device("meta"):
        network = models.build(arch, 10) if arch != "digits_net" else models.build(arch, 10, 1)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            assert module.bias is not None
        if any(True for _ in module.parameters(recurse=False)):
            assert type(module) in (nn.Conv2d, nn.BatchNorm2d, nn.Linear)


def parameter_names(arch: str) -> list[str]:
    with torch.device("meta"):
        return [name for name, _ in models.build(arch, 10).named_parameters()]


def test_resnet18_parameter_names() -> None:
    def block(prefix: str, projected: bool) -> list[str]:
        names = [f"{part}{i}" for i in (1, 2) for part in ("conv", "bn")]
        names += ["shortcut.0", "shortcut.1"] if projected else []
        return [f"{prefix}.{name}" for name in names]

    modules = ["conv1", "bn1"]
    for stage in (1, 2, 3, 4):
        modules += block(f"layer{stage}.0", projected=stage > 1) + block(f"layer{stage}.1", False)
    expected = []
    for name in [*modules, "linear"]:
        has_bias = ".bn" in f".{name}" or name.endswith("shortcut.1") or name == "linear"
        expected += [f"{name}.weight", f"{name}.bias"] if has_bias else [f"{name}.weight"]
    assert parameter_names("resnet18") == expected


def test_bottleneck_parameter_names() -> None:
    names = parameter_names("resnet50")
    assert "layer1.0.shortcut.0.weight" in names  # 64 -> 256 channels
    assert "layer4.2.conv3.weight" in names
    assert "layer4.2.bn3.bias" in names
    assert "layer4.2.shortcut.0.weight" not in names


def test_resnet20s_has_an_fc_head_and_no_shortcut_parameters() -> None:
    names = parameter_names("resnet20s")
    assert names[:3] == ["conv1.weight", "bn1.weight", "bn1.bias"]
    assert names[-2:] == ["fc.weight", "fc.bias"]
    assert "layer3.2.conv2.weight" in names
    assert not [name for name in names if "shortcut" in name]


def test_capital_names_are_torchvision_s() -> None:
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


def test_resnet20s_initialisation_is_kaiming_normal() -> None:
    torch.manual_seed(0)
    weight = models.build("resnet20s", 10).get_parameter("layer3.2.conv2.weight")
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    # Normal, not uniform: a uniform distribution of this std ends at 1.73 std.
    assert weight.abs().max() > 3 * weight.std()


def test_building_is_deterministic_by_seed() -> None:
    torch.manual_seed(3)
    first = models.build("resnet20s", 10).state_dict()
    torch.manual_seed(3)
    second = models.build("resnet20s", 10).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("arch", ["resnet20s", "resnet18", "digits_net"])
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
        ("vgg16", "torchvision/vgg16"),
        ("torchvision/resnet-50", "torchvision/resnet50"),
        ("torchvision/fcn_resnet50", "torchvision/resnet50"),  # a segmentation network
        ("", None),
    ],
)
def test_an_unknown_name_raises_and_names_the_nearest(wrong: str, nearest: str | None) -> None:
    with pytest.raises(UserError, match="unknown network") as error:
        models.build(wrong, 10)
    assert f"'{wrong}'" in str(error.value)
    assert "\n" not in str(error.value)
    if nearest is not None:
        assert f"'{nearest}'" in str(error.value)


@pytest.mark.parametrize("arch", ["ResNet18", "torchvision/resnet18"])
def test_torchvision_networks_name_the_channels_they_need(arch: str) -> None:
    with pytest.raises(UserError, match=f"'{arch}' takes 3-channel images, not 1"):
        models.build(arch, 10, channels=1)
