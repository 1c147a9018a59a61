"""A run that is killed at any moment, in the middle of any write, ends with the same bits."""

import builtins
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from bip.config import build_config, load_config
from bip.errors import UserError
from bip.files import read_jsonl
from bip.run import train
from bip.training.checkpoint import CheckpointFolder, read_checkpoint
from tests.distributed.harness import PRELOAD
from tests.runs import Finished, arguments

STEPS = 12
OPERATIONS = ("fsync", "replace", "rename", "link", "symlink", "unlink")
Operation = tuple[str, int]  # what is done to which file, and which write of that file (or 0)
CLOCK: Operation = ("clock", 0)
# Beside the writes of a step's checkpoint: what each twenty kills hit.
COMMITS = (
    "fsync step",
    "replace step",
    "fsync checkpoint",
    "write manifest.json",
    "fsync manifest.json",
    "replace manifest.json",
    "replace checkpoint.pth.tar",
    "write result.json",
    "replace result.json",
)


@dataclass(frozen=True)
class Kill:
    """At the `nth` time that an attempt comes to `operation`; by the clock, after `seconds`."""

    operation: Operation
    nth: int = 1
    seconds: float | None = None


def _role(path: Path) -> str:
    """What a file is for, whatever the temporary name it is written under."""
    name = path.name
    if name.startswith(".lock"):
        return "lock"
    if name.startswith("."):
        name = re.sub(r"^\.(.+?)(\.[0-9a-f]{32}\.tmp|\.\d+)$", r"\1", name)
    if name.startswith("step-"):
        return "step"
    return "run folder" if path.is_dir() and name != "checkpoint" else name


class _Writes:
    """A file of which each write is an operation."""

    def __init__(self, stream: Any, role: str, come_to: Callable[..., None]) -> None:
        self.stream, self.role, self.come_to = stream, role, come_to
        self.number = 0

    def write(self, data: bytes) -> int:
        def half() -> None:
            self.stream.write(data[: len(data) // 2])
            self.stream.flush()

        self.number += 1
        self.come_to((f"write {self.role}", self.number), half)
        return int(self.stream.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __enter__(self) -> "_Writes":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()


def _train(text: str, kill: Kill | None, answers: Any) -> None:
    """In a process of its own: train, killed before the operation that `kill` names.

    A write is killed half-way. Answers with how often each operation was come to.
    """
    import bip.files

    done: Counter[Operation] = Counter()

    def come_to(operation: Operation, half: Callable[[], None] = lambda: None) -> None:
        done[operation] += 1
        if kill and operation == kill.operation and done[operation] == kill.nth:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    def faulty(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            path = args[-1] if name in ("replace", "rename", "link") else args[name == "symlink"]
            if name == "fsync":
                path = os.readlink(f"/proc/self/fd/{path}")
            come_to((f"{name} {_role(Path(path))}", 0))
            return operation(*args, **kwargs)

        return call

    def opened(path: Any, mode: str = "r", *more: Any) -> Any:
        if "x" not in mode and "a" not in mode:
            return builtins.open(path, mode, *more)
        role = _role(Path(path))
        come_to((f"open {role}", 0))
        return _Writes(builtins.open(path, mode, *more), role, come_to)

    for name in OPERATIONS:
        setattr(os, name, faulty(name, getattr(os, name)))
    bip.files.open = opened  # type: ignore[attr-defined]
    train(build_config(yaml.safe_load(text)))
    answers.put(done)


class Killer:
    """Runs one configuration again and again in forked processes, and kills them."""

    def __init__(self, folder: Path, source: Path) -> None:
        # A checkpoint after every step: the time between two is under the interval.
        settings = {"max_steps": STEPS, "checkpoint_minutes": 1e-9, "k": 0.2}
        line = arguments("bip", folder, source_net=source, **settings)
        self.config = load_config(line)
        self.checkpoints = CheckpointFolder(self.config.run_folder / "checkpoint")
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)

    def attempt(self, kill: Kill | None = None) -> Counter[Operation] | None:
        """How often a run to the end came to each operation; None if it was killed."""
        answers = self.context.SimpleQueue()
        process = self.context.Process(target=_train, args=(self.config.to_yaml(), kill, answers))
        process.start()
        if kill and kill.seconds is not None:
            process.join(kill.seconds)
            process.kill()
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL), "it failed by itself"
        return answers.get() if process.exitcode == 0 else None

    def check(self) -> int:
        """What is committed is readable under each of its names. Returns the newest's step."""
        entries, state = self.checkpoints.entries(), self.checkpoints.load()
        assert (state is None) == (not self.checkpoints.manifest.exists()) == (not entries)
        for name in (self.checkpoints.newest, self.checkpoints.best):
            if name.is_symlink() or name.exists():
                read_checkpoint(name)
        if state is None:
            return 0
        step = int(state["progress"]["iteration"])
        assert step == entries[0]["step"], "the newest is readable, not only the one before"
        return step

    def finish(self) -> Finished:
        assert self.attempt() is not None
        result = (self.config.run_folder / "result.json").read_text()
        return Finished(self.config.run_folder, yaml.safe_load(result))


@dataclass(frozen=True)
class Calm:
    """The undisturbed run, what it did to files, and how long its process took."""

    run: Finished
    operations: Counter[Operation]
    seconds: float

    def third_of(self, write: int) -> int:
        """Whether a write of a step's checkpoint is in its first (0), middle or last (2) third."""
        return 3 * (write - 1) // max(n for name, n in self.operations if name == "write step")


@pytest.fixture(scope="module")
def calm(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Calm:
    # The first process waits for the server's imports.
    Killer(tmp_path_factory.mktemp("warm"), source).attempt(Kill(("open config.yml", 0)))
    killer = Killer(tmp_path_factory.mktemp("calm"), source)
    start = time.monotonic()
    operations = killer.attempt()
    seconds = time.monotonic() - start
    assert operations is not None
    return Calm(killer.finish(), operations, seconds)


def twenty(chance: random.Random, calm: Calm) -> list[Kill]:
    """In any order: one in each third of a checkpoint's writes, one at each of `COMMITS`, five by
    the clock and three at operations of any kind.
    """
    chosen: list[Operation] = []
    for third in range(3):
        chosen.append(chance.choice([
            (name, n) for name, n in sorted(calm.operations)
            if name == "write step" and calm.third_of(n) == third
        ]))  # fmt: skip
    chosen += [(name, 1 if name.startswith("write") else 0) for name in COMMITS]
    names = sorted({name for name, _ in calm.operations})
    for _ in range(3):  # by name first: nearly all operations are writes of checkpoints
        name = chance.choice(names)
        chosen.append(chance.choice(sorted(o for o in calm.operations if o[0] == name)))
    # In the first saves of an attempt: several kills share a run, which goes on between them.
    kills = [Kill(o, nth=chance.randint(1, min(3, calm.operations[o]))) for o in chosen]
    kills += [Kill(CLOCK, seconds=chance.uniform(0, calm.seconds)) for _ in range(5)]
    chance.shuffle(kills)
    return kills


def kill_often(killer: Killer, calm: Calm, kills: list[Kill]) -> Counter[Operation]:
    """Kill one attempt after the other. Returns what was hit how often.

    A run that comes to its end in between is compared and started again; where the kill was still
    due, it is due in the new run: there it comes to every operation.
    """
    hit: Counter[Operation] = Counter()
    committed = 0
    result = killer.config.run_folder / "result.json"
    for kill in kills:
        while True:
            if result.exists():
                compare(killer, calm.run)
                shutil.rmtree(killer.config.run_folder)
                committed = 0
            killed = killer.attempt(kill) is None
            step = killer.check()
            assert step >= committed, "what was committed stays"
            committed = step
            if killed:
                break
            if kill.seconds is not None:  # the machine is quicker now
                kill = replace(kill, seconds=kill.seconds / 2)
        hit[kill.operation] += 1
    compare(killer, calm.run)
    return hit


def compare(killer: Killer, calm: Finished) -> None:
    """The run, finished, has the undisturbed run's bits and a record of every attempt."""
    finished = killer.finish()
    for name in ("mask_sha256", "weights_sha256", "kept", "top1"):
        assert finished.result[name] == calm.result[name]
    for name, value in calm.weights.items():
        assert value.numpy().tobytes() == finished.weights[name].numpy().tobytes(), name
    steps = [record["step"] for record in finished.records()]
    assert steps == list(range(1, STEPS + 1)), "each step is reported once"
    assert [record["step"] for record in finished.records("epoch")] == [STEPS]
    starts = [r for r in read_jsonl(finished.folder / "attempts.jsonl") if r["event"] == "start"]
    assert finished.result["attempts"] == len(starts)


@pytest.mark.parametrize(
    "rounds", [1, pytest.param(5, marks=[pytest.mark.storm, pytest.mark.timeout(1800)])]
)
def test_twenty_kills(rounds: int, tmp_path: Path, source: Path, calm: Calm) -> None:
    """Every part of a commit is hit in each round, and some kills come by the clock."""
    chance = random.Random(6 + rounds)
    kills = [kill for _ in range(rounds) for kill in twenty(chance, calm)]
    assert len(set(kills)) > 12 * rounds, "not the same twenty again"
    hit: Counter[str] = Counter()
    for (name, write), times in kill_often(Killer(tmp_path, source), calm, kills).items():
        hit[f"write step {calm.third_of(write)}" if name == "write step" else name] += times
    parts = [*COMMITS, *(f"write step {third}" for third in range(3))]
    assert {name: hit[name] for name in parts if hit[name] < rounds} == {}
    assert hit["clock"] >= 5 * rounds
    assert hit.total() == 20 * rounds


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.5 MB: room for two checkpoints, not for three."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here (root is needed)")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_is_one_line_and_the_last_checkpoint_stays(
    small_disk: Path, tmp_path: Path, source: Path, calm: Calm
) -> None:
    killer = Killer(small_disk, source)
    with pytest.raises(UserError, match=r"No space left on device; .*checkpoint is kept"):
        train(killer.config)
    assert killer.check() >= 1
    # With room again the same command goes on, to the same bits.
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    assert killer.finish().result["weights_sha256"] == calm.run.result["weights_sha256"]


def test_folder_that_becomes_read_only(small_disk: Path, source: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    killer = Killer(small_disk, source)
    assert killer.attempt(Kill(("replace manifest.json", 0), nth=3)) is None
    step = killer.check()
    assert step == 2
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match="Read-only file system") as error:
        train(killer.config)
    assert "\n" not in str(error.value)
    assert killer.check() == step
