"""The networks by their published names. All are plain modules that know nothing of pruning.

A file of this folder is a family; its NETWORKS name their constructors, which take (num_classes,
channels).
"""

import copy
import difflib
import math
import pkgutil
from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
from torch import nn

from bip.errors import UserError

_TORCHVISION = "torchvision/"

# Capitals: the 7x7 stem and max-pool of ImageNet.
_IMAGENET_STEM = {"ResNet18": "resnet18", "ResNet34": "resnet34", "ResNet50": "resnet50"}

# In training mode these would return their auxiliary heads' logits in a tuple as well.
_WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")


@cache
def _own() -> dict[str, Callable[[int, int], nn.Module]]:
    found: dict[str, Callable[[int, int], nn.Module]] = {}
    for module in pkgutil.iter_modules(__path__):
        found |= import_module(f"{__name__}.{module.name}").NETWORKS
    return found


def names() -> list[str]:
    """The networks' own names; ``torchvision/NAME`` builds any torchvision classifier besides."""
    return [*_own(), *_IMAGENET_STEM]


def build(arch: str, num_classes: int, channels: int = 3) -> nn.Module:
    """A freshly initialised network: images (N, channels, H, W) -> logits (N, num_classes).

    Raises UserError, with the nearest right name, for an unknown ``arch``, and for a torchvision
    network (the capital names too) with other than 3 channels.
    """
    if arch in _own():
        return _own()[arch](num_classes, channels)
    import torchvision  # takes over a second, and most runs have no need of it

    classifiers = torchvision.models.list_models(module=torchvision.models)
    if arch in _IMAGENET_STEM:
        name = _IMAGENET_STEM[arch]
    elif arch.startswith(_TORCHVISION) and arch.removeprefix(_TORCHVISION) in classifiers:
        name = arch.removeprefix(_TORCHVISION)
    else:
        raise UserError(
            f"arch: unknown network '{arch}'; the nearest name is '{_nearest(arch, classifiers)}' "
            f"(known: {', '.join(names())} and {_TORCHVISION}NAME)"
        )
    if channels != 3:
        raise UserError(
            f"arch: '{arch}' takes 3-channel images, not {channels}; "
            f"use one of {', '.join(_own())} for these images"
        )
    options = {"aux_logits": False, "init_weights": True} if name in _WITH_AUXILIARY_HEADS else {}
    network: nn.Module = torchvision.models.get_model(
        name, weights=None, num_classes=num_classes, **options
    )
    return network


def _nearest(arch: str, classifiers: list[str]) -> str:
    """The known name most like ``arch``; bare torchvision names (vgg16) are found as well."""
    full_names = {name: _TORCHVISION + name for name in classifiers}
    if not arch.startswith(_TORCHVISION):
        full_names |= {name: name for name in names()}
    bare = arch.removeprefix(_TORCHVISION)
    return full_names[difflib.get_close_matches(bare, full_names, n=1, cutoff=0.0)[0]]


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
