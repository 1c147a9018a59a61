"""The private parts of dependencies that the code uses. setup.cfg bounds their versions; raise a
bound when these tests, and those of the parts named here, pass with the new version."""

import contextlib
import ctypes
import io
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
import torch.distributed as dist
import tyro
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from bip.distributed.group import Group, wrap
from tests.distributed.harness import world_size


def test_torch_workers_of_a_data_loader() -> None:
    """bip/data: names the batch of a worker that died, and ends workers at once."""
    data: Any = [torch.zeros(1)] * 4
    batches: Any = iter(DataLoader(data, num_workers=1, multiprocessing_context="fork"))
    assert isinstance(batches, _MultiProcessingDataLoaderIter)
    assert batches._rcvd_idx == 0, "the number of the next batch"
    assert batches._task_info[0][0] == 0, "a batch's number: its worker's number, ..."
    (worker,) = batches._workers
    assert worker.is_alive()
    assert (worker.exitcode, bool(worker.sentinel)) == (None, True)
    batches._shutdown_workers()
    worker.join(10)
    assert not worker.is_alive()


def test_torch_shared_storage() -> None:
    """bip/data: a worker writes a batch where the parent reads it."""
    storage = torch.UntypedStorage._new_shared(6)
    assert storage.is_shared()
    assert torch.empty(0, dtype=torch.uint8).set_(storage).view(2, 3).shape == (2, 3)


def test_torch_process_group(tmp_path: Path) -> None:
    """bip/distributed: the group's store carries the heartbeat; its time-out is changed later."""
    inner: Any = dist.distributed_c10d
    assert callable(getattr(dist, "set_timeout", None) or inner._set_pg_timeout)
    assert issubclass(dist.DistError, RuntimeError), "launch takes it, by name, for a lost rank"
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        store = inner._get_default_store()
        assert isinstance(store, dist.Store)
        assert callable(store.clone)
    finally:
        dist.destroy_process_group()


@world_size(2)
def test_torch_ddp_logging(group: Group) -> None:
    """bip/training/forward.py: how long the exchange of gradients took, in nanoseconds."""
    ddp = wrap(torch.nn.Linear(100, 100), group.device)
    for _ in range(3):
        ddp(torch.ones(2, 100)).sum().backward()
    facts: Any = ddp._get_ddp_logging_data()
    total = facts["avg_backward_comm_time"]
    assert total > facts["avg_backward_compute_comm_overlap_time"] >= 0


def test_numpy_scalar() -> None:
    """bip/training/sources.py admits this function, which a pickled numpy float names."""
    core: Any = np
    scalar = core._core.multiarray.scalar
    assert np.float64(1.5).__reduce__()[0] is scalar
    assert pickle.loads(pickle.dumps(np.float64(1.5))) == 1.5


def test_tyro_prints_errors_as_a_box() -> None:
    """bip/cli.py makes one line of what tyro prints to stderr before it exits: a title, the reason,
    and help, with rules between them, in characters that stdout's encoding has."""

    def command(epochs: int = 1) -> None: ...

    def printed(*words: str) -> tuple[bool, list[str]]:
        box, out = io.StringIO(), io.StringIO()
        captured = contextlib.redirect_stderr(box), contextlib.redirect_stdout(out)
        with captured[0], captured[1], pytest.raises(SystemExit) as stop:
            tyro.cli(command, args=list(words), prog="bip")
        rows = [line.strip("│ ") for line in box.getvalue().splitlines()]
        return bool(stop.value.code), [row for row in rows if not set(row) <= set("─╰╯-")]

    for words, reason in ((["--epoch", "1"], "nrecognized"), (["--epochs", "x"], "invalid")):
        failed, (_title, first, *more) = printed(*words)
        assert failed
        assert reason in first
        assert any(row.startswith("For full helptext") for row in more)
    assert printed("--help") == (False, [])


def test_lmdb_keeps_a_large_value_on_pages_of_its_own(tmp_path: Path) -> None:
    """bip/data reads a node to learn where the value lies: 8 bytes before the key (size low and
    high, flags, key size), then the key, then the first page's number. A page has a header of 16
    bytes."""
    value, key = b"image" * 4000, b"8 bytes."
    with lmdb.open(str(tmp_path / "a"), subdir=False) as env, env.begin(write=True) as writing:
        writing.put(key, value)
    with lmdb.open(str(tmp_path / "a"), subdir=False, readonly=True, lock=False) as env:
        page_size = env.stat()["psize"]
        with env.begin(buffers=True) as reading, reading.cursor() as cursor:
            assert cursor.set_key(key)
            place = np.frombuffer(cursor.key(), np.uint8).__array_interface__["data"][0]
            low, high, flags, size = struct.unpack("=HHHH", ctypes.string_at(place - 8, 8))
            (page,) = struct.unpack("=Q", ctypes.string_at(place + len(key), 8))
    assert (low + (high << 16), size) == (len(value), len(key))
    assert flags == 1, "F_BIGDATA"
    start = page * page_size + 16
    assert (tmp_path / "a").read_bytes()[start : start + len(value)] == value


def test_submitit_writes_and_submits_a_script_that_can_be_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """launch/slurm: an executor with a command, a submission and an answer of its own."""
    import submitit
    from submitit.core import _submit, utils

    asked: list[str] = []
    script: list[str] = []

    class Executor(submitit.SlurmExecutor):  # type: ignore[misc]
        @property
        def _submitit_command_str(self) -> str:
            return "run_points here"

        def _make_submission_command(self, path: Path) -> list[str]:
            script.append(path.read_text())
            return ["echo", "Submitted batch job 12"]

        def _get_job_id_from_submission_command(self, answer: bytes | str) -> str:
            asked.append(super()._get_job_id_from_submission_command(answer))
            return asked[-1]

    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")  # there may be no srun
    executor: Any = Executor(tmp_path)
    executor.update_parameters(
        use_srun=False, setup=["source task.sh"], wckey=None, additional_parameters={"array": "0-1"}
    )
    executor.parameters["additional_parameters"]["output"] = "%A_%a_log.out"
    job = executor.submit(_task, 3)
    assert (job.job_id, asked) == ("12", ["12"])
    lines = script[0].splitlines()
    assert lines[-1] == "run_points here"
    assert lines.index("source task.sh") < len(lines) - 1
    assert {"#SBATCH --array=0-1", "#SBATCH --output=%A_%a_log.out"} <= set(lines)
    assert job.paths.submitted_pickle == tmp_path / "12_submitted.pkl"
    assert utils.JobPaths(tmp_path, "12_0").submitted_pickle == tmp_path / "12_0_submitted.pkl"
    assert (utils.JobPaths(tmp_path).stdout.name, utils.JobPaths(tmp_path).stderr.name) == (
        "%j_%t_log.out",
        "%j_%t_log.err",
    )
    main: Callable[[], None] = _submit.submitit_main  # python -m submitit.core._submit FOLDER
    assert callable(main)
    assert issubclass(utils.FailedSubmissionError, Exception)


def _task(number: int) -> int:
    return number
