"""Ranks that drift apart are caught and named; a rank that is lost ends the run in bounded time."""

import re
import signal
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from bip import run as run_module
from bip.config import load_config
from bip.data.stores.writer import LmdbWriter
from bip.distributed import control as control_module
from bip.distributed.compare import (
    CHUNK,
    describe_difference,
    hash_tensor,
    run_state,
)
from bip.distributed.control import Control
from bip.distributed.group import Group
from bip.distributed.signals import StopRequest
from bip.errors import RankError, Stopped, UserError
from bip.files import read_jsonl
from bip.run import Run
from bip.run import train as train_run
from bip.training.evaluate import share_statistics
from tests.distributed.harness import run_ranks, world_size
from tests.runs import Finished, arguments, make_run


def test_hash_sees_small_changes_that_cancel_in_a_sum() -> None:
    """Drifts of a few units in the last place in several elements, of both signs."""
    hashes, seen = set(), set()
    for n in (2, 3, 8, 64):
        for seed in range(1000):
            generator = torch.Generator().manual_seed(seed)
            values = torch.ones(n)
            drift = torch.randint(-2, 3, (n,), generator=generator, dtype=torch.int32)
            values.view(torch.int32).add_(drift)
            seen.add(tuple(values.tolist()))
            hashes.add(int(hash_tensor(values)))
    assert len(hashes) == len(seen)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.int64]
)
def test_hash_is_of_bits_and_places_alone(dtype: torch.dtype) -> None:
    """Not of memory: alignment and layout do not matter; length does. Every place counts."""
    size = 9 * CHUNK + 3
    values = torch.arange(size).remainder(251).to(dtype)
    shifted = torch.cat([values[:1], values])[1:]
    assert hash_tensor(shifted) == hash_tensor(values)
    square = values[:9].view(3, 3)
    assert hash_tensor(square.T.contiguous().T) == hash_tensor(square)
    for place in (0, 1, CHUNK, size - 1):
        changed = values.clone()
        changed[place] += 1
        assert hash_tensor(changed) != hash_tensor(values)
    assert hash_tensor(torch.tensor([0.0])) != hash_tensor(torch.tensor([-0.0]))
    assert len({int(hash_tensor(torch.zeros(n, dtype=dtype))) for n in range(20)}) == 20
    moved = values.clone()
    for one, other in ((0, 1), (2, size - 1), (CHUNK, 5 * CHUNK + 1)):
        moved[[one, other]] = values[[other, one]]
        assert hash_tensor(moved) != hash_tensor(values)
        moved.copy_(values)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ("aaaa", None),
        ("ab", "rank 0 has a, rank 1 has b"),
        ("abb", "rank 0 has a, the others have b"),
        ("bbab", "rank 2 has a, the others have b"),
        ("aabb", "ranks 0, 1 have a, ranks 2, 3 have b"),
        ("bbbcacb", "ranks 3, 5 have c, rank 4 has a, the others have b"),
        ("abc", "rank 0 has a, rank 1 has b, rank 2 has c"),
    ],
)
def test_only_a_majority_is_the_others(values: str, text: str | None) -> None:
    assert describe_difference(values) == text


# What rank 1 changes by itself in a BiP run, who finds it, at which step, and how it is named.
PERTURBED: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "a score, at --check-ranks": ("score", {"check_ranks": 1}, 3, "scores"),
    "a score, at an evaluation": ("score", {"batch_size": 360, "epochs": 3}, 3, "scores"),
    "a score, at the checkpoint": ("score", {"eval_every": 100}, 8, "scores"),
    "a bias": ("bias", {"check_ranks": 1}, 3, "linear.bias"),
    "a momentum": ("momentum", {"check_ranks": 1}, 3, "lower optimizer momentum_buffer 0"),
    "a frozen buffer, at --check-ranks": (
        "buffer", {"freeze_bn": True, "check_ranks": 1}, 3, "bn1.running_mean",
    ),
    "a frozen buffer, at the checkpoint": (
        "buffer", {"freeze_bn": True, "eval_every": 100}, 8, "bn1.running_mean",
    ),
    "the mask, by the exchange after it": ("mask", {}, 4, "mask"),
}  # fmt: skip


def run_perturbed(
    group: Group, result_dir: Path, source: Path, what: str, settings: dict[str, Any]
) -> str:
    """What the run ends with. Rank 1 changes something after its third step."""
    given = {"source_net": source, "max_steps": 8, "batch_size": 60} | settings
    run = make_run("bip", result_dir, group, **given)
    pruned, made, note = run.pruned, run.loop, run.heartbeat.note_step
    assert pruned is not None
    optimizers: dict[str, Any] = {}

    def loop(*args: Any) -> Any:
        loop = made(*args)
        optimizers.update(loop.method.optimizers)
        return loop

    @torch.no_grad()
    def perturb(step: int) -> None:
        if step == 3 and group.rank == 1:
            if what == "mask":
                pruned.scores[:200] *= -3
            elif what == "momentum":
                optimizers["lower"].state[pruned.weights]["momentum_buffer"][5] += 1e-6
            else:
                tensors = {"score": pruned.scores, "bias": run.network.get_parameter("linear.bias")}
                tensors["buffer"] = run.network.get_buffer("bn1.running_mean")
                tensors[what][0] += 1e-6
        note(step)

    run.loop, run.heartbeat.note_step = loop, perturb  # type: ignore[method-assign]
    with pytest.raises(RankError) as raised:
        run.train()
    return f"{raised.value} [step {run.heartbeat.step}]"


@pytest.mark.parametrize("case", PERTURBED)
def test_a_perturbed_rank_ends_training(case: str, source: Path, tmp_path: Path) -> None:
    what, settings, step, text = PERTURBED[case]
    messages = run_ranks(3, run_perturbed, tmp_path, source, what, settings)
    for message in messages:
        named = rf"{text}: .*\(rank 1 has .*, the others have .*\).* \[step (\d+)\]"
        found = re.fullmatch(named, message)
        assert found is not None, message
        assert step <= int(found[1]) <= step + 2 * (what == "mask")
    (folder,) = (path.parent for path in tmp_path.glob("*/*/*/attempts.jsonl"))
    assert list(read_jsonl(folder / "attempts.jsonl"))[-1]["cause"].startswith("error: ")
    assert not list(folder.glob("checkpoint/*")), "what differs is not saved"


def begin_unlike(group: Group, result_dir: Path, source: Path) -> list[int]:
    """Hashes of a run's state, whose network rank 1 has built otherwise."""

    build = run_module.build_network

    def unlike(*args: Any) -> Any:
        network, source = build(*args)
        if group.rank == 1:
            with torch.no_grad():
                for tensor in [*network.parameters(), *network.buffers()]:
                    tensor += 1
        return network, source

    run_module.build_network = unlike
    run = Run(load_config(arguments("bip", result_dir, source_net=source)), group)
    state = run_state(run.network, run.pruned, {}, buffers=True)
    group.barrier()  # a rank that leaves at once would fail the other's connection
    return [int(hash_tensor(tensor)) for _, tensor in state]


def test_every_rank_begins_with_rank_0s_network(source: Path, tmp_path: Path) -> None:
    first, second = run_ranks(2, begin_unlike, tmp_path, source)
    assert first == second


@world_size(3)
def test_a_signal_on_one_rank_reaches_all_in_the_same_iteration(group: Group) -> None:
    control = Control(group)
    seen = []
    for step in range(6):
        stop = signal.SIGTERM if group.rank == 2 and step >= 2 else 0
        news = control.post(stop, save=group.is_first and step == 1, proof=None)
        seen.append((news.stop, news.save))
    none, term = 0, int(signal.SIGTERM)
    assert seen == [
        (none, False), (none, False), (none, True), (term, False), (term, False), (term, False),
    ]  # fmt: skip


class Slot:
    """A proof of a GPU, that is not on the host yet; and _Slot's, without a GPU."""

    is_cuda = True

    def __init__(self, count: int = 0) -> None:
        self.proof = (count, 1 if count else 0)

    def read(self) -> tuple[int, int]:
        return self.proof

    def write(self, proof: "Slot") -> None:
        self.proof = proof.proof


def proofs_of_a_device(group: Group) -> list[int]:
    """What an exchange carries at each iteration; then masks that differ from step 20 on."""
    control_module._Slot = Slot  # type: ignore[assignment,misc]
    control = Control(group)
    carried = []
    for step in range(1, 20):
        control.post(0, False, Slot(step))  # type: ignore[arg-type]
        assert control.pending is not None
        rows, work = control.pending
        assert work is not None
        work.wait()
        carried.append(int(rows[group.rank, 2]))
    for step in range(20, 40):
        try:
            control.post(0, False, Slot(step + group.rank))  # type: ignore[arg-type]
        except RankError:
            return [*carried, step]
    return carried


def test_a_proof_on_a_gpu_travels_a_fixed_number_of_iterations_later() -> None:
    lag = control_module.LAG
    for carried in run_ranks(2, proofs_of_a_device):
        # One iteration more until the exchange itself is read.
        assert carried == [*[0] * lag, *range(1, 20 - lag), 20 + lag + 1]


@world_size(2)
def test_statistics_of_every_kind_of_norm_are_shared(group: Group) -> None:
    network = nn.Sequential(
        nn.InstanceNorm2d(1, track_running_stats=True), nn.BatchNorm2d(1), nn.Conv2d(1, 1, 1)
    )
    for buffer in network.buffers():
        buffer.fill_(group.rank + 1)
    share_statistics(network, group)
    assert [float(buffer) for buffer in network.buffers()] == [1.0] * 6


def diverge(group: Group, result_dir: Path, source: Path) -> tuple[str, int]:
    """A NaN gradient that rank 1 alone makes: the sum carries it to all."""
    run = make_run("bip", result_dir, group, source_net=source, max_steps=9)
    train_batches = run.data.train

    def spoiled(level: str = "lower", start: int = 0) -> Iterator[Any]:
        for number, (images, labels) in enumerate(train_batches(level, start)):
            if group.rank == 1 and (level, number) == ("lower", 4):
                images = images * float("nan")
            yield images, labels

    run.data.train = spoiled  # type: ignore[method-assign,assignment]
    with pytest.raises((UserError, ValueError)) as raised:
        run.train()
    return f"{type(raised.value).__name__}: {raised.value}", run.heartbeat.step


@pytest.mark.parametrize("world", [2, 4])
def test_a_nan_of_one_rank_ends_all_at_the_same_step(
    world: int, source: Path, tmp_path: Path
) -> None:
    ends = run_ranks(world, diverge, tmp_path, source)
    assert len(set(ends)) == 1
    message, step = ends[0]
    assert "NaN" in message or "nan" in message, message
    assert step in (4, 5)
    (attempts,) = tmp_path.glob("*/*/*/attempts.jsonl")
    assert list(read_jsonl(attempts))[-1]["cause"].startswith("error: ")
    assert not list(tmp_path.rglob("*.pth.tar"))


def start_differently(group: Group, result_dir: Path, what: str) -> str:
    settings: dict[str, Any] = {"max_steps": 1}
    if what in ("lr", "print_freq", "test_batch_size") and group.rank == 1:
        settings[what] = 77
    if group.rank == 1:
        if what == "torch":
            torch.__version__ = "1.0"  # type: ignore[assignment]
        elif what == "threads":
            torch.set_num_threads(2)
        elif what == "CPU capability":
            torch.backends.cpu.get_cpu_capability = lambda: "Z80"
    with pytest.raises(UserError) as raised:
        make_run("pretrain", result_dir, group, **settings)
    return str(raised.value)


@pytest.mark.parametrize(
    "what", ["lr", "print_freq", "test_batch_size", "torch", "threads", "CPU capability"]
)
def test_ranks_that_start_differently_are_refused(what: str, tmp_path: Path) -> None:
    for message in run_ranks(2, start_differently, tmp_path, what):
        assert re.match(rf"ranks start differently: {what} ", message)
    assert not list(tmp_path.iterdir())


def start_on_other_data(group: Group, result_dir: Path, folders: list[str]) -> str:
    settings = {"dataset": "CIFAR10", "arch": "resnet20s", "data_dir": folders[group.rank]}
    with pytest.raises(UserError) as raised:
        make_run("pretrain", result_dir, group, **settings)
    return str(raised.value)


def test_ranks_with_other_data_are_refused(tmp_path: Path) -> None:
    """As when a node's own copy was built with --skip-bad."""
    stream = BytesIO()
    Image.linear_gradient("L").resize((32, 32)).convert("RGB").save(stream, "JPEG")
    for name, count in (("one", 310), ("other", 309)):
        for split in ("train", "test"):
            (tmp_path / name).mkdir(exist_ok=True)
            classes = [str(label) for label in range(10)]
            with LmdbWriter(tmp_path / name / f"{split}.lmdb", classes) as writer:
                for number in range(count):
                    writer.add(stream.getvalue(), number % 10, 32, 32)
    folders = [str(tmp_path / "one"), str(tmp_path / "other")]
    for message in run_ranks(2, start_on_other_data, tmp_path / "out", folders):
        assert re.match(r"ranks start differently: images .*310 \+ 310.*309 \+ 309", message)
    assert not (tmp_path / "out").exists()


def run_or_stop(
    group: Group, result_dir: Path, settings: dict[str, Any], victim: int, number: int
) -> int | str:
    """Train; the `victim` gets the signal in step 4. The step that it stops at, or its result."""
    run = make_run("bip", result_dir, group, max_steps=9, **settings)
    note = run.heartbeat.note_step

    def note_and_stop(now: int) -> None:
        note(now)
        if now == 4 and group.rank == victim:
            run.stop.signal = number

    run.heartbeat.note_step = note_and_stop  # type: ignore[method-assign]
    try:
        return str(run.train()["weights_sha256"])
    except Stopped as stopped:
        return stopped.step


@pytest.mark.parametrize("worlds", [(2, 2), (2, 1), (1, 3)])
def test_ranks_stop_together_and_others_go_on(
    worlds: tuple[int, int], source: Path, tmp_path: Path
) -> None:
    """To the same bits; as other ranks to the same up to the order of summation."""
    settings: dict[str, Any] = {"source_net": source}
    if worlds != (2, 2):  # frozen batch-norm: a step does not depend on how a batch is divided
        settings |= {"freeze_bn": True, "batch_size": 48}
    before, after = worlds
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    stop = before - 1, signal.SIGUSR2
    # Alone a rank knows of its signal in the same iteration.
    assert run_ranks(before, run_or_stop, parts, settings, *stop) == [4 + (before > 1)] * before
    ends = run_ranks(after, run_or_stop, parts, settings, -1, 0)
    expected = run_ranks(before, run_or_stop, whole, settings, -1, 0)
    losses, masks = [], []
    for folder in (parts, whole):
        (path,) = (path.parent for path in folder.glob("*/*/*/attempts.jsonl"))
        finished = Finished(path, {})
        losses.append(finished.losses)
        masks.append(torch.cat([mask.flatten() for mask in finished.masks.values()]))
    if before == after:
        assert ends == expected
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == 9
    assert (masks[0] != masks[1]).float().mean() < 1e-3
    (path,) = parts.glob("*/*/*/attempts.jsonl")
    attempts = list(read_jsonl(path))
    assert [record.get("cause") for record in attempts] == [None, "SIGUSR2", None, "finished"]
    assert [r["world"] for r in attempts if r["event"] == "start"] == [before, after]


def test_a_signal_before_the_first_step_leaves_nothing(source: Path, tmp_path: Path) -> None:
    config = load_config(arguments("bip", tmp_path, source_net=source))
    stop = StopRequest()
    stop.signal = signal.SIGTERM
    with pytest.raises(Stopped) as stopped:
        train_run(config, stop)
    assert stopped.value.step == 0
    assert not list(tmp_path.rglob("*.pth.tar"))
