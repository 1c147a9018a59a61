"""A run that is killed at any moment, in the middle of any write, ends with the same bits."""

import builtins
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bip.config import build_config, load_config
from bip.errors import UserError
from bip.files import read_jsonl
from bip.run import train
from bip.training.checkpoint import CheckpointFolder
from tests.distributed.harness import PRELOAD
from tests.runs import Finished, arguments

STEPS = 12
OPERATIONS = ("fsync", "replace", "link", "symlink", "unlink")


class _HalfWriting:
    """A file whose `last` write stops half-way."""

    def __init__(self, stream: Any, last: int) -> None:
        self.stream, self.left = stream, last

    def write(self, data: bytes) -> int:
        self.left -= 1
        if self.left == 0:
            self.stream.write(data[: len(data) // 2])
            self.stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return int(self.stream.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __enter__(self) -> "_HalfWriting":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()


def _train(text: str, kill_at: int, answers: Any) -> None:
    """In a process of its own: train, killed at the `kill_at`-th operation on files (0: not).

    Writing a file is one; it is killed in the middle of its first or a later write, or, where
    there are fewer, not at all. Answers with how many operations there were.
    """
    import bip.files

    done = 0

    def is_due() -> bool:
        nonlocal done
        done += 1
        return done == kill_at

    def faulty(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if is_due():
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)

        return call

    def opened(path: Any, mode: str = "r", *more: Any) -> Any:
        stream = builtins.open(path, mode, *more)  # noqa: SIM115
        if "x" not in mode or not is_due():
            return stream
        return _HalfWriting(stream, last=1 if kill_at % 2 else 40)

    for name in OPERATIONS:
        setattr(os, name, faulty(getattr(os, name)))
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

    def attempt(self, kill_at: int = 0, after: float | None = None) -> int | None:
        """How many operations a run to the end made; None if it was killed."""
        answers = self.context.Queue()
        process = self.context.Process(
            target=_train, args=(self.config.to_yaml(), kill_at, answers)
        )
        process.start()
        if after is not None:
            process.join(after)
            process.kill()
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL), "it failed by itself"
        return answers.get(timeout=5) if process.exitcode == 0 else None

    def check(self) -> int:
        """The newest checkpoint is readable, or there never was one. Returns its step."""
        state = self.checkpoints.load()
        assert (state is None) == (not self.checkpoints.manifest.exists())
        return state["progress"]["iteration"] if state else 0

    def finish(self) -> Finished:
        while self.attempt() is None:
            pass
        result = (self.config.run_folder / "result.json").read_text()
        return Finished(self.config.run_folder, yaml.safe_load(result))


@pytest.fixture(scope="module")
def calm(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Killer(tmp_path_factory.mktemp("calm"), source).finish()


def kill_often(killer: Killer, calm: Finished, kills: int) -> None:
    """Before the 1st, 2nd, 3rd ... operation of an attempt, and every fifth time at any moment.

    A run that comes to its end in between (a quick machine) is compared and begun again.
    """
    moments = random.Random(7)
    killed = number = 0
    while killed < kills:
        number += 1
        if (killer.config.run_folder / "result.json").exists():
            compare(killer, calm)
            shutil.rmtree(killer.config.run_folder)
            number = 1
        by_clock = number % 5 == 0
        after = moments.uniform(0.1, 1.2) if by_clock else None
        if killer.attempt(0 if by_clock else number, after) is None:
            killed += 1
        killer.check()
    compare(killer, calm)


def compare(killer: Killer, calm: Finished) -> None:
    """The run, finished, has the undisturbed run's bits and a record of every attempt."""
    finished = killer.finish()
    for name in ("mask_sha256", "weights_sha256", "kept", "top1"):
        assert finished.result[name] == calm.result[name]
    for name, value in calm.weights.items():
        assert value.numpy().tobytes() == finished.weights[name].numpy().tobytes(), name
    told = [record["step"] for record in finished.records()]
    assert told == sorted(set(told)), "no step is reported twice"
    assert [record["step"] for record in finished.records("epoch")] == [STEPS]
    starts = [r for r in read_jsonl(finished.folder / "attempts.jsonl") if r["event"] == "start"]
    assert finished.result["attempts"] == len(starts)


def test_twenty_kills(tmp_path: Path, source: Path, calm: Finished) -> None:
    kill_often(Killer(tmp_path, source), calm, 20)


@pytest.mark.storm
@pytest.mark.timeout(1800)
def test_a_hundred_kills(tmp_path: Path, source: Path, calm: Finished) -> None:
    for number in range(5):
        kill_often(Killer(tmp_path / str(number), source), calm, 20)


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
    small_disk: Path, tmp_path: Path, source: Path, calm: Finished
) -> None:
    killer = Killer(small_disk, source)
    with pytest.raises(UserError, match="No space left on device; the newest checkpoint is kept"):
        train(killer.config)
    assert killer.check() >= 1
    # With room again the same command goes on, to the same bits.
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    assert killer.finish().result["weights_sha256"] == calm.result["weights_sha256"]


def test_folder_that_becomes_read_only(small_disk: Path, source: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    killer = Killer(small_disk, source)
    assert killer.attempt(kill_at=40) is None  # in the third save or so of twelve
    step = killer.check()
    assert 0 < step < STEPS
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match="Read-only file system") as error:
        train(killer.config)
    assert "\n" not in str(error.value)
    assert killer.check() == step
