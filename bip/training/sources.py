"""Checkpoints of other programs: what a file is, and how its entries become a network's.

To read a new kind of file, add an entry to CONTAINERS, LEFT_OUT or FORMATS. Files are unpickled by
torch's weights-only rules: tensors and plain types, numpy scalars by name. Nothing here runs code
from a file, also with `skip_objects`, which puts an empty placeholder for each other object.

A foreign file becomes a state without "config": "state_dict" (names as in the file), "foreign"
(what the file is), "facts" (what it records of arch, k, layer_type, dataset), "notes" (lines for
the user). `fit` gives it the names of a network.
"""

import collections
import contextlib
import io
import json
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from bip import models
from bip.checkpoint_path import k_in_name
from bip.errors import UserError
from bip.pruning.choices import GROUP_AXIS, LayerType, Scope
from bip.pruning.layout import find_prunable

if TYPE_CHECKING:
    from bip.config import RunConfig
    from bip.pruning.state import PrunedParameters

SCORES = "popup_scores"
State = dict[str, Any]

# Keys under which files hold their state_dict, the usual one first.
CONTAINERS = (
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights",
)  # fmt: skip

# Entries that no network here has, by a pattern of their names, and what they are.
LEFT_OUT = {
    r"(.*\.)?(AuxLogits|aux1|aux2)\..*": "auxiliary heads, which are not built",
    r"(.*\.)?n_averaged": "the counter of an averaged model",
    r"(.*\.)?sub_block1\..*": "the published WRN's block that no image passes",
    r"(.*\.)?total_(ops|params)": "a profiler's counter",
}

# What a file is by its first bytes, if it is none that holds tensors.
FORMATS = {
    b"version https://git-lfs": "a Git LFS pointer; fetch the file with git lfs pull",
    b"<": "a web page; download the file itself",
    b"\x08": "perhaps an ONNX file; give the checkpoint that it was made from",
    b"\x1f\x8b": "a gzip archive; unpack it first",
}

# Of torch's errors: a part, and what it means.
REASONS = {
    "TorchScript": "a TorchScript archive; save its module's state_dict() instead",
    "EOFError": "the file is empty or cut short",
    "central directory": "the file is damaged or cut short",
    'hasRecord("version")': "an archive, but not of torch.save; unpack it first",
}

_BLOCKED = re.compile(r"GLOBAL ([\w.]+) was not an allowed global")


# Reading


def load(data: bytes, where: Path, skip_objects: bool = False) -> tuple[Any, dict[str, str]]:
    """(the file's content, its text metadata). Raises UserError, one line, for any other file."""
    if data[:2] != b"PK" and data[8:9] == b"{":
        return _load_safetensors(data, where)
    for start, what in FORMATS.items():
        if data.startswith(start):
            raise UserError(f"{where}: not a readable checkpoint: {what}")
    return unpickle(data, where, skip_objects), {}


def _load_safetensors(data: bytes, where: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors.torch import load as load_tensors

    try:
        tensors = load_tensors(data)
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{where}: not a readable safetensors file ({reason})") from None
    return tensors, metadata


class _Placeholder:
    """Stands for an object that is not loaded. Takes any arguments and state, and keeps none."""

    def __init__(self, *_args: object, **_options: object) -> None: ...

    def __setstate__(self, _state: object) -> None: ...


def unpickle(data: bytes, where: Path, skip_objects: bool = False) -> Any:
    """Tensors and plain types from a file of torch.save, without running code from it.

    Published checkpoints hold a numpy float, which is allowed. Raises UserError.
    """
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    allowed: list[Any] = [scalar, np.dtype, np.float64, np.float32, np.int64, np.bool_]
    allowed += [type(np.dtype(t)) for t in (np.float64, np.float32, np.int64, np.bool_)]
    # Files written under numpy 1 name the same function by its old module.
    allowed.append((scalar, "numpy.core.multiarray.scalar"))
    left_out: set[str] = set()
    while True:
        try:
            with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the error below is enough
                return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # its own text recommends unsafe loading
            blocked = _BLOCKED.search(str(error))
            if blocked and skip_objects and blocked[1] not in left_out:
                left_out.add(blocked[1])
                # One class for each name, as torch looks them up by name.
                stand_in = type("Placeholder", (_Placeholder,), {})
                allowed.append((stand_in, blocked[1]))
                continue
            raise UserError(f"{where}: not a readable checkpoint ({_reason(blocked)})") from None
        except Exception as error:  # an unpickler may raise anything on a file that is no pickle
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            reason = next((plain for part, plain in REASONS.items() if part in reason), reason)
            raise UserError(f"{where}: not a readable checkpoint ({reason})") from None


def _reason(blocked: re.Match[str] | None) -> str:
    if blocked is None:
        return "no checkpoint, or it holds more than tensors and plain types"
    return (
        f"it holds more than tensors and plain types: {blocked[1]}; --skip-objects leaves such "
        "objects out and runs no code; of a whole network, save its state_dict() instead"
    )


def recognise(
    content: Any, metadata: Mapping[str, str], where: Path, key: str | None = None
) -> State:
    """The state of a foreign file's content.

    `key` is the place of the state_dict, such as "ema.module", or a prefix of its entries. Raises
    UserError for content without named tensors.
    """
    if metadata.get("format") in ("compact", "onnx"):
        raise UserError(
            f"{where}: holds the {metadata['format']} form, whose layers are smaller than the "
            "network's; give the checkpoint that it was made from"
        )
    facts, notes = recorded_facts(content, metadata), []
    chosen = content if key is None else _at(content, key)
    found, place = _contained(content if chosen is None else chosen)
    tensors = _tensors(found)
    if chosen is None:
        tensors = {n: t for n, t in tensors.items() if n.startswith(f"{key}.")}
    if not tensors:
        keys = [str(name) for name in content] if isinstance(content, Mapping) else []
        missing = f"nothing at source_key {key}" if key else "no state_dict"
        shown = f"; its keys: {', '.join(keys[:8])}" if keys else ""
        raise UserError(f"{where}: not a checkpoint: it has {missing}{shown}")
    if key is None and place:
        others = [n for n, v in content.items() if n != place[0] and _tensors(_contained(v)[0])]
        if others:
            notes.append(
                f"{where}: {place[0]} is used, not {', '.join(others)}; --source-key KEY chooses"
            )
    place = [key, *place] if key and chosen is not None else place
    what = f"a state_dict at {'.'.join(place)}" if place else "a bare state_dict"
    state = {"state_dict": tensors, "foreign": what, "facts": facts, "notes": notes}
    if isinstance(content, Mapping) and isinstance(content.get("epoch"), int):
        state["epoch"] = content["epoch"]
    if isinstance(facts.get("arch"), str):
        state["arch"] = facts["arch"]
    return state


def _at(content: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(content, Mapping) or part not in content:
            return None
        content = content[part]
    return content


def _contained(content: Any) -> tuple[Any, list[str]]:
    """(the state_dict in `content`, the keys that lead there)."""
    place: list[str] = []
    while isinstance(content, Mapping):
        inner = next((n for n in CONTAINERS if isinstance(content.get(n), Mapping)), None)
        if inner is None:
            break
        content = content[inner]
        place.append(inner)
    return content, place


def _tensors(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        return {}
    return {n: v for n, v in content.items() if isinstance(n, str) and isinstance(v, Tensor)}


def recorded_facts(content: Any, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a file records of its network: in text metadata, or `arch` beside the tensors."""
    found: dict[str, Any] = {}
    if isinstance(content, Mapping):
        inner = content.get("metadata")
        if isinstance(inner, Mapping):
            metadata = {**inner, **metadata}
        if isinstance(content.get("arch"), str):
            found["arch"] = content["arch"]
    for name in ("arch", "k", "layer_type", "dataset", "num_classes"):
        if isinstance(metadata.get(name), str):
            found[name] = metadata[name]
    if found.get("layer_type") in ("None", "dense"):
        del found["layer_type"]
    if not re.fullmatch(r"\d*\.?\d+", found.get("k", "")):
        found.pop("k", None)
    with contextlib.suppress(KeyError, TypeError, ValueError):
        found["config"] = dict(json.loads(metadata["config"]))  # of our exports
    return found


# What is pruned


def is_pruned(state: State) -> bool:
    """Whether a foreign state is of a pruned network: with scores, masks, or a record of it."""
    names = state["state_dict"]
    return "layer_type" in state["facts"] or any(
        name.endswith((SCORES, "weight_mask")) for name in names
    )


def has_masks(state: State) -> bool:
    """Whether a foreign state has torch.nn.utils.prune's masks."""
    return any(name.endswith("weight_mask") for name in state["state_dict"])


def k_of_scores(state: State, layer_type: LayerType) -> Decimal | None:
    """k, to 12 places, if scores are exactly 0 where pruned; None if none is, or all are."""
    masks = _nonzero(all_scores(state), layer_type).values()
    total, kept = sum(m.numel() for m in masks), sum(int(m.sum()) for m in masks)
    return round(Decimal(kept) / total, 12).normalize() if 0 < kept < total else None


def _nonzero(values: Mapping[str, Tensor], layer_type: LayerType) -> dict[str, Tensor]:
    """The masks that prune what is exactly 0: single values, or whole filters or channels."""
    masks = {}
    for name, value in values.items():
        kept = value != 0
        if (axis := GROUP_AXIS.get(layer_type)) is not None:
            others = [d for d in range(kept.dim()) if d != axis]
            kept = kept.any(dim=others, keepdim=True).expand_as(kept)
        masks[name] = kept.to(torch.uint8)
    return masks


def all_scores(state: State) -> dict[str, Tensor]:
    """The scores by weight name, in the file's order, those of blocks left out included."""
    if "scores" in state:
        found: dict[str, Tensor] = state["scores"]
        return found
    entries = state["state_dict"].items()
    return {n.removesuffix(SCORES) + "weight": v for n, v in entries if n.endswith("." + SCORES)}


def layer_types(state: State) -> tuple[LayerType, ...]:
    """The layer types that a foreign state may have been pruned with."""
    recorded = state["facts"].get("layer_type")
    if recorded in get_args(LayerType):
        return (recorded,)
    masks = [v for n, v in state["state_dict"].items() if n.endswith("weight_mask")]
    if any(value.dim() == 2 for value in [*all_scores(state).values(), *masks]):
        return ("unstructured",)
    grouped: tuple[LayerType, ...] = ("filter", "channel")
    kinds = [k for k in grouped if all(_is_whole(mask != 0, GROUP_AXIS[k]) for mask in masks)]
    linear = any(n.endswith("weight") and v.dim() == 2 for n, v in state["state_dict"].items())
    if kinds and (masks or linear):  # unstructured pruning would have scores for linear layers
        return tuple(kinds)
    return (*kinds, "unstructured")


def _is_whole(mask: Tensor, axis: int) -> bool:
    """Whether a mask keeps or prunes each index along `axis` as a whole."""
    groups = mask.movedim(axis, 0).flatten(1)
    return bool((groups == groups[:, :1]).all())


def published_masks(
    state: State, layer_type: LayerType, k: Decimal, scope: Scope
) -> dict[str, Tensor]:
    """The masks by weight name that the published code makes of the scores.

    Its rule prunes the int((1 - k) · n) smallest, in floats, of the network's |scores| or, with
    `scope` "layer" (HYDRA's own code), of each layer's; of filters and channels it ranks L2 norms
    in each convolution, the stem's colours too. If exactly k are not 0, these are kept.
    """
    scores = {name: score.abs() for name, score in all_scores(state).items()}
    if k == k_of_scores(state, layer_type):
        return _nonzero(scores, layer_type)
    if layer_type == "unstructured" and scope == "erk":
        raise UserError("scope: erk is none of the published rules; give --scope global or layer")
    return published_rule(scores, layer_type, k, scope)


def published_rule(
    scores: Mapping[str, Tensor], layer_type: str, k: Decimal, scope: str
) -> dict[str, Tensor]:
    """The rule of `published_masks` for |scores| by weight name."""
    if layer_type == "unstructured":
        if scope == "layer":
            return {name: _top(score, k) for name, score in scores.items()}
        flat = _top(torch.cat([score.flatten() for score in scores.values()]), k)
        parts = flat.split([score.numel() for score in scores.values()])
        return {n: part.view_as(scores[n]) for n, part in zip(scores, parts, strict=True)}
    axis = 0 if layer_type == "filter" else 1
    masks = {}
    for name, score in scores.items():
        others = [d for d in range(score.dim()) if d != axis]
        kept = _top(torch.linalg.vector_norm(score.float(), dim=others), k)
        masks[name] = kept.view([-1 if d == axis else 1 for d in range(score.dim())]).expand_as(
            score
        )
    return masks


def _top(values: Tensor, k: Decimal) -> Tensor:
    flat = values.flatten()
    kept = torch.ones(len(flat), dtype=torch.uint8)
    kept[flat.argsort(stable=True)[: int((1 - float(k)) * len(flat))]] = 0
    return kept.view_as(values)


def prunes_stem(state: State, network: nn.Module) -> bool:
    """Whether a state's channel mask prunes the colours of the first convolution, as published."""
    first = find_prunable(network, "channel", stem=True).tensors[0].name
    if "foreign" not in state:
        return first in state["masked"]
    return first in all_scores(state)


def notes(state: State, config: "RunConfig", pruned: "PrunedParameters | None") -> list[str]:
    """Lines on how a run reads a foreign source; none for a state of this project."""
    found: list[str] = [*state.get("notes", [])]
    path, by_scores = config.source_net, "scores" in state and "masks" not in state
    if path and by_scores and pruned is not None and pruned.keeps_constants:
        layer_type, scope = pruned.layout.layer_type, pruned.scope
        found.append(_mask_note(state, layer_type, config.k, scope, path))
    return found


def _mask_note(state: State, layer_type: LayerType, k: Decimal, scope: Scope, path: Path) -> str:
    """Which rule gives a published file's mask, and a warning if only a flag states k."""
    where = "each convolution"
    if layer_type == "unstructured":
        where = "each layer" if scope == "layer" else "the network (--scope layer: as HYDRA's code)"
    rule = f"{path}: the mask keeps the largest |scores| of {where}, k {k}"
    if k == k_of_scores(state, layer_type):
        return f"{path}: the mask keeps the scores that are not 0, k {k}"
    if k_in_name(path) is not None:
        return f"{rule}, as its name says"
    masks = published_masks(state, layer_type, k, scope)
    nonzero = _nonzero(all_scores(state), layer_type)
    if k < 1 and all(torch.equal(masks[name], nonzero[name]) for name in masks):
        return f"{rule}, those that are not 0"
    return f"warning: {rule}; neither the file nor its name confirms this k"


# Fitting a network


@torch.no_grad()
def fit(state: State, network: nn.Module, where: str, reset_head: bool = False) -> State:
    """The state with the network's names, each entry there and of its shape; else UserError.

    Leaves wrappers' prefixes and entries that no network has out, and fills in batch-norm's
    counters, which old files lack. `reset_head`: the last layer keeps the network's own values.
    """
    own = network.state_dict()
    entries, notes, masks = dict(state["state_dict"]), list(state.get("notes", [])), {}
    fitted = dict(state)
    if "foreign" in state:
        masks = _split_torch_prune(entries)
        prefix = _prefix(entries, own)
        scores = all_scores(state).items()
        fitted["scores"] = {name.removeprefix(prefix): score for name, score in scores}
        masks = {name.removeprefix(prefix): mask for name, mask in masks.items()}
        entries, left = _without(prefix, entries)
        notes += left
        for name, value in own.items():
            if name.endswith("num_batches_tracked"):
                if name.replace("num_batches_tracked", "running_mean") in entries:
                    entries.setdefault(name, value)
            elif name in entries and entries[name].layout != torch.strided:
                entries[name] = entries[name].to_dense().view_as(value)
    for name, value in entries.items():
        if name in own and own[name].is_floating_point() and not _holds_floats(value):
            kind = "without data (meta)" if value.is_meta else str(value.dtype)
            raise UserError(f"{where}: {name} is {kind}; save the network's floating-point weights")
        if value.dtype.itemsize == 1 and value.is_floating_point():  # float8 has no `isfinite`
            entries[name] = value = value.float()
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise UserError(f"{where}: {name} holds NaN or infinite values; it cannot be used")
    if reset_head:
        pruned = is_pruned(state) if "foreign" in state else state.get("mask") is not None
        if pruned:
            raise UserError(f"reset_head: {where} is pruned; only a dense network takes a new head")
        head = _head(network)
        entries |= {name: value.clone() for name, value in own.items() if name.startswith(head)}
    weights = {n: v for n, v in entries.items() if not n.endswith(SCORES)}
    check(own, weights, where)
    fitted |= {"state_dict": entries, "notes": notes}
    if "foreign" in state:
        if state["facts"].get("layer_type") is not None:
            layer_type = layer_types(state)[0]
            named = [tensor.name for tensor in find_prunable(network, layer_type).tensors]
            masks = _nonzero({name: entries[name] for name in named}, layer_type)
        if masks:
            fitted["masks"] = masks
            for name in masks:  # no scores are recorded; any that agree with the mask do
                entries.setdefault(name.removesuffix("weight") + SCORES, entries[name].abs())
    return fitted


def _holds_floats(value: Tensor) -> bool:
    """Not those of a quantized network, whose integers are no weights without their scale."""
    return value.is_floating_point() and not value.is_meta


def _split_torch_prune(entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take torch.nn.utils.prune's `weight_orig` and `weight_mask` apart: weights stay, masks go."""
    masks = {}
    for name in [name for name in entries if name.endswith("weight_mask")]:
        plain = name.removesuffix("_mask")
        if f"{plain}_orig" in entries:
            masks[plain] = (entries.pop(name) != 0).to(torch.uint8)
            entries[plain] = entries.pop(f"{plain}_orig")
    return masks


def _without(prefix: str, entries: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(entries below a prefix, without it and without LEFT_OUT; lines on what was left out)."""
    inside = {n.removeprefix(prefix): v for n, v in entries.items() if n.startswith(prefix)}
    outside = [n for n in entries if not n.startswith(prefix)]
    notes = []
    for pattern, what in LEFT_OUT.items():
        named = [n for n in inside if re.fullmatch(pattern, n)]
        for name in named:
            del inside[name]
        found = [n for n in outside if re.fullmatch(pattern, n)]
        outside = [n for n in outside if n not in found]
        if named or found:
            notes.append(f"left out: {_listed([*named, *found])}: {what}")
    if outside:
        notes.append(f"left out, as not in {prefix}*: {_listed(outside)}")
    return inside, notes


def _prefix(entries: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """The prefix under which most of the network's names stand."""
    counts: collections.Counter[str] = collections.Counter()
    for name in entries:
        if name in own:
            counts[""] += 1
        for dot in re.finditer(r"\.", name):
            if name[dot.end() :] in own:
                counts[name[: dot.end()]] += 1
    best = counts.most_common(2)
    if len(best) == 2 and best[0][1] == best[1][1] and best[0][1] > len(own) // 2:
        first, second = (f"'{prefix.removesuffix('.')}'" for prefix, _ in best)
        raise UserError(f"source_key: two networks in the file fit: {first} and {second}; give one")
    return best[0][0] if best else ""


def _head(network: nn.Module) -> str:
    """The name, with its dot, of the last linear layer or convolution."""
    layers = [n for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return f"{layers[-1]}."


def _problems(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """What does not fit, as words."""
    missing = [n for n in own if n not in weights]
    unexpected = [n for n in weights if n not in own]
    odd = [n for n in own if n in weights and own[n].shape != weights[n].shape]
    shapes = [f"{n} {tuple(weights[n].shape)}, not {tuple(own[n].shape)}" for n in odd]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    return [f"{len(names)} {what}: {_listed(names)}" for what, names in kinds if names]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], where: str) -> None:
    """Raise UserError, one line, unless the weights are those of the network's state_dict."""
    problems = _problems(own, weights)
    if not problems:
        return
    odd = [n for n in own if n in weights and own[n].shape != weights[n].shape]
    heads = [n for n in odd if own[n].shape[1:] == weights[n].shape[1:] and own[n].dim() > 0]
    if len(heads) == len(odd) and all(n in weights for n in own) and len(weights) == len(own):
        there, here = weights[heads[0]].shape[0], own[heads[0]].shape[0]
        raise UserError(
            f"{where}: is for {there} classes ({heads[0]}), the network has {here}; are arch and "
            f"num_classes right? --reset-head gives it a fresh last layer"
        )
    others = list(_fitting(weights))
    fits = f"it fits {' or '.join(others)}" if others else "is arch right?"
    raise UserError(f"{where}: does not fit the network (arch): {'; '.join(problems)}; {fits}")


def _fitting(weights: Mapping[str, Tensor]) -> Iterator[str]:
    """The networks of the zoo, and torchvision's of those names, that the weights fit."""
    matrices = [w for w in weights.values() if w.dim() >= 2]
    if not matrices:
        return
    classes, images = matrices[-1].shape[0], [w.shape[1] for w in matrices if w.dim() == 4]
    for name in models.names():
        for arch in (name, f"torchvision/{name}"):
            try:
                own = models.outline(arch, classes, images[0] if images else 3).state_dict()
            except UserError:
                continue
            named = _without(_prefix(weights, own), weights)[0]
            counters = {n: v for n, v in own.items() if n.endswith("num_batches_tracked")}
            if not _problems(own, counters | named):
                yield arch
