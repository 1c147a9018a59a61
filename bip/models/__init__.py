"""The networks by their names. All are plain modules that know nothing of pruning.

A file of this folder is a family; its NETWORKS name their constructors, which take (num_classes,
channels), and its INPUT_SIZE is the side of the images that they are made for. `library` has the
networks of other packages.
"""

import copy
import difflib
import math
import pkgutil
import re
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import nn

from bip.errors import UserError
from bip.models import library

OTHERS = ("torchvision/NAME", "timm/NAME", "package.module:function")


@cache
def families() -> dict[str, ModuleType]:
    """The module of each of our networks, by the network's name."""
    modules = [import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    return {name: module for module in modules for name in getattr(module, "NETWORKS", {})}


def names() -> list[str]:
    """The networks' own names; OTHERS are the further forms that `build` takes."""
    return list(families())


def build(arch: str, num_classes: int, channels: int = 3) -> nn.Module:
    """A freshly initialised network: images (N, channels, H, W) -> logits (N, num_classes).

    Raises UserError for an unknown ``arch``, with the right spelling if it is close to one, and for
    a torchvision network (the capital names too) with other than 3 channels.
    """
    bare = arch.rpartition("/")[2]
    if arch in families():
        constructor: Callable[..., nn.Module] = families()[arch].NETWORKS[arch]
        return constructor(num_classes=num_classes, channels=channels)
    if arch.startswith(library.TORCHVISION) and bare in library.torchvision_names():
        return library.from_torchvision(bare, num_classes, channels)
    if arch.startswith(library.TIMM) and bare in library.timm_names():
        return library.from_timm(bare, num_classes, channels)
    if ":" in arch:
        return library.from_function(arch, num_classes, channels)
    raise UserError(f"arch: unknown network '{arch}'{_suggestion(arch)}")


def outline(arch: str, num_classes: int, channels: int = 3) -> nn.Module:
    """The network without memory for its weights, on the meta device.

    A few constructors compute with tensors (torchvision's RegNets); these are built as usual.
    """
    try:
        with torch.device("meta"):
            return build(arch, num_classes, channels)
    except (NotImplementedError, RuntimeError):
        return build(arch, num_classes, channels)


def _suggestion(arch: str) -> str:
    """The remedy for an unknown name: its spelling among its equals, and where all names are.

    Numbers in a name are sizes: names that differ in them are other networks, so none is suggested.
    """
    prefix = next((p for p in (library.TORCHVISION, library.TIMM) if arch.startswith(p)), "")
    known = {
        library.TORCHVISION: library.torchvision_names, library.TIMM: library.timm_names, "": names
    }[prefix]()  # fmt: skip
    bare = arch.removeprefix(prefix)
    alike = [name for name in known if _numbers(name) == _numbers(bare)]
    close = difflib.get_close_matches(bare, alike, n=1, cutoff=0.75)
    meant = f" (perhaps you meant '{prefix}{close[0]}')" if close else ""
    if prefix:
        return f"{meant}; `bip archs '{prefix}*'` lists the names"
    if not meant and arch in library.torchvision_names():
        meant = f" (torchvision has one: '{library.TORCHVISION}{arch}')"
    return f"{meant}; `bip archs` lists the names; besides {', '.join(OTHERS)}"


def _numbers(name: str) -> list[str]:
    return re.findall(r"\d+", name)


@torch.no_grad()
def check_image_size(network: nn.Module, arch: str, channels: int, image_dim: int) -> None:
    """Raise UserError if the network cannot take images of (channels, image_dim, image_dim)."""
    device = next(network.parameters()).device
    modes = [(module, module.training) for module in network.modules()]
    try:
        network.eval()(torch.zeros(1, channels, image_dim, image_dim, device=device))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"image_dim: '{arch}' cannot take {image_dim}x{image_dim} images ({reason})"
        ) from None
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def check_batch_of_one(network: nn.Module, arch: str, channels: int, image_dim: int) -> None:
    """Raise UserError if batch-norm cannot train on one image: it may have one value a channel."""
    image = torch.zeros(1, channels, image_dim, image_dim)
    try:
        copy.deepcopy(network).train()(image)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"batch_size: one image a rank and micro-batch leaves batch-norm of '{arch}' one value "
            f"a channel at {image_dim}x{image_dim}; give a larger --batch-size, fewer --accumulate "
            "or ranks, or --freeze-bn"
        ) from None


@torch.no_grad()
def scale_initial_weights(network: nn.Module, k: float) -> None:
    """Draw conv and linear weights again, normal with deviation sqrt(2 / (k · fan_in)).

    Kaiming's initialisation for a network of which only the fraction k will act
    (HYDRA's scale_rand_init).
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.normal_(0, math.sqrt(2 / (k * module.weight[0].numel())))
