"""Which arrays a sweep becomes, their chains and throttles, the profile, and SLURM's answers."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bip.errors import UserError
from launch.profile import SlurmProfile, load_profile
from launch.slurm import client as slurm
from launch.slurm.arrays import sbatch_parameters
from launch.slurm.chain import Array, plan_arrays
from launch.slurm.snapshot import snapshot
from launch.sweep import Run, Sweep
from tests.launch.conftest import ROOT

PROFILES = ROOT / "slurm" / "profiles"


def record(run_id: str, stage: str, *needs: str) -> Run:
    fixed = {"k": "0.5", "seed": 1, "arch": "a", "layer_type": "unstructured", "trainer": "base"}
    return Run(run_id=run_id, stage=stage, folder="", config="", needs=list(needs), **fixed)  # type: ignore[arg-type]


def sweep_of(values: int, seeds: int = 1) -> list[Run]:
    """pretrain -> prune -> finetune for each seed and value."""
    found = [record(f"d{seed}", "pretrain") for seed in range(seeds)]
    for seed in range(seeds):
        found += [record(f"p{seed}.{v}", "prune", f"d{seed}") for v in range(values)]
    for seed in range(seeds):
        found += [record(f"f{seed}.{v}", "finetune", f"p{seed}.{v}") for v in range(values)]
    return found


def number(arrays: list[Array]) -> list[Array]:
    for at, array in enumerate(arrays):
        array.job = str(100 + at)
    return arrays


def test_a_chain_of_three_arrays() -> None:
    records = sweep_of(21)
    arrays = number(plan_arrays(records, {r.run_id for r in records}, (), {}, 4))
    assert [(a.stage, len(a.tasks), a.parallelism, a.dependency) for a in arrays] == [
        ("pretrain", 1, 4, ""),
        ("prune", 21, 4, "afterok:100_0"),
        ("finetune", 21, 4, "aftercorr:101"),
    ]
    pairs = zip(arrays[1].tasks, arrays[2].tasks, strict=True)
    assert all(prune[0][1:] == finetune[0][1:] for prune, finetune in pairs)


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
def test_every_plan_runs_each_missing_point_once_after_its_needs(
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
    for at, one in enumerate(sweep_of(values, seeds)):
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


def test_tasks_wait_for_their_own_need_where_an_earlier_stage_has_more() -> None:
    """Two series in one folder, the first without fine-tuning."""
    records = [r for r in sweep_of(1, seeds=2) if r.run_id != "f0.0"]
    arrays = number(plan_arrays(records, {r.run_id for r in records}, (), {}, 4))
    assert [(a.tasks, a.dependency) for a in arrays] == [
        ([["d1"], ["d0"]], ""),
        ([["p1.0"], ["p0.0"]], "aftercorr:100"),
        ([["f1.0"]], "aftercorr:101"),
    ]


def test_seeds_do_not_wait_for_one_another() -> None:
    """One pretraining that fails takes only its own pruning with it."""
    records = sweep_of(3, seeds=2)
    arrays = number(plan_arrays(records, {r.run_id for r in records}, (), {}, 5))
    assert [(a.stage, len(a.tasks), a.parallelism, a.dependency) for a in arrays] == [
        ("pretrain", 2, 5, ""),
        ("prune", 3, 3, "afterok:100_0"),
        ("prune", 3, 2, "afterok:100_1"),
        ("finetune", 3, 3, "aftercorr:101"),
        ("finetune", 3, 2, "aftercorr:102"),
    ]


def rounds_of(count: int, seeds: int = 1, finetune: bool = False) -> list[Run]:
    """pretrain -> round 0 -> round 1 ... for each seed, beside two runs that need no round."""
    found = [record(f"d{seed}", "pretrain") for seed in range(seeds)]
    for seed in range(seeds):
        found += [record(f"o{seed}.{v}", "prune", f"d{seed}") for v in range(2)]
        before = f"d{seed}"
        for at in range(count):
            found.append(record(f"r{seed}.{at}", "prune", before))
            before = f"r{seed}.{at}"
    if finetune:
        names = [run.run_id for run in found if run.run_id[0] == "r"]
        found += [record(f"f{name}", "finetune", name) for name in names]
    return found


def test_each_round_is_an_array_that_waits_for_the_one_before() -> None:
    records = rounds_of(4)
    arrays = number(plan_arrays(records, {r.run_id for r in records}, (), {}, 3))
    assert [(a.tasks, a.parallelism, a.dependency) for a in arrays] == [
        ([["d0"]], 3, ""),
        ([["o0.0"], ["o0.1"]], 2, "afterok:100_0"),
        ([["r0.0"]], 1, "afterok:100_0"),
        ([["r0.1"]], 1, "aftercorr:102"),
        ([["r0.2"]], 1, "aftercorr:103"),
        ([["r0.3"]], 1, "aftercorr:104"),
    ]


def test_rounds_of_several_seeds_share_arrays_where_the_dense_networks_are_done() -> None:
    records = [run for run in rounds_of(3, seeds=3, finetune=True) if run.run_id[0] != "o"]
    dense = ["d0", "d1", "d2"]
    arrays = number(plan_arrays(records, {r.run_id for r in records}, dense, {}, 2))
    assert [([t[0] for t in a.tasks], a.dependency) for a in arrays[:3]] == [
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


def test_points_in_the_queue_are_waited_for_not_submitted_again() -> None:
    records = sweep_of(2)
    queued = {"d0": "7_0", "p0.0": "8_0"}
    arrays = plan_arrays(records, {r.run_id for r in records}, (), queued, 2)
    assert [a.tasks for a in arrays] == [[["p0.1"]], [["f0.1"]], [["f0.0"]]]
    assert [a.dependency for a in number(arrays)] == ["afterok:7_0", "aftercorr:100", "afterok:8_0"]


def test_a_need_that_nobody_runs_is_an_error() -> None:
    with pytest.raises(UserError, match=r"p0\.1 needs d0, which is neither done nor submitted"):
        plan_arrays(sweep_of(2), {"p0.1"}, (), {}, 2)


@pytest.mark.parametrize("name", ["dev", "gpu", "preemptible", "container"])
def test_profiles_load(name: str) -> None:
    assert isinstance(load_profile(PROFILES / f"{name}.yml"), SlurmProfile)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("sbatch: {time: 1}\npartition: a\npartition: b", "key 'partition' is written twice"),
        ("time: soon", "time: must be minutes"),
        ("time: 1-", "time: must be minutes"),
        ("time: 1:2:3:4", "time: must be minutes"),
        ("time: '0'", "time: Input should be greater than or equal to 1"),
        ("sbatch: {partition: x}", "sbatch: partition is a key of the profile"),
        ("sbatch: {array: 0-3}", "sbatch: array is set by the launcher"),
        ("sbatch: {ntasks: 3}", "sbatch: ntasks is set by the launcher"),
        ("srun_args: [--label, --kill-on-bad=0]", "srun_args: --kill-on-bad is set by the"),
        ("srun_args: [-N2]", "srun_args: -N2 is set by the launcher"),
        ("srun_args: [--output, x]", "srun_args: --output is set by the launcher"),
        ("srun_args: [--export=NONE]", "srun_args: --export is set by the launcher"),
        ("srun_args: [--export, ALLES]", "srun_args: --export is set by the launcher"),
        ("env: {NCCL-DEBUG: WARN}", "env: 'NCCL-DEBUG' is no name of a shell variable"),
        ('python: "it\'s"', "python: No closing quotation"),
        ("gpus_per_node: 1\nntasks_per_node: 2", "gpus_per_node: 1 GPUs for 2 ranks"),
        ("partion: x", "unknown key 'partion' (perhaps you meant partition)"),
        ("signal_lead: 4000", "signal_lead: 4000 s is not less than the time limit"),
        ("retries: {bug: 3}", "unknown key 'retries.bug'"),
    ],
)
def test_profile_errors_name_the_key(text: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yml"
    path.write_text(f"executor: slurm\n{text}\n")
    with pytest.raises(UserError) as error:
        load_profile(path)
    assert f"{path}: {named}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        (90, 90), ("90", 90), ("30:00", 30), ("0:30", 1), ("30:61", 32), ("1:30:00", 90),
        ("00:00:30", 1), ("1-2", 1560), ("1-2:3", 1563), ("1-2:3:4", 1564), ("0-0:0:1", 1),
    ],
)  # fmt: skip
def test_time_limits_are_read_as_sbatch_reads_them(text: int | str, minutes: int) -> None:
    assert SlurmProfile(executor="slurm", time=text, signal_lead=0).time == minutes  # type: ignore[arg-type]


def test_other_arguments_of_srun_are_the_users() -> None:
    words = ["--container-image=/x", "--nodelist=n1", "-l", "--cpu-bind=none", "--mpi", "none"]
    words += ["--export=ALL,PATH=/nowhere", "--export", "ALL", "--exp=ALL"]
    assert SlurmProfile(executor="slurm", srun_args=words).srun_args == words


def test_a_node_may_be_asked_for_with_more_gpus_than_ranks() -> None:
    assert SlurmProfile(executor="slurm", gpus_per_node=4).gpus_per_node == 4


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("2:30:00", 150), ("12:00:00", 720), ("1-00:00:00", 1440), ("150:00", 150), ("90", 90)],
)
def test_times_need_no_quotes(text: str, minutes: int, tmp_path: Path) -> None:
    """YAML 1.1 reads 2:30:00 as 9000, a number to the base 60."""
    path = tmp_path / "p.yml"
    path.write_text(f"executor: slurm\ntime: {text}\nenv: {{CLOCK: 1:30}}\n")
    profile = load_profile(path)
    assert isinstance(profile, SlurmProfile)
    assert (profile.time, profile.env) == (minutes, {"CLOCK": "1:30"})


def test_what_sbatch_is_told(tmp_path: Path) -> None:
    profile = SlurmProfile(
        executor="slurm", partition="low", ntasks_per_node=2, gpus_per_node=2, mem="4G",
        signal_lead=45,
        sbatch={"reservation": "r", "exclusive": False}, env={"NAME": "two words"},
        setup=["module load x"],
    )  # fmt: skip
    array = Array("prune", [["a"], ["b"]], parallelism=2, after=["5_0"])
    told = sbatch_parameters(Sweep(tmp_path / "s"), profile, array, tmp_path, "now", tmp_path)
    assert told["additional_parameters"] == {
        "array": "0-1%2", "requeue": True, "open-mode": "append", "signal": "USR2@45",
        "reservation": "r", "mem": "4G", "dependency": "afterok:5_0", "kill-on-invalid-dep": "yes",
    }  # fmt: skip
    assert (told["gpus_per_node"], told["job_name"]) == (2, "s")
    assert told["setup"][1] == "export NAME='two words'"
    assert told["setup"][3:5] == ["module load x", "trap - ERR"]


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
