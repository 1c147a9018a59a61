"""ResNets with a 3x3 stem and no max-pool, for images of about 32 to 64 pixels.

He et al., "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), widths
64-128-256-512 as on ImageNet, stem as usual on CIFAR. Parameter names are the published ones:
``conv1 bn1 layer1.0.conv1 ... layer2.0.shortcut.0/1 ... linear``. Initialisation: torch's defaults.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the image size at stride 1; batch norm supplies the bias."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (N, in, H, W) -> (N, out, H/stride, W/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: nn.Module):
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut; the middle is a quarter as wide as the output."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: nn.Module):
        super().__init__()
        width = out_channels // 4
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.shortcut(x), inplace=True)


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The identity where shapes allow it, else a 1x1 convolution with batch norm (option B)."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class ResNet(nn.Module):
    """Images (N, channels, H, W) -> logits (N, num_classes), for any H and W."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        num_classes: int,
        channels: int = 3,
    ):
        super().__init__()
        expansion = 4 if block is Bottleneck else 1
        self.conv1 = conv3x3(channels, 64)
        self.bn1 = nn.BatchNorm2d(64)
        in_channels = 64
        stages = []
        for stage, depth in enumerate(depths):
            out_channels = 64 * 2**stage * expansion
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                shortcut = _projection(in_channels, out_channels, stride)
                blocks.append(block(in_channels, out_channels, stride, shortcut))
                in_channels = out_channels
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.linear = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        logits: Tensor = self.linear(torch.flatten(F.adaptive_avg_pool2d(out, 1), 1))
        return logits


_Block = type[BasicBlock] | type[Bottleneck]
_BUILT: dict[str, tuple[_Block, tuple[int, int, int, int]]] = {  # block, blocks of each stage
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}
NETWORKS = {name: partial(ResNet, block, depths) for name, (block, depths) in _BUILT.items()}
INPUT_SIZE = 32
