"""The small ResNets of He et al. for CIFAR (arXiv 1512.03385, section 4.2): widths 16-32-64.

Shortcuts are option A, without parameters: take every second pixel and pad the missing channels
with zeros. Parameter names are the published ones, with ``fc`` as the head. Initialisation:
Kaiming normal for convolution and linear weights, as in Y. Idelbayev's reimplementation.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bip.models.resnet import BasicBlock, conv3x3


class PadShortcut(nn.Module):
    """Option A: (N, C, H, W) -> (N, C + 2 * padding, H/2, W/2), zeros on both sides of C."""

    def __init__(self, padding: int):
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class CifarResNet(nn.Module):
    """Images (N, channels, H, W) -> logits (N, num_classes); 6 * depth + 2 layers."""

    def __init__(self, depth: int, num_classes: int, channels: int = 3):
        super().__init__()
        self.conv1 = conv3x3(channels, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, depth)
        self.layer2 = _stage(16, 32, depth)
        self.layer3 = _stage(32, 64, depth)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(out, 1), 1))
        return logits


def _stage(in_channels: int, out_channels: int, depth: int) -> nn.Sequential:
    if in_channels == out_channels:
        first = BasicBlock(in_channels, out_channels, 1, nn.Identity())
    else:
        shortcut = PadShortcut((out_channels - in_channels) // 2)
        first = BasicBlock(in_channels, out_channels, 2, shortcut)
    rest = [BasicBlock(out_channels, out_channels, 1, nn.Identity()) for _ in range(depth - 1)]
    return nn.Sequential(first, *rest)


NETWORKS = {
    f"resnet{layers}s": partial(CifarResNet, (layers - 2) // 6) for layers in (20, 32, 44, 56)
}
INPUT_SIZE = 32
