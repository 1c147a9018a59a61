"""The network without pruned filters and channels, as safetensors; `bip.load_compact` reads it.

The metadata hold, as JSON, what builds the network and the shapes of what changed in it.
"""

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import fx

from bip import models
from bip.errors import UserError
from bip.exporting.formats import Exported
from bip.exporting.model import Model, check_arch
from bip.exporting.shrink import Shrunk, rebuild, shrink
from bip.files import atomic_write_bytes
from bip.training.macs import macs_of

NAME = "compact"
SUFFIXES = (".safetensors",)
VERSION = 1
TOLERANCE = 1e-9  # of float64 outputs, relative to their size


def write(model: Model, out: Path, of: str) -> Exported:
    """Only after the outputs were compared with the masked network's, in float64."""
    small, shrunk = compact(model)
    metadata = model.metadata(NAME) | {
        "version": str(VERSION),
        "shapes": json.dumps(shrunk.spec, separators=(",", ":")),
    }
    atomic_write_bytes(out, save(shrunk.state, metadata))
    notes = []
    if shrunk.whole:
        names = ", ".join(shrunk.whole[:5]) + (", ..." if len(shrunk.whole) > 5 else "")
        notes.append(f"note: kept whole, as compact does not follow channels there: {names}")
    parameters = sum(p.numel() for p in small.parameters())
    return Exported(small, parameters, macs_of(small, model.sample(1))[""], notes)


def compact(model: Model) -> tuple[fx.GraphModule, Shrunk]:
    """The smaller network, in the model's type, and what it is made of.

    Raises UserError for a network that cannot be traced or acts otherwise once it is smaller.
    """
    sample = model.sample(2)
    shrunk = shrink(model.network, sample)
    small = rebuild(model.network, shrunk.spec)
    small.load_state_dict(shrunk.state)
    _check(model, sample)
    return small, shrunk


@torch.no_grad()
def _check(model: Model, sample: torch.Tensor) -> None:
    network = copy.deepcopy(model.network).double()
    shrunk = shrink(network, sample)
    small = rebuild(network, shrunk.spec)
    small.load_state_dict(shrunk.state)
    expected = network(sample.double())
    difference = float((small(sample.double()) - expected).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise UserError(
            f"format: the compact network of {model.facts.arch} gives other outputs (by "
            f"{difference:.1e}); nothing was written; export it as dense"
        )


def metadata_of(path: Path) -> dict[str, str]:
    """The text metadata of a safetensors file. Raises UserError if it is none."""
    with _opened(path) as stored:
        return stored.metadata() or {}


@contextlib.contextmanager
def _opened(path: Path | str) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as stored:
            yield stored
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is not a readable safetensors file ({error})") from None


def load_compact(path: Path | str, arch: str | None = None) -> fx.GraphModule:
    """The network of a file that `bip export --format compact` wrote, in evaluation mode.

    Takes images (N, channels, H, W), gives logits (N, num_classes). `arch`: the network that it was
    made of, needed if that is a function of yours. Raises UserError, one line, for a file that is
    not one, or whose network the code here no longer builds.
    """
    with _opened(path) as stored:
        metadata = stored.metadata() or {}
        state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    if metadata.get("format") != NAME or metadata.get("version") != str(VERSION):
        raise UserError(f"{path}: is no compact network; bip export --format compact writes one")
    check_arch(metadata.get("arch", ""), arch, Path(path))
    try:
        spec = json.loads(metadata["shapes"])
        sizes = int(metadata["num_classes"]), int(metadata["channels"])
        with torch.random.fork_rng(devices=[]):
            network = models.build(arch or metadata["arch"], *sizes)
        small = rebuild(network, spec)
        small = small.to(next((v.dtype for v in state.values() if v.is_floating_point()), None))
        small.load_state_dict(state)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: does not fit the network {metadata.get('arch')} that is built here "
            f"({reason}); export it again"
        ) from None
    return small
