"""A small network for scikit-learn's 8x8 handwritten digits: seconds of training on a CPU core."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bip.models.resnet import conv3x3


class DigitsNet(nn.Module):
    """Images (N, channels, H, W) -> logits (N, num_classes); 39 thousand parameters."""

    def __init__(self, num_classes: int, channels: int = 1):
        super().__init__()
        self.conv1 = conv3x3(channels, 24)
        self.bn1 = nn.BatchNorm2d(24)
        self.conv2 = conv3x3(24, 48)
        self.bn2 = nn.BatchNorm2d(48)
        self.conv3 = conv3x3(48, 64, stride=2)
        self.bn3 = nn.BatchNorm2d(64)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = F.relu(self.bn3(self.conv3(out)), inplace=True)
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(out, 1), 1))
