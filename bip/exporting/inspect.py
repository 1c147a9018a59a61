"""`bip inspect`: what a checkpoint keeps, layer by layer, and how its scores lie."""

import json as json_format
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bip.exporting import picture as pictures
from bip.exporting.model import Facts, Model, read_model
from bip.pruning.choices import GROUP_AXIS, PATTERNS, LayerType, Scope
from bip.pruning.layout import find_prunable

BINS = range(-6, 6)  # of a score over its threshold, powers of 2
BAR = 40  # characters


def inspect(
    checkpoint: Path,
    json: bool = False,
    picture: Path | None = None,
    arch: str | None = None,
    k: str | None = None,
    layer_type: LayerType | None = None,
    scope: Scope | None = None,
) -> None:
    """What a checkpoint keeps: per layer, dead filters and layers, scores against the threshold.

    Args:
        checkpoint: a checkpoint of this project, or a published one.
        json: print one JSON object instead of a table.
        picture: also draw it, into this .png file.
        arch: of a published checkpoint that does not record it.
        k: keep ratio of a published checkpoint.
        layer_type: of a published checkpoint.
        scope: of a published checkpoint; HYDRA's are "layer".
    """
    pictures.check(picture)
    model = read_model(checkpoint, Facts(arch=arch, k=k, layer_type=layer_type, scope=scope))
    report = inspection(model)
    print(json_format.dumps(report, indent=2) if json else "\n".join(_table(report)))
    if picture is not None:
        _draw(report, picture)


def inspection(model: Model) -> dict[str, Any]:
    """What `bip inspect --json` prints. Of a dense network, weights that are not 0 count as kept.

    A layer's threshold is the smallest |score| (of groups: norm) that is kept among those ranked
    with it; None where nothing is kept, or there are no scores. Of a pattern n:m it is the
    layer's smallest, and the scores are counted by the thresholds of their own m.
    """
    masks = model.masks
    if not masks:
        weights = dict(model.network.named_parameters())
        layout = find_prunable(model.network, "unstructured")
        masks = {t.name: weights[t.name].detach() != 0 for t in layout.tensors}
    sizes = {name: _sizes(model, name) for name in model.masks}
    kept = {name: _groups(model, mask.float()) > 0 for name, mask in model.masks.items()}
    thresholds = _thresholds(model, sizes, kept)
    layers: list[dict[str, Any]] = []
    for name, mask in masks.items():
        filters = (mask != 0).flatten(1).any(1)
        layers.append(
            {
                "name": name, "shape": list(mask.shape), "kept": int((mask > 0).sum()),
                "total": mask.numel(), "filters": len(filters),
                "dead_filters": int((~filters).sum()), "threshold": thresholds.get(name),
            }
        )  # fmt: skip
    facts = {key: value for key, value in vars(model.facts).items() if value is not None}
    return facts | {
        "kept": sum(layer["kept"] for layer in layers),
        "total": sum(layer["total"] for layer in layers),
        "dead_filters": sum(layer["dead_filters"] for layer in layers),
        "dead_layers": [layer["name"] for layer in layers if not layer["kept"]],
        "layers": layers,
        "scores": _histogram(_ratios(model, sizes, kept, thresholds), kept) if sizes else None,
    }


def _groups(model: Model, values: Tensor) -> Tensor:
    """The L2 norm of every group of a layer: what is ranked."""
    axis = GROUP_AXIS.get(str(model.facts.layer_type))
    if axis is None:
        return values.abs().flatten()
    others = [d for d in range(values.dim()) if d != axis]
    norms: Tensor = torch.linalg.vector_norm(values, dim=others)
    return norms


def _sizes(model: Model, name: str) -> Tensor:
    score = model.scores[name].float()
    norms = _groups(model, score)
    if _is_balanced(model):
        norms = norms / (score.numel() // len(norms)) ** 0.5  # 1 for single weights
    return norms


def _is_balanced(model: Model) -> bool:
    return model.config.get("ranking") == "balanced" and model.facts.scope == "global"


def _thresholds(
    model: Model, sizes: dict[str, Tensor], kept: dict[str, Tensor]
) -> dict[str, float | None]:
    ranked = {name: size[kept[name]] for name, size in sizes.items()}
    if _is_balanced(model) and sizes:
        # A layer's largest is kept whatever it is: below a pruned one it was not chosen by rank.
        cut = torch.cat([size[~kept[n]] for n, size in sizes.items()])
        most = float(cut.max()) if len(cut) else 0.0
        ranked = {
            n: of[(of >= most) | (of < of.max())] if len(of) else of for n, of in ranked.items()
        }
    found = {name: float(values.min()) if len(values) else None for name, values in ranked.items()}
    if model.facts.scope != "global":
        return found
    return dict.fromkeys(found, min((t for t in found.values() if t is not None), default=None))


def _ratios(
    model: Model,
    sizes: dict[str, Tensor],
    kept: dict[str, Tensor],
    thresholds: dict[str, float | None],
) -> Tensor:
    """All scores over their thresholds (n,)."""
    pattern = PATTERNS.get(str(model.facts.layer_type))
    parts = []
    for name, size in sizes.items():
        cut: Tensor | float = thresholds[name] or 1e-30
        if pattern is not None:
            shape = model.scores[name].shape
            kept_sizes = torch.where(kept[name], size, torch.inf).view(shape)
            least = kept_sizes.unflatten(1, (-1, pattern[1])).amin(2, keepdim=True)
            least = least.expand(-1, -1, pattern[1], *shape[2:])
            cut = least.reshape(-1).clamp(min=1e-30)
        parts.append(size / cut)
    return torch.cat(parts).double()


def _histogram(ratios: Tensor, kept: dict[str, Tensor]) -> dict[str, Any]:
    """Counts of the scores over their thresholds, in bins between powers of 2."""
    is_kept = torch.cat(list(kept.values()))
    exponents = ratios.clamp(min=2.0 ** BINS[0], max=2.0 ** (BINS[-1] + 0.5)).log2().floor().long()
    exponents[ratios >= 1] = exponents[ratios >= 1].clamp(min=0)
    exponents[ratios < 1] = exponents[ratios < 1].clamp(max=-1)
    return {
        "over_threshold": [2.0**n for n in BINS],
        "kept": [int(((exponents == n) & is_kept).sum()) for n in BINS],
        "pruned": [int(((exponents == n) & ~is_kept).sum()) for n in BINS],
        "pruned_above_threshold": int(((ratios >= 1) & ~is_kept).sum()),
    }


def _table(report: dict[str, Any]) -> list[str]:
    k = f", {report['layer_type']}, k {report['k']}" if "layer_type" in report else ", dense"
    share = 100 * report["kept"] / report["total"]
    lines = [
        f"{report['arch']}{k}: {report['kept']:,} of {report['total']:,} weights ({share:.2f}%)",
        "",
        f"{'layer':31} {'kept':>10} {'of':>10} {'%':>6} {'dead':>9} {'threshold':>9}",
    ]
    for layer in report["layers"]:
        name = layer["name"].removesuffix(".weight")
        name = name if len(name) <= 31 else "..." + name[-28:]
        dead = f"{layer['dead_filters']}/{layer['filters']}"
        score = "" if layer["threshold"] is None else f"{layer['threshold']:9.1e}"
        lines.append(
            f"{name:31} {layer['kept']:10,} {layer['total']:10,} "
            f"{100 * layer['kept'] / layer['total']:6.2f} {dead:>9} {score}".rstrip()
        )
    if (scores := report["scores"]) is not None:
        lines += ["", "scores over the threshold (the smallest that is kept): # kept, . pruned"]
        counts = list(zip(scores["over_threshold"], scores["kept"], scores["pruned"], strict=True))
        most = max(a + b for _, a, b in counts)
        for start, kept, pruned in counts:
            bars = [round(BAR * n / most) or bool(n) for n in (kept, pruned)]
            lines.append(
                f"{start:9.4f} {kept + pruned:10,} {'#' * bars[0]}{'.' * bars[1]}".rstrip()
            )
        if above := scores["pruned_above_threshold"]:
            lines.append(
                f"note: {above:,} pruned scores are above the threshold: the mask was kept"
            )
    if report["dead_filters"]:
        lines += ["", "dead: output filters (or outputs) without any kept weight"]
    if report["dead_layers"]:
        lines.append(
            f"warning: layer collapse: nothing is kept of {', '.join(report['dead_layers'])}"
        )
    return lines


def _draw(report: dict[str, Any], path: Path) -> None:
    layers, scores = report["layers"], report["scores"]
    drawn = pictures.figure(12 if scores else 7, max(3.5, 0.22 * len(layers)))
    left, *right = drawn.subplots(1, 2 if scores else 1, squeeze=False)[0]
    names = [layer["name"].removesuffix(".weight") for layer in layers]
    left.barh(names, [100 * layer["kept"] / layer["total"] for layer in layers], label="weights")
    alive = [100 * (1 - layer["dead_filters"] / layer["filters"]) for layer in layers]
    left.plot(alive, names, "k|", label="filters")
    left.invert_yaxis()
    left.set_xlabel("kept, %")
    left.legend()
    left.set_title(f"{report['arch']}, k {report.get('k', 1)}, {report.get('layer_type', 'dense')}")
    for axes in right:
        places = range(len(scores["kept"]))
        axes.bar(places, scores["pruned"], align="edge", width=1, label="pruned", color="0.7")
        axes.bar(
            places, scores["kept"], align="edge", width=1, bottom=scores["pruned"], label="kept"
        )
        axes.axvline(-BINS[0], color="k", linestyle="--", label="threshold")
        axes.set_xticks(list(places), [f"{2**n}" if n >= 0 else f"1/{2**-n}" for n in BINS])
        axes.set_xlabel("score over its threshold")
        axes.legend()
    pictures.save(drawn, path)
