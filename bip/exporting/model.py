"""A trained network as its checkpoint defines it: weights, mask and scores, and what built it."""

import json
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bip import models
from bip.checkpoint_path import agrees, k_in_name
from bip.config import build_config
from bip.data.options import DataOptions
from bip.errors import UserError
from bip.pruning.choices import LayerType, Scope
from bip.pruning.layout import find_prunable
from bip.pruning.state import PrunedParameters
from bip.training import sources
from bip.training.checkpoint import State, layer_masks, read_checkpoint, restore_model, split_state


@dataclass(frozen=True)
class Facts:
    """What builds the network, and how it was pruned. Given values override a checkpoint's.

    k, layer_type and scope give the mask of a published checkpoint, which records none of them.
    """

    arch: str | None = None
    num_classes: int | None = None
    channels: int | None = None
    image_dim: int | None = None
    k: str | None = None
    layer_type: LayerType | None = None
    scope: Scope | None = None


@dataclass(frozen=True)
class Model:
    """A network in evaluation mode whose weights are masked, and the parts of them.

    Attributes:
        masks: by weight name, uint8 in the weight's shape; empty for a dense network.
        weights, scores: likewise, before the mask.
        config: the run's settings; empty for a published checkpoint.
    """

    path: Path
    facts: Facts
    network: nn.Module
    config: dict[str, Any]
    epoch: int
    masks: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)

    def sample(self, size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Random images (size, channels, H, W), always the same."""
        side = self.facts.image_dim
        assert side is not None
        assert self.facts.channels is not None
        generator = torch.Generator().manual_seed(0)
        return torch.randn(size, self.facts.channels, side, side, generator=generator, dtype=dtype)

    def metadata(self, name: str) -> dict[str, str]:
        """What a file of the format `name` records, as text, for safetensors."""
        found = {key: str(value) for key, value in _known(self.facts).items()} | {"format": name}
        if self.config:
            found |= {"dataset": self.config["dataset"], "config": json.dumps(self.config)}
        return found


def read_model(path: Path, given: Facts | None = None) -> Model:
    """The model of a checkpoint, of this project or published.

    Raises UserError, one line, for a file that is no checkpoint or does not fit, and naming the
    flag for a fact that neither the file nor `given` states.
    """
    state = read_checkpoint(path)
    facts = _facts(state, path, given or Facts())
    assert facts.arch is not None
    assert facts.num_classes is not None
    assert facts.channels is not None
    network = models.build(facts.arch, facts.num_classes, facts.channels).eval()
    state = sources.fit(state, network, str(path))
    epoch = state.get("epoch", 0)
    config = state.get("config") or state.get("facts", {}).get("config", {})
    if facts.layer_type is None:
        restore_model(network, None, state, str(path))
        return Model(path, facts, network, config, epoch)
    stem = facts.layer_type == "channel" and sources.prunes_stem(state, network)
    layout = find_prunable(network, facts.layer_type, stem)
    assert facts.k is not None
    pruned = PrunedParameters(network, layout, Decimal(facts.k), facts.scope or "global")
    restore_model(network, pruned, state, str(path))

    def by_name(flat: Tensor) -> dict[str, Tensor]:
        views = zip(layout.tensors, pruned.views(flat.detach()), strict=True)
        return {tensor.name: view for tensor, view in views}

    return Model(
        path, facts, network, config, epoch,
        by_name(pruned.mask), by_name(pruned.weights), by_name(pruned.scores),
    )  # fmt: skip


def _facts(state: State, path: Path, given: Facts) -> Facts:
    recorded: dict[str, Any] = {}
    weights, _ = split_state(state)
    of_export = state.get("facts", {}).get("config")
    if "config" in state or of_export is not None:
        config = build_config(state.get("config") or of_export, str(path))
        data = DataOptions.of(config)
        recorded = {
            "arch": config.arch, "num_classes": data.classes, "channels": data.spec.channels,
            "image_dim": data.side, "k": config.k_text,
        }  # fmt: skip
        if layer_masks(state) or "layer_type" in state.get("facts", {}):
            recorded |= {"layer_type": config.layer_type, "scope": config.ranking_scope}
        for name in ("arch", "k", "layer_type", "scope"):
            mine = getattr(given, name)
            if mine is not None and str(mine) != str(recorded.get(name)):
                raise UserError(
                    f"{name}: {path} was made with {recorded.get(name, 'a dense network')}, which "
                    f"it records; leave --{name.replace('_', '-')} out"
                )
    else:
        recorded = _of_published(state, weights, path, given)
    check_arch(recorded["arch"], given.arch, path)
    return Facts(**recorded | _known(given))


def check_arch(recorded: str, given: str | None, path: Path) -> None:
    """Raise UserError if a file alone names a function of yours, as building it runs its code."""
    if ":" in recorded and given is None:
        raise UserError(f"arch: {path} names your function; to run it give arch as {recorded}")


def _of_published(
    state: State, weights: dict[str, Tensor], path: Path, given: Facts
) -> dict[str, Any]:
    named = k_in_name(path)
    facts = {"arch": state.get("arch"), "k": named and str(named)}
    facts |= state.get("facts", {}) | _known(given)
    arch = facts["arch"]
    if not isinstance(arch, str):
        raise UserError(f"arch: {path} does not record it; give --arch NAME")
    stems = [w.shape[1] for w in weights.values() if isinstance(w, Tensor) and w.dim() == 4]
    heads = [w.shape[0] for w in weights.values() if isinstance(w, Tensor) and w.dim() >= 2]
    found: dict[str, Any] = {"arch": arch, "image_dim": 32}
    found["channels"] = stems[0] if stems else 3
    found["num_classes"] = heads[-1] if heads else 10
    if facts.get("layer_type") == "dense":
        return found
    if not sources.is_pruned(state) and facts.get("layer_type") is None:
        return found
    for name, example in (("k", "0.1"), ("layer_type", "unstructured")):
        if facts.get(name) is None:
            flag = name.replace("_", "-")
            raise UserError(
                f"{name}: {path} does not record it; give --{flag}, as in --{flag} {example}"
            )
        found[name] = facts[name]
    try:
        fits = 0 < Decimal(str(facts["k"])) <= 1
    except InvalidOperation:
        fits = False
    if not fits:
        raise UserError(f"k: must be a decimal number in (0, 1], not {facts['k']!r}")
    if sources.is_pruned(state):
        recorded = state.get("facts", {}).get("k")
        for k, source in ((recorded, "it records"), (named, "its name says")):
            if k is not None and not agrees(Decimal(str(facts["k"])), Decimal(k)):
                raise UserError(
                    f"k: {path} was pruned with k {k}, as {source}, not {facts['k']}; give --k {k}"
                    + (", or rename it" if source == "its name says" else "")
                )
        may = sources.layer_types(state)
        if facts["layer_type"] not in may:
            raise UserError(
                f"layer_type: {path} was pruned with {' or '.join(may)}, not {facts['layer_type']}"
            )
    found["scope"] = facts.get("scope") or (
        "global" if facts["layer_type"] == "unstructured" else "layer"
    )
    return found


def _known(facts: Facts) -> dict[str, Any]:
    return {name: value for name, value in vars(facts).items() if value is not None}
