"""Two ranks do what one does: same gradients, same trajectory, same masks on every rank."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bip.distributed.compare import hash_tensor, run_state
from bip.distributed.group import Group, wrap
from bip.errors import UserError
from bip.files import read_jsonl
from bip.training.evaluate import average_statistics, evaluate
from bip.training.forward import ForwardBackward
from tests.distributed.harness import run_ranks
from tests.runs import LAYER_TYPES, Finished, arguments, cases_of_rivals, make_run, source_for
from tests.unit.networks import make_config, prune, random_batch, small_net

ROOT = Path(__file__).parents[2]


# One forward-backward


def gradient(
    group: Group, layer_type: str, accumulate: int, settings: dict[str, Any]
) -> tuple[Tensor, Tensor, list[Tensor], float]:
    """(g, gradient of the scores, gradients of all parameters, sum of the loss) of a rank."""
    network = small_net(dtype=torch.float64)
    network.eval()
    pruned = prune(network, layer_type)  # type: ignore[arg-type]
    config = make_config(accumulate=accumulate, **settings)
    ddp = wrap(network, group.device) if group.world > 1 else None
    run = ForwardBackward(config, network, ddp, group.rank, group.device)
    images, labels = random_batch(0, size=8, dtype=torch.float64)
    share = 8 // group.world
    part = slice(group.rank * share, (group.rank + 1) * share)
    for _ in range(2):  # the second is the one after DDP has rebuilt its buckets
        report = run((images[part], labels[part]), "upper", 0)
    total = group.sum_(report.loss.double().clone())
    pruned.take_gradient()
    g = pruned.gradient.clone()
    pruned.set_upper_gradient(10.0)
    assert pruned.scores.grad is not None
    parameters = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    return g, pruned.scores.grad, parameters, float(total)


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_equal_those_of_one_process(layer_type: str, accumulate: int) -> None:
    """g is all-reduced before it is squared: 1/γ = 10 makes the square the larger term."""
    settings = {"label_smoothing": 0.1}
    (one,) = run_ranks(1, gradient, layer_type, 1, settings)
    for world in (2, 4):
        for result in run_ranks(world, gradient, layer_type, accumulate, settings):
            for a, b in zip((*one[:2], *one[2]), (*result[:2], *result[2]), strict=True):
                torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-14)
            assert result[3] == pytest.approx(one[3], rel=1e-6)


# Whole runs


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "pretrain": ("pretrain", {}),
    "bip": ("bip", {"world": 4}),
    "bip-filter": ("bip", {"layer_type": "filter", "world": 4}),
    "bip-channel": ("bip", {"layer_type": "channel", "world": 4}),
    "bip-2:4": ("bip", {"layer_type": "2:4", "k": 0.5}),
    "accelerate": ("bip", {"accelerate": True}),
    "accumulate": ("bip", {"accumulate": 2}),
    "hydra": ("hydra", {}),
    "hydra-filter": ("hydra", {"layer_type": "filter"}),
    "finetune": ("finetune", {}),
    "finetune-filter": ("finetune", {"layer_type": "filter"}),
    **cases_of_rivals(),
}


def trajectory(
    group: Group, kind: str, folder: Path, settings: dict[str, Any]
) -> tuple[Finished, list[Any], dict[str, Tensor]]:
    """The run, hashes of this rank's state and its mask after every step, and what it ends with.

    z keeps its storage and requires_grad, and is m ⊙ θ.
    """
    run = make_run(kind, folder, group, **settings)
    found, made, pruned = [], run.loop, run.pruned

    def places() -> list[tuple[int, bool]]:
        return [(p.data_ptr(), p.requires_grad) for p in run.network.parameters()]

    before = places()

    def loop_of(*args: Any) -> Any:
        loop = made(*args)

        def note(_step: int) -> None:
            assert places() == before
            if pruned is not None:
                z = torch.cat([z.detach().flatten() for z in pruned.z])
                assert torch.equal(z, pruned.mask * pruned.weights.detach())
            state = run_state(run.network, pruned, loop.method.optimizers, buffers=True)
            hashes = {name: int(hash_tensor(tensor)) for name, tensor in state}
            found.append((hashes, pruned.mask.clone() if pruned else None))

        run.heartbeat.note_step = note  # type: ignore[method-assign]
        return loop

    run.loop = loop_of  # type: ignore[method-assign]
    finished = Finished(run.folder.path, run.train())
    return finished, found, {n: t.detach().clone() for n, t in run.network.state_dict().items()}


@pytest.mark.parametrize("case", CASES)
def test_several_ranks_follow_one_at_every_step(
    case: str, source: Path, pruned_runs: dict[str, Finished], tmp_path: Path
) -> None:
    """Bit for bit among themselves; up to the order of summation like one rank."""
    kind, extra = CASES[case]
    settings = {"freeze_bn": True, "max_steps": 9} | extra
    world = settings.pop("world", 2)
    if kind != "pretrain":
        layer_type = settings.get("layer_type", "unstructured")
        pruned = pruned_runs.get(layer_type, pruned_runs["filter"])
        settings = {"k": 0.3} | settings | source_for(kind, source, pruned.newest)
    if kind == "bip":
        settings |= {"mask_until": 1}
    if kind not in ("pretrain", "bip", "hydra"):
        settings |= {"lr": 0.02}  # at their 0.1 the frozen network diverges, and rounding with it
    ((one, steps, _),) = run_ranks(1, trajectory, kind, tmp_path / "one", settings)
    ranks = run_ranks(world, trajectory, kind, tmp_path / "several", settings)
    two = ranks[0][0]

    # The world is no part of a run's identity, and rank 0 alone writes.
    assert two.folder.name == one.folder.name
    assert len(two.records()) == 9
    assert two.losses == pytest.approx(one.losses, rel=1e-4)
    for name, weight in one.weights.items():
        torch.testing.assert_close(two.weights[name], weight, rtol=1e-3, atol=1e-4)
    assert two.result["top1"] == pytest.approx(one.result["top1"], abs=1)
    assert two.result["kept"] == one.result["kept"]
    for number, (_, mask) in enumerate(steps):
        for _, found, _ in ranks:
            hashes, own = found[number]
            assert hashes == ranks[0][1][number][0], f"step {number + 1}"
            if mask is not None:
                assert own.sum() == mask.sum()
                assert (own == mask).float().mean() > 0.999, f"step {number + 1}"
    assert len(steps) == 9
    if kind in ("bip", "hydra"):
        assert not torch.equal(steps[0][1], steps[-1][1])


def test_batch_statistics_of_rank_0_are_everyones(source: Path, tmp_path: Path) -> None:
    """They differ in training; at a checkpoint and an evaluation they are rank 0's."""
    settings = {"source_net": source, "max_steps": 3, "k": 0.3}
    (first, found, end), (second, other, other_end) = run_ranks(
        2, trajectory, "bip", tmp_path, settings
    )
    assert found[0][0]["bn1.running_mean"] != other[0][0]["bn1.running_mean"]
    assert all(torch.equal(value, other_end[name]) for name, value in end.items())
    for key in ("top1", "top5", "mask_sha256", "weights_sha256"):
        assert first.result[key] == second.result[key]


def recalibrated(group: Group) -> list[Tensor]:
    """Each rank has its own part of two batches; the statistics that all hold afterwards."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    images = torch.randn(2, 8, 3, 6, 6)
    share = 8 // group.world
    mine = images[:, group.rank * share : (group.rank + 1) * share]
    torch.optim.swa_utils.update_bn(iter(mine), network)
    average_statistics(network, group)
    return [network[1].running_mean, network[1].running_var]


def test_every_ranks_images_count_for_re_estimated_statistics() -> None:
    ((mean, var),) = run_ranks(1, recalibrated)
    first, second = run_ranks(2, recalibrated)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.testing.assert_close(first[0], mean)
    # Variances are of each rank's part of a batch, so they agree roughly.
    torch.testing.assert_close(first[1], var, rtol=0.05, atol=0.0)


# Evaluation


def count_images(group: Group, folder: Path, source: Path) -> tuple[int, float, int]:
    settings = {"source_net": source, "evaluate": True, "batch_size": 60, "holdout": 100}
    run = make_run("pretrain", folder, group, **settings)
    labels = [y for _, y in run.data.evaluate("test")]
    accuracy = evaluate(run.network, run.data.evaluate("test"), 360, group)
    assert evaluate(run.network, run.data.evaluate("holdout"), 100, group).count == 100
    with pytest.raises(RuntimeError, match=r"360.*361|361.*360"):  # an image was not seen
        evaluate(run.network, run.data.evaluate("test"), 361, group)
    return sum(len(y) for y in labels), accuracy.top1, accuracy.count


def test_evaluation_counts_each_image_once(source: Path, tmp_path: Path) -> None:
    (one,) = run_ranks(1, count_images, tmp_path, source)
    assert one[0] == one[2] == 360
    for world in (2, 3, 4):
        ranks = run_ranks(world, count_images, tmp_path, source)
        assert sum(seen for seen, _, _ in ranks) == 360
        assert {(top1, count) for _, top1, count in ranks} == {one[1:]}


# The commands


def torchrun(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "-m", "bip", "train", *argv]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def test_under_torchrun(source: Path, tmp_path: Path) -> None:
    done = torchrun(*arguments("bip", tmp_path, source_net=source, max_steps=3))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished: ") == 1
    (path,) = tmp_path.glob("*/prune/*/result.json")
    assert json.loads(path.read_text())["attempts"] == 1
    (attempt, _) = read_jsonl(path.parent / "attempts.jsonl")
    assert attempt["world"] == 2


def test_a_users_error_under_torchrun(source: Path, tmp_path: Path) -> None:
    """A batch that does not divide: the error names the nearest that does."""
    done = torchrun(*arguments("bip", tmp_path / "out", source_net=source, batch_size=63))
    assert done.returncode != 0
    assert "exitcode  : 2" in done.stderr
    (line, *_) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert "batch_size: 63" in line
    assert "64" in line or "62" in line
    assert f'File "{ROOT / "bip"}' not in done.stderr, "no traceback of ours"
    assert not (tmp_path / "out").exists()


def divides(group: Group, folder: Path, source: Path, settings: dict[str, int]) -> str:
    try:
        make_run("bip", folder, group, source_net=source, **settings)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("batch", "accumulate", "nearest"), [(64, 1, "63"), (100, 2, "102"), (1, 1, "3"), (66, 2, "")]
)
def test_the_global_batch_divides_by_ranks_and_accumulation(
    batch: int, accumulate: int, nearest: str, source: Path, tmp_path: Path
) -> None:
    settings = {"batch_size": batch, "accumulate": accumulate}
    for text in run_ranks(3, divides, tmp_path, source, settings):
        assert text.endswith(nearest)
        assert bool(text) == bool(nearest)
