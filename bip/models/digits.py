"""A small network for scikit-learn's 8x8 handwritten digits: seconds of training on a CPU core."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bip.models.resnet import BasicBlock, conv3x3

WIDTH = 36


class DigitsNet(nn.Module):
    """Images (N, channels, H, W) -> logits (N, num_classes); 48 thousand parameters.

    Its shortcuts still carry the signal where all weights of a layer are pruned, which happens when
    a few hundred weights are kept.
    """

    def __init__(self, num_classes: int, channels: int = 1):
        super().__init__()
        self.conv1 = conv3x3(channels, WIDTH)
        self.bn1 = nn.BatchNorm2d(WIDTH)
        self.layer1 = nn.Sequential(
            BasicBlock(WIDTH, WIDTH, 1, nn.Identity()), BasicBlock(WIDTH, WIDTH, 1, nn.Identity())
        )
        self.linear = nn.Linear(WIDTH, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.layer1(F.max_pool2d(out, 2))
        logits: Tensor = self.linear(torch.flatten(F.adaptive_avg_pool2d(out, 1), 1))
        return logits


NETWORKS = {"digits_net": DigitsNet}
INPUT_SIZE = 8
