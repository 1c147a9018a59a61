"""Schedules, warm-up, and that the rates of both levels really act."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bip.methods.bip import mask_rate
from bip.training.optim import Clock, lower_rate
from tests.runs import train
from tests.unit.networks import make_config, make_setup

CLOCK = Clock(iterations=400, per_epoch=20)  # 20 epochs


def rates(level: str, **settings: object) -> list[float]:
    """The rate of each iteration of CLOCK."""
    config = make_config(epochs=20, mask_until=1, **settings)
    rate = lower_rate if level == "lower" else mask_rate
    return [rate(config, i, CLOCK) for i in range(CLOCK.iterations)]


LEVELS = pytest.mark.parametrize(("level", "name"), [("lower", "lr"), ("upper", "mask_lr")])


@LEVELS
def test_cosine_goes_from_the_rate_to_zero(level: str, name: str) -> None:
    settings = {name: 0.3, f"{name}_schedule": "cosine"}
    values = rates(level, **settings)
    assert values[0] == 0.3
    assert values[200] == pytest.approx(0.15)
    assert values[100] == pytest.approx(0.3 * (0.5 + math.sqrt(0.125)))
    assert all(a > b > 0 for a, b in itertools.pairwise(values))
    rate = lower_rate if level == "lower" else mask_rate
    end = rate(make_config(epochs=20, mask_until=1, **settings), 400, CLOCK)
    assert end == pytest.approx(0, abs=1e-15)


@LEVELS
def test_step_drops_tenfold_at_75_and_90_percent(level: str, name: str) -> None:
    """And each level reads its own rate and schedule."""
    other = {"lr": "mask_lr", "mask_lr": "lr"}[name]
    settings = {name: 0.2, f"{name}_schedule": "step", other: 0.9, f"{other}_schedule": "cosine"}
    values = rates(level, **settings)
    assert values == pytest.approx([0.2] * 300 + [0.02] * 60 + [0.002] * 40, rel=1e-12)


@pytest.mark.parametrize("warmup", ["constant", "linear"])
@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_warm_up(warmup: str, schedule: str) -> None:
    """The schedule runs over what remains."""
    start = {"warmup": "linear"} if warmup == "linear" else {"warmup_lr": 0.01}
    values = rates("lower", lr=0.4, lr_schedule=schedule, warmup_epochs=5, **start)
    rising = [0.4 * (i + 1) / 100 for i in range(100)]
    assert values[:100] == pytest.approx(rising if warmup == "linear" else [0.01] * 100)
    assert values[100] == pytest.approx(0.4)
    if schedule == "cosine":
        assert values[250] == pytest.approx(0.2)
        assert values[-1] < 1e-4
    else:
        assert values[324:326] == pytest.approx([0.4, 0.04])  # 100 + 0.75 · 300


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop"])
def test_the_first_step_is_the_named_optimizers(optimizer: str) -> None:
    """Against the textbook's first steps, from the gradient that the step left behind."""
    setup = make_setup("hydra", optimizer=optimizer, lr=0.05, momentum=0.9, wd=0.0)
    assert setup.pruned is not None
    before = setup.pruned.scores.detach().clone()
    setup.method.step(0)
    g = setup.pruned.scores.grad
    assert g is not None
    step = {"sgd": g, "adam": g / (g.abs() + 1e-8), "rmsprop": g / ((0.01 * g * g).sqrt() + 1e-8)}[
        optimizer
    ]
    change = setup.pruned.scores.detach() - before
    torch.testing.assert_close(change, -0.05 * step, rtol=1e-3, atol=1e-6)


def test_momentum_is_a_setting() -> None:
    setup = make_setup("bip", momentum=0.7)
    for optimizer in setup.method.optimizers.values():
        assert {group["momentum"] for group in optimizer.param_groups} == {0.7}


# In real runs


def cosine(rate: float, steps: int) -> Any:
    return pytest.approx([rate * (1 + math.cos(math.pi * i / steps)) / 2 for i in range(steps)])


def test_mask_lr_and_its_schedule_act(source: Path, tmp_path: Path) -> None:
    """Runs that differ in nothing else: other scores, and the recorded rate is the schedule."""
    runs = {
        (rate, schedule): train(
            "bip", tmp_path, source_net=source, max_steps=8, mask_lr=rate,
            mask_lr_schedule=schedule, mask_wd=0, mask_until=1,
        )
        for rate, schedule in [(0.1, "step"), (0.1, "cosine"), (0.4, "step"), (0, "step")]
    }  # fmt: skip
    still = runs[0, "step"]
    scores = {
        key: torch.cat([
            finished.state["state_dict"][name.replace("weight", "popup_scores")].flatten()
            for name in still.masks
        ])
        for key, finished in runs.items()
    }  # fmt: skip
    start = torch.cat(
        [torch.load(source, weights_only=True)["state_dict"][n].flatten() for n in still.masks]
    )
    assert torch.equal(scores[0, "step"], start), "a rate of zero freezes the mask"
    assert not torch.equal(scores[0.1, "step"], scores[0.1, "cosine"])
    moved = [(scores[rate, "step"] - start).norm() for rate in (0.1, 0.4)]
    assert moved[1] > 2 * moved[0] > 0
    assert len({finished.result["mask_sha256"] for finished in runs.values()}) == 4
    recorded = {
        key: [[r[f"{level}_lr"] for r in finished.records()] for level in ("lower", "upper")]
        for key, finished in runs.items()
    }
    # 75% of 8 steps is 6, 90% is 7.2
    assert recorded[0.1, "step"] == [cosine(0.03, 8), pytest.approx([0.1] * 6 + [0.01, 0.01])]
    assert recorded[0.1, "cosine"] == [cosine(0.03, 8), cosine(0.1, 8)]


def test_hydras_scores_go_by_lr(source: Path, tmp_path: Path) -> None:
    settings = {"source_net": source, "max_steps": 4, "lr": 0.2, "lr_schedule": "cosine"}
    finished = train("hydra", tmp_path, mask_lr=9, **settings)
    assert [r["upper_lr"] for r in finished.records()] == cosine(0.2, 4)


def test_lower_steps_per_upper_step(source: Path, tmp_path: Path) -> None:
    """Three lower batches and one upper batch an iteration."""
    for lower_steps in (1, 3):
        finished = train("bip", tmp_path, source_net=source, lower_steps=lower_steps)
        assert len(finished.records()) == 1437 // 64 // lower_steps
