"""Export of a trained network, and the comparison of two masks."""

from pathlib import Path

import torch
from safetensors.torch import save

from bip.errors import UserError
from bip.files import atomic_write_bytes
from bip.training.checkpoint import State, layer_masks, read_checkpoint, split_state


def export(checkpoint: Path, out: Path) -> None:
    """Write a checkpoint's effective weights (z = m ⊙ θ) as one safetensors file.

    Args:
        checkpoint: a checkpoint.pth.tar or model_best.pth.tar of this project.
        out: the .safetensors file to write; its metadata names arch, k and layer type.
    """
    state = read_checkpoint(checkpoint)
    _own(state, checkpoint)
    settings = state["config"]
    metadata = {key: str(settings[key]) for key in ("arch", "k", "layer_type", "dataset")}
    if not out.parent.is_dir():
        raise UserError(f"out: no such folder: {out.parent}")
    weights, _ = split_state(state)
    for name, mask in layer_masks(state).items():
        weights[name] = weights[name] * mask
    data = save({name: value.contiguous() for name, value in weights.items()}, metadata)
    try:
        atomic_write_bytes(out, data)
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error.strerror})") from None
    print(f"wrote {out}: {len(weights)} tensors")


def compare(first: Path, second: Path) -> None:
    """Print the intersection over union (IoU) of two checkpoints' masks, in all and per layer.

    Args:
        first: checkpoint of a pruned network.
        second: another of the same network and layer type.
    """
    masks = []
    for path in (first, second):
        state = read_checkpoint(path)
        _own(state, path)
        if state["mask"] is None:
            raise UserError(f"{path}: is a dense network without a mask")
        masks.append(layer_masks(state))
    if {n: m.shape for n, m in masks[0].items()} != {n: m.shape for n, m in masks[1].items()}:
        raise UserError(f"{first} and {second} are not masks of the same layers")
    for name, mask in masks[0].items():
        print(f"{name:40} IoU {iou(mask, masks[1][name]):.4f}")
    whole = [torch.cat([mask.flatten() for mask in part.values()]) for part in masks]
    print(f"{'all':40} IoU {iou(*whole):.4f}")


def iou(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a and b| / |a or b| of two masks; 1 for two empty ones."""
    union = int(((a + b) > 0).sum())
    return int((a * b > 0).sum()) / union if union else 1.0


def _own(state: State, path: Path) -> None:
    if "config" not in state:
        raise UserError(
            f"{path}: has no record of its settings; give a checkpoint.pth.tar or "
            "model_best.pth.tar of this project"
        )
