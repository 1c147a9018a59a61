"""Two ranks do what one does: same gradients, same trajectory, same masks on every rank."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from bip.config import load_config
from bip.distributed.compare import hash_tensor, run_state
from bip.distributed.group import Group
from bip.run import Run
from bip.training.forward import ForwardBackward
from tests.distributed.harness import run_ranks, world_size
from tests.runs import LAYER_TYPES, Finished, arguments, cases_of_rivals, source_for, train
from tests.unit.networks import make_config, prune, random_batch, small_net

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


# One forward-backward


def gradient(
    group: Group, layer_type: str, accumulate: int, settings: dict[str, Any]
) -> tuple[Tensor, Tensor, list[Tensor], float]:
    """(g, gradient of the scores, gradients of all parameters, sum of the loss) of a rank."""
    network = small_net(dtype=torch.float64)
    network.eval()
    pruned = prune(network, layer_type)  # type: ignore[arg-type]
    config = make_config(accumulate=accumulate, **settings)
    ddp = (
        DistributedDataParallel(network, gradient_as_bucket_view=True) if group.world > 1 else None
    )
    run = ForwardBackward(config, network, ddp, group.rank, CPU)
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


# z under DDP


@world_size(2)
def test_z_keeps_its_storage_and_requires_grad_under_ddp(
    group: Group, source: Path, tmp_path: Path
) -> None:
    for layer_type in LAYER_TYPES:
        config = load_config(arguments("bip", tmp_path, source_net=source, layer_type=layer_type))
        run = Run(config, group)
        assert run.pruned is not None
        made: list[DistributedDataParallel] = []
        step = built_step(run, made)
        before = [(p.data_ptr(), p.requires_grad) for p in run.network.parameters()]
        for iteration in range(3):
            step(iteration)
            assert [(p.data_ptr(), p.requires_grad) for p in run.network.parameters()] == before
            product = run.pruned.mask * run.pruned.weights.detach()
            assert torch.equal(torch.cat([z.detach().flatten() for z in run.pruned.z]), product)
        mask = run.pruned.mask.clone()
        assert torch.equal(group.broadcast_(mask), run.pruned.mask)


def built_step(run: Run, made: list[DistributedDataParallel]):  # type: ignore[no-untyped-def]
    from bip.run_folder import Progress
    from bip.training.metrics import RunLog

    return run.loop(Progress(), RunLog(run.folder.path, active=False)).method.step


# Whole runs


def state_of_rank(group_settings: dict[str, Any], kind: str, folder: Path) -> dict[str, Any]:
    """Run on this rank to the end; the rank's own final state."""
    from bip import run as runs
    from bip.distributed.rendezvous import join

    config = load_config(arguments(kind, folder, **group_settings))
    group = join(folder)
    try:
        run = Run(config, group)
        result = run.train()
        pruned = run.pruned
        return {
            "result": result,
            "mask": pruned.mask if pruned else None,
            "scores": pruned.scores.detach() if pruned else None,
            "network": {n: t.detach().clone() for n, t in run.network.state_dict().items()},
            "folder": str(config.run_folder),
            "module": runs.__name__,
        }
    finally:
        group.close()


CASES = {
    "pretrain": ("pretrain", {}),
    "bip": ("bip", {}),
    "bip-filter": ("bip", {"layer_type": "filter"}),
    "bip-channel": ("bip", {"layer_type": "channel"}),
    "accelerate": ("bip", {"accelerate": True}),
    "accumulate": ("bip", {"accumulate": 2}),
    "hydra": ("hydra", {}),
    "hydra-filter": ("hydra", {"layer_type": "filter"}),
    "finetune": ("finetune", {}),
    "finetune-filter": ("finetune", {"layer_type": "filter"}),
    **cases_of_rivals(),
}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_follow_one(
    case: str, source: Path, pruned_runs: dict[str, Finished], tmp_path: Path
) -> None:
    kind, settings = CASES[case]
    settings = {"freeze_bn": True, "max_steps": 5} | settings
    if kind != "pretrain":
        layer_type = settings.get("layer_type", "unstructured")
        settings |= {"k": 0.3} | source_for(kind, source, pruned_runs[layer_type].newest)
    one = train(kind, tmp_path / "one", **settings)
    ranks = run_ranks(2, state_of_rank, settings, kind, tmp_path / "two", join=False)
    two = Finished(Path(ranks[0]["folder"]), ranks[0]["result"])

    # The world is no part of a run's identity, and rank 0 alone writes.
    assert two.folder.name == one.folder.name
    assert len(two.records()) == 5
    assert two.losses == pytest.approx(one.losses, rel=1e-4)
    for name, weight in one.weights.items():
        torch.testing.assert_close(two.weights[name], weight, rtol=1e-3, atol=1e-4)
    assert two.result["top1"] == pytest.approx(one.result["top1"], abs=1)
    assert two.result["kept"] == one.result["kept"]
    if one.masks:
        agreement = torch.cat([(a == two.masks[n]).flatten() for n, a in one.masks.items()])
        assert agreement.float().mean() > 0.999
        for key in ("mask", "scores"):
            assert torch.equal(ranks[0][key], ranks[1][key]), f"{key}: bitwise between ranks"
    for name, value in ranks[0]["network"].items():
        assert torch.equal(value, ranks[1]["network"][name]), name
    assert ranks[0]["result"].keys() == ranks[1]["result"].keys()


def trajectory(group: Group, kind: str, folder: Path, settings: dict[str, Any]) -> list[Any]:
    """After every step: hashes of this rank's whole state, and the mask."""
    run = Run(load_config(arguments(kind, folder, **settings)), group)
    assert run.pruned is not None
    pruned, found = run.pruned, []
    made = run.loop

    def loop_of(*args: Any) -> Any:
        loop = made(*args)

        def note(_step: int) -> None:
            state = run_state(run.network, pruned, loop.method.optimizers, buffers=True)
            hashes = {name: int(hash_tensor(tensor)) for name, tensor in state}
            found.append((hashes, pruned.mask.clone()))

        run.heartbeat.note_step = note  # type: ignore[method-assign]
        return loop

    run.loop = loop_of  # type: ignore[method-assign]
    run.train()
    return found


@pytest.mark.parametrize(
    ("world", "kind", "layer_type"),
    [
        *((4, "bip", layer_type) for layer_type in LAYER_TYPES),
        (2, "bip", "unstructured"),
        (2, "hydra", "unstructured"),
    ],
)
def test_ranks_follow_one_at_every_step(
    world: int, kind: str, layer_type: str, source: Path, tmp_path: Path
) -> None:
    """Bit for bit among themselves; up to the order of summation like one rank."""
    settings = {"freeze_bn": True, "max_steps": 12, "k": 0.3, "source_net": source}
    settings["layer_type"] = layer_type
    (one,) = run_ranks(1, trajectory, kind, tmp_path / "one", settings)
    ranks = run_ranks(world, trajectory, kind, tmp_path / "several", settings)
    losses = []
    for name in ("one", "several"):
        (path,) = (tmp_path / name).rglob("metrics.jsonl")
        lines = map(json.loads, path.read_text().splitlines())
        losses.append([record["loss"] for record in lines if record["event"] == "step"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(one) == len(losses[0]) == 12
    moved = False
    for step, (_, mask) in enumerate(one):
        for rank in ranks:
            hashes, own = rank[step]
            assert hashes == ranks[0][step][0], f"step {step + 1}"
            assert own.sum() == mask.sum()
            assert (own == mask).float().mean() > 0.999, f"step {step + 1}"
        moved |= not torch.equal(mask, one[0][1])
    assert moved


def test_batch_statistics_of_rank_0_are_everyones(source: Path, tmp_path: Path) -> None:
    """They differ in training; at a checkpoint and an evaluation they are rank 0's."""
    settings = {"source_net": source, "max_steps": 3, "k": 0.3}
    ranks = run_ranks(2, state_of_rank, settings, "bip", tmp_path, join=False)
    for name, value in ranks[0]["network"].items():
        assert torch.equal(value, ranks[1]["network"][name]), name
    for key in ("top1", "top5", "mask_sha256", "weights_sha256"):
        assert ranks[0]["result"][key] == ranks[1]["result"][key]


# Evaluation


def count_images(group: Group, folder: Path, source: Path) -> tuple[int, float, int]:
    config = load_config(
        arguments("pretrain", folder, source_net=source, evaluate=True, batch_size=60, holdout=100)
    )
    run = Run(config, group)
    labels = [y for _, y in run.data.evaluate("test")]
    from bip.training.evaluate import evaluate

    accuracy = evaluate(run.network, run.data.evaluate("test"), 360, group)
    held = evaluate(run.network, run.data.evaluate("holdout"), 100, group)
    assert held.count == 100
    return sum(len(y) for y in labels), accuracy.top1, accuracy.count


def test_evaluation_counts_each_image_once(source: Path, tmp_path: Path) -> None:
    (one,) = run_ranks(1, count_images, tmp_path, source)
    assert one[0] == one[2] == 360
    for world in (2, 3, 4):
        ranks = run_ranks(world, count_images, tmp_path, source)
        assert sum(seen for seen, _, _ in ranks) == 360
        assert {(top1, count) for _, top1, count in ranks} == {one[1:]}


def wrong_size(group: Group, folder: Path, source: Path) -> str:
    from bip.training.evaluate import evaluate

    config = load_config(arguments("pretrain", folder, source_net=source, evaluate=True))
    run = Run(config, group)
    try:
        evaluate(run.network, run.data.evaluate("test"), 361, group)
    except RuntimeError as error:
        return str(error)
    return ""


def test_an_image_that_was_not_seen_is_an_error(source: Path, tmp_path: Path) -> None:
    for text in run_ranks(2, wrong_size, tmp_path, source):
        assert "360" in text
        assert "361" in text


# The commands


def torchrun(*argv: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--standalone", "-m", "bip", "train", *argv]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def test_under_torchrun(source: Path, tmp_path: Path) -> None:
    done = torchrun(*arguments("bip", tmp_path, source_net=source, max_steps=3))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished: ") == 1
    (path,) = tmp_path.glob("*/prune/*/result.json")
    assert json.loads(path.read_text())["attempts"] == 1
    (attempt, _) = [
        json.loads(x) for x in (path.parent / "attempts.jsonl").read_text().splitlines()
    ]
    assert attempt["world"] == 2


def test_a_batch_that_does_not_divide_names_the_nearest(source: Path, tmp_path: Path) -> None:
    done = torchrun(*arguments("bip", tmp_path / "out", source_net=source, batch_size=63))
    assert done.returncode != 0
    assert "exitcode  : 2" in done.stderr
    (line, *_) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert "batch_size: 63" in line
    assert "64" in line or "62" in line
    assert 'Traceback (most recent call last):\n  File "/' + str(ROOT / "bip") not in done.stderr
    assert not (tmp_path / "out").exists()


def divides(group: Group, folder: Path, source: Path, batch: int, accumulate: int) -> str:
    from bip.errors import UserError

    settings = {"batch_size": batch, "accumulate": accumulate, "source_net": source}
    config = load_config(arguments("bip", folder, **settings))
    try:
        Run(config, group)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("batch", "accumulate", "nearest"), [(64, 1, "63"), (100, 2, "102"), (1, 1, "3"), (66, 2, "")]
)
def test_the_global_batch_divides_by_ranks_and_accumulation(
    batch: int, accumulate: int, nearest: str, source: Path, tmp_path: Path
) -> None:
    for text in run_ranks(3, divides, tmp_path, source, batch, accumulate):
        assert text.endswith(nearest)
        assert bool(text) == bool(nearest)
