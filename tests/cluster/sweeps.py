"""Sweeps of real runs on a real cluster: submitted, disturbed, compared with undisturbed ones."""

import json
from pathlib import Path
from typing import Any

import yaml

from bip.config import RunConfig, build_config
from bip.files import read_jsonl
from bip.training.checkpoint import read_checkpoint, split_state
from bip.yaml_file import read_yaml
from launch.__main__ import main
from tests.cluster.cluster import Cluster
from tests.distributed.harness import run_ranks

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


class ClusterSweep:
    """One sweep in `results`/sweep on `cluster`, submitted by this process."""

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

    def runs(self) -> dict[str, RunConfig]:
        """RUN_ID -> configuration, each read once: whoever polls leaves the CPUs to the runs."""
        paths = sorted((self.folder / "points").glob("*.yml"))
        for path in paths:
            if path.stem not in self.known:
                self.known[path.stem] = build_config(read_yaml(path))
        return {path.stem: self.known[path.stem] for path in paths}

    def arrays(self) -> list[dict[str, Any]]:
        return list(read_jsonl(self.folder / "jobs" / "arrays.jsonl"))

    def task(self, run_id: str) -> str:
        """The newest array task of a run."""
        return [
            f"{array['job']}_{index}"
            for array in self.arrays()
            for index, names in enumerate(array["tasks"])
            if run_id in names
        ][-1]

    def attempts(self, run_id: str, event: str | None = None) -> list[dict[str, Any]]:
        path = self.runs()[run_id].run_folder / "attempts.jsonl"
        return [r for r in read_jsonl(path) if event in (None, r["event"])]

    def is_training(self, run_id: str) -> bool:
        """An attempt has begun, and made steps, and has not ended."""
        records = self.attempts(run_id)
        if not records or records[-1]["event"] != "start" or self.result(run_id):
            return False
        steps = read_jsonl(self.runs()[run_id].run_folder / "metrics.jsonl")
        return any(record["step"] > records[-1]["step"] for record in steps)

    def training(self) -> list[str]:
        """Those that SLURM shows as running, too: where a node failed no end is recorded."""
        tasks = set(self.cluster.run("squeue", "-hr", "-t", "R", "-o", "%F_%K").split())
        runs = (run_id for run_id in self.runs() if self.task(run_id) in tasks)
        return [run_id for run_id in runs if self.is_training(run_id)]

    def result(self, run_id: str) -> dict[str, Any] | None:
        path = self.runs()[run_id].run_folder / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    def all_done(self) -> bool:
        """All have their result, and its record in their ledger, which comes a moment later."""
        return all(is_done(config.run_folder) for config in self.runs().values())

    def causes(self, run_id: str, event: str) -> list[str]:
        return [record["cause"] for record in self.attempts(run_id, event)]

    def assert_as_undisturbed(self, *run_ids: str, ranks: int = 2) -> None:
        """Their ledgers are in order, and their outcome is that of runs never interrupted."""
        for run_id in run_ids:
            assert_story(self.attempts(run_id))
            assert_same_outcome(self.runs()[run_id], self.results.with_name("calm"), ranks)

    def log(self, run_id: str) -> str:
        return (self.folder / "jobs" / f"{run_id}.log").read_text()

    def wait(self, condition: Any, what: str, seconds: float = 400) -> None:
        """Poll; a run that failed ends the test at once."""

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


def assert_same_outcome(config: RunConfig, calm: Path, ranks: int = 2) -> None:
    """Byte-equal mask and weights, and the same accuracy, as the same run with result_dir `calm`,
    on that many ranks, without SLURM and never interrupted."""
    same = config.model_copy(update={"result_dir": calm})
    run_ranks(ranks, train_here, same.to_yaml(), join=False, timeout=300)
    folders = (config.run_folder, same.run_folder)
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    for name in ("mask_sha256", "weights_sha256", "kept", "top1", "best_top1"):
        assert results[0][name] == results[1][name], name
    paths = [folder / "checkpoint" / "checkpoint.pth.tar" for folder in folders]
    (weights, mask), (others, other_mask) = (split_state(read_checkpoint(p)) for p in paths)
    assert weights.keys() == others.keys()
    pairs = [(mask, other_mask), *((weights[name], others[name]) for name in weights)]
    for one, other in pairs:
        assert (one is None) == (other is None)
        assert one is None or one.numpy().tobytes() == other.numpy().tobytes()


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


def interrupted(attempts: list[dict[str, Any]]) -> int:
    return sum(record["event"] == "start" for record in attempts) - 1
