"""A data set is one file of `sets`, a loader one of `loaders`; options travel as one object."""

import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from bip.config import RunConfig
from bip.data import loaders, sets
from bip.data.options import DataOptions
from bip.data.reader import Loader
from bip.errors import UserError

SETS = ("CIFAR10", "CIFAR100", "Digits", "ImageNet", "TinyImageNet")


def test_names_are_those_of_the_files() -> None:
    assert sets.names() == (*SETS[:4], "ImageNetOrigin", "ImageNetLMDB", SETS[4])
    assert loaders.names() == ("auto", "dali", "folder", "lmdb", "memory")
    for name in loaders.names()[1:]:
        assert issubclass(loaders.loader_class(name), Loader)


@pytest.mark.parametrize("alias", ["ImageNetOrigin", "ImageNetLMDB", "ImageNet"])
def test_aliases_have_one_canonical_name(alias: str) -> None:
    assert sets.canonical(alias) == "ImageNet"
    assert sets.dataset_spec(alias) is sets.dataset_spec("ImageNet")


@pytest.mark.parametrize(
    ("name", "hint"), [("cifar10", "CIFAR10"), ("TinyImagenet", "TinyImageNet"), ("zzz", "known: ")]
)
def test_an_unknown_set_gets_the_nearest_name(name: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"dataset: unknown '{name}'.*{hint}"):
        sets.canonical(name)


@pytest.mark.parametrize("name", SETS)
def test_a_spec_fits_together(name: str) -> None:
    spec = sets.dataset_spec(name)
    assert len(spec.mean) == len(spec.std) == spec.channels
    assert all(0 < value < 1 for value in spec.mean + spec.std)
    assert spec.augment == "pad_crop" or spec.padding == 0


def test_names_and_options_take_no_slow_import() -> None:
    code = """
import sys
from bip.data import loaders, sets
from bip.data.options import DataOptions
print(sets.names(), loaders.names(), DataOptions.__name__)
print({"torch", "torchvision", "sklearn", "lmdb", "numpy", "nvidia.dali"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_options_are_the_configurations() -> None:
    config = RunConfig(
        exp_name="x", exp_mode="pretrain", arch="resnet18", dataset="ImageNetLMDB", seed=7
    )
    options = DataOptions.of(config)
    assert all(getattr(options, f.name) == getattr(config, f.name) for f in fields(options))
    assert (options.spec.name, options.classes, options.side) == ("ImageNet", 1000, 224)
    other = replace(options, image_dim=9, num_classes=3)
    assert (other.classes, other.side) == (3, 9)
    with pytest.raises(FrozenInstanceError):
        options.seed = 8  # type: ignore[misc]
