"""Schedules, warm-up, and that the rates of both levels really act."""

import itertools
import math
from pathlib import Path

import pytest
import torch

from bip.training.optim import Clock, lower_rate, mask_rate
from tests.runs import train
from tests.unit.networks import make_config, make_setup

CLOCK = Clock(iterations=400, per_epoch=20)  # 20 epochs


def rates(level: str, **settings: object) -> list[float]:
    """The rate of each iteration of CLOCK."""
    config = make_config(epochs=20, **settings)
    rate = lower_rate if level == "lower" else mask_rate
    return [rate(config, i, CLOCK) for i in range(CLOCK.iterations)]


@pytest.mark.parametrize(("level", "name"), [("lower", "lr"), ("upper", "mask_lr")])
def test_cosine_goes_from_the_rate_to_zero(level: str, name: str) -> None:
    values = rates(level, **{name: 0.3, f"{name}_schedule": "cosine"})
    assert values[0] == 0.3
    assert values[200] == pytest.approx(0.15)
    assert values[100] == pytest.approx(0.3 * (0.5 + math.sqrt(0.125)))
    assert all(a > b > 0 for a, b in itertools.pairwise(values))
    assert values[-1] < 1e-4 * 0.3
    rate = lower_rate if level == "lower" else mask_rate
    end = rate(make_config(epochs=20, **{name: 0.3, f"{name}_schedule": "cosine"}), 400, CLOCK)
    assert end == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(("level", "name"), [("lower", "lr"), ("upper", "mask_lr")])
def test_step_drops_tenfold_at_75_and_90_percent(level: str, name: str) -> None:
    values = rates(level, **{name: 0.2, f"{name}_schedule": "step"})
    assert values == pytest.approx([0.2] * 300 + [0.02] * 60 + [0.002] * 40, rel=1e-12)


def test_each_level_reads_its_own_rate_and_schedule() -> None:
    settings = {"lr": 0.5, "lr_schedule": "step", "mask_lr": 0.07, "mask_lr_schedule": "cosine"}
    lower, upper = rates("lower", **settings), rates("upper", **settings)
    assert lower[0] == lower[299] == 0.5
    assert upper[0] == 0.07
    assert upper[200] == pytest.approx(0.035)


def test_constant_warm_up() -> None:
    values = rates("lower", lr=0.4, warmup_epochs=5, warmup_lr=0.01)
    assert values[:100] == [0.01] * 100
    assert values[100] == pytest.approx(0.4)
    assert values[250] == pytest.approx(0.2), "the schedule runs over what remains"
    assert values[-1] < 1e-4


def test_linear_warm_up() -> None:
    values = rates("lower", lr=0.4, warmup_epochs=5, warmup="linear")
    assert values[:100] == pytest.approx([0.4 * (i + 1) / 100 for i in range(100)])
    assert values[100] == pytest.approx(0.4)
    assert values[250] == pytest.approx(0.2)


def test_warm_up_and_step_schedule() -> None:
    values = rates("lower", lr=1, lr_schedule="step", warmup_epochs=5, warmup_lr=0.5)
    assert values[99:101] == [0.5, 1]
    assert values[324:326] == pytest.approx([1, 0.1])  # 100 + 0.75 · 300


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop"])
def test_the_first_step_is_the_named_optimizers(optimizer: str) -> None:
    """Against the textbook's first steps, from the gradient that the step left behind."""
    setup = make_setup("hydra", optimizer=optimizer, lr=0.05, momentum=0.9, wd=0.0)
    assert setup.pruned is not None
    before = setup.pruned.scores.detach().clone()
    setup.method.step(0)
    g = setup.pruned.scores.grad
    assert g is not None
    step = {
        "sgd": g,
        "adam": g / (g.abs() + 1e-8),
        "rmsprop": g / ((0.01 * g * g).sqrt() + 1e-8),
    }[optimizer]
    change = setup.pruned.scores.detach() - before
    torch.testing.assert_close(change, -0.05 * step, rtol=1e-3, atol=1e-6)


def test_momentum_is_a_setting() -> None:
    setup = make_setup("bip", momentum=0.7)
    for optimizer in setup.method.optimizers.values():
        assert {group["momentum"] for group in optimizer.param_groups} == {0.7}


# In real runs


def test_mask_lr_and_its_schedule_act(source: Path, tmp_path: Path) -> None:
    """Two runs that differ in nothing else: other scores, and the recorded rate is the schedule."""
    runs = {
        (rate, schedule): train(
            "bip", tmp_path, source_net=source, max_steps=8, mask_lr=rate, mask_lr_schedule=schedule
        )
        for rate, schedule in [(0.1, "step"), (0.1, "cosine"), (0.4, "step"), (0, "step")]
    }
    scores = {
        key: torch.cat([
            value.flatten() for name, value in finished.state["state_dict"].items()
            if "popup_scores" in name
        ])
        for key, finished in runs.items()
    }  # fmt: skip
    start = torch.cat([
        value.flatten() for name, value in runs[0, "step"].weights.items()
        if name in runs[0, "step"].masks
    ])  # fmt: skip
    assert start.shape == scores[0, "step"].shape
    assert not torch.equal(scores[0.1, "step"], scores[0.1, "cosine"])
    moved = [(scores[key] - scores[0, "step"]).norm() for key in [(0.1, "step"), (0.4, "step")]]
    assert moved[1] > 2 * moved[0] > 0
    assert len({finished.result["mask_sha256"] for finished in runs.values()}) == 4

    recorded = [r["upper_lr"] for r in runs[0.1, "step"].records()]
    assert recorded == pytest.approx([0.1] * 6 + [0.01, 0.01])  # 75% of 8 steps is 6, 90% is 7.2
    recorded = [r["upper_lr"] for r in runs[0.1, "cosine"].records()]
    assert recorded == pytest.approx([0.05 * (1 + math.cos(math.pi * i / 8)) for i in range(8)])
    lower = [r["lower_lr"] for r in runs[0.1, "cosine"].records()]
    assert lower == pytest.approx([0.015 * (1 + math.cos(math.pi * i / 8)) for i in range(8)])


def test_a_mask_lr_of_zero_freezes_the_mask(source: Path, tmp_path: Path) -> None:
    still = train("bip", tmp_path, source_net=source, max_steps=6, mask_lr=0, mask_wd=0)
    shorter = train("bip", tmp_path, source_net=source, max_steps=1, mask_lr=0, mask_wd=0)
    assert still.result["mask_sha256"] == shorter.result["mask_sha256"]
    assert still.result["weights_sha256"] != shorter.result["weights_sha256"]


def test_hydras_scores_go_by_lr(source: Path, tmp_path: Path) -> None:
    finished = train(
        "hydra", tmp_path, source_net=source, max_steps=4, lr=0.2, lr_schedule="cosine", mask_lr=9
    )
    recorded = [r["upper_lr"] for r in finished.records()]
    assert recorded == pytest.approx([0.1 * (1 + math.cos(math.pi * i / 4)) for i in range(4)])


def test_lower_steps_per_upper_step(source: Path, tmp_path: Path) -> None:
    """Three lower batches and one upper batch an iteration, so a quarter of the epoch's pace."""
    one = train("bip", tmp_path, source_net=source, print_freq=1)
    three = train("bip", tmp_path, source_net=source, print_freq=1, lower_steps=3)
    assert len(one.records()) == 1437 // 64
    assert len(three.records()) == 1437 // 64 // 3
