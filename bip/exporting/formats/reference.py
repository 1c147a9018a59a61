"""The published code's layout: {"state_dict": weights and popup_scores, "epoch", "arch", ...}.

The published code makes the mask again from the scores. Scores that would not give the trained
mask back by their order are moved apart; what its rule cannot express is reported.
"""

import io
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bip.errors import UserError
from bip.exporting.formats import Exported
from bip.exporting.model import Model
from bip.files import atomic_write_bytes
from bip.pruning.choices import PATTERNS
from bip.training.sources import published_rule

NAME = "reference"
SUFFIXES = (".pth.tar", ".tar", ".pth", ".pt")


def write(model: Model, out: Path, of: str) -> Exported:
    """For --source-net and --resume of the published code."""
    if model.facts.layer_type in PATTERNS:
        raise UserError(
            f"format: the published code has no layer type {model.facts.layer_type}; "
            "export it as dense"
        )
    scores, notes = _scores(model)
    content: dict[str, Any] = {}
    for name, value in model.network.state_dict().items():
        content[name] = model.weights.get(name, value).clone()
        if name in scores:
            content[name.removesuffix("weight") + "popup_scores"] = scores[name].clone()
    stream = io.BytesIO()
    state = {"epoch": model.epoch, "arch": model.facts.arch, "best_prec1": 0.0}
    torch.save(state | {"state_dict": content}, stream)
    atomic_write_bytes(out, stream.getvalue())
    return Exported(notes=notes)


def _scores(model: Model) -> tuple[dict[str, Tensor], list[str]]:
    """The scores by weight name, and a line for each thing that they cannot express."""
    if not model.masks:
        return {}, []
    # There every convolution has scores, the first too; linear layers in unstructured networks.
    linear = (nn.Linear,) if model.facts.layer_type == "unstructured" else ()
    layers = [
        f"{name}.weight"
        for name, module in model.network.named_modules()
        if isinstance(module, (nn.Conv2d, *linear))
    ]
    weights = model.network.state_dict()
    scores = {name: model.scores.get(name, weights[name].abs()) for name in layers}
    layer_type, scope = str(model.facts.layer_type), str(model.facts.scope)
    k = Decimal(str(model.facts.k))
    if layer_type == "unstructured" and set(layers) != set(model.masks):
        return scores, ["note: the published code ranks only 2-d convolutions and linear layers"]
    wrong = differing(scores, model.masks, layer_type, scope, k)
    notes = []
    if any(wrong.values()):
        for name, mask in model.masks.items():
            size = scores[name].abs()
            scores[name] = torch.where(mask > 0, 1 + size / (1 + size), 0.5 * size / (1 + size))
        notes.append("note: the scores were moved apart, as their order did not give the mask")
        wrong = differing(scores, model.masks, layer_type, scope, k)
    rule = f"k = {k} by its rule" + ("" if layer_type == "unstructured" else f" for {layer_type}s")
    for name, count in wrong.items():
        if count:
            notes.append(
                f"warning: {name}: the published code's mask differs in {count} bits ({rule}); "
                "it will evaluate to another accuracy"
            )
    return scores, notes


def differing(
    scores: dict[str, Tensor], masks: dict[str, Tensor], layer_type: str, scope: str, k: Decimal
) -> dict[str, int]:
    """How many bits of the mask the published rule gives differently, by the layers' names."""
    sizes = {name: score.abs() for name, score in scores.items()}
    theirs = published_rule(sizes, layer_type, k, scope)
    whole = {name: masks.get(name, torch.ones_like(kept)) > 0 for name, kept in theirs.items()}
    return {name: int((kept.bool() != whole[name]).sum()) for name, kept in theirs.items()}
