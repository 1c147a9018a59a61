"""What a run reports: per epoch and layer, its cost, trackers; and what result.json says of it."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bip import models, trackers
from bip.__main__ import main
from bip.commit import git_commit
from bip.config import load_config
from bip.distributed.group import Group
from bip.errors import RankError, Stopped
from bip.files import read_jsonl
from bip.methods import methods
from bip.pruning.facts import layer_facts
from bip.trackers import background
from bip.trackers.background import Background
from bip.trackers.base import Tracker
from bip.training import metrics
from bip.training.macs import costs, positions
from bip.training.metrics import RunLog, tags
from bip.training.stopwatch import Stopwatch
from tests.distributed.harness import world_size
from tests.runs import Finished, arguments, train, train_until
from tests.unit.networks import prune, small_net

ROOT = Path(__file__).parents[2]
SHORT: dict[str, Any] = {"batch_size": 300, "epochs": 2, "k": 0.3}  # 2 epochs of 4 steps


@pytest.fixture(scope="module", params=["unstructured", "filter"])
def pruned(
    request: pytest.FixtureRequest, dense: Finished, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    folder = tmp_path_factory.mktemp("metrics")
    settings = SHORT | {"layer_type": request.param, "source_net": dense.newest, "mask_until": 1}
    return train("bip", folder, **settings)


# Layers


def test_the_last_epoch_tells_of_the_final_mask(pruned: Finished) -> None:
    first, last = pruned.records("layers")
    assert (first["step"], last["step"]) == (4, 8)
    assert [name for name, _ in sorted(pruned.masks.items())] == sorted(last["names"])
    for at, name in enumerate(last["names"]):
        mask = pruned.masks[name]
        assert last["kept"][at] == pytest.approx(float(mask.float().mean()), rel=1e-3)
        empty = [row for row in mask.flatten(1) if not row.any()]
        assert last["dead_filters"][at] == len(empty)
        assert last["direct_norm"][at] > last["implicit_norm"][at] >= 0
    if pruned.result["layer_type"] == "unstructured":
        assert sum(first["flips"]) > 0


@pytest.mark.parametrize("layer_type", ["unstructured", "filter"])
def test_facts_of_layers_by_their_definition(layer_type: Any) -> None:
    pruned = prune(small_net(), layer_type)
    before = pruned.mask.clone()
    with torch.no_grad():
        pruned.scores.copy_(torch.randn(len(pruned.scores)))
    pruned.update_mask()
    found = layer_facts(pruned, before, torch.ones(2, len(pruned.z)))
    flips = [
        int((new != old).sum())
        for new, old in zip(pruned.views(pruned.mask), pruned.views(before), strict=True)
    ]
    assert found["flips"] == flips
    assert sum(flips) > 0
    for tensor, mask, score, threshold in zip(
        pruned.layout.tensors, pruned.views(pruned.mask), pruned.views(pruned.scores),
        found["threshold"], strict=True,
    ):  # fmt: skip
        single = layer_type == "unstructured"
        sizes = score.detach().abs() if single else score.detach().flatten(1).norm(dim=1)
        kept = mask.bool() if single else mask.bool().flatten(1).any(1)
        assert threshold == pytest.approx(float(sizes[kept].min()), rel=1e-3), tensor.name
    assert "flips" not in layer_facts(pruned, None, None)
    pruned.mask.zero_()
    assert layer_facts(pruned, None, None)["threshold"] == [None] * len(pruned.z)


# Cost


def test_each_epoch_has_its_cost(pruned: Finished) -> None:
    records = pruned.records("cost")
    assert [record["step"] for record in records] == [4, 8]
    for record in records:
        parts = ("data", "forward", "backward", "update", "threshold")
        seconds = [record[f"{part}_seconds"] for part in parts]
        assert min(seconds) > 0
        # Eight forward-backwards of 300 images.
        assert sum(seconds) == pytest.approx(8 * 300 / record["images_per_second"], rel=0.3)
        assert record["peak_memory_bytes"] > 1e7
        assert {"lower_lr", "upper_lr"} <= {*record}


def test_a_stopwatch_samples_and_scales() -> None:
    watch = Stopwatch(torch.device("cpu"))
    watch.sample(per_epoch=800)
    assert watch.stride == 4
    for iteration in range(8):
        with watch.step(iteration), watch.part("forward"):
            time.sleep(0.01)
    found = watch.take()
    assert found["forward"] == pytest.approx(8 * 0.01, rel=0.5)
    assert found["update"] < found["forward"]
    assert watch.take() == {}
    assert [*watch.timed("data", iter(range(3)))] == [0, 1, 2]


@world_size(2)
def test_exchanges_of_ranks_are_timed(group: Group) -> None:
    watch = Stopwatch(group.device)
    group.timed = watch.part
    with watch.step(0):
        if group.rank == 1:
            time.sleep(0.1)
        group.sum_(torch.ones(3))
        group.gather(torch.ones(3))
    assert (watch.take()["communication"] > 0.08) == (group.rank == 0)


def test_macs_are_the_published_ones() -> None:
    """torchvision's documentation has them as GFLOPS per image."""
    for name, giga in (("resnet18", 1.81), ("mobilenet_v2", 0.3), ("vit_b_16", 17.56)):
        found = costs(models.build(f"torchvision/{name}", 1000, 3), None, (3, 224, 224))
        assert found["macs"] / 1e9 == pytest.approx(giga, abs=0.006)
        assert found["macs_kept"] == found["macs"]


def test_a_pruned_weight_of_attention_costs_nothing() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner = nn.Conv2d(3, 4, 1), nn.MultiheadAttention(4, 2)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            tokens = self.stem(images).flatten(2).permute(2, 0, 1)
            out: torch.Tensor = self.inner(tokens, tokens, tokens)[0]
            return out

    network = Attention()
    assert positions(network, (3, 5, 5)) == {"stem.weight": 25, "inner.out_proj.weight": 25}
    # Stem, inputs and output; both products of 25 tokens with each other.
    expected = 25 * (12 + 48 + 16) + 2 * 25 * 25 * 4
    assert costs(network, None, (3, 5, 5))["macs"] == expected
    pruned = prune(network, "unstructured")
    pruned.mask.zero_()
    out_proj = [tensor.name == "inner.out_proj.weight" for tensor in pruned.layout.tensors]
    assert any(out_proj)
    gone = 25 * (12 * any(t.name == "stem.weight" for t in pruned.layout.tensors) + 16)
    assert costs(network, pruned, (3, 5, 5))["macs_kept"] == expected - gone


def test_macs_kept_count_what_the_mask_keeps() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 2))
    assert positions(network, (1, 8, 8)) == {"0.weight": 36, "2.weight": 1}
    pruned = prune(network, "unstructured")
    pruned.mask.zero_()
    pruned.mask[:5] = 1
    found = costs(network, pruned, (1, 8, 8))
    assert found["macs"] == 36 * 36 + 288
    assert (found["macs_kept"], found["parameters_kept"]) == (5 * 36, 5 + 4 + 2)
    assert network.training


def test_the_result_names_code_and_machine(pruned: Finished) -> None:
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"],
                          capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    assert pruned.result["git_commit"].removesuffix("-dirty") == head
    assert pruned.result["versions"]["torch"] == torch.__version__
    assert pruned.result["host"] == os.uname().nodename
    assert pruned.result["macs_kept"] < pruned.result["macs"]


def test_the_commit_of_a_snapshot_and_of_no_repository(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    (tmp_path / "COMMIT").write_text("abc\n")
    assert git_commit(tmp_path) == "abc"


# metrics.jsonl


def test_a_log_cut_at_any_byte_goes_on_without_doubles(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = RunLog(tmp_path, active=True)
    for step in range(1, 5):
        log.record("step", step, "", loss=0.5)
    log.record("layers", 4, "", names=["a"], kept=[0.5])
    log.record("epoch", 4, "", top1=50.0)
    whole = path.read_bytes()
    for cut in range(0, len(whole), 5):
        path.write_bytes(whole[:cut])
        again = RunLog(tmp_path, active=True, step=2)
        for step in (3, 4):
            again.record("step", step, "", loss=0.5)
        again.record("epoch", 4, "", top1=40.0)
        records = [*read_jsonl(path)]
        steps = [r["step"] for r in records if r["event"] == "step"]
        assert steps == sorted({*steps})
        assert steps[-2:] == [3, 4]
        assert [r["best_so_far"] for r in records if r["event"] == "epoch"] == [40.0]


def test_the_best_so_far_survives_a_restart(tmp_path: Path) -> None:
    for step, top1, best in ((1, 50.0, 50.0), (2, 40.0, 50.0), (3, 60.0, 60.0)):
        log = RunLog(tmp_path, active=True, step=step - 1, evaluated=step - 1)
        log.record("epoch", step, "", top1=top1)
        assert [*read_jsonl(tmp_path / "metrics.jsonl")][-1]["best_so_far"] == best


# Trackers


def test_tags_are_clean_and_finite() -> None:
    step = {"epoch": 1, "epochs": 2, "steps": 9, "loss": 0.5, "lower_lr": float("nan")}
    assert tags("step", step) == {"train/loss": 0.5}
    epoch = {"epoch": 1, "top1": 90.0, "holdout_top1": 80.0, "best_so_far": 91.0}
    assert tags("epoch", epoch) == {
        "test/top1": 90.0, "holdout/top1": 80.0, "test/best_so_far": 91.0,
    }  # fmt: skip
    layers = {"epoch": 1, "names": ["a.weight"], "kept": [0.5], "threshold": [None]}
    assert tags("layers", layers) == {"kept/a.weight": 0.5}


def test_tensorboard_has_settings_and_tags(pruned: Finished) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(pruned.folder / "tensorboard")).Reload()
    found = {*events.Tags()["scalars"]}
    assert found >= {"train/loss", "test/top1", "cost/data_seconds", "kept/conv1.weight"}
    assert [event.step for event in events.Scalars("train/loss")] == [*range(1, 9)]
    assert events.summary_metadata.keys() >= {"_hparams_/experiment"}


class Broken(Tracker):
    """Fails, or hangs, where it is told to."""

    def __init__(self, how: str) -> None:
        self.how, self.seen = how, list[int]()
        self.act("start")

    def act(self, place: str) -> None:
        if place == self.how.partition("-")[0]:
            if self.how.endswith("hang"):
                time.sleep(5)
            raise SystemExit("no") if self.how.endswith("exit") else RuntimeError("down")

    def log(self, step: int, values: dict[str, float]) -> None:
        self.seen.append(step)
        self.act("log")

    def close(self, result: dict[str, Any] | None, stopped: bool) -> None:
        self.act("close")


@pytest.mark.parametrize(
    "how", ["start", "log", "close", "start-hang", "log-hang", "close-hang", "start-exit"]
)
def test_a_tracker_that_fails_or_hangs_stops_nothing(
    how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    tracker = Background("mine", lambda: Broken(how))
    for step in range(100):
        tracker.log(step, {"train/loss": 1.0})
    tracker.close(None, stopped=True)
    tracker.join(time.monotonic() + 0.2)
    assert time.monotonic() - began < 3
    out = capsys.readouterr().out
    assert out.startswith("warning: tracker: mine")
    assert out.count("\n") == 1
    assert "training goes on" in out


def test_a_tracker_that_fell_behind_lacks_numbers_but_gets_its_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(background, "_MOST", 2)
    go, sent = threading.Event(), list[object]()

    class Slow(Tracker):
        def log(self, step: int, values: dict[str, float]) -> None:
            go.wait()
            sent.append(step)

        def close(self, result: dict[str, Any] | None, stopped: bool) -> None:
            sent.append(result)

    tracker = Background("mine", lambda: Slow(Path(), {}, 0))
    for step in range(9):
        tracker.log(step, {})
    go.set()
    tracker.close({"top1": 1.0}, stopped=False)
    tracker.join(time.monotonic() + 5)
    assert sent[-1] == {"top1": 1.0}
    assert 3 <= len(sent) <= 4
    assert capsys.readouterr().out.count("too slow") == 1


def test_a_tracker_gets_everything_in_order() -> None:
    made: list[Broken] = []
    tracker = Background("mine", lambda: made.append(Broken("")) or made[0])  # type: ignore[func-returns-value]
    for step in range(1000):
        tracker.log(step, {})
    tracker.close({"top1": 1.0}, stopped=False)
    tracker.join(time.monotonic() + 10)
    assert made[0].seen == [*range(1000)]


def two_attempts(dense: Finished, folder: Path, tracker: str, by: Exception) -> Finished:
    """A run that is ended after an epoch, and goes on to its end."""
    settings = SHORT | {"source_net": dense.newest, "tracker": tracker}
    with pytest.MonkeyPatch.context() as patch:
        # Both attempts are in this process, so the first one must have ended.
        patch.setattr(metrics, "STOPPED_SECONDS", 60.0)
        train_until(4, "bip", folder, by=by, **settings)
    return train("bip", folder, **settings)


ENDS = pytest.mark.parametrize(
    ("by", "stopped"), [(Stopped("SIGTERM", 4), True), (RankError("a bug"), False)], ids=str
)


@ENDS
def test_mlflow_has_one_run_of_two_attempts(
    dense: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: Exception, stopped: bool
) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed: its tracker is NOT tested")
    from mlflow import MlflowClient

    ended = []
    end = MlflowClient.set_terminated
    monkeypatch.setattr(
        MlflowClient,
        "set_terminated",
        lambda self, run, status: (ended.append(status), end(self, run, status)),
    )
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = two_attempts(dense, tmp_path, "mlflow", by)
    assert ended == ["KILLED" if stopped else "FAILED", "FINISHED"]
    client = MlflowClient((tmp_path / "mlruns").as_uri())
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["k"] == "0.3"
    assert found.data.metrics["result/top1"] == run.result["top1"]
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert {metric.step for metric in history} == {*range(1, 9)}


@ENDS
def test_wandb_writes_two_attempts_offline_as_one_run(
    dense: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: Exception, stopped: bool
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: its tracker is NOT tested")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    run = two_attempts(dense, tmp_path, "wandb", by)
    written = [*run.folder.glob("wandb/offline-run-*/*.wandb")]
    assert len(written) == 2
    assert len({path.name for path in written}) == 1, "one ID"
    # W&B's own process may still write when finish() has returned.
    end = time.monotonic() + 60
    while {wandb_end(path)[1] for path in written} != {0, 1} and time.monotonic() < end:
        time.sleep(0.1)
    first, last = sorted(written, key=lambda path: wandb_end(path)[1], reverse=True)
    assert b"train/loss" in last.read_bytes()
    assert b"macs_kept" in last.read_bytes(), "the result is its summary"
    assert wandb_end(first) == (["preempting"] * stopped, 1), "else it shows as failed"
    assert wandb_end(last) == ([], 0)


def wandb_end(path: Path) -> tuple[list[str], int]:
    """Whether an offline file marks its run as preempting, and the exit code in it."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, block, parts = path.read_bytes(), 7, 1 << 15, b""
    kinds, code = [], -1
    while at + 7 <= len(data):  # LevelDB's log format, after a header of 7 bytes
        if (left := block - at % block) < 7:
            at += left
            continue
        length, part = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # whole, or the last part
            record, parts = Record.FromString(parts), b""
            kinds.append(record.WhichOneof("record_type"))
            code = record.exit.exit_code if kinds[-1] == "exit" else code
    return [kind for kind in kinds if kind == "preempting"], code


def test_throughput_does_not_count_what_comes_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = methods()["random"].prepare
    slow: Callable[[Any], None] = lambda method: (time.sleep(5), prepare(method))[1]  # noqa: E731
    monkeypatch.setattr(methods()["random"], "prepare", slow)
    run = train("random", tmp_path, k=0.3, batch_size=300, max_steps=2, print_freq=1)
    (cost,) = run.records("cost")
    for record in (run.records()[0], cost):
        assert record["images_per_second"] > 2 * 300 / 5


def test_an_unreachable_server_does_not_stop_training(
    dense: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip("mlflow", reason="mlflow is not installed: its tracker is NOT tested")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(metrics, "FINISHED_SECONDS", 10.0)
    settings = SHORT | {"source_net": dense.newest}
    run = train("bip", tmp_path / "a", **settings, tracker="mlflow")
    assert "warning: tracker: mlflow failed" in capsys.readouterr().out
    without = train("bip", tmp_path / "b", **settings)
    assert run.folder.name == without.folder.name
    assert run.result["weights_sha256"] == without.result["weights_sha256"]
    assert run.losses == without.losses


def test_a_missing_package_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    assert main(["train", *arguments("pretrain", tmp_path / "out", tracker="wandb")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: tracker: wandb is not installed; pip install 'bip-hpc[wandb]'")
    assert not (tmp_path / "out").exists()


def test_a_tracker_is_no_part_of_a_runs_identity(tmp_path: Path) -> None:
    one, other = (load_config(arguments("pretrain", tmp_path, **more))
                  for more in ({}, {"tracker": "mlflow,wandb"}))  # fmt: skip
    assert one.run_id == other.run_id
    assert json.loads(json.dumps(other.to_plain()))["tracker"] == "mlflow,wandb"
