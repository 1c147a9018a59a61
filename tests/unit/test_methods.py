"""What every method declares, and that the rest of the program takes it from there."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from bip.config import RunConfig, about
from bip.methods import acts_in, find, methods, own_settings, spellings
from bip.methods.base import Mode
from bip.pruning.layout import keep_count
from tests.runs import LAYER_TYPES, train


def test_a_method_is_found_by_its_own_and_its_published_name() -> None:
    for method in methods().values():
        assert find(method.name, method.mode) is method
        assert find(method.trainer, method.mode) is method
        assert {method.name, method.trainer} <= set(spellings())
    assert find("base", "prune").name == "hydra"
    assert find("bilevel", "prune").name == "bip"


@pytest.mark.parametrize("method", methods().values(), ids=methods())
def test_a_method_of_another_mode_is_refused_with_the_right_names(method: type) -> None:
    for mode in set(get_args(Mode)) - {m.mode for m in methods().values() if m is method}:
        if method.trainer == "base":  # type: ignore[attr-defined]
            assert find("base", mode) is not method
        with pytest.raises(ValueError, match=f"cannot {mode}; give --trainer"):
            find(method.name, mode)  # type: ignore[attr-defined]


def test_an_unknown_method_gets_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"'hydre' \(perhaps you meant hydra\)"):
        find("hydre", "prune")


def test_what_a_method_declares_is_a_setting_of_runs_and_acts_in_that_method() -> None:
    assert own_settings() <= RunConfig.model_fields.keys()
    for method in methods().values():
        for name in method.settings.model_fields:
            assert acts_in(method, name)
            assert not acts_in(find("finetune", "finetune"), name)


def test_every_setting_has_a_group_and_help() -> None:
    for name, field in RunConfig.model_fields.items():
        assert about(name).group
        assert field.description


def test_declarations_are_read_without_torch() -> None:
    """The launcher plans with them, and a rank installs its signal handlers before torch."""
    code = "import sys, bip.config; from bip.methods import methods; methods(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "bip.methods.hydra" in done.stdout.split()
    assert "torch" not in done.stdout.split()


# One-shot magnitude


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
def test_omp_keeps_the_largest_weights_of_the_dense_network_to_the_end(
    layer_type: str, source: Path, tmp_path: Path
) -> None:
    finished = train(
        "omp", tmp_path, source_net=source, layer_type=layer_type, k=0.3, max_steps=5, wd=0
    )
    dense = torch.load(source, weights_only=True)["state_dict"]
    axis = {"unstructured": None, "filter": 0, "channel": 1}[layer_type]
    sizes, kept = [], []
    for name, mask in finished.masks.items():
        groups = mask.flatten() if axis is None else mask.transpose(0, axis).flatten(1)
        sizes.append(dense[name].abs().flatten())
        if axis is not None:
            assert torch.equal(groups.amin(1), groups.amax(1))
            sizes[-1] = dense[name].transpose(0, axis).flatten(1).norm(dim=1)
            groups = groups.amin(1)
        kept.append(groups == 1)
        moved = finished.weights[name] != dense[name]
        assert not moved[mask == 0].any(), "only what is kept is trained"
        assert moved[mask == 1].any()
    if axis is None:  # one ranking over the network
        sizes, kept = [torch.cat(sizes)], [torch.cat(kept)]
    for size, is_kept in zip(sizes, kept, strict=True):
        assert size[is_kept].min() >= size[~is_kept].max()
        assert int(is_kept.sum()) == keep_count("0.3", len(size))
