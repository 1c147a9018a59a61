"""The k series, the plan's product and chain, and bad input: one line, exit 2, nothing created."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bip import models
from bip.cli import parse_flags
from bip.config import RunConfig, load_config
from bip.errors import UserError
from bip.yaml_file import read_yaml
from launch.plan import Plan, PlannedRun, SeriesOptions, make_plan, parse_series
from launch.sweep import Sweep
from tests.launch.conftest import DIGITS, FakeSweep

PUBLISHED = (
    "0.8000 0.6400 0.5120 0.4100 0.3280 0.2620 0.2097 0.1678 0.1342 0.1074 0.0859 0.0687 0.0550 "
    "0.0440 0.0350 0.0280 0.0225 0.0180 0.0144 0.0115 0.0092"
)


def plan(*argv: str, configs: Path | str = DIGITS / "bip.yml", ranks: int = 1) -> Plan:
    line = ["--configs", str(configs), *argv]
    return make_plan(parse_flags([SeriesOptions, RunConfig], line, "series", ""), ranks)


def setting(file: str, key: str) -> Any:
    return float(read_yaml(DIGITS / file)[key])


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    path = tmp_path / "dense.pth.tar"
    torch.save(
        {"arch": "digits_net", "state_dict": models.build("digits_net", 10, 1).state_dict()}, path
    )
    return path


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("unstructured", PUBLISHED.split()),
        ("structured", ["0.9", "0.8", "0.7", "0.6", "0.5", "0.4", "0.3", "0.2", "0.1"]),
        ("0.1, 0.50,1", ["0.1", "0.50", "1"]),
    ],
)
def test_a_series_keeps_its_order_and_its_digits(text: str, values: list[str]) -> None:
    assert [format(k, "f") for k in parse_series(text)] == values


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("0.5,0.50", "0.50 is given twice"),
        ("0.5,0", "0 lies outside (0, 1]"),
        ("0.5,1.01", "1.01 lies outside"),
        ("-0.1", "-0.1 lies outside"),
        ("nan", "nan lies outside"),
        ("0.5,,0.1", "an empty value"),
        ("unstructred", "'unstructred' is not a number"),
    ],
)
def test_bad_series_names_the_value(text: str, named: str) -> None:
    with pytest.raises(UserError, match=rf"series: .*{re.escape(named)}"):
        parse_series(text)


def test_product_and_chain() -> None:
    """2 k x 2 seeds x 2 networks x 2 layer types; one pretraining per network and seed."""
    found = plan(
        *("--series", "0.5,0.1", "--seeds", "1,2", "--archs", "digits_net,resnet20s"),
        *("--layer-types", "unstructured,filter", "--stages", "pretrain,prune,finetune"),
        *("--result-dir", "/results", "--exp-name", "sweep"),
    )
    stages = [run.stage for run in found.runs]
    assert stages == ["pretrain"] * 4 + ["prune"] * 16 + ["finetune"] * 16
    by_id = {run.run_id: run for run in found.runs}
    assert len(by_id) == 36
    axes = set()
    for run in found.runs:
        config = run.config
        assert config.run_folder == Path("/results/sweep") / run.stage / run.run_id
        assert config.exp_mode == run.stage
        if run.stage == "pretrain":
            assert (run.needs, config.source_net) == ((), None)
            assert config.epochs == setting("pretrain.yml", "epochs")
            continue
        (need,) = run.needs
        source = by_id[need].config
        assert config.source_net == source.run_folder / "checkpoint" / "model_best.pth.tar"
        assert (source.arch, source.seed) == (config.arch, config.seed)
        if run.stage == "prune":  # always from the dense network, whatever the k before
            assert (source.exp_mode, config.trainer) == ("pretrain", "bilevel")
            axes.add((config.k, config.seed, config.arch, config.layer_type))
        else:
            assert source.exp_mode == "prune"
            assert (source.k, source.layer_type) == (config.k, config.layer_type)
            assert (config.trainer, run.trainer) == ("base", "bilevel")
    assert len(axes) == 16


def test_rounds_follow_one_another_from_large_to_small() -> None:
    found = plan(
        *("--series", "0.1,0.5,0.3", "--seeds", "1,2", "--trainers", "imp,omp"),
        *("--stages", "pretrain,prune,finetune"),
    )
    by_id = {run.run_id: run for run in found.runs}
    assert len(by_id) == 2 + 12 + 12
    seen: set[str] = set()
    for run in found.runs:
        assert seen.issuperset(run.needs)
        seen.add(run.run_id)
    for seed in (1, 2):
        mine = [r for r in found.runs if r.stage == "prune" and r.config.seed == seed]
        rounds = [run for run in mine if run.trainer == "imp"]
        assert [str(run.config.k) for run in rounds] == ["0.5", "0.3", "0.1"]
        assert [run.needs for run in rounds[1:]] == [(run.run_id,) for run in rounds[:-1]]
        assert by_id[rounds[0].needs[0]].stage == "pretrain"
        for run in [run for run in mine if run.trainer == "omp"]:
            assert run.needs == rounds[0].needs
    for run in found.runs[14:]:
        assert by_id[run.needs[0]].config.k == run.config.k


def test_rewound_weights_are_those_of_the_shared_dense_network() -> None:
    chain = ("--series", "0.5,0.1", "--stages", "pretrain,prune", "--rewind", "weights")
    imp = DIGITS / "imp.yml"
    dense, *rounds = plan(*chain, "--rewind-epoch", "2", configs=imp).runs
    assert {run.config.rewind_net for run in rounds} == {dense.config.rewind_model}
    assert dense.config.rewind_model.name == "model_rewind-2.pth.tar"
    later, *others = plan(*chain, "--rewind-epoch", "3", configs=imp).runs
    assert later.run_id == dense.run_id
    assert {run.run_id for run in rounds}.isdisjoint(run.run_id for run in others)
    with pytest.raises(UserError, match="rewind_epoch: missing"):
        plan(*chain, configs=imp)


def test_a_network_pruned_at_its_start_has_no_source(dense: Path) -> None:
    line = ("--series", "0.1", "--trainers", "snip,omp")
    snip, omp = plan(*line, "--source-net", str(dense)).runs
    assert (snip.config.source_net, snip.needs) == (None, ())
    assert omp.config.source_net == dense


def test_a_budget_is_shared_by_pruning_and_the_fine_tuning_that_needs_it() -> None:
    line = ("--series", "0.1", "--trainers", "bip,hydra,omp,synflow", "--budget", "601")
    chain = plan(*line, "--stages", "pretrain,prune,finetune").runs
    assert chain[0].config.epochs == setting("pretrain.yml", "epochs")
    spent = {(run.stage, run.trainer): run.config.budget for run in chain}
    assert spent == {
        ("pretrain", "base"): None,
        ("prune", "bilevel"): 601,
        ("prune", "base"): 300,
        ("prune", "omp"): 601,
        ("prune", "synflow"): 601,
        ("finetune", "base"): 300,
    }
    assert {run.config.budget for run in plan(*line, "--stages", "pretrain,prune").runs} == {
        None, 601,
    }  # fmt: skip
    (alone,) = plan("--budget", "7", configs=DIGITS / "pretrain.yml").runs
    assert alone.config.budget == 7
    with pytest.raises(UserError, match=r"budget: 100 .* synflow; give at least 101"):
        plan(*line[:-1], "100", "--stages", "pretrain,prune")


def test_single_stage_takes_the_files_own_mode_and_the_given_source(dense: Path) -> None:
    found = plan("--series", "unstructured", "--source-net", str(dense))
    assert [str(run.config.k) for run in found.runs] == PUBLISHED.split()
    assert {(p.stage, p.needs, p.config.source_net) for p in found.runs} == {("prune", (), dense)}
    (pretrain,) = plan(configs=DIGITS / "pretrain.yml").runs
    assert pretrain.stage == "pretrain"


def test_paths_in_a_plan_are_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    found = plan("--series", "0.1", "--stages", "pretrain,prune")
    assert found.folder == tmp_path / "trained_models" / "Digits_digits_net_BiP"
    assert {run.config.data_dir for run in found.runs} == {tmp_path / "data"}


CHAIN = ("--stages", "pretrain,prune,finetune")


def test_flags_reach_the_stages_where_they_act() -> None:
    def stages(*flags: str) -> dict[str, PlannedRun]:
        return {run.stage: run for run in plan("--series", "0.1", *CHAIN, *flags).runs}

    plain, tuned = stages(), stages("--epochs", "3", "--data-dir", "/x")
    assert {run.config.epochs for run in tuned.values()} == {3}
    assert {run.config.data_dir for run in tuned.values()} == {Path("/x")}
    for spelling in ("--mask-lr", "--mask_lr"):
        masked = stages(spelling, "0.7")
        assert masked["prune"].config.mask_lr == 0.7
        assert masked["prune"].run_id != plain["prune"].run_id
        assert masked["pretrain"].run_id == plain["pretrain"].run_id  # shared with the plain sweep
        assert masked["finetune"].config.mask_lr == plain["finetune"].config.mask_lr


def test_trainer_sweep_takes_each_trainers_file_and_names_it(dense: Path, tmp_path: Path) -> None:
    line = ("--series", "0.1", "--trainers", "bilevel,base", "--source-net", str(dense))
    found = plan(*line)
    methods = [(run.config.method.name, run.config.wd) for run in found.runs]
    assert methods == [("bip", setting("bip.yml", "wd")), ("hydra", setting("hydra.yml", "wd"))]
    assert methods[0][1] != methods[1][1]
    notes = zip(found.notes, ("bip", "hydra"), ("bip.yml", "hydra.yml"), strict=True)
    assert all(trainer in note and str(DIGITS / file) in note for note, trainer, file in notes)
    # One without a file of its own keeps the named one.
    shutil.copy(DIGITS / "bip.yml", tmp_path / "mine.yml")
    found = plan(*line, configs=tmp_path / "mine.yml")
    assert [run.config.method.name for run in found.runs] == ["bip", "hydra"]
    assert {run.config.wd for run in found.runs} == {setting("bip.yml", "wd")}
    assert all(str(tmp_path / "mine.yml") in note for note in found.notes)


def test_a_run_never_has_two_sources() -> None:
    """Whatever a RUN_ID covers, two runs of one folder must start from one network."""
    try:
        runs = plan("--series", "0.1", "--trainers", "bilevel,base", *CHAIN).runs
    except UserError as error:
        assert "would start from" in str(error)  # noqa: PT017
    else:
        finetunes = [run for run in runs if run.stage == "finetune"]
        assert len({run.run_id for run in finetunes}) == len({run.needs for run in finetunes}) == 2


def test_extreme_sparsity_without_finetune_warns_once(dense: Path) -> None:
    one_stage = ("--source-net", str(dense))
    for series, stages, count in (
        ("unstructured", one_stage, 1), ("unstructured", CHAIN, 0), ("0.01", one_stage, 0),
    ):  # fmt: skip
        warnings = plan("--series", series, *stages).warnings
        assert sum("fine-tune" in line for line in warnings) == count


def test_option_without_effect_warns(dense: Path) -> None:
    line = ("--series", "0.1", "--source-net", str(dense), "--mask-lr", "0.3")
    warnings = plan(*line, configs=DIGITS / "hydra.yml").warnings
    assert any(line.startswith("mask_lr: no effect") for line in warnings)


def test_budget_and_paths_of_a_file_are_read_as_those_of_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "bip.yml").write_text((DIGITS / "bip.yml").read_text() + "budget: 441\n")
    line = ("--series", "0.1", "--stages", "pretrain,prune", "--result-dir=~/runs")
    files = ("--pretrain-configs", str(DIGITS / "pretrain.yml"))
    _, prune = plan(*line, *files, configs=tmp_path / "bip.yml").runs
    assert prune.config.budget == 441
    assert prune.config.result_dir == tmp_path / "runs"
    (tmp_path / "bip.yml").write_text((DIGITS / "bip.yml").read_text() + "budget: many\n")
    with pytest.raises(UserError, match=r"budget: .*'many'"):
        plan(*line, *files, configs=tmp_path / "bip.yml")


def test_stage_files_can_be_named(tmp_path: Path) -> None:
    values = read_yaml(DIGITS / "pretrain.yml") | {"epochs": 4}
    (tmp_path / "other.yml").write_text(yaml.safe_dump(values))
    other = ("--pretrain-configs", str(tmp_path / "other.yml"))
    pretrain, _ = plan("--series", "0.1", "--stages", "pretrain,prune", *other).runs
    assert pretrain.config.epochs == 4


def test_batch_must_divide_by_the_ranks() -> None:
    with pytest.raises(UserError, match="batch_size: 64 does not divide by 3 ranks"):
        plan("--series", "0.1", "--stages", "pretrain,prune", ranks=3)


TWO = ["--stages", "pretrain,prune"]
BOTH, PRUNE = (["--series", "0.5,0.1", "--stages", one] for one in ("pretrain,prune", "prune"))


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "series: missing"),
        (["--series", "0.5"], "source_net: missing; give --source-net PATH, or --stages pretrain,"),
        (["--series", "0.5", "--source-net", "/nowhere.pth"], "source_net: no such file: /nowhere"),
        (["--series", "0.5,0.5", *TWO], "series: 0.5 is given twice"),
        (["--series", "2", *TWO], "series: 2 lies outside"),
        (["--seris", "0.5", *TWO], "Perhaps you meant: --series"),
        (["--series", "0.5", "--k", "0.1", *TWO], "k: --series gives it too"),
        (["--series", "0.5", "--seeds", "1,1", *TWO], "seeds: 1 is given twice"),
        (["--series", "0.5", "--seeds", "1,01", *TWO], "seeds: a value is given twice"),
        (["--series", "0.5", "--seeds", "one", *TWO], "seeds: 'one' is not a whole number"),
        (["--series", "0.5", "--seeds", "-1", *TWO], "seed: "),
        (["--series", "0.5", "--layer-types", "filtre", *TWO], "layer_type: "),
        (["--series", "0.5", "--trainers", "bipp", *TWO], "trainer: "),
        (["--series", "0.5", "--archs", "digits_net,resnet21s", *TWO], "'resnet21s'"),
        (["--series", "0.5", "--lr", "-1", *TWO], "lr: "),
        (["--series", "0.5", "--stages", "prune,pretrain"], "stages: prune,pretrain is out of"),
        (["--series", "0.5", "--stages", "pretrain,pune"], "stages: unknown stage 'pune'"),
        (["--series", "0.5", "--stages", "pretrain,finetune"], "finetune takes a pruned network"),
        (["--series", "0.5", "--stages", "finetune"], "exp_mode is prune, but --configs must name"),
        (["--series", "0.5", *TWO, "--source-net", "/x"], "source_net: comes from the pretrain"),
        (["--series", "0.5", *TWO, "--resume", "/x"], "resume: a series starts and resumes"),
        (["--series", "0.5", *TWO, "--pretrain-configs", "/no.yml"], "/no.yml: cannot be read"),
        (["--series", "0.5", *TWO, "--profile", "/no.yml"], "profile: no such file: /no.yml"),
        (["--series", "0.5", *TWO, "--parallelism", "0"], "parallelism: must be at least 1"),
        # What would fail in every run
        ([*PRUNE, "--source-net", "DENSE", "--archs", "resnet20s"],
         "it fits digits_net"),
        ([*PRUNE, "--source-net", "TEXT"], "not a readable checkpoint"),
        ([*BOTH, "--batch-size", "5000"], "batch_size: 5000 is more than the 1437 images"),
        ([*BOTH, "--holdout", "5000"], "holdout: 5000 of the 1437"),
        ([*BOTH, "--num-classes", "11"], "num_classes: 11, but Digits"),
        ([*BOTH, "--loader", "lmdb"], "loader: lmdb does not apply to Digits"),
        ([*BOTH, "--dataset", "CIFAR10", "--data-dir", "/nowhere"], "data_dir: /nowhere does not"),
        ([*BOTH, "--dataset", "CIFAR10", "--archs", "torchvision/vit_b_16",
          "--image-dim", "32"],
         "image_dim: 'torchvision/vit_b_16' cannot take 32x32 images"),
        ([*BOTH, "--dataset", "CIFAR10", "--archs", "torchvision/mobilenet_v2",
          "--image-dim", "32", "--layer-types", "channel"],
         "layer_type: channel cannot prune the grouped convolution"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_creates_nothing(
    argv: list[str], named: str, fake: FakeSweep, dense: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "text").write_text("no checkpoint")
    places = {"DENSE": str(dense), "TEXT": str(tmp_path / "text")}
    assert fake.series(*(places.get(word, word) for word in argv)) == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert (out, line[:7]) == ("", "error: ")
    assert named in line
    assert not fake.results.exists()


def test_one_source_cannot_serve_several_pruned_networks(dense: Path) -> None:
    with pytest.raises(UserError, match=r"source_net: .*--stages prune,finetune"):
        plan(*("--series", "0.5,0.1", "--source-net", str(dense)), configs=DIGITS / "finetune.yml")
    with pytest.raises(UserError, match=r"source_net: .*--archs"):
        plan("--series", "0.5", "--source-net", str(dense), "--archs", "digits_net,resnet20s")


def test_configurations_of_runs_load_as_they_were_planned(tmp_path: Path, dense: Path) -> None:
    """From the ledger's files, by `bip train`."""
    line = ("--series", "0.5,0.0092", "--source-net", str(dense), "--result-dir", str(tmp_path))
    found = plan(*line)
    Sweep(found.folder).add(found.runs)
    for run in found.runs:
        path = found.folder / "points" / f"{run.run_id}.yml"
        read = load_config(["--configs", str(path)])
        assert read.run_id == run.run_id
        one, other = (c.model_copy(update={"configs": None}) for c in (read, run.config))
        assert one == other
