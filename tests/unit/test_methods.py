"""What every method declares, and that the rest of the program takes it from there."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from bip.config import RunConfig, about
from bip.methods import find, methods, spellings
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


def test_the_keys_of_methods_are_settings_that_act_in_some_methods_only() -> None:
    of_methods = {name for name in RunConfig.model_fields if about(name).of_method}
    assert set().union(*(method.keys for method in methods().values())) == of_methods


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
        "omp", tmp_path, source_net=source, layer_type=layer_type, k=0.3, max_steps=5, lr=0.02
    )
    dense = torch.load(source, weights_only=True)["state_dict"]
    masks = finished.masks
    if layer_type == "unstructured":
        sizes = torch.cat([dense[name].abs().flatten() for name in masks])
        kept = sizes.argsort(descending=True, stable=True)[: keep_count("0.3", len(sizes))]
        expected = torch.zeros(len(sizes), dtype=torch.uint8)
        expected[kept] = 1
        assert torch.equal(torch.cat([mask.flatten() for mask in masks.values()]), expected)
        return
    axis = 0 if layer_type == "filter" else 1
    for name, mask in masks.items():
        norms = dense[name].transpose(0, axis).flatten(1).norm(dim=1)
        groups = mask.transpose(0, axis).flatten(1)
        assert torch.equal(groups.amin(1), groups.amax(1))
        assert norms[groups.amin(1) == 1].min() >= norms[groups.amin(1) == 0].max()
        assert int(groups.amin(1).sum()) == keep_count("0.3", len(norms))


def test_omp_trains_what_it_keeps_and_nothing_else_of_the_weights(
    source: Path, tmp_path: Path
) -> None:
    settings = {"source_net": source, "k": 0.3, "wd": 0, "max_steps": 5, "lr": 0.02}
    finished = train("omp", tmp_path, **settings)
    dense = torch.load(source, weights_only=True)["state_dict"]
    for name, mask in finished.masks.items():
        moved = finished.weights[name] != dense[name]
        assert not moved[mask == 0].any()
        assert moved[mask == 1].any()
