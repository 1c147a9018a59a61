"""Sweeps over any setting: lists, series files, --dry-run, --fail-fast; and `launch list`."""

import re
from pathlib import Path

import pytest

from bip.errors import UserError
from launch.__main__ import main
from launch.grid import split_lists
from launch.plan import Plan, make_plan
from launch.sweep import Sweep
from tests.launch.conftest import DIGITS, FakeSweep, finish, plan_sweep, until
from tests.launch.fake_cluster import FakeCluster
from tests.launch.test_series import plan as plan_of_flags

TWO = ("--stages", "pretrain,prune")


def plan(*argv: str) -> Plan:
    from bip.cli import parse_flags
    from bip.config import RunConfig
    from launch.plan import SeriesOptions

    words, lists = split_lists(["--configs", str(DIGITS / "bip.yml"), *argv])
    return make_plan(parse_flags([SeriesOptions, RunConfig], words, "series", ""), 1, lists)


def settings(found: Plan, *keys: str) -> list[tuple[str, ...]]:
    return [
        tuple(str(getattr(run.config, key)) for key in keys)
        for run in found.runs
        if run.stage == "prune"
    ]


def test_lists_multiply_and_runs_share_what_they_do_not_change() -> None:
    found = plan("--mask-lr", "0.1,0.3", "--wd=1e-4,5e-4", "--seeds", "1-2,7", "--series", "0.5",
                 *TWO)  # fmt: skip
    assert len(set(settings(found, "mask_lr", "wd", "seed"))) == 12
    dense = [run for run in found.runs if run.stage == "pretrain"]
    assert len(dense) == 6, "mask_lr does not act in pretraining, wd and seed do"
    assert {tuple(run.swept) for run in dense} == {("wd",)}
    one = next(run for run in found.runs if run.stage == "prune")
    assert one.swept == {"mask_lr": "0.1", "wd": "0.0001"}
    by_id = {run.run_id: run for run in found.runs}
    for run in found.runs:
        assert all(by_id[need].config.wd == run.config.wd for need in run.needs)


def test_a_run_of_a_list_is_the_run_of_its_value_alone() -> None:
    swept = {run.run_id for run in plan("--lr", "0.1,0.01", "--series", "0.5", *TWO).runs}
    for lr in ("0.1", "0.01"):
        alone = plan_of_flags("--lr", lr, "--series", "0.5", *TWO).runs
        assert swept >= {run.run_id for run in alone}


def test_a_file_multiplies_its_grid_and_keeps_its_list_together(tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    path.write_text("grid: {k: [0.5, 0.1], seed: [3, 4]}\nlist:\n- {lr: 0.1, wd: 0}\n"
                    "- {lr: 1e-2, wd: 5e-4}\n")  # fmt: skip
    found = settings(plan("--series", str(path), *TWO), "seed", "lr", "wd", "k")
    pairs = [("0.1", "0.0"), ("0.01", "0.0005")]
    assert found == [
        (seed, lr, wd, k) for seed in ("3", "4") for lr, wd in pairs for k in ("0.5", "0.1")
    ]
    path.write_text("list: [{k: 0.5, lr: 0.1}, {k: 0.1, lr: 0.01}]")
    paired = settings(plan("--series", str(path), *TWO), "k", "lr")
    assert paired == [("0.5", "0.1"), ("0.1", "0.01")]


@pytest.mark.parametrize("name", ["gamma", "rates", "configs/series/gamma.yml"])
def test_a_shipped_series_is_found_by_its_name(name: str) -> None:
    assert len(settings(plan("--series", name, *TWO), "lr")) in (9, 12)


@pytest.mark.parametrize(
    ("argv", "file", "named"),
    [
        (["--lr", "0.1,0.10", "--series", "0.5"], "", "lr: 0.10 is given twice"),
        (["--lr", "0.1,x", "--series", "0.5"], "", "lr: 'x'"),
        (["--lr", "0.1,", "--series", "0.5"], "", "lr: ''"),
        (["--lr", "0.1,-1", "--series", "0.5"], "", "lr: '-1'"),
        (["--print-freq", "1,2", "--series", "0.5"], "", "print_freq: does not change results"),
        (["--budget", "100,200", "--series", "0.5"], "", "budget: cannot vary"),
        (["--k", "0.5,0.1", "--series", "0.5"], "", "series"),
        (["--seeds", "5-1", "--series", "0.5"], "", "seeds: 5-1 is no range"),
        (["--seeds", "1-3,2", "--series", "0.5"], "", "seeds: a value is given twice"),
        (["--acdc-phase", "0.1,0.2", "--series", "0.5"], "", "acdc_phase: no effect in any run"),
        (["--series", "FILE"], "grid: {lrr: [1]}", "unknown key 'lrr' (perhaps you meant lr)"),
        (["--series", "FILE"], "grid: {lr: 0.1}", "grid: must hold lists"),
        (["--series", "FILE"], "grid: {lr: []}", "grid: must hold lists"),
        (["--series", "FILE"], "list: [{lr: 1}, {wd: 1}]", "the same keys"),
        (["--series", "FILE"], "list: [3]", "list: must hold settings"),
        (["--series", "FILE"], "lr: [1]", "must hold grid"),
        (["--series", "FILE"], "{}", "must hold"),
        (["--series", "FILE"], "grid: {lr: [1]}\nlist: [{lr: 1}]", "in grid and in list"),
        (["--series", "FILE"], "list: [{lr: 0.1}, {lr: 0.1}]", "listed twice"),
        (["--series", "FILE"], "list: [{trainer: bip}]", "trainer: cannot be in list"),
        (["--series", "FILE"], "grid: {k: [0.5, 2]}", "series: 2 lies outside"),
        (["--series", "FILE", "--lr", "0.1"], "grid: {lr: [1]}", "lr: --series gives it too"),
        (["--series", "FILE", "--seeds", "1"], "grid: {seed: [1]}", "seed: --seeds gives it too"),
        (["--series", "/no.yml"], "", "/no.yml: cannot be read"),
    ],
)
def test_bad_lists_are_one_line_and_create_nothing(
    argv: list[str], file: str, named: str, fake: FakeSweep, capsys: pytest.CaptureFixture[str]
) -> None:
    path = fake.script.with_name("mine.yml")
    path.write_text(file)
    assert fake.series(*(str(path) if word == "FILE" else word for word in argv), *TWO) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert (out, line[:7]) == ("", "error: ")
    assert named in line
    assert not fake.results.exists()


def test_lists_are_taken_out_of_the_command_line_alone() -> None:
    line = ["--arch", "a,b", "--exp-name", "x,y", "--step-drops", "0.5,0.75", "--inv-gamma=0,1"]
    words, lists = split_lists([*line, "--lr"])
    assert words == ["--archs", *line[1:6], "--inv-gamma=0", "--lr"]
    assert lists == {"lr2": ["0", "1"]}


def test_the_ledger_keeps_what_was_swept(tmp_path: Path) -> None:
    place = ("--result-dir", str(tmp_path), "--exp-name", "x", "--series", "0.5", *TWO)
    swept, alone = plan("--lr", "0.1,0.01", *place), plan("--lr", "0.1", *place)
    sweep = Sweep(swept.folder)
    sweep.add(swept.runs)
    sweep.add(alone.runs)
    assert sorted(run.swept["lr"] for run in sweep.runs()) == ["0.01", "0.01", "0.1", "0.1"]


def test_a_dry_run_shows_scripts_and_cost_and_submits_nothing(
    cluster: FakeCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "mine.yml"
    profile.write_text("executor: slurm\nsignal_lead: 60\ntime: '1:30:00'\nnodes: 1\n")
    argv = ["series", "--configs", str(DIGITS / "bip.yml"), "--result-dir", str(tmp_path / "out")]
    argv += ["--exp-name", "hand", "--profile", str(profile), "--series", "0.5,0.1", *TWO]
    before = {path.name for path in cluster.folder.iterdir()}
    assert main([*argv, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "#SBATCH --array=0-1%2" in out
    assert "afterok:ARRAY1_0" in out
    assert out.count("#SBATCH --time=90") == 2
    assert "at most 4.5 node-hours" in out
    assert "disk: about" in out
    assert out.count("prune/digits_net") == 2
    made = {path.name for path in cluster.folder.iterdir()} - before
    assert not {name for name in made if name.startswith("script")}
    assert not (tmp_path / "out").exists()
    assert main([*argv, "--no-wait", "--no-snapshot"]) == 0
    script = cluster.script.read_text()
    shown = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert [
        line for line in shown if not re.search("dependency|comment", line) and line not in out
    ] == []


@pytest.mark.parametrize("stays", [True, False], ids=["launcher stays", "launcher is gone"])
def test_fail_fast_cancels_the_others(
    fake: FakeSweep, stays: bool, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    fake.hold.touch()
    monkeypatch.setenv("FAKE_FAIL", "0.5")
    series = ("--series", "0.5,0.4,0.3,0.2", "--stages", "prune", "--parallelism", "2")
    source = fake.script.with_name("dense.pth.tar")
    import torch

    from bip import models

    torch.save({"state_dict": models.build("digits_net", 10, 1).state_dict()}, source)
    words = [*series, "--source-net", str(source), "--fail-fast"]
    assert fake.series(*words, *([] if stays else ["--no-wait"])) == int(stays)
    until(lambda: sorted(fake.states()) == ["cancelled", "cancelled", "cancelled", "failed"])
    until(lambda: not Sweep(fake.folder).live_workers())
    assert ("fail_fast: prune k 0.5" in capsys.readouterr().out) == stays


def test_list_shows_every_sweep_below_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = plan_sweep(tmp_path / "a")
    finish(sweep, sweep.runs()[0].run_id)
    other = tmp_path / "b" / "deep" / "broken"
    other.mkdir(parents=True)
    (other / "series.json").write_text("{")
    assert main(["list", str(tmp_path)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(str(sweep.folder))
    assert first.endswith("3 runs: 2 waiting, 1 done")
    assert "not a readable ledger" in second
    assert main(["list", str(tmp_path / "none")]) == 2


def test_a_flag_after_the_list_is_no_value() -> None:
    with pytest.raises(UserError, match="lr"):
        plan("--lr", "--wd", "1,2", "--series", "0.5", *TWO)


def test_a_pattern_gives_the_k_of_its_runs() -> None:
    found = plan("--layer-type", "2:4", *TWO, "--seeds", "1-2")
    assert settings(found, "layer_type", "k", "seed") == [("2:4", "0.5", s) for s in "12"]
    found = plan("--layer-types", "1:4,2:4", *TWO)
    assert settings(found, "layer_type", "k") == [("1:4", "0.25"), ("2:4", "0.5")]
    found = plan("--layer-types", "unstructured,2:4", "--series", "0.5", *TWO)
    assert settings(found, "layer_type", "k") == [("unstructured", "0.5"), ("2:4", "0.5")]
    with pytest.raises(UserError, match=r"k: layer_type 2:4 keeps 0\.5, not 0\.1"):
        plan("--layer-type", "2:4", "--series", "0.5,0.1", *TWO)
    with pytest.raises(UserError, match="series: missing"):
        plan("--layer-types", "unstructured,2:4", *TWO)
