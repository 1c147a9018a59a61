"""Which arrays a sweep becomes, their chains and throttles, and what sbatch gets of them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bip.errors import UserError
from launch.profile import SlurmProfile
from launch.slurm import client as slurm
from launch.slurm.arrays import sbatch_parameters
from launch.slurm.chain import Array, plan_arrays
from launch.slurm.snapshot import snapshot
from launch.sweep import Run, Sweep
from tests.launch.conftest import run_of, runs_of


def chains(
    runs: list[Run], parallelism: int, queued: dict[str, str] | None = None
) -> list[tuple[str, list[str], int, str]]:
    """(stage, tasks, at once, dependency) of each array; the first one is job 100."""
    arrays = plan_arrays(runs, {run.run_id for run in runs}, (), queued or {}, parallelism)
    for at, array in enumerate(arrays):
        array.job = str(100 + at)
    tasks = [[" ".join(task) for task in array.tasks] for array in arrays]
    return [(a.stage, t, a.parallelism, a.dependency) for a, t in zip(arrays, tasks, strict=True)]


def rounds_of(count: int, seeds: int = 1, finetune: bool = False) -> list[Run]:
    """pretrain -> round 0 -> round 1 ... for each seed, beside two runs that need no round."""
    found = [run_of(f"d{seed}", "pretrain") for seed in range(seeds)]
    for seed in range(seeds):
        found += [run_of(f"o{seed}.{v}", "prune", f"d{seed}") for v in range(2)]
        before = f"d{seed}"
        for at in range(count):
            found.append(run_of(f"r{seed}.{at}", "prune", before))
            before = f"r{seed}.{at}"
    if finetune:
        names = [run.run_id for run in found if run.run_id[0] == "r"]
        found += [run_of(f"f{name}", "finetune", name) for name in names]
    return found


@pytest.mark.parametrize(
    ("runs", "parallelism", "queued", "expected"),
    [
        pytest.param(
            runs_of(3), 4, {},
            [
                ("pretrain", ["d0"], 4, ""),
                ("prune", ["p0.0", "p0.1", "p0.2"], 4, "afterok:100_0"),
                ("finetune", ["f0.0", "f0.1", "f0.2"], 4, "aftercorr:101"),
            ],
            id="a chain of three arrays",
        ),
        pytest.param(
            [run for run in runs_of(1, seeds=2) if run.run_id != "f0.0"], 4, {},
            [
                ("pretrain", ["d1", "d0"], 4, ""),
                ("prune", ["p1.0", "p0.0"], 4, "aftercorr:100"),
                ("finetune", ["f1.0"], 4, "aftercorr:101"),
            ],
            id="two series in one folder, the first without fine-tuning",
        ),
        pytest.param(
            runs_of(2, seeds=2), 5, {},
            [
                ("pretrain", ["d0", "d1"], 5, ""),
                ("prune", ["p0.0", "p0.1"], 3, "afterok:100_0"),
                ("prune", ["p1.0", "p1.1"], 2, "afterok:100_1"),
                ("finetune", ["f0.0", "f0.1"], 3, "aftercorr:101"),
                ("finetune", ["f1.0", "f1.1"], 2, "aftercorr:102"),
            ],
            id="a pretraining that fails takes only its own pruning with it",
        ),
        pytest.param(
            runs_of(2), 2, {"d0": "7_0", "p0.0": "8_0"},
            [
                ("prune", ["p0.1"], 2, "afterok:7_0"),
                ("finetune", ["f0.1"], 1, "aftercorr:100"),
                ("finetune", ["f0.0"], 1, "afterok:8_0"),
            ],
            id="runs in the queue are waited for, not submitted again",
        ),
        pytest.param(
            rounds_of(4), 3, {},
            [
                ("pretrain", ["d0"], 3, ""),
                ("prune", ["o0.0", "o0.1"], 2, "afterok:100_0"),
                ("prune", ["r0.0"], 1, "afterok:100_0"),
                *(("prune", [f"r0.{at}"], 1, f"aftercorr:{101 + at}") for at in (1, 2, 3)),
            ],
            id="each round waits for the one before",
        ),
    ],
)  # fmt: skip
def test_chains(
    runs: list[Run], parallelism: int, queued: dict[str, str], expected: list[object]
) -> None:
    assert chains(runs, parallelism, queued) == expected


@given(
    values=st.integers(1, 12),
    seeds=st.integers(1, 3),
    per_task=st.integers(1, 4),
    size=st.integers(1, 9),
    parallelism=st.integers(1, 6),
    done=st.sets(st.integers(0, 40)),
    dropped=st.sets(st.integers(0, 80)),
    going=st.sets(st.integers(0, 80)),
)
def test_every_plan_runs_each_missing_run_once_after_its_needs(
    values: int,
    seeds: int,
    per_task: int,
    size: int,
    parallelism: int,
    done: set[int],
    dropped: set[int],
    going: set[int],
) -> None:
    """Of any sweep, also one of several commands, whose stages are no full product."""
    records: list[Run] = []
    for at, one in enumerate(runs_of(values, seeds)):
        if at not in dropped and {r.run_id for r in records}.issuperset(one.needs):
            records.append(one)
    by_name = {r.run_id: r for r in records}
    # What is done has its needs done.
    finished: set[str] = set()
    for at, one in enumerate(records):
        if at in done and finished.issuperset(one.needs):
            finished.add(one.run_id)
    queued = {
        one.run_id: f"{one.stage}_{at}"
        for at, one in enumerate(records)
        if at in going and one.run_id not in finished
    }
    arrays = plan_arrays(records, by_name, finished, queued, parallelism, per_task, size)
    placed = [name for array in arrays for task in array.tasks for name in task]
    assert sorted(placed) == sorted(set(by_name) - finished - set(queued))
    before: list[Array] = []
    for array in arrays:
        assert len(array.tasks) <= size
        assert all(0 < len(task) <= per_task for task in array.tasks)
        for index, task in enumerate(array.tasks):
            for need in {n for name in task for n in by_name[name].needs} - finished:
                same_index = array.corr is not None and need in array.corr.tasks[index]
                waits_for = {one if isinstance(one, str) else one[1] for one in array.after}
                assert same_index or {need, queued.get(need)} & waits_for
            for one in array.after:  # for nothing else
                needs = by_name[task[0]].needs
                assert one in map(queued.get, needs) if isinstance(one, str) else one[1] in needs
        waits = [array.corr, array.throttled_by, *array.after]
        before_it = [wait[0] if isinstance(wait, tuple) else wait for wait in waits]
        assert all(any(w is b for b in before) for w in before_it if isinstance(w, Array))
        before.append(array)
    for stage in ("pretrain", "prune", "finetune"):
        mine = [array for array in arrays if array.stage == stage]
        first = [array for array in mine if array.throttled_by is None]
        assert sum(array.parallelism for array in first) == (parallelism if mine else 0)


def test_rounds_of_several_seeds_share_arrays_where_the_dense_networks_are_done() -> None:
    runs = [run for run in rounds_of(3, seeds=3, finetune=True) if run.run_id[0] != "o"]
    arrays = plan_arrays(runs, {run.run_id for run in runs}, ["d0", "d1", "d2"], {}, 2)
    for at, array in enumerate(arrays):
        array.job = str(100 + at)
    assert [([task[0] for task in a.tasks], a.dependency) for a in arrays[:3]] == [
        (["r0.0", "r1.0", "r2.0"], ""),
        (["r0.1", "r1.1", "r2.1"], "aftercorr:100,afterany:100"),  # two at once, of three
        (["r0.2", "r1.2", "r2.2"], "aftercorr:101,afterany:101"),
    ]
    assert [a.corr for a in arrays[3:]] == arrays[:3]


@given(
    rounds=st.integers(1, 5),
    seeds=st.integers(1, 3),
    per_task=st.integers(1, 3),
    size=st.integers(1, 4),
    parallelism=st.integers(1, 4),
    done=st.lists(st.integers(0, 5), min_size=3, max_size=3),
    finetune=st.booleans(),
)
def test_every_round_waits_for_its_need_and_no_stage_runs_too_much_at_once(
    rounds: int,
    seeds: int,
    per_task: int,
    size: int,
    parallelism: int,
    done: list[int],
    finetune: bool,
) -> None:
    records = rounds_of(rounds, seeds, finetune)
    finished = {f"r{seed}.{at}" for seed in range(seeds) for at in range(done[seed])}
    finished |= {f"d{seed}" for seed in range(seeds) if done[seed]}
    finished &= {run.run_id for run in records}
    arrays = plan_arrays(
        records, {r.run_id for r in records}, finished, {}, parallelism, per_task, size
    )
    place = {name: a for a in arrays for task in a.tasks for name in task}
    assert sorted(place) == sorted({run.run_id for run in records} - finished)
    for run in records:
        for need in {*run.needs} - finished if run.run_id in place else ():
            array = place[run.run_id]
            index = next(i for i, task in enumerate(array.tasks) if run.run_id in task)
            same_index = array.corr is not None and need in array.corr.tasks[index]
            assert same_index or (place[need], need) in array.after
            assert arrays.index(place[need]) < arrays.index(array)
    first = [a for a in arrays if a.stage == "prune" and a.throttled_by is None]
    heads = [a for a in first if a.corr is None or a.corr.stage != "prune"]
    if heads:
        assert sum(a.parallelism for a in heads) == parallelism


def test_a_need_that_nobody_runs_is_an_error() -> None:
    with pytest.raises(UserError, match=r"p0\.1 needs d0"):
        plan_arrays(runs_of(2), {"p0.1"}, (), {}, 2)


def test_what_sbatch_gets(tmp_path: Path) -> None:
    profile = SlurmProfile(
        executor="slurm", partition="low", ntasks_per_node=2, gpus_per_node=2, mem="4G",
        signal_lead=45,
        sbatch={"reservation": "r", "exclusive": False}, env={"NAME": "two words"},
        setup=["module load x"],
    )  # fmt: skip
    array = Array("prune", [["a"], ["b"]], parallelism=2, after=["5_0"])
    got = sbatch_parameters(Sweep(tmp_path / "s"), profile, array, tmp_path, "now", tmp_path)
    assert got["additional_parameters"] == {
        "array": "0-1%2", "requeue": True, "open-mode": "append", "signal": "USR2@45",
        "reservation": "r", "mem": "4G", "dependency": "afterok:5_0", "kill-on-invalid-dep": "yes",
    }  # fmt: skip
    assert (got["gpus_per_node"], got["job_name"]) == (2, "s")
    assert got["setup"][1] == "export NAME='two words'"
    assert got["setup"][3:5] == ["module load x", "trap - ERR"]


def test_the_name_of_a_task_is_never_the_bare_id_of_its_array() -> None:
    env = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
    assert slurm.own_task(env) == "7_0"
    assert slurm.own_task({"SLURM_JOB_ID": "7"}) == "7"
    assert slurm.own_task({}) is None


def test_answers_of_slurm() -> None:
    line = "JobId=3 JobState=RUNNING Restarts=2 EndTime=2026-01-02T03:04:05 PreemptTime=None A=b"
    task = slurm.Task.parse(line)
    assert (task.state, task.restarts, task.preempted) == ("RUNNING", 2, False)
    assert slurm.Task.parse(
        line.replace("PreemptTime=None", "PreemptTime=2026-01-02T03:04:00")
    ).preempted
    assert slurm.seconds_of("1-02:03:04") == 93784
    assert slurm.seconds_of("3:04") == 184


def test_snapshot_is_kept_once_per_content(tmp_path: Path) -> None:
    root = tmp_path / "project"
    (root / "bip").mkdir(parents=True)
    (root / "slurm" / "profiles").mkdir(parents=True)
    (root / "bip" / "a.py").write_text("1")
    (root / "slurm" / "task.sh").write_text("x")
    (root / "slurm" / "profiles" / "local.yml").write_text("y")
    one = snapshot(tmp_path / "code", root)
    assert (one / "bip" / "a.py").read_text() == "1"
    assert snapshot(tmp_path / "code", root) == one
    (root / "bip" / "a.py").write_text("2")
    other = snapshot(tmp_path / "code", root)
    assert other != one
    assert (one / "bip" / "a.py").read_text() == "1"
