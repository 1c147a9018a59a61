"""Sweeps of real runs on a real cluster: submitted, disturbed, compared with undisturbed ones."""

import json
from pathlib import Path
from typing import Any

import yaml

from bip.config import RunConfig, build_config, read_yaml
from bip.files import read_jsonl
from bip.training.checkpoint import read_checkpoint, split_state
from launch.__main__ import main
from tests.cluster.conftest import Cluster
from tests.distributed.harness import run_ranks

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


class ClusterSweep:
    """One sweep in `results`/sweep on `cluster`; SLURM_CONF must name it in this process."""

    def __init__(self, cluster: Cluster, results: Path, **profile: Any) -> None:
        self.cluster, self.results, self.folder = cluster, results, results / "sweep"
        facts = {"executor": "slurm", "nodes": 2, "time": 30, "signal_lead": 60} | profile
        results.mkdir(exist_ok=True)
        self.known: dict[str, RunConfig] = {}
        self.profile = results / "profile.yml"
        self.profile.write_text(yaml.safe_dump(facts))

    def series(self, config: Path | str, *flags: object) -> int:
        """`launch series --no-wait`; its exit code."""
        place = ["--result-dir", self.results, "--exp-name", "sweep", "--profile", self.profile]
        words = ["series", "--configs", CONFIGS / config, "--no-wait", *place, *flags]
        return main([str(word) for word in words])

    def points(self) -> dict[str, RunConfig]:
        """RUN_ID -> configuration, each read once: whoever polls leaves the CPUs to the runs."""
        paths = sorted((self.folder / "points").glob("*.yml"))
        for path in paths:
            if path.stem not in self.known:
                self.known[path.stem] = build_config(read_yaml(path))
        return {path.stem: self.known[path.stem] for path in paths}

    def arrays(self) -> list[dict[str, Any]]:
        return list(read_jsonl(self.folder / "jobs" / "arrays.jsonl"))

    def task(self, run_id: str) -> str:
        """The newest array task of a point."""
        return [
            f"{array['job']}_{index}"
            for array in self.arrays()
            for index, names in enumerate(array["tasks"])
            if run_id in names
        ][-1]

    def attempts(self, run_id: str, event: str | None = None) -> list[dict[str, Any]]:
        path = self.points()[run_id].run_folder / "attempts.jsonl"
        return [r for r in read_jsonl(path) if event in (None, r["event"])]

    def is_training(self, run_id: str) -> bool:
        """An attempt has begun, and made steps, and has not ended."""
        records = self.attempts(run_id)
        if not records or records[-1]["event"] != "start" or self.result(run_id):
            return False
        steps = read_jsonl(self.points()[run_id].run_folder / "metrics.jsonl")
        return any(record["step"] > records[-1]["step"] for record in steps)

    def training(self) -> list[str]:
        """Those that SLURM shows as running, too: a run that a failed node took says no end."""
        tasks = set(self.cluster.run("squeue", "-hr", "-t", "R", "-o", "%F_%K").split())
        points = (run_id for run_id in self.points() if self.task(run_id) in tasks)
        return [run_id for run_id in points if self.is_training(run_id)]

    def result(self, run_id: str) -> dict[str, Any] | None:
        path = self.points()[run_id].run_folder / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    def all_done(self) -> bool:
        """All have their result, and have said so in their ledger, which comes a moment later."""
        return all(is_done(config.run_folder) for config in self.points().values())

    def log(self, run_id: str) -> str:
        return (self.folder / "jobs" / f"{run_id}.log").read_text()

    def wait(self, condition: Any, what: str, seconds: float = 400) -> None:
        """Poll; a point that failed ends the test at once."""

        def met() -> bool:
            for note in (self.folder / "jobs").glob("*.failed"):
                raise AssertionError(f"{note.name}: {note.read_text()}")
            return bool(condition())

        self.cluster.wait(met, what, seconds)

    def status(self, capsys: Any) -> list[dict[str, Any]]:
        capsys.readouterr()
        assert main(["status", str(self.folder), "--json"]) == 0
        rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
        return rows


def high(cluster: Cluster, seconds: float, tasks_per_node: int | None = None) -> str:
    """A job that preempts: on both nodes, whole or with some CPUs of each."""
    size = ["--exclusive"] if tasks_per_node is None else [f"--ntasks-per-node={tasks_per_node}"]
    # When its own node fails it is to be gone, not to come back and be waited for.
    job = ["--partition=high", "--nodes=2", "--mem-per-cpu=10", "--no-requeue", *size]
    return cluster.submit(f"sleep {seconds}", *job)


def train_here(text: str) -> None:
    """On one rank: a run from its YAML."""
    from bip.run import train

    train(build_config(yaml.safe_load(text)))


def undisturbed(config: RunConfig, results: Path, ranks: int = 2) -> Path:
    """The run folder of the same run, never interrupted, without SLURM."""
    same = config.model_copy(update={"result_dir": results})
    if not (same.run_folder / "result.json").exists():
        run_ranks(ranks, train_here, same.to_yaml(), join=False, timeout=300)
    return same.run_folder


def assert_same_outcome(one: Path, other: Path) -> None:
    """Byte-equal mask and weights, the same accuracy."""
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    for name in ("mask_sha256", "weights_sha256", "kept", "top1", "best_top1"):
        assert results[0][name] == results[1][name], name
    paths = [folder / "checkpoint" / "checkpoint.pth.tar" for folder in (one, other)]
    (weights, mask), (others, other_mask) = (split_state(read_checkpoint(p)) for p in paths)
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        assert value.numpy().tobytes() == others[name].numpy().tobytes(), name
    assert (mask is None) == (other_mask is None)
    if mask is not None and other_mask is not None:
        assert mask.numpy().tobytes() == other_mask.numpy().tobytes()


def assert_story(attempts: list[dict[str, Any]]) -> None:
    """The ledger of a run: it finished exactly once, last; no agreed stop lost a step.

    A task that is preempted after that, on its way out, is requeued, and finds nothing to do.
    """
    assert [r["cause"] for r in attempts if r["event"] == "end"].count("finished") == 1
    runs = [record for record in attempts if record["event"] in ("start", "end")]
    assert runs[-1] == runs[-1] | {"event": "end", "cause": "finished"}
    saved = 0
    for record in attempts:
        if record["event"] == "end" and record["cause"].startswith("SIG"):
            saved = record["step"]
        if record["event"] == "start":
            assert record["step"] >= saved, "steps were lost after an agreed save"


def is_done(run_folder: Path) -> bool:
    """There is a result, and the ledger's last attempt has ended."""
    events = [record["event"] for record in read_jsonl(run_folder / "attempts.jsonl")]
    ran = [event for event in events if event in ("start", "end")]
    return (run_folder / "result.json").exists() and ran[-1:] == ["end"]


def env_for(cluster: Cluster) -> dict[str, str]:
    return {"SLURM_CONF": cluster.environment["SLURM_CONF"], "OMP_NUM_THREADS": "1"}


def interrupted(attempts: list[dict[str, Any]]) -> int:
    return sum(record["event"] == "start" for record in attempts) - 1
