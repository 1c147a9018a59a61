"""CIFAR-10 (Krizhevsky, 2009)."""

from functools import partial

from bip.data.sets import Archive, DatasetSpec
from bip.data.stores.archives import read_torchvision


def archive(name: str, folder: str, tar: str) -> Archive:
    """As torchvision's class of that name unpacks it, or packed."""
    return Archive(partial(read_torchvision, name, folder), (folder, tar))


SPEC = DatasetSpec(
    name="CIFAR10",
    classes=10,
    channels=3,
    image_dim=32,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    augment="pad_crop",
    padding=4,
    archive=archive("CIFAR10", "cifar-10-batches-py", "cifar-10-python.tar.gz"),
)
