"""Networks and weights of other libraries: ``torchvision/NAME``, ``timm/NAME``, and your own.

Nothing is imported before a network of its library is asked for.
"""

import inspect
import os
import sys
from importlib import import_module
from typing import Any
from urllib.error import URLError

from torch import Tensor, nn

from bip.errors import UserError

TORCHVISION, TIMM = "torchvision/", "timm/"

# In training mode these would return their auxiliary heads' logits in a tuple as well.
_WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")


def timm() -> Any:
    """The package timm. Raises UserError, with the extra that installs it, if it is missing."""
    try:
        import timm
    except ImportError as error:
        raise UserError(
            f"arch: timm/NAME needs the package timm ({error}); pip install 'bip-hpc[timm]'"
        ) from None
    return timm


def torchvision_names() -> list[str]:
    """torchvision's classifiers."""
    import torchvision  # takes over a second, and most runs have no need of it

    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def timm_names() -> list[str]:
    """timm's networks, without the tags that name weights."""
    names: list[str] = timm().list_models()
    return names


def from_torchvision(name: str, num_classes: int, channels: int) -> nn.Module:
    """A torchvision classifier. Raises UserError for images with other than 3 channels."""
    import torchvision

    if channels != 3:
        raise UserError(
            f"arch: torchvision's {name} takes 3-channel images, not {channels}; use a network "
            "of `bip archs` or timm/NAME for these images"
        )
    options = {"aux_logits": False, "init_weights": True} if name in _WITH_AUXILIARY_HEADS else {}
    network: nn.Module = torchvision.models.get_model(
        name, weights=None, num_classes=num_classes, **options
    )
    return network


def from_timm(name: str, num_classes: int, channels: int) -> nn.Module:
    network: nn.Module = timm().create_model(
        name, pretrained=False, num_classes=num_classes, in_chans=channels
    )
    return network


def from_function(arch: str, num_classes: int, channels: int) -> nn.Module:
    """The network that your ``package.module:function`` returns.

    It is called with `num_classes` and, if it takes it, `channels`. Raises UserError if it cannot
    be imported or returns no module.
    """
    module_name, _, name = arch.partition(":")
    if os.getcwd() not in sys.path:  # the console script leaves it out, `python -m` does not
        sys.path.append(os.getcwd())
    try:
        function = getattr(import_module(module_name), name)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"arch: '{arch}' cannot be imported ({error}); install its package, or put its folder "
            "on PYTHONPATH"
        ) from None
    except AttributeError:
        raise UserError(f"arch: {module_name} has no '{name}'") from None
    try:
        signature = inspect.signature(function)
        takes = signature.parameters
    except (TypeError, ValueError) as error:
        raise UserError(f"arch: '{arch}' is not a function ({error})") from None
    anything = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    if "num_classes" not in takes and not anything:
        raise UserError(f"arch: '{arch}' must take num_classes")
    options = {"channels": channels} if "channels" in takes or anything else {}
    try:
        signature.bind(num_classes=num_classes, **options)
    except TypeError as error:
        raise UserError(
            f"arch: '{arch}' gets num_classes and channels only ({error}); give the others defaults"
        ) from None
    network = function(num_classes=num_classes, **options)
    if not isinstance(network, nn.Module):
        raise UserError(f"arch: '{arch}' returned a {type(network).__name__}, not an nn.Module")
    return network


def weights(source: str, arch: str) -> dict[str, Tensor]:
    """The state_dict of ``torchvision:WEIGHTS`` or ``timm:TAG`` for a network of that library.

    The library downloads them, or finds them in its cache. "DEFAULT" is the library's choice.
    Raises UserError for unknown weights, and where the download fails.
    """
    from bip.models.resnet_imagenet import TORCHVISION as capitals  # which imports this module

    library, _, tag = source.partition(":")
    name = capitals.get(arch, arch.rpartition("/")[2])
    read = _of_torchvision if library == "torchvision" else _of_timm
    try:
        return read(name, tag)
    except (URLError, OSError) as error:
        raise UserError(
            f"source_net: {source} cannot be downloaded ({error}); download it elsewhere and give "
            "the file as --source-net"
        ) from None


def _of_torchvision(name: str, tag: str) -> dict[str, Tensor]:
    import torchvision

    if name not in torchvision_names():
        raise UserError(f"source_net: torchvision has no weights for {name}; is arch right?")
    known = torchvision.models.get_model_weights(name)
    if tag not in known.__members__:
        names = ", ".join(known.__members__) or "none"
        raise UserError(f"source_net: torchvision has no weights '{tag}' for {name}, but {names}")
    state: dict[str, Tensor] = known[tag].get_state_dict(progress=False, check_hash=True)
    return state


def _of_timm(name: str, tag: str) -> dict[str, Tensor]:
    tags = [full.partition(".")[2] for full in timm().list_pretrained(f"{name}.*")]
    if tag != "DEFAULT" and tag not in tags:
        known = ", ".join(tags) or "none"
        raise UserError(f"source_net: timm has no weights '{tag}' for {name}, but {known}")
    full = name if tag == "DEFAULT" else f"{name}.{tag}"
    try:
        state: dict[str, Tensor] = timm().create_model(full, pretrained=True).state_dict()
    except Exception as error:  # its hub raises errors of several packages
        raise OSError((str(error) or type(error).__name__).splitlines()[0]) from None
    return state
