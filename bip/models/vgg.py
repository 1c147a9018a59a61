"""VGG networks for images of about 32 to 64 pixels (Simonyan and Zisserman, arXiv 1409.1556).

The number in a name counts the convolutions; three linear layers follow, 256 wide. ``_bn``: with
batch-norm. Parameter names are the published ones: ``features.N``, ``classifier.0/2/4``; no
convolution has a bias. Initialisation: Kaiming normal by fan-out for convolutions, normal with
deviation 0.01 for linear weights (what the published code means to do; it fails there).
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HIDDEN = 256
POOLED = 2  # side of the pooled features
_WIDTHS = {  # of each stage's convolutions; a pooling step between any two stages
    "vgg2": "64 | 64 |",
    "vgg4": "64 64 | 128 128 |",
    "vgg6": "64 64 | 128 128 | 256 256 |",
    "vgg8": "64 64 | 128 128 | 256 256 | 512 512 |",
    "vgg11": "64 | 128 | 256 256 | 512 512 | 512 512",
    "vgg13": "64 64 | 128 128 | 256 256 | 512 512 | 512 512",
    "vgg16": "64 64 | 128 128 | 256 256 256 | 512 512 512 | 512 512 512",
}


class Halve(nn.MaxPool2d):
    """2x2 max-pooling that leaves a side of one pixel as it is, so that any image size works."""

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, x: Tensor) -> Tensor:
        size = (min(2, x.shape[-2]), min(2, x.shape[-1]))
        return F.max_pool2d(x, size, size)


class VGG(nn.Module):
    """Images (N, channels, H, W) -> logits (N, num_classes), for any H and W."""

    def __init__(self, widths: str, batch_norm: bool, num_classes: int, channels: int = 3):
        super().__init__()
        layers: list[nn.Module] = []
        for word in widths.split():
            if word == "|":
                layers.append(Halve())
                continue
            width = int(word)
            layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=False))
            layers += [nn.BatchNorm2d(width)] if batch_norm else []
            layers.append(nn.ReLU(inplace=True))
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(channels * POOLED**2, HIDDEN),
            nn.ReLU(inplace=True),
            nn.Linear(HIDDEN, HIDDEN),
            nn.ReLU(inplace=True),
            nn.Linear(HIDDEN, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = F.adaptive_avg_pool2d(self.features(x), POOLED)
        logits: Tensor = self.classifier(torch.flatten(out, 1))
        return logits


NETWORKS = {
    f"{name}{'_bn' * batch_norm}": partial(VGG, widths, batch_norm)
    for name, widths in _WIDTHS.items()
    for batch_norm in (False, True)
}
INPUT_SIZE = 32
