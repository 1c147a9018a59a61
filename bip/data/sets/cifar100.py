"""CIFAR-100 (Krizhevsky, 2009): like CIFAR-10, with other classes."""

from dataclasses import replace

from bip.data.sets.cifar10 import SPEC as CIFAR10
from bip.data.sets.cifar10 import archive

SPEC = replace(
    CIFAR10,
    name="CIFAR100",
    classes=100,
    mean=(0.5071, 0.4866, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    archive=archive("CIFAR100", "cifar-100-python", "cifar-100-python.tar.gz"),
)
