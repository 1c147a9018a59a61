"""Bad input: exit code 2, one line that names the culprit, nothing created."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bip.__main__ import main
from bip.config import RunConfig, load_config, of_type, paths
from bip.methods import methods
from tests.runs import CONFIGS, Finished, arguments, flags, train

Refuse = Callable[..., str]


@pytest.fixture
def refuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """`refuse(argv, *words)` runs the command; its one line of error must hold every word."""
    monkeypatch.chdir(tmp_path)  # the default result_dir would show as well

    def run(argv: list[str], *words: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert re.fullmatch("error: .+\n", error), error
        for word in words:
            assert word in error, error
        assert sorted(tmp_path.rglob("*")) == before, "nothing is created"
        return error

    return run


def pretrain(tmp_path: Path, **settings: Any) -> list[str]:
    return ["train", *arguments("pretrain", tmp_path / "out", **settings)]


# Values

INVALID: dict[str, list[Any]] = {
    "seed": [-1, 1.5, "x", 2**64],
    "k": [0, -0.1, 1.0001, "nan", "inf", "half", "", "1e-3000"],
    "epochs": [0, -1, 1.5, "ten", "inf", "nan"],
    "tracker": ["tensorbord", "wandb,", "mlflow,mlflow"],
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
    "ranking": ["sizes"],
    "dead_filters": ["none"],
    "score_gain": [1, "published code"],
    "score_batches": [0, "x"],
    "rewind": ["epoch"],
    "rewind_epoch": [-1, 2, "x"],  # 2 lies after the one epoch
    "levels": ["both"],
    "mask_until": [-0.1, 1.1, "nan"],
    "stage_order": ["new"],
    "step_drops": ["", "0.5;0.75", "0.75,0.5", "0.5,0.5", "0", "1", "nan"],
    "budget": [0, -1, 1.5, "x"],
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
    "source_key": [""],
}
OF_METHODS = {name for m in methods().values() for name in m.settings.model_fields}
FREE = {*paths(), *of_type(bool)}  # paths are in tests of their own


def beyond(name: str) -> list[Any]:
    """What a setting's type and bounds exclude."""
    values: list[Any] = ["x"]
    for bound in RunConfig.model_fields[name].metadata:
        values += [getattr(bound, end) for end in ("gt", "lt") if hasattr(bound, end)]
        values += [bound.ge - 1] if hasattr(bound, "ge") else []
        values += [bound.le + 1] if hasattr(bound, "le") else []
    return values


INVALID |= {name: beyond(name) for name in sorted(OF_METHODS - FREE - INVALID.keys())}
CASES = [(name, value) for name, values in INVALID.items() for value in values]


def test_every_setting_with_a_range_is_in_the_table() -> None:
    assert RunConfig.model_fields.keys() == INVALID.keys() | FREE


@pytest.mark.parametrize(("name", "value"), CASES, ids=lambda v: str(v))
def test_an_invalid_value(name: str, value: Any, refuse: Refuse, tmp_path: Path) -> None:
    """As a flag, and in the file."""
    error = refuse(pretrain(tmp_path, **{name: value}))
    assert re.search(rf"\b{name}\b|--{name.replace('_', '-')}\b", error), error
    value = float(value) if value in ("nan", "inf") else value
    short = {"epochs": 1, "result_dir": str(tmp_path / "out")}
    path = write(tmp_path, **short | {name: value})
    error = refuse(["train", "--configs", str(path)])
    assert re.search(rf"\b{name}\b", error), error


def test_the_error_names_the_file_only_for_what_stands_in_it(
    refuse: Refuse, tmp_path: Path
) -> None:
    for name, value in (("label_smoothing", 5), ("freeze_bn", "maybe")):
        path = write(tmp_path, **{name: value})
        refuse(["train", "--configs", str(path)], name, str(path))
    good = write(tmp_path)
    error = refuse(["train", "--configs", str(good), "--label-smoothing", "5"], "label_smoothing")
    assert str(good) not in error


def test_settings_that_exclude_each_other(refuse: Refuse, tmp_path: Path) -> None:
    refuse(pretrain(tmp_path, freeze_bn=True, recalibrate_bn=3), "recalibrate_bn", "--freeze-bn")
    refuse(pretrain(tmp_path, image_dim=1), "image_dim", "1x1", "digits_net")


# Keys


def write(tmp_path: Path, *lines: str, drop: str = "", **changes: Any) -> Path:
    """The file for pretraining, changed, and these lines after it."""
    settings = yaml.safe_load((CONFIGS / "pretrain.yml").read_text()) | changes
    settings.pop(drop, None)
    path = tmp_path / "mine.yml"
    path.write_text("\n".join([yaml.safe_dump(settings), *lines, ""]))
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


def test_words_that_mean_nothing(refuse: Refuse, source: Path, tmp_path: Path) -> None:
    refuse([*pretrain(tmp_path), "--zzz", "1"], "zzz")
    refuse([*pretrain(tmp_path), "stray"], "stray")
    refuse(["trian"], "trian", "train")
    refuse(["export", "nowhere", "out"], "nowhere")
    refuse(["export", str(source), str(tmp_path)], "out", str(tmp_path))
    refuse(["compare", "nowhere", "elsewhere"], "nowhere")


def test_a_setting_given_twice(refuse: Refuse, tmp_path: Path) -> None:
    path = write(tmp_path, "lr: 0.2")
    refuse(["train", "--configs", str(path)], "'lr'", "twice", str(path))
    path = write(tmp_path, "lr2: 0.2", "inv_gamma: 0.1")
    refuse(["train", "--configs", str(path)], "lr2", "inv_gamma", str(path))


@pytest.mark.parametrize(
    "data",
    [b"", b"- 1\n- 2\n", b"lr: [", b"just words", b"1: 2", b"lr: 0.1\n\tk: 1", b"\xff\xfe\x00lr"],
)
def test_a_file_that_holds_no_settings(data: bytes, refuse: Refuse, tmp_path: Path) -> None:
    path = tmp_path / "odd.yml"
    path.write_bytes(data)
    refuse(["train", "--configs", str(path)], str(path))


@pytest.mark.parametrize("name", ["arch", "exp_mode", "exp_name", "dataset"])
def test_a_missing_required_setting(name: str, refuse: Refuse, tmp_path: Path) -> None:
    refuse(["train", "--configs", str(write(tmp_path, drop=name))], name)


def test_a_path_to_nothing_or_to_the_wrong_thing(refuse: Refuse, tmp_path: Path) -> None:
    refuse(["train", "--configs", str(tmp_path)], str(tmp_path))
    refuse(["train", "--configs", "nowhere.yml"], "nowhere.yml")
    cifar = {"dataset": "CIFAR10", "arch": "resnet20s", "image_dim": 32}
    refuse(pretrain(tmp_path, **cifar, data_dir="none"), "data_dir", "none")
    refuse(prune(tmp_path, source_net=tmp_path), "source_net", str(tmp_path))
    (tmp_path / "out").touch()
    refuse(pretrain(tmp_path), f"result_dir: {tmp_path / 'out'}", "--result-dir")


# --source-net


def prune(tmp_path: Path, kind: str = "bip", **settings: Any) -> list[str]:
    return ["train", *arguments(kind, tmp_path / "out", **settings)]


@pytest.mark.parametrize("kind", ["bip", "hydra", "finetune"])
def test_pruning_and_fine_tuning_need_a_source(kind: str, refuse: Refuse, tmp_path: Path) -> None:
    refuse(prune(tmp_path, kind), "source_net", "--source-net")
    refuse(prune(tmp_path, kind, evaluate=True), "source_net")


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("finetune", {"k": 0.2}, ["k", "0.2", "0.3"]),
        ("finetune", {"layer_type": "filter"}, ["layer_type", "filter", "unstructured"]),
        ("finetune", {"layer_type": "channel"}, ["layer_type", "channel", "unstructured"]),
        *((kind, {}, ["unstructured", "0.3", "dense"]) for kind in ("pretrain", "bip", "hydra")),
        ("pretrain", {"evaluate": True, "layer_type": "unstructured"}, ["prune"]),
    ],
)
def test_a_pruned_source_fits_what_it_is_used_for(
    kind: str, settings: dict[str, Any], words: list[str], refuse: Refuse,
    pruned_runs: dict[str, Finished], tmp_path: Path,
) -> None:  # fmt: skip
    path = pruned_runs["unstructured"].newest
    refuse(prune(tmp_path, kind, **{"k": 0.3, "source_net": path} | settings), "source_net", *words)


def test_finetune_takes_the_same_k_in_another_spelling(
    pruned_runs: dict[str, Finished], tmp_path: Path
) -> None:
    path = pruned_runs["unstructured"].newest
    train("finetune", tmp_path, source_net=path, k="0.3000", max_steps=1)


def test_a_dense_source_fits_what_it_is_used_for(
    refuse: Refuse, source: Path, tmp_path: Path
) -> None:
    refuse(prune(tmp_path, "finetune", source_net=source, k=0.3), "source_net", "dense")
    other = prune(tmp_path, source_net=source, arch="resnet20s")
    refuse(other, "source_net", "digits_net", "resnet20s")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"text", None])
def test_a_source_that_is_no_checkpoint(
    content: bytes | None, refuse: Refuse, source: Path, tmp_path: Path
) -> None:
    path = tmp_path / "bad.pth.tar"
    path.write_bytes(source.read_bytes()[:-500] if content is None else content)
    assert "weights_only" not in refuse(prune(tmp_path, source_net=path), str(path))


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
    path = str(write(tmp_path, "label_smoothing: 0.1", "warmup_lr: 0.01"))
    config = load_config(["--configs", path, "--label-smoothing", "0.2"])
    assert (config.label_smoothing, config.warmup_lr, config.mask_lr) == (0.2, 0.01, 0.1)
    # A flag with the default's value beats the file as well.
    assert load_config(["--configs", path, "--label-smoothing", "0"]).label_smoothing == 0


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4", "1.e-4"])
def test_exponents_as_people_write_them(text: str, tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-4 as text."""
    path = write(tmp_path, f"wd: {text}", f"lr2: {text}", f"mask_wd: {text}", drop="wd")
    config = load_config(["--configs", str(path)])
    assert (config.wd, config.lr2, config.mask_wd) == (1e-4, 1e-4, 1e-4)


def test_a_null_in_the_file_means_the_default(tmp_path: Path) -> None:
    path = write(tmp_path, "max_steps: null", "resume: ~", "label_smoothing:")
    config = load_config(["--configs", str(path)])
    assert (config.max_steps, config.resume, config.label_smoothing) == (None, None, 0)


def test_an_empty_path_in_the_file_means_none(tmp_path: Path) -> None:
    """As in published files."""
    config = load(tmp_path, "--configs", str(write(tmp_path, 'resume: ""', 'source_net: ""')))
    assert (config.resume, config.source_net) == (None, None)


def test_sparse_from_scratch_is_no_pretraining(refuse: Refuse, tmp_path: Path) -> None:
    refuse(pretrain(tmp_path, layer_type="unstructured", k=0.1), "layer_type", "--trainer random")
    refuse(pretrain(tmp_path, reset_head=True), "reset_head", "--source-net")


@pytest.mark.parametrize("text", ["0.8", "0.8000", "8e-1"])
def test_k_is_the_decimal_as_written(text: str, source: Path, tmp_path: Path) -> None:
    config = load_config(arguments("bip", tmp_path, source_net=source, k=text))
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

IDLE: list[tuple[str, dict[str, Any]]] = [  # the last setting has no effect
    ("pretrain", {"mask_lr": 0.3}),
    ("pretrain", {"lr2": 0.3}),
    ("pretrain", {"accelerate": True}),
    ("pretrain", {"lower_steps": 2}),
    ("pretrain", {"k": 0.5}),
    ("pretrain", {"layer_type": "filter"}),
    ("pretrain", {"scaled_score_init": True}),
    ("pretrain", {"recalibrate_bn": 3}),
    ("pretrain", {"warmup": "linear"}),
    ("pretrain", {"warmup_lr": 0.3}),
    ("pretrain", {"warmup": "linear", "epochs": 2, "warmup_epochs": 1, "warmup_lr": 0.3}),
    ("pretrain", {"optimizer": "adam", "momentum": 0.5}),
    ("pretrain", {"freeze_bn": True, "bn_wd": False}),
    ("hydra", {"mask_lr": 0.3}),
    ("hydra", {"mask_lr_schedule": "step"}),
    ("hydra", {"mask_wd": 0.3}),
    ("hydra", {"lr2": 0.3}),
    ("hydra", {"scale_rand_init": True}),
    ("bip", {"scores_init_type": "hydra"}),  # the file has scaled_score_init
    ("bip", {"accelerate": True, "lr2": 0.3}),
    ("bip", {"scale_rand_init": True}),
    *((kind, {}) for kind in ("pretrain", "bip", "hydra")),
]


@pytest.mark.parametrize(("kind", "settings"), IDLE, ids=lambda v: str(v))
def test_an_option_without_effect_warns(
    kind: str, settings: dict[str, Any], source: Path, tmp_path: Path, capsys: Any
) -> None:
    """And the shipped settings do not."""
    more = {} if kind == "pretrain" else {"source_net": source}
    assert main(["train", *arguments(kind, tmp_path, max_steps=1, **more | settings)]) == 0
    printed = "".join(capsys.readouterr())
    warnings = [line for line in printed.splitlines() if line.startswith("warning: ")]
    if not settings:
        assert "warning" not in printed
        return
    assert any(re.search(rf"\b{[*settings][-1]}\b", line) for line in warnings), warnings
