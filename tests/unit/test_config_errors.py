"""Bad input: exit code 2, one line that names the culprit, nothing created."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from bip.__main__ import main
from bip.config import RunConfig, load_config
from tests.runs import CONFIGS, Finished, arguments, flags, train


class Refuse:
    """`refuse(argv, *words)` runs the command; its one line of error must hold every word."""

    def __init__(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.tmp_path, self.capsys = tmp_path, capsys

    def __call__(self, argv: list[str], *words: str) -> str:
        before = sorted(self.tmp_path.rglob("*"))
        self.capsys.readouterr()
        assert main(argv) == 2
        error = self.capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert error.endswith("\n")
        assert "Traceback" not in error
        for word in words:
            assert word in error, error
        assert sorted(self.tmp_path.rglob("*")) == before, "nothing is created"
        return error


@pytest.fixture
def refuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Refuse:
    monkeypatch.chdir(tmp_path)  # the default result_dir would show as well
    return Refuse(tmp_path, capsys)


def pretrain(tmp_path: Path, **settings: Any) -> list[str]:
    return ["train", *arguments("pretrain", tmp_path / "out", **settings)]


# Values

INVALID: dict[str, list[Any]] = {
    "seed": [-1, 1.5, "x", 2**64],
    "k": [0, -0.1, 1.0001, "nan", "inf", "half", "", "1e-3000"],
    "epochs": [0, -1, 1.5, "ten", "inf", "nan"],
    "check_ranks": [-1, 1.5, "x"],
    "rank_timeout": [0, -1, "nan", "inf", "x"],
    "max_steps": [0, -3, "x"],
    "batch_size": [0, -64, 1.5, "x", 2000],  # 2000 is more than the training set
    "test_batch_size": [0, "x"],
    "lr": [-0.1, "nan", "inf", "fast"],
    "wd": [-1e-4, "nan", "inf", "x"],
    "mask_lr": [-0.1, "nan", "inf", "x"],
    "mask_wd": [-0.1, "nan", "inf", "x"],
    "lr2": [-1, "nan", "inf", "x"],
    "momentum": [-0.1, 1, 1.5, "nan", "inf", "x"],
    "warmup_lr": [-0.1, "nan", "inf"],
    "warmup_epochs": [-1, 1, "x"],  # 1 would leave nothing of one epoch
    "label_smoothing": [-0.1, 1, "nan", "inf"],
    "accumulate": [0, -1, 5, "x"],  # 64 does not divide by 5
    "lower_steps": [0, "x"],
    "eval_every": [0],
    "print_freq": [0, -1],
    "checkpoint_minutes": [0, -1, "nan", "inf"],
    "holdout": [-1, "x", 1437, 99999],
    "num_workers": [-1, "x"],
    "num_classes": [0, 11],
    "image_dim": [0, "x"],
    "recalibrate_bn": [-1],
    "data_fraction": [0, 0.5, 2, "nan"],
    "arch": ["resnet19", "torchvision/nothing", ""],
    "dataset": ["MNIST", "digits", ""],
    "exp_mode": ["train", "Prune", ""],
    "trainer": ["hydra", "bilevel"],  # bilevel does not pretrain
    "layer_type": ["weights"],
    "scope": ["all"],
    "mask_start": [-0.1, 1],
    "mask_end": [0, 1.1],
    "mask_every": [0],
    "acdc_warmup": [-0.1, 1],
    "acdc_phase": [0, 1],
    "acdc_last": [0, 1.1],
    "feather_scale": [-1, 1.1],
    "rigl_drop": [-0.1, 1],
    "optimizer": ["lamb"],
    "lr_schedule": ["linear"],
    "mask_lr_schedule": ["poly"],
    "warmup": ["cosine"],
    "scores_init_type": ["zeros"],
    "precision": ["fp16"],
    "loader": ["tfrecord", "lmdb"],  # Digits is no LMDB
    "val_method": ["smooth"],
    "exp_name": ["", "a/b", "..", "."],
    "resume": ["nowhere.pth.tar"],
    "source_net": ["nowhere.pth.tar"],
}
CASES = [(name, value) for name, values in INVALID.items() for value in values]


def test_every_setting_with_a_range_is_in_the_table() -> None:
    free = {"configs", "result_dir", "data_dir", "stage_to"}  # paths, in tests of their own
    flags_only = {n for n, f in RunConfig.model_fields.items() if f.annotation is bool}
    assert set(RunConfig.model_fields) - free - flags_only == set(INVALID)


def test_frozen_statistics_cannot_be_re_estimated(refuse: Refuse, tmp_path: Path) -> None:
    error = refuse(pretrain(tmp_path, freeze_bn=True, recalibrate_bn=3))
    assert "recalibrate_bn: 3 would re-estimate the statistics that --freeze-bn keeps" in error


@pytest.mark.parametrize(("name", "value"), CASES, ids=lambda v: str(v))
def test_an_invalid_flag(name: str, value: Any, refuse: Refuse, tmp_path: Path) -> None:
    error = refuse(pretrain(tmp_path, **{name: value}))
    assert re.search(rf"\b{name}\b|--{name.replace('_', '-')}\b", error), error


@pytest.mark.parametrize(("name", "value"), CASES, ids=lambda v: str(v))
def test_an_invalid_value_in_the_file(
    name: str, value: Any, refuse: Refuse, tmp_path: Path
) -> None:
    settings = yaml.safe_load((CONFIGS / "pretrain.yml").read_text())
    settings |= {"epochs": 1, "result_dir": str(tmp_path / "out"), name: value}
    if value in ("nan", "inf"):
        settings[name] = float(value)
    path = tmp_path / "mine.yml"
    path.write_text(yaml.safe_dump(settings))
    error = refuse(["train", "--configs", str(path)])
    assert re.search(rf"\b{name}\b", error), error


def test_a_boolean_that_is_none(refuse: Refuse, tmp_path: Path) -> None:
    path = write(tmp_path, "freeze_bn: maybe")
    refuse(["train", "--configs", str(path)], "freeze_bn", str(path))


def test_the_error_names_the_file_only_for_what_stands_in_it(
    refuse: Refuse, tmp_path: Path
) -> None:
    path = write(tmp_path, "label_smoothing: 5")
    refuse(["train", "--configs", str(path)], "label_smoothing", str(path))
    good = write(tmp_path)
    error = refuse(["train", "--configs", str(good), "--label-smoothing", "5"], "label_smoothing")
    assert str(good) not in error


# Keys


def write(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "mine.yml"
    path.write_text("\n".join([(CONFIGS / "pretrain.yml").read_text(), *lines, ""]))
    return path


@pytest.mark.parametrize(
    ("wrong", "right"), [("mask_lrr", "mask_lr"), ("epoch", "epochs"), ("sourc_net", "source_net")]
)
def test_an_unknown_key_or_flag_gets_the_nearest_name(
    wrong: str, right: str, refuse: Refuse, tmp_path: Path
) -> None:
    path = write(tmp_path, f"{wrong}: 1")
    error = refuse(["train", "--configs", str(path)], wrong, str(path))
    assert re.search(rf"\b{right}\b", error), error
    for spelling in (wrong, wrong.replace("_", "-")):
        error = refuse([*pretrain(tmp_path), f"--{spelling}", "1"], spelling)
        assert re.search(rf"--{right.replace('_', '-')}\b", error.replace("_", "-")), error


def test_an_unknown_flag_that_is_like_none(refuse: Refuse, tmp_path: Path) -> None:
    refuse([*pretrain(tmp_path), "--zzz", "1"], "zzz")
    refuse([*pretrain(tmp_path), "stray"], "stray")


def test_a_key_written_twice(refuse: Refuse, tmp_path: Path) -> None:
    path = write(tmp_path, "lr: 0.2")
    refuse(["train", "--configs", str(path)], "'lr'", "twice", str(path))


def test_a_setting_under_both_its_names(refuse: Refuse, tmp_path: Path) -> None:
    path = write(tmp_path, "lr2: 0.2", "inv_gamma: 0.1")
    refuse(["train", "--configs", str(path)], "lr2", "inv_gamma", str(path))


@pytest.mark.parametrize(
    "text", ["", "- 1\n- 2\n", "lr: [", "just words", "1: 2", "lr: 0.1\n\tk: 1"]
)
def test_a_file_that_holds_no_settings(text: str, refuse: Refuse, tmp_path: Path) -> None:
    path = tmp_path / "odd.yml"
    path.write_text(text)
    refuse(["train", "--configs", str(path)], str(path))


def test_files_that_cannot_be_read(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "bytes.yml").write_bytes(b"\xff\xfe\x00lr")
    refuse(["train", "--configs", str(tmp_path / "bytes.yml")], "bytes.yml")
    refuse(["train", "--configs", str(tmp_path)], str(tmp_path))
    refuse(["train", "--configs", "nowhere.yml"], "nowhere.yml")


def test_missing_required_settings(refuse: Refuse, tmp_path: Path) -> None:
    for name in ("arch", "exp_mode", "exp_name", "dataset"):
        settings = yaml.safe_load((CONFIGS / "pretrain.yml").read_text())
        del settings[name]
        path = tmp_path / "mine.yml"
        path.write_text(yaml.safe_dump(settings))
        refuse(["train", "--configs", str(path)], name)


def test_commands(refuse: Refuse) -> None:
    refuse(["trian"], "trian", "train")
    refuse(["export", "nowhere", "out"], "nowhere")
    refuse(["compare", "nowhere", "elsewhere"], "nowhere")


def test_export_to_what_is_no_file(refuse: Refuse, source: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    refuse(["export", str(source), str(tmp_path / "folder")], "out", "folder")


# --source-net


@pytest.mark.parametrize("kind", ["bip", "hydra", "finetune"])
def test_pruning_and_fine_tuning_need_a_source(kind: str, refuse: Refuse, tmp_path: Path) -> None:
    refuse(["train", *arguments(kind, tmp_path / "out")], "source_net", "--source-net")
    refuse(["train", *arguments(kind, tmp_path / "out", evaluate=True)], "source_net")


def test_a_source_of_another_network(refuse: Refuse, source: Path, tmp_path: Path) -> None:
    argv = ["train", *arguments("bip", tmp_path / "out", source_net=source, arch="resnet20s")]
    refuse(argv, "source_net", "digits_net", "resnet20s")


@pytest.mark.parametrize(
    ("key", "value"), [("k", 0.2), ("layer_type", "filter"), ("layer_type", "channel")]
)
def test_finetune_must_match_the_pruning(
    key: str, value: Any, refuse: Refuse, pruned_runs: dict[str, Finished], tmp_path: Path
) -> None:
    settings = {"k": 0.3, "source_net": pruned_runs["unstructured"].newest, key: value}
    argv = ["train", *arguments("finetune", tmp_path / "out", **settings)]
    refuse(argv, "source_net", key, str(value), "0.3" if key == "k" else "unstructured")


def test_finetune_takes_the_same_k_in_another_spelling(
    pruned_runs: dict[str, Finished], tmp_path: Path
) -> None:
    path = pruned_runs["unstructured"].newest
    train("finetune", tmp_path, source_net=path, k="0.3000", max_steps=1)


def test_finetune_of_a_dense_network(refuse: Refuse, source: Path, tmp_path: Path) -> None:
    argv = ["train", *arguments("finetune", tmp_path / "out", source_net=source, k=0.3)]
    refuse(argv, "source_net", "dense")


@pytest.mark.parametrize("kind", ["pretrain", "bip", "hydra"])
def test_training_from_a_pruned_network(
    kind: str, refuse: Refuse, pruned_runs: dict[str, Finished], tmp_path: Path
) -> None:
    settings = {"source_net": pruned_runs["filter"].newest, "k": 0.3}
    argv = ["train", *arguments(kind, tmp_path / "out", **settings)]
    refuse(argv, "source_net", "layer_type filter", "0.3", "dense")


def test_a_pruned_network_is_not_evaluated_as_a_dense_one(
    refuse: Refuse, pruned_runs: dict[str, Finished], tmp_path: Path
) -> None:
    path = pruned_runs["unstructured"].newest
    settings = {"source_net": path, "k": 0.3, "layer_type": "unstructured"}
    refuse(
        ["evaluate", *arguments("pretrain", tmp_path / "out", **settings)], "source_net", "prune"
    )


def test_images_that_the_network_cannot_take(refuse: Refuse, tmp_path: Path) -> None:
    refuse(pretrain(tmp_path, image_dim=1), "image_dim", "1x1", "digits_net")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"text", None])
def test_a_source_that_is_no_checkpoint(
    content: bytes | None, refuse: Refuse, source: Path, tmp_path: Path
) -> None:
    path = tmp_path / "bad.pth.tar"
    path.write_bytes(source.read_bytes()[:-500] if content is None else content)
    argv = ["train", *arguments("bip", tmp_path / "out", source_net=path)]
    assert "weights_only" not in refuse(argv, str(path))


def test_a_source_that_is_a_folder(refuse: Refuse, tmp_path: Path) -> None:
    argv = ["train", *arguments("bip", tmp_path / "out", source_net=tmp_path)]
    refuse(argv, "source_net", str(tmp_path))


def test_a_missing_data_dir(refuse: Refuse, tmp_path: Path) -> None:
    argv = pretrain(tmp_path, dataset="CIFAR10", arch="resnet20s", image_dim=32, data_dir="none")
    refuse(argv, "data_dir", "none")


def test_a_result_dir_that_is_a_file(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    refuse(pretrain(tmp_path), "result_dir")


# What must work


def load(tmp_path: Path, *argv: str) -> RunConfig:
    return load_config(["--configs", str(CONFIGS / "pretrain.yml"), *argv])


def test_both_spellings_of_every_flag(tmp_path: Path, source: Path) -> None:
    settings = {
        "exp_mode": "prune", "layer_type": "filter", "source_net": source, "result_dir": tmp_path,
        "mask_lr_schedule": "step", "test_batch_size": 7, "scaled_score_init": True,
        "max_steps": 3, "bn_wd": False,
    }  # fmt: skip
    hyphens = flags(**settings)
    underscores = [
        word.replace("-", "_").replace("__", "--", 1) if word.startswith("--") else word
        for word in hyphens
    ]
    assert hyphens != underscores
    first, second = load(tmp_path, *hyphens), load(tmp_path, *underscores)
    assert first == second
    assert first.mask_lr_schedule == "step"
    assert first.scaled_score_init is True
    assert first.bn_wd is False
    assert load(tmp_path, "--inv-gamma", "0.5").lr2 == load(tmp_path, "--inv_gamma=0.5").lr2 == 0.5


def test_flags_beat_the_file_which_beats_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "label_smoothing: 0.1", "warmup_lr: 0.01")
    config = load_config(["--configs", str(path), "--label-smoothing", "0.2"])
    assert (config.label_smoothing, config.warmup_lr, config.mask_lr) == (0.2, 0.01, 0.1)
    # A flag that says the default beats the file as well.
    assert load_config(["--configs", str(path), "--label-smoothing", "0"]).label_smoothing == 0


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4", "1.e-4"])
def test_exponents_as_people_write_them(text: str, tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-4 as text."""
    settings = yaml.safe_load((CONFIGS / "pretrain.yml").read_text())
    del settings["wd"]
    path = tmp_path / "mine.yml"
    path.write_text(f"{yaml.safe_dump(settings)}wd: {text}\nlr2: {text}\nmask_wd: {text}\n")
    config = load_config(["--configs", str(path)])
    assert (config.wd, config.lr2, config.mask_wd) == (1e-4, 1e-4, 1e-4)


def test_a_null_in_the_file_means_the_default(tmp_path: Path) -> None:
    path = write(tmp_path, "max_steps: null", "resume: ~", "label_smoothing:")
    config = load_config(["--configs", str(path)])
    assert (config.max_steps, config.resume, config.label_smoothing) == (None, None, 0)


@pytest.mark.parametrize("text", ["0.8", "0.8000", "8e-1"])
def test_k_is_the_decimal_as_written(text: str, source: Path, tmp_path: Path) -> None:
    argv = arguments("bip", tmp_path, source_net=source, k=text)
    config = load_config(argv)
    assert config.k_text == "0.8"
    assert config.run_id == load_config(arguments("bip", tmp_path, source_net=source, k=0.8)).run_id


def test_help_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in RunConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in text or f"--no-{name.replace('_', '-')}" in text
    assert main(["--help"]) == 0


# Options without effect warn

IDLE = [
    ("pretrain", {"mask_lr": 0.3}, "mask_lr"),
    ("pretrain", {"lr2": 0.3}, "lr2"),
    ("pretrain", {"accelerate": True}, "accelerate"),
    ("pretrain", {"lower_steps": 2}, "lower_steps"),
    ("pretrain", {"k": 0.5}, "k"),
    ("pretrain", {"layer_type": "filter"}, "layer_type"),
    ("pretrain", {"scaled_score_init": True}, "scaled_score_init"),
    ("pretrain", {"recalibrate_bn": 3}, "recalibrate_bn"),
    ("pretrain", {"warmup": "linear"}, "warmup"),
    ("pretrain", {"warmup_lr": 0.3}, "warmup_lr"),
    (
        "pretrain",
        {"warmup": "linear", "epochs": 2, "warmup_epochs": 1, "warmup_lr": 0.3},
        "warmup_lr",
    ),
    ("pretrain", {"optimizer": "adam", "momentum": 0.5}, "momentum"),
    ("pretrain", {"freeze_bn": True, "bn_wd": False}, "bn_wd"),
    ("hydra", {"mask_lr": 0.3}, "mask_lr"),
    ("hydra", {"mask_lr_schedule": "step"}, "mask_lr_schedule"),
    ("hydra", {"mask_wd": 0.3}, "mask_wd"),
    ("hydra", {"lr2": 0.3}, "lr2"),
    ("hydra", {"scale_rand_init": True}, "scale_rand_init"),
    ("bip", {"scores_init_type": "hydra"}, "scores_init_type"),  # the file says scaled_score_init
    ("bip", {"accelerate": True, "lr2": 0.3}, "lr2"),
    ("bip", {"scale_rand_init": True}, "scale_rand_init"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings", "name"), IDLE, ids=lambda v: str(v))
def test_an_option_without_effect_warns(
    kind: str,
    settings: dict[str, Any],
    name: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = {} if kind == "pretrain" else {"source_net": source}
    argv = ["train", *arguments(kind, tmp_path, max_steps=1, **more | settings)]
    assert main(argv) == 0
    said = capsys.readouterr()
    warnings = [x for x in (said.out + said.err).splitlines() if x.startswith("warning: ")]
    assert any(re.search(rf"\b{name}\b", line) for line in warnings), warnings


@pytest.mark.parametrize("kind", ["pretrain", "bip", "hydra"])
def test_the_shipped_settings_do_not_warn(
    kind: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {} if kind == "pretrain" else {"source_net": source}
    assert main(["train", *arguments(kind, tmp_path, max_steps=1, **more)]) == 0
    said = capsys.readouterr()
    assert "warning" not in said.out + said.err
