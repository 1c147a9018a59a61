"""The networks: published names, published sizes, any image size."""

import itertools

import pytest
import torch
from torch import nn

from bip import models
from bip.errors import UserError

SIZES = {  # (arch, classes, channels) -> parameters, with the source of the number
    # He et al. table 6 gives 0.27 M and 0.85 M. Exactly, option A: the often quoted 272,474 and
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
    """Every linear layer has a bias, and no layer is special."""
    channels = 1 if arch == "digits_net" else 3
    # The meta device runs shape inference only, so that a ResNet50 costs nothing.
    with torch.device("meta"):
        network = models.build(arch, 7, channels)
        for size in (8, 32, 64):
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
    with pytest.raises(UserError, match=f"'{arch}' .*3-channel"):
        models.build(arch, 10, channels=1)
