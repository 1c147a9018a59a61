"""Wide ResNets for CIFAR (Zagoruyko and Komodakis, arXiv 1605.07146), pre-activation, no dropout.

``wrn_D_W``: D layers, W times as wide as 16-32-64. Parameter names are the published ones:
``conv1 block1.layer.0.bn1 ... block2.layer.0.convShortcut ... bn1 fc``. Initialisation: normal with
deviation sqrt(2 / (out_channels · kernel area)) for convolutions, a zero bias for ``fc``. The
published module holds a copy of its first block, ``sub_block1``, that no image passes; it is left
out here, and out of files that are loaded (`bip.training.sources`).
"""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bip.models.resnet import conv3x3

_SIZES = ((28, 10), (28, 4), (28, 1), (34, 10), (40, 2))


class PreActivationBlock(nn.Module):
    """(N, in, H, W) -> (N, out, H/stride, W/stride).

    Where the shapes differ, the 1x1 shortcut takes the activated input, else the input itself.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.convShortcut = None
        if in_channels != out_channels:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active)), inplace=True))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return torch.add(shortcut, out)


class Stage(nn.Module):
    """`depth` blocks, the first of which changes width and size."""

    def __init__(self, depth: int, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        first = PreActivationBlock(in_channels, out_channels, stride)
        rest = [PreActivationBlock(out_channels, out_channels, 1) for _ in range(depth - 1)]
        self.layer = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """Images (N, channels, H, W) -> logits (N, num_classes), for any H and W."""

    def __init__(self, depth: int, widen: int, num_classes: int, channels: int = 3):
        super().__init__()
        blocks = (depth - 4) // 6
        widths = [16, 16 * widen, 32 * widen, 64 * widen]
        self.conv1 = conv3x3(channels, widths[0])
        self.block1 = Stage(blocks, widths[0], widths[1], 1)
        self.block2 = Stage(blocks, widths[1], widths[2], 2)
        self.block3 = Stage(blocks, widths[2], widths[3], 2)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[:, 0].numel()
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        out = F.adaptive_avg_pool2d(F.relu(self.bn1(out), inplace=True), 1)
        logits: Tensor = self.fc(torch.flatten(out, 1))
        return logits


NETWORKS = {f"wrn_{depth}_{widen}": partial(WideResNet, depth, widen) for depth, widen in _SIZES}
INPUT_SIZE = 32
