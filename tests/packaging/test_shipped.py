"""A shipped file given by its name in the repository, from another folder."""

from pathlib import Path

import pytest

from bip.config import load_config
from bip.errors import UserError
from bip.shipped import given_or_shipped, shipped
from launch.profile import load_profile

CONFIG = Path("configs", "CIFAR10", "pretrain.yml")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def own_file(folder: Path, text: str) -> None:
    path = folder / CONFIG
    path.parent.mkdir(parents=True)
    path.write_text(text)


def test_a_file_that_is_not_here_is_the_shipped_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert load_config(["--configs", str(CONFIG), "--exp-name", "x"]).dataset == "CIFAR10"
    assert capsys.readouterr().err.count(str(shipped(str(CONFIG)))) == 1
    assert load_profile(Path("slurm", "profiles", "gpu.yml")).executor == "slurm"


def test_a_file_of_ones_own_is_taken_first(folder: Path) -> None:
    own_file(folder, "kk: 3")
    with pytest.raises(UserError, match="unknown key 'kk'"):
        load_config(["--configs", str(CONFIG), "--exp-name", "x"])


def test_a_file_that_cannot_be_read_is_not_replaced(folder: Path) -> None:
    """Else a run would silently train with other settings."""
    own_file(folder, "")
    parent = folder / CONFIG.parent
    parent.rename(folder / "moved")
    parent.symlink_to(parent)  # a loop: no file and no sign that there is none
    assert given_or_shipped(CONFIG) == CONFIG


@pytest.mark.parametrize(
    "name", ["configs/CIFAR10/none.yml", "README.md", "/configs/CIFAR10/bip.yml"]
)
def test_nothing_else_is_taken(name: str) -> None:
    assert given_or_shipped(Path(name)) == Path(name)


def test_a_settings_file_without_its_flag_is_recognised() -> None:
    """As in the published `train.py`, with --configs forgotten."""
    for words in ([str(CONFIG)], ["--k", "0.1", str(CONFIG)], ["--freeze-bn", str(CONFIG)]):
        with pytest.raises(UserError, match=f"--configs {CONFIG}"):
            load_config(words)
    with pytest.raises(UserError, match="--source-net"):
        load_config(["--sorce-net", str(CONFIG)])


def test_files_of_a_clone_and_of_a_wheel(folder: Path) -> None:
    assert shipped("slurm/task.sh", folder) == folder / "slurm" / "task.sh"
    (folder / "bip" / "_files").mkdir(parents=True)
    assert shipped("slurm/task.sh", folder) == folder / "bip" / "_files" / "slurm" / "task.sh"
