"""TinyImageNet (Stanford CS231n): 200 of ImageNet's classes at 64 x 64 pixels."""

from bip.data.sets import IMAGENET_MEAN, IMAGENET_STD, DatasetSpec

SPEC = DatasetSpec(
    name="TinyImageNet",
    classes=200,
    channels=3,
    image_dim=64,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    augment="pad_crop",
    padding=4,
)
