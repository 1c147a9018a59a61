"""torchvision's ResNets under their published names, with capitals: 7x7 stem and max-pool."""

from functools import partial

from torch import nn

from bip.models import library


def _build(name: str, num_classes: int, channels: int = 3) -> nn.Module:
    return library.from_torchvision(name, num_classes, channels)


# The published names, each with torchvision's. They take torchvision's weights too.
TORCHVISION = {"ResNet18": "resnet18", "ResNet34": "resnet34", "ResNet50": "resnet50"}
NETWORKS = {name: partial(_build, other) for name, other in TORCHVISION.items()}
INPUT_SIZE = 224
