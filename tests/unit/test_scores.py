"""How scores start, against the definitions."""

import math

import pytest
import torch
from torch import Tensor, nn

from bip.pruning.layout import find_prunable
from bip.pruning.scores import initialise_scores

FAN_IN, FAN_OUT = 32 * 9, 48 * 9  # of the convolution below


def start(how: str, seed: int = 0, scale: float = 1) -> tuple[list[Tensor], list[Tensor]]:
    """(scores, weights) of each layer."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(32, 48, 3), nn.Linear(60, 50))
    layout = find_prunable(network, "unstructured")
    weights = scale * torch.cat([layer.weight.flatten() for layer in network]).detach()
    scores = torch.full_like(weights, float("nan"))
    initialise_scores(scores, weights, layout, how, "torch")  # type: ignore[arg-type]
    assert scores.isfinite().all()
    sizes = [48 * 32 * 9, 3000]
    return list(scores.split(sizes)), list(weights.split(sizes))


def test_scaled_scores_are_the_weights_in_their_own_storage() -> None:
    for score, weight in zip(*start("scaled"), strict=True):
        assert torch.equal(score, weight)
        assert score.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()


def test_hydra_scores() -> None:
    """s = sqrt(6 / fan_in) · θ / max|θ|, layer by layer; zero in a layer of zeros."""
    for score, weight, fan_in in zip(*start("hydra"), (FAN_IN, 60), strict=True):
        expected = math.sqrt(6 / fan_in) * weight / weight.abs().max()
        torch.testing.assert_close(score, expected, rtol=1e-6, atol=0)
    assert all((score == 0).all() for score in start("hydra", scale=0)[0])


# Standard deviations: He et al. (fan in) and Glorot and Bengio (fan in + fan out), with the gain of
# torch's layers. The published ones are in tests/methods/test_bip.py.
DEVIATIONS = {
    "kaiming_normal": [math.sqrt(2 / FAN_IN), math.sqrt(2 / 60)],
    # a = sqrt(5), as torch initialises layers: bound 1 / sqrt(fan in)
    "kaiming_uniform": [1 / math.sqrt(3 * FAN_IN), 1 / math.sqrt(3 * 60)],
    "xavier_normal": [math.sqrt(2 / (FAN_IN + FAN_OUT)), math.sqrt(2 / 110)],
    "xavier_uniform": [math.sqrt(2 / (FAN_IN + FAN_OUT)), math.sqrt(2 / 110)],
}


@pytest.mark.parametrize("how", DEVIATIONS)
def test_random_scores(how: str) -> None:
    scores, weights = start(how)
    for score, deviation, weight in zip(scores, DEVIATIONS[how], weights, strict=True):
        assert float(score.std()) == pytest.approx(deviation, rel=0.05)
        assert abs(float(score.mean())) < 0.1 * deviation
        peak = float(score.abs().max()) / deviation
        assert (
            0.97 * math.sqrt(3) < peak < 1.0001 * math.sqrt(3) if "uniform" in how else peak > 2.5
        )
        together = torch.corrcoef(torch.stack([score, weight]))[0, 1]
        assert abs(float(together)) < 0.1
    assert torch.equal(scores[0], start(how)[0][0])
    assert not torch.equal(scores[0], start(how, seed=1)[0][0])
