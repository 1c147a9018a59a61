"""CIFAR-100 (Krizhevsky, 2009)."""

from functools import partial

from bip.data.sets import Archive, DatasetSpec
from bip.data.stores.archives import read_torchvision

SPEC = DatasetSpec(
    name="CIFAR100",
    classes=100,
    channels=3,
    image_dim=32,
    mean=(0.5071, 0.4866, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    augment="pad_crop",
    padding=4,
    archive=Archive(
        partial(read_torchvision, "CIFAR100", "cifar-100-python"),
        ("cifar-100-python", "cifar-100-python.tar.gz"),
    ),
)
