"""The list of networks: `bip archs`."""

import fnmatch
from collections.abc import Iterator

from tyro.conf import Positional

from bip import models
from bip.errors import UserError
from bip.models import library
from bip.models.resnet_imagenet import TORCHVISION as WITH_CAPITALS
from bip.pruning.layout import find_prunable

CLASSES = 10


def archs(pattern: Positional[str] = "", classes: int = CLASSES) -> None:
    """Print networks: name, parameters, prunable weights, input size, source.

    Args:
        pattern: a part of the name, or a shell pattern such as 'torchvision/resnet*'; without one
            the published networks are listed.
        classes: output classes to count for.
    """
    if not (found := list(_matching(pattern))):
        raise UserError(f"pattern: no network is called {pattern!r}; try 'torchvision/*'")
    print(f"{'name':32} {'parameters':>11} {'prunable':>11} {'input':>5}  source")
    for name in found:
        channels = 1 if name == "digits_net" else 3
        network = models.outline(name, classes, channels)
        size = sum(p.numel() for p in network.parameters())
        prunable = find_prunable(network, "unstructured").size
        source, side = _source(name)
        print(f"{name:32} {size:11,} {prunable:11,} {side:>5}  {source}", flush=True)
    if not pattern:
        print(
            "More: bip archs 'torchvision/*', bip archs 'timm/*', or your package.module:function"
        )


def _matching(pattern: str) -> Iterator[str]:
    known = list(models.names())
    if pattern:
        known += [library.TORCHVISION + name for name in library.torchvision_names()]
    if pattern.startswith(library.TIMM):
        known += [library.TIMM + name for name in library.timm_names()]
    glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    return (name for name in known if fnmatch.fnmatchcase(name, glob))


def _source(name: str) -> tuple[str, str]:
    """(where the network comes from, side of the images that it was made for)."""
    if name.startswith(library.TIMM):
        side = library.timm().get_pretrained_cfg(name.removeprefix(library.TIMM)).input_size[-1]
        return "timm", str(side)
    if name.startswith(library.TORCHVISION):
        return "torchvision", _crop_size(name.removeprefix(library.TORCHVISION))
    source = "torchvision" if name in WITH_CAPITALS else "published names"
    if name == "digits_net":
        source = "this project"
    return source, str(models.families()[name].INPUT_SIZE)


def _crop_size(name: str) -> str:
    import torchvision

    weights = list(torchvision.models.get_model_weights(name))
    sizes = weights[0].transforms.keywords.get("crop_size", "any") if weights else "any"
    return str(sizes)
