"""ImageNet (ILSVRC 2012). The aliases are published names for its storage formats."""

from bip.data.sets import IMAGENET_MEAN, IMAGENET_STD, DatasetSpec

SPEC = DatasetSpec(
    name="ImageNet",
    aliases=("ImageNetOrigin", "ImageNetLMDB"),
    classes=1000,
    channels=3,
    image_dim=224,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    augment="resized_crop",
    small=False,
)
