"""The compiled steps of both levels give the bits of the plain way: gradient, torch's SGD, z."""

from typing import Any

import numpy as np
import pytest
import torch

from bip.pruning import kernels
from bip.training import fused
from tests.runs import LAYER_TYPES
from tests.unit.networks import make_setup

STEPS = 4


def moved(method: str, layer_type: str, settings: dict[str, Any]) -> tuple[list[torch.Tensor], int]:
    """All that the steps move, and how many steps were compiled: those leave no .grad."""
    setup = make_setup(method, layer_type, lr=0.05, mask_lr=0.5, k=0.1, **settings)
    pruned = setup.pruned
    assert pruned is not None
    assert pruned.layout.size % fused.VECTOR or layer_type != "unstructured", "torch steps a rest"
    compiled = 0
    for iteration in range(STEPS):
        setup.method.step(iteration)
        trained = pruned.scores if "upper" in setup.method.optimizers else pruned.weights
        compiled += trained.grad is None
    states = [o.state_dict()["state"].values() for o in setup.method.optimizers.values()]
    momenta = [state.get("momentum_buffer") for level in states for state in level]
    network = [*setup.network.state_dict().values()]
    tensors = [pruned.weights.detach(), pruned.scores.detach(), pruned.mask, *network]
    return tensors + [m for m in momenta if m is not None], compiled


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("bip", {}),
        ("bip", {"dead_filters": "full", "wd": 0.0}),
        ("bip", {"levels": "simultaneous"}),
        ("hydra", {}),
        ("finetune", {}),
    ],
    ids=str,
)
def test_the_compiled_steps_give_the_bits_of_the_plain_ones(
    method: str, settings: dict[str, Any], layer_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, compiled = moved(method, layer_type, settings)
    assert compiled == (STEPS - 1 if fused.rounds_as_torch() else 0)  # torch's first step differs
    monkeypatch.setattr(fused, "rounds_as_torch", lambda: False)
    expected, none = moved(method, layer_type, settings)
    assert none == 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("parts", [1, 3])
def test_the_compiled_passes_are_sgd_on_every_processor(parts: int) -> None:
    """Of layers that do not end where the threads' parts do."""
    sizes, rates = (50, 7, 200, 31), (0.1, 0.9, 5e-4)
    size, starts = sum(sizes), np.cumsum([0, *sizes])
    g, weights, scores, momentum = torch.randn(4, size, generator=torch.manual_seed(0))
    mask = torch.rand(size, generator=torch.manual_seed(1)) < 0.5
    sgd = np.array(rates, np.float32)

    def stepped(values: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
        new = rates[1] * momentum + gradient + rates[2] * values
        return [values - rates[0] * new, new]

    places = np.array([g.data_ptr() + 4 * start for start in starts[:-1]], np.int64)
    z, moved, pace = torch.empty(size), weights.clone(), momentum.clone()
    targets = np.array([z.data_ptr() + 4 * start for start in starts[:-1]], np.int64)
    ones = mask.to(torch.uint8).numpy()
    kernels.lower_step(parts, size, starts, places, targets, ones, moved.numpy(), pace.numpy(), sgd)
    expected = stepped(weights, mask * g)
    torch.testing.assert_close([moved, pace, z], [*expected, mask * expected[0]])
    moved, pace = scores.clone(), momentum.clone()
    given = np.zeros(len(sizes), bool)
    kernels.upper_step(
        parts, size, starts, places, given, np.float32(0.3), weights.numpy(), ones,
        moved.numpy(), pace.numpy(), sgd,
    )  # fmt: skip
    slope = torch.where(scores < 0, -1.0, 1.0) * (weights - 0.3 * mask * g) * g
    torch.testing.assert_close([moved, pace], stepped(scores, slope))


@pytest.mark.parametrize("settings", [{"optimizer": "adam"}, {"momentum": 0.0}], ids=str)
def test_another_optimizer_is_torchs(settings: dict[str, Any]) -> None:
    assert moved("bip", "unstructured", settings)[1] == 0
