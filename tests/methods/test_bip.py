"""BiP and HYDRA where version 0.1 failed, and what came since: each old rule stays by name."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bip.config import build_config, load_config
from bip.distributed.group import Group, Ranks
from bip.pruning.layout import find_prunable
from bip.pruning.scores import initialise_scores
from bip.run import Run
from tests.runs import Finished, arguments, train
from tests.unit.networks import Setup, make_setup, prune, random_batch, small_net

# Wholly pruned filters


def three_layers(dead: int) -> tuple[nn.Sequential, Any]:
    """Two convolutions with batch-norm; all is kept but `dead` filters of the first."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    nn.init.constant_(network[1].bias, 0.5)  # type: ignore[arg-type]  # ReLU lets zero through
    pruned = prune(network, "unstructured")
    pruned.mask.fill_(1)
    pruned.view(pruned.mask, pruned.layout.tensors[0])[:dead] = 0
    with torch.no_grad():
        pruned.scores.copy_(pruned.weights)
    pruned.write_z()
    images, labels = random_batch(0, size=64)
    nn.functional.cross_entropy(network(images), labels).backward()
    pruned.set_upper_gradient(0.0)
    return network, pruned


def sizes(pruned: Any) -> Tensor:
    """The mean size of the scores' gradient in each filter of the first layer."""
    first: Tensor = pruned.view(pruned.gradient, pruned.layout.tensors[0])
    return first.flatten(1).abs().mean(1)


def test_the_gradient_of_a_dead_filter_explodes_and_is_scaled() -> None:
    _, pruned = three_layers(dead=3)
    before = sizes(pruned)
    assert before[:3].mean() > 50 * before[3:].mean(), "batch-norm's slope at zero"
    everything = pruned.gradient.clone()
    pruned.scale_dead_filters()
    after = sizes(pruned)
    assert after[:3].mean() == pytest.approx(float(after[3:].mean()), rel=1e-4)
    assert torch.equal(after[3:], before[3:]), "living filters keep theirs"
    torch.testing.assert_close(after[:3] / after[0], before[:3] / before[0])  # and dead their order
    rest = slice(pruned.layout.tensors[0].stop, None)
    assert torch.equal(pruned.gradient[rest], everything[rest])


def test_without_dead_filters_nothing_is_scaled() -> None:
    _, pruned = three_layers(dead=0)
    before = pruned.gradient.clone()
    pruned.scale_dead_filters()
    assert torch.equal(pruned.gradient, before)


def test_a_dead_layer_is_scaled_by_batch_norms_slope() -> None:
    _, pruned = three_layers(dead=8)
    before = sizes(pruned)
    pruned.scale_dead_filters()
    torch.testing.assert_close(sizes(pruned), before * 1e-5**0.5)


def churn(source: Path, folder: Path, **settings: Any) -> list[float]:
    """The part of the kept set that each of the first 20 iterations of BiP replaces."""
    line = arguments(
        "bip", folder, source_net=source, k=0.0092, max_steps=20, mask_until=1, **settings
    )
    run = Run(
        load_config([*line, "--mask-lr", "0.1"]), Group(Ranks(0, 1, 0, 1), torch.device("cpu"))
    )
    assert run.pruned is not None
    pruned, masks = run.pruned, [run.pruned.mask.clone()]
    run.heartbeat.note_step = lambda step: masks.append(pruned.mask.clone())  # type: ignore[method-assign]
    run.train()
    return [float((a != b).sum() / 2 / a.sum()) for a, b in itertools.pairwise(masks)]


def test_the_mask_does_not_become_noise_at_the_smallest_k(source: Path, tmp_path: Path) -> None:
    calm, wild = churn(source, tmp_path), churn(source, tmp_path, dead_filters="full")
    assert len(calm) == 20
    assert max(calm) < 0.1
    assert sum(calm) < sum(wild)


# Both levels from one batch


def test_simultaneous_levels_take_the_gradients_of_one_batch() -> None:
    """Against both closed forms, from one backward pass of autograd."""
    setup: Setup = make_setup("bip", levels="simultaneous", lr2=0.5, wd=0.0, momentum=0.0)
    pruned = setup.pruned
    assert pruned is not None
    theta, scores, mask = (t.detach().clone() for t in (pruned.weights, pruned.scores, pruned.mask))
    (report,) = setup.method.step(0)
    assert report.count == setup.config.batch_size
    g = torch.cat([z.grad.flatten() for z in pruned.z if z.grad is not None])
    rates = {level: o.param_groups[0]["lr"] for level, o in setup.method.optimizers.items()}
    upper = torch.where(scores < 0, -1, 1) * (theta - 0.5 * mask * g) * g
    torch.testing.assert_close(pruned.scores.detach(), scores - rates["upper"] * upper)
    torch.testing.assert_close(pruned.weights.detach(), theta - rates["lower"] * mask * g)
    z = torch.cat([z.detach().flatten() for z in pruned.z])
    assert torch.equal(z, pruned.mask * pruned.weights.detach())


def test_simultaneous_levels_leave_no_room_for_further_lower_steps(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"levels: .*--lower-steps"):
        make_setup("bip", levels="simultaneous", lower_steps=2)


# A mask that stops moving


def test_after_mask_until_the_mask_is_final_and_the_weights_train(
    source: Path, tmp_path: Path
) -> None:
    settings = {"source_net": source, "layer_type": "filter", "k": 0.3, "mask_lr": 0.3}
    whole = train("bip", tmp_path, max_steps=8, mask_until=0.5, **settings)
    assert whole.result["top1_before_bn_mask"] == whole.result["top1"], "nothing is left to zero"
    lower = [r["lower_lr"] for r in whole.records()]
    upper = [r["upper_lr"] for r in whole.records()]
    assert len(set(lower)) == 8
    assert len(set(upper[3:])) == 1, "the upper optimizer takes no further steps"


# Old rules by name

OLD = {
    "dead_filters": "full", "score_gain": "torch", "stage_order": "replayed",
    "ranking": "plain", "step_drops": "0.75,0.9", "levels": "alternate", "mask_until": 1.0,
}  # fmt: skip


def test_settings_that_version_0_1_recorded_keep_its_rules(
    pruned_runs: dict[str, Finished],
) -> None:
    recorded = pruned_runs["filter"].state["config"]
    now = build_config(recorded)
    assert now.dead_filters == "scaled"
    before = build_config({k: v for k, v in recorded.items() if k not in OLD})
    assert {name: getattr(before, name) for name in OLD} == OLD
    assert before.fingerprint() != now.fingerprint()


@pytest.mark.parametrize("stage", ["bip", "finetune"])
def test_a_later_stage_does_not_replay_the_order_of_pretraining(
    stage: str, source: Path, pruned_runs: dict[str, Finished], tmp_path: Path
) -> None:
    before = source if stage == "bip" else pruned_runs["unstructured"].newest
    settings: dict[str, Any] = {"source_net": before, "max_steps": 2, "k": 0.3}
    own = train(stage, tmp_path, **settings)
    replayed = train(stage, tmp_path, stage_order="replayed", **settings)
    assert own.losses != replayed.losses
    assert own.folder != replayed.folder


# Scores


@pytest.mark.parametrize("how", ["kaiming_uniform", "xavier_normal", "xavier_uniform"])
def test_drawn_scores_have_the_published_deviation(how: str) -> None:
    """sqrt(2 / fan_in); for xavier sqrt(4 / (fan_in + fan_out)), which is the same here."""
    network = nn.Conv2d(64, 64, 3)
    layout = find_prunable(network, "unstructured")
    scores = torch.empty(layout.size)
    initialise_scores(scores, torch.ones(layout.size), layout, how)  # type: ignore[arg-type]
    assert scores.std() == pytest.approx((2 / 576) ** 0.5, rel=0.02)


# One ranking of filters or channels of unequal sizes


@pytest.mark.parametrize("layer_type", ["filter", "channel"])
def test_a_global_ranking_of_groups_leaves_no_layer_empty(
    layer_type: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"source_net": source, "layer_type": layer_type, "scope": "global", "max_steps": 2}
    finished = train("omp", tmp_path, k=0.1, **settings)
    assert finished.result["empty_layers"] == []
    assert all(mask.any() for mask in finished.masks.values())


def test_balanced_norms_are_those_of_one_weight() -> None:
    """Filters of unequal sizes with scores of one size rank by index alone."""
    network = small_net()
    pruned = prune(network, "filter", scope="global")
    pruned.balanced = True
    with torch.no_grad():
        pruned.scores.fill_(1.0)
    pruned.update_mask()
    kept = [mask.flatten(1).amax(1) for mask in pruned.views(pruned.mask)]
    assert all(layer[0] == 1 for layer in kept), "the first of each layer stays"
    assert sum(int(layer.sum()) for layer in kept) == pruned.segments[0].keep
    flat = torch.cat(kept).tolist()
    firsts = {tensor.first_group for tensor in pruned.layout.tensors}
    others = [value for place, value in enumerate(flat) if place not in firsts]
    assert others == sorted(others, reverse=True), "ties to the lowest index"


def test_layer_collapse_is_warned_of_and_recorded(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = train("omp", tmp_path, source_net=source, k=0.0001, max_steps=1)
    out = capsys.readouterr().out
    assert finished.result["empty_layers"]
    assert "layer collapse" in out
    assert finished.result["empty_layers"][0] in out
