"""`bip compare`: how far the masks of two checkpoints agree."""

import json as json_format
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bip.errors import UserError
from bip.exporting import picture as pictures
from bip.exporting.model import Facts, Model, read_model
from bip.pruning.choices import LayerType, Scope

PARTS = 32  # of a layer's filters, in the heat map


def compare(
    first: Path,
    second: Path,
    json: bool = False,
    picture: Path | None = None,
    arch: str | None = None,
    k: str | None = None,
    layer_type: LayerType | None = None,
    scope: Scope | None = None,
) -> None:
    """The intersection over union (IoU) of two checkpoints' masks, in all and per layer.

    Beside it the largest IoU that two masks of these sizes can have: the smaller over the larger.

    Args:
        first: checkpoint of a pruned network, of this project or published.
        second: another of the same network and layer type.
        json: print one JSON object instead of a table.
        picture: also draw a heat map, layers by filters, into this .png file.
        arch: of published checkpoints that do not record it.
        k: keep ratio of published checkpoints; two of them as "0.1,0.05".
        layer_type: of published checkpoints.
        scope: of published checkpoints; HYDRA's are "layer".
    """
    pictures.check(picture)
    ratios = (k or "").split(",")
    if len(ratios) > 2:
        raise UserError(f"k: give one, or one of each file as 0.1,0.05, not {k!r}")
    models = []
    for path, ratio in ((first, ratios[0]), (second, ratios[-1])):
        given = Facts(arch=arch, k=ratio or None, layer_type=layer_type, scope=scope)
        models.append(read_model(path, given))
        if not models[-1].masks:
            raise UserError(f"{path}: is a dense network without a mask; give a pruned one")
    report = comparison(*models)
    print(json_format.dumps(report, indent=2) if json else "\n".join(_table(report)))
    if picture is not None:
        _draw(models[0], models[1], report, picture)


def comparison(first: Model, second: Model) -> dict[str, Any]:
    """What `bip compare --json` prints. Raises UserError if the layers differ."""
    a, b = first.masks, second.masks
    if {n: m.shape for n, m in a.items()} != {n: m.shape for n, m in b.items()}:
        raise UserError(
            f"{first.path} and {second.path} are not masks of the same layers: "
            f"{first.facts.arch} {first.facts.layer_type} and "
            f"{second.facts.arch} {second.facts.layer_type}"
        )
    whole = [torch.cat([mask.flatten() for mask in part.values()]) for part in (a, b)]
    return {
        "k": [first.facts.k, second.facts.k],
        "layer_type": first.facts.layer_type,
        "arch": [first.facts.arch, second.facts.arch],
        **_agreement(*whole),
        "layers": [{"name": name} | _agreement(mask, b[name]) for name, mask in a.items()],
    }


def _agreement(a: Tensor, b: Tensor) -> dict[str, Any]:
    kept = [int((mask > 0).sum()) for mask in (a, b)]
    largest = min(kept) / max(kept) if max(kept) else 1.0
    return {"kept": kept, "total": a.numel(), "iou": iou(a, b), "largest_iou": largest}


def iou(a: Tensor, b: Tensor) -> float:
    """|a and b| / |a or b| of two masks; 1 for two empty ones."""
    union = int(((a + b) > 0).sum())
    return int((a * b > 0).sum()) / union if union else 1.0


def _table(report: dict[str, Any]) -> list[str]:
    k = [f"kept, k {ratio}" for ratio in report["k"]]
    lines = [f"{'layer':36} {k[0]:>14} {k[1]:>14} {'IoU':>6} {'at most':>7}"]
    for row in [*report["layers"], report | {"name": "all"}]:
        name = row["name"].removesuffix(".weight")
        name = name if len(name) <= 36 else "..." + name[-33:]
        a, b = row["kept"]
        lines.append(f"{name:36} {a:14,} {b:14,} {row['iou']:6.4f} {row['largest_iou']:7.4f}")
    return lines


def _draw(first: Model, second: Model, report: dict[str, Any], path: Path) -> None:
    """Each cell is the IoU in a part of a layer's filters; white: both keep nothing there."""
    rows = []
    for name, a in first.masks.items():
        pairs = [t.flatten(1) for t in (a, second.masks[name])]
        cuts = [round(i * len(a) / PARTS) for i in range(PARTS + 1)]
        row = []
        for i in range(PARTS):
            part = slice(min(cuts[i], len(a) - 1), max(cuts[i + 1], cuts[i] + 1))
            x, y = (t[part] for t in pairs)
            row.append(iou(x, y) if bool((x + y).any()) else float("nan"))
        rows.append(row)
    drawn = pictures.figure(9, max(3.5, 0.22 * len(rows)))
    axes = drawn.subplots()
    shown = axes.imshow(rows, aspect="auto", vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks(range(len(rows)), [n.removesuffix(".weight") for n in first.masks], fontsize=7)
    axes.set_xticks([0, PARTS - 1], ["first filter", "last filter"])
    axes.set_title(f"IoU {report['iou']:.4f}, at most {report['largest_iou']:.4f}")
    drawn.colorbar(shown)
    pictures.save(drawn, path)
