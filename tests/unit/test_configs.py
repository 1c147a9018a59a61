"""The shipped YAML files, and files in the shape of the published ones, load as they are."""

import itertools
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml

from bip import models
from bip.config import RunConfig, about, build_config, load_config, merge
from bip.methods import methods

CONFIGS = Path(__file__).parents[2] / "configs"
DATASETS = {  # name: (network, classes, image side in pixels, batch)
    "CIFAR10": ("resnet20s", 10, 32, 128),
    "CIFAR100": ("resnet20s", 100, 32, 128),
    "TinyImageNet": ("resnet20s", 200, 64, 128),
    "ImageNet": ("ResNet18", 1000, 224, 200),
    "Digits": ("digits_net", 10, 8, 64),
}
KINDS = ("pretrain", "bip", "hydra", "finetune")  # the published ones
# pretrain.yml is of dense; transfer is finetune.yml with --layer-type dense.
SHIPPED = ("pretrain", *(name for name in methods() if name not in ("dense", "transfer")))
MODES = dict.fromkeys(SHIPPED, "prune") | {"pretrain": "pretrain", "finetune": "finetune"}
PUBLISHED = [*itertools.product(("CIFAR10", "CIFAR100", "TinyImageNet", "ImageNet"), KINDS)]


@pytest.fixture
def source_net(tmp_path: Path) -> Path:
    path = tmp_path / "model_best.pth.tar"
    path.touch()
    return path


def load(path: Path, kind: str, source_net: Path, *flags: str) -> RunConfig:
    source = [] if kind == "pretrain" else ["--source-net", str(source_net)]
    return load_config(["--configs", str(path), *source, *flags])


# The shipped files


def test_every_method_has_a_file_for_every_data_set() -> None:
    expected = {CONFIGS / dataset / f"{kind}.yml" for dataset in DATASETS for kind in SHIPPED}
    found = {path for dataset in DATASETS for path in (CONFIGS / dataset).iterdir()}
    assert found == expected


@pytest.mark.parametrize("kind", SHIPPED)
@pytest.mark.parametrize("dataset", DATASETS)
def test_a_shipped_file_loads(dataset: str, kind: str, source_net: Path) -> None:
    path = CONFIGS / dataset / f"{kind}.yml"
    config = load(path, kind, source_net)
    arch, classes, image_dim, batch = DATASETS[dataset]
    assert config.arch == arch
    assert config.arch in models.names()
    assert (config.dataset, config.num_classes) == (dataset, classes)
    assert (config.image_dim, config.batch_size) == (image_dim, batch)
    assert config.exp_mode == MODES[kind]
    assert config.method.name == ("dense" if kind == "pretrain" else kind)
    assert config.normalize
    assert config.result_dir == Path("trained_models")
    assert config.data_dir == Path("data")
    assert config.layer_type == ("dense" if kind == "pretrain" else "unstructured")
    assert config.k == (Decimal(1) if kind == "pretrain" else Decimal("0.1"))
    assert config.warnings() == []
    assert str(path.relative_to(CONFIGS.parent)) in path.read_text().splitlines()[0]
    # YAML 1.1 reads 1e-4 as text; another reader of the file must not depend on our leniency.
    values = yaml.safe_load(path.read_text())
    for key in {"lr", "wd", "momentum", "mask_lr", "lr2", "k"} & set(values):
        assert isinstance(values[key], float), key


# Files in the published shape


def published(dataset: str, kind: str) -> dict[str, Any]:
    """The keys and values of one published file."""
    arch, classes, image_dim, batch = DATASETS[dataset]
    imagenet = dataset == "ImageNet"
    method = {"pretrain": "Pretrain", "hydra": "Unstructured_Hydra_K0.1"}
    values: dict[str, Any] = {
        "arch": arch,
        "result_dir": "./trained_models",
        "exp_name": f"{dataset}_{arch}_{method.get(kind, 'Unstructured_BiP_K0.1')}",
        "exp_mode": MODES[kind],
        "normalize": True,
        "trainer": "bilevel" if kind == "bip" else "base",
        "layer_type": "dense" if kind == "pretrain" else "unstructured",
        "epochs": {"pretrain": 90 if imagenet else 200}.get(kind, 100),
        "optimizer": "sgd",
        "lr": 0.01 if imagenet else 0.1,
        "lr_schedule": "cosine",
        "wd": 0.0001 if kind == "bip" else 0.0005,
        "momentum": 0.9,
        "warmup_epochs": 0,
        "warmup_lr": 0.1,
        "val_method": "base",
        "dataset": dataset,
        "batch_size": batch,
        "test_batch_size": batch,
        "num_classes": classes,
        "data_dir": "./data",
        "seed": 1234,
        "print_freq": 100,
    }
    if kind != "pretrain":
        values |= {"k": 0.1}
    if MODES[kind] == "prune":
        # HYDRA's files carry the bi-level keys too.
        values |= {"scaled_score_init": True, "lr2": 0.0001, "mask_lr": 0.1}
        values |= {"mask_lr_schedule": "step" if kind == "bip" else "cosine"}
    if (dataset, kind) not in {("CIFAR10", "hydra"), ("CIFAR10", "finetune")}:
        values |= {"image_dim": image_dim}
    if (dataset, kind) == ("CIFAR10", "finetune"):
        values |= {"data_fraction": 1.0}
    if imagenet:
        values |= {"num_workers": 16}
    return values


@pytest.mark.parametrize(("dataset", "kind"), PUBLISHED)
def test_a_published_file_loads_unchanged_and_ours_has_its_settings(
    dataset: str, kind: str, source_net: Path, tmp_path: Path
) -> None:
    values = published(dataset, kind)
    path = tmp_path / f"{kind}.yml"
    path.write_text(yaml.safe_dump(values))
    theirs = load(path, kind, source_net)
    values |= {"result_dir": Path("trained_models"), "data_dir": Path("data")}
    values["k"] = Decimal(1) if kind == "pretrain" else Decimal("0.1")
    assert {key: getattr(theirs, key) for key in values} == values
    ours = load(CONFIGS / dataset / f"{kind}.yml", kind, source_net)
    if kind == "bip":  # the paper's, where the code's files have 0.1
        values["lr"] = 0.01
    for key in values.keys() - {"trainer", "exp_name", "num_workers", "warmup_lr", "print_freq"}:
        if key in ours.idle():
            continue
        assert getattr(ours, key) == values[key], key


def test_flags_beat_a_published_file(source_net: Path, tmp_path: Path) -> None:
    path = tmp_path / "bip.yml"
    path.write_text(yaml.safe_dump(published("CIFAR100", "bip")))
    config = load(path, "bip", source_net, "--arch", "resnet18", "--k", "0.01", "--mask_lr", "0.05")
    assert (config.arch, config.k, config.mask_lr) == ("resnet18", Decimal("0.01"), 0.05)
    assert config.epochs == 100


def test_run_ids_and_fingerprints_are_those_of_version_0_1(source_net: Path) -> None:
    """Runs under way must find their folders again: recorded by that version for many settings."""
    recorded = json.loads((CONFIGS.parent / "tests/fixtures/run_ids.json").read_text())
    source = "trained_models/x/pretrain/resnet20s-base-dense-k1-s1-01234567/checkpoint/m.pth.tar"
    for key, expected in recorded.items():
        file, *settings = key.split()
        flags: dict[str, Any] = dict(pair.split("=") for pair in settings)
        flags["configs"] = CONFIGS.parent / file
        for name in RunConfig.model_fields:  # later keys, at what that version did
            if about(name).before not in (..., None):
                flags[name] = about(name).before
        if "pretrain" not in file:
            flags["source_net"] = source
        config = build_config(merge(flags))
        assert [config.run_id, config.fingerprint()] == expected, key


def test_a_budget_replaces_the_epochs_of_a_file_but_not_those_given_beside_it() -> None:
    line = ["--configs", str(CONFIGS / "Digits" / "pretrain.yml"), "--budget", "9"]
    assert load_config(line).warnings() == []
    assert "epochs" in load_config([*line, "--epochs", "2"]).warnings()[0]
