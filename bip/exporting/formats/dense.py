"""z = m ⊙ θ under plain names: what any other code loads as an ordinary network."""

import io
from pathlib import Path

import torch
from safetensors.torch import save

from bip.errors import UserError
from bip.exporting.formats import Exported
from bip.exporting.model import Model
from bip.files import atomic_write_bytes
from bip.pruning.choices import PATTERNS

NAME = "dense"
SUFFIXES = (".safetensors", ".pth", ".pt", ".tar")


def write(model: Model, out: Path, of: str) -> Exported:
    """safetensors with metadata, else torch.save of {"state_dict", "metadata", "arch", "epoch"}."""
    _check_pattern(model)
    weights = {name: value.contiguous() for name, value in model.network.state_dict().items()}
    metadata = model.metadata(NAME)
    if out.suffix == ".safetensors":
        # Tied weights are one storage, which safetensors refuses.
        data = save({name: value.clone() for name, value in weights.items()}, metadata)
    else:
        stream = io.BytesIO()
        content = {"state_dict": weights, "metadata": metadata, "arch": model.facts.arch}
        torch.save(content | {"epoch": model.epoch}, stream)
        data = stream.getvalue()
    atomic_write_bytes(out, data)
    zeros = sum(
        int(((weights[name] == 0) & (mask > 0)).sum()) for name, mask in model.masks.items()
    )
    note = f"note: {zeros} kept weights are exactly 0, so that they look pruned in the file"
    return Exported(notes=[note] if zeros else [])


def _check_pattern(model: Model) -> None:
    """Raise UserError unless the weights are of the layer type n:m, if it is one."""
    if (pattern := PATTERNS.get(str(model.facts.layer_type))) is None:
        return
    keep, of = pattern
    for name in model.masks:
        groups = model.network.get_parameter(name).unflatten(1, (-1, of))
        if int((groups != 0).sum(2).max()) > keep:
            raise UserError(f"{model.path}: {name} does not have the pattern {keep}:{of}")
