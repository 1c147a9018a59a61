"""The harness itself: it finds failures, and does not hang."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from bip import errors
from bip.distributed.group import Group, join
from bip.distributed.preemption import StopRequest
from bip.errors import Stopped, UserError
from tests.distributed.harness import RankError, run_ranks, world_size


@world_size(1, 2, 3, 4)
def test_collectives(group: Group, tmp_path: Path) -> None:
    assert isinstance(tmp_path, Path)
    total = group.sum_(torch.tensor([group.rank + 1.0]))
    assert total.item() == group.world * (group.world + 1) / 2
    assert group.broadcast_(torch.tensor([group.rank])).item() == 0
    assert group.from_first({"rank": group.rank}) == {"rank": 0}
    with group.together():
        pass


def ranks(group: Group) -> tuple[int, int]:
    return group.rank, os.getpid()


def test_results_come_in_rank_order_from_processes_of_their_own() -> None:
    results = run_ranks(3, ranks)
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert len({pid for _, pid in results} | {os.getpid()}) == 4


def fail_on_one(group: Group) -> None:
    assert group.rank != 1, "not on this one"
    group.barrier()


def end_on_one(group: Group) -> None:
    if group.rank == 1:
        os._exit(3)
    group.barrier()


def sleep_on_one(group: Group) -> None:
    time.sleep(1000 * group.rank)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (fail_on_one, "not on this one"),
        (end_on_one, "rank 1 of 2: ended with code 3"),
        (sleep_on_one, r"ranks \[1\]"),
    ],
)
def test_a_failing_rank_fails_the_test(body, what) -> None:  # type: ignore[no-untyped-def]
    began = time.monotonic()
    with pytest.raises(RankError, match=what):
        run_ranks(2, body, timeout=3)
    assert time.monotonic() - began < 20


def meet_as_under_srun(folder: Path) -> tuple[int, list[Path]]:
    env = {
        "SLURM_PROCID": os.environ["RANK"], "SLURM_LOCALID": os.environ["RANK"],
        "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "3",
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0",
    }  # fmt: skip
    group = join(folder, env)
    total = int(group.sum_(torch.tensor([group.rank + 1])))
    left = list(folder.iterdir())
    group.close()
    return total, left


def test_ranks_of_an_srun_step_meet_and_leave_nothing(tmp_path: Path) -> None:
    """Twice under the same numbers, as after a cluster's restart."""
    for _ in range(2):
        assert run_ranks(3, meet_as_under_srun, tmp_path, join=False) == [(6, [])] * 3


def leave_while_meeting(folder: Path) -> str:
    """Rank 0 is told to stop before rank 2 comes; rank 1 a second later."""
    rank = int(os.environ["RANK"])
    if rank == 2:
        return "never came"
    env = {
        "SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
        "SLURM_STEP_TASKS_PER_NODE": "3", "SLURMD_NODENAME_ADDR": "127.0.0.1",
    }  # fmt: skip
    stop = StopRequest()
    threading.Timer(1.0 + rank, lambda: setattr(stop, "signal", signal.SIGTERM)).start()
    try:
        join(folder, env, stop=stop)
    except Stopped as stopped:
        return str(stopped)
    return "joined"


def test_a_signal_while_the_ranks_meet_stops_them_all(tmp_path: Path) -> None:
    told = run_ranks(3, leave_while_meeting, tmp_path, join=False)
    assert told == [told[0], told[0], "never came"]
    assert told[0].startswith("stopped by SIGTERM at step 0")


def problem_on_last(group: Group) -> str:
    try:
        with group.together():
            if group.rank == group.world - 1:
                raise UserError("data_dir: not here")
    except UserError as error:
        return str(error)
    return "none"


def bug_on_last(group: Group) -> str:
    try:
        with group.together():
            if group.rank == group.world - 1:
                raise KeyError("a bug")
    except (KeyError, errors.RankError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def bug_in_the_answer(group: Group) -> str:
    def call() -> None:
        raise KeyError("a bug")

    try:
        group.ask_first(call)
    except (KeyError, errors.RankError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def test_a_bug_in_the_answer_of_rank_0_leaves_nobody_waiting() -> None:
    own, *others = run_ranks(3, bug_in_the_answer)
    assert own == "KeyError: 'a bug'"
    assert others == ["RankError: KeyError: 'a bug' (rank 0)"] * 2


def problem_on_first(group: Group) -> str:
    def call() -> int:
        if group.rank:
            raise AssertionError("only rank 0 is asked")
        if not answers:
            raise UserError("result.json: damaged")
        return answers.pop()

    answers = [7]
    assert group.ask_first(call) == 7
    answers.clear()
    try:
        group.ask_first(call)
    except UserError as error:
        return str(error)
    return "none"


def test_what_only_rank_0_finds_out_is_every_ranks() -> None:
    assert run_ranks(2, problem_on_first) == ["result.json: damaged"] * 2


def test_one_ranks_bug_is_told_to_the_others() -> None:
    told, other, own = run_ranks(3, bug_on_last)
    assert told == other == "RankError: KeyError: 'a bug' (rank 2)"
    assert own == "KeyError: 'a bug'"


def test_one_ranks_problem_is_every_ranks() -> None:
    results = run_ranks(3, problem_on_last)
    assert results == ["data_dir: not here (rank 2)"] * 3
