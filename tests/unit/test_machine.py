"""What machines lack or do differently: folders by variables, limits, links, locks, terminals."""

import errno
import fcntl
import io
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bip import cli, compiled, models
from bip.config import load_config
from bip.errors import ExitCode, UserError, outcome
from bip.files import NOT_SUPPORTED
from bip.lock import RunLock
from bip.machine import expanded, for_shell
from bip.training.checkpoint import CheckpointFolder
from bip.yaml_file import read_yaml
from launch.profile import load_profile
from launch.sweep import Lock
from tests.runs import CONFIGS, arguments

ROOT = Path(__file__).parents[2]
VALUES = ["a b", "$HOME/x y", "~/q'uote", "${HOME}`id`$(id)", "~", "x$HOME", '%d \\ "q"', "", "a~b"]


def fails(number: int) -> Callable[..., Any]:
    def call(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


# Folders named by variables


def test_a_shell_expands_as_we_do() -> None:
    words = " ".join(for_shell(value, "env: A") for value in VALUES)
    printed = subprocess.check_output(["bash", "-c", f"printf '%s\\n' {words}"], text=True)
    assert printed.splitlines() == [expanded(value, "env: A") for value in VALUES]
    unset = subprocess.run(
        ["bash", "-c", f"export A={for_shell('$NOT_SET/x', 'env: A')}; echo went on"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert unset.returncode
    assert "NOT_SET: env: A" in unset.stderr
    assert not unset.stdout


@pytest.mark.parametrize("as_flag", [False, True])
def test_paths_are_expanded_and_the_nodes_own_is_kept(
    as_flag: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    paths = {"result_dir": "${SCRATCH}/runs", "data_dir": "~/data", "stage_to": "$NODE_DISK/bip"}
    words = [*arguments("pretrain", tmp_path)]
    if as_flag:
        words += [w for k, v in paths.items() for w in (f"--{k.replace('_', '-')}", v)]
    else:
        values = read_yaml(CONFIGS / "pretrain.yml") | paths
        (tmp_path / "c.yml").write_text(yaml.safe_dump(values) + "# größe\n", encoding="utf-8")
        words = ["--configs", "~/c.yml", "--exp-name", "e"]
    config = load_config(words)
    assert config.result_dir == tmp_path / "scratch" / "runs"
    assert config.data_dir == tmp_path / "data"
    assert str(config.stage_to) == paths["stage_to"], "it is expanded on the node"
    (tmp_path / "$odd~").mkdir()
    assert expanded(str(tmp_path / "$odd~"), "data_dir") == str(tmp_path / "$odd~")
    with pytest.raises(UserError, match=r"data_dir: .*NOT_SET is not set"):
        load_config([*words, "--data-dir", "$NOT_SET/x"])


# YAML keeps what is written


@pytest.mark.parametrize("text", ["20241001", "on", "0123", "1:30", "1.10", "2024-10-01", "yes"])
def test_a_name_is_taken_as_it_is_written(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yml"
    lines = (CONFIGS / "pretrain.yml").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("exp_name", "test_batch_size"))]
    path.write_text("\n".join([*kept, f"exp_name: {text}", "bn_wd: on", ""]))
    config = load_config(["--configs", str(path)])
    assert config.exp_name == text
    assert config.bn_wd is True
    path.write_text(path.read_text() + "test_batch_size: 0123\n")
    with pytest.raises(UserError, match=r"test_batch_size: .*0123"):
        load_config(["--configs", str(path)])


def test_what_is_switched_off_in_a_file_is_off(tmp_path: Path) -> None:
    path = tmp_path / "c.yml"
    path.write_text((CONFIGS / "pretrain.yml").read_text() + "pretrained: no\nskip_objects: off\n")
    config = load_config(["--configs", str(path)])
    assert config.source_net is None
    assert not config.pretrained


def test_a_profile_keeps_its_texts(tmp_path: Path) -> None:
    path = tmp_path / "p.yml"
    path.write_text("executor: slurm\naccount: 00123\ntime: 90\nenv: {A: 1.10, B: on}\n")
    profile = load_profile(path)
    assert getattr(profile, "account", None) == "00123"
    assert profile.env == {"A": "1.10", "B": "on"}
    path.write_text("executor: slurm\ntime: 0030\n")
    with pytest.raises(UserError, match=r"time: .*0030"):
        load_profile(path)


def test_yaml_merges_and_refuses_endless_brackets(tmp_path: Path) -> None:
    path = tmp_path / "c.yml"
    path.write_text("a: &x {b: 1, d: 3}\nc: {<<: *x, d: 2}\n")
    assert read_yaml(path)["c"] == {"b": "1", "d": "2"}
    path.write_text(f"a: {'[' * 5000}")
    with pytest.raises(UserError, match=r"c.yml: not YAML"):
        read_yaml(path)


@pytest.mark.parametrize(
    "line", ['account: "a\\nb"', "qos: |\n  a\n  b", 'sbatch: {comment: "a\\nb"}']
)
def test_an_option_of_sbatch_is_one_line(line: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yml"
    path.write_text(f"executor: slurm\n{line}\n")
    with pytest.raises(UserError, match=f"{line.split(':')[0]}: must be one line"):
        load_profile(path)


@pytest.mark.parametrize(
    ("name", "what"), [("x" * 300, "300 bytes"), ("ü" * 128, "256 bytes"), ("a\nb", "control")]
)
def test_a_name_that_is_no_folder_is_refused(name: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"exp_name: .*{what}"):
        load_config(arguments("pretrain", tmp_path, exp_name=name))


def test_a_closed_output_or_a_removed_folder_ends_in_no_traceback(tmp_path: Path) -> None:
    def shell(line: str) -> subprocess.CompletedProcess[str]:
        command = f"{line} {shlex.quote(sys.executable)} -m bip data prepare-imagenet"
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True
        )

    closed = shell("exec >&-;")
    assert (closed.returncode, closed.stderr) == (0, "")
    gone = shell("mkdir gone && cd gone && rmdir ../gone;")
    assert gone.returncode == ExitCode.USER
    assert "current folder" in gone.stderr
    assert "cd into" in gone.stderr


# File systems


@pytest.mark.parametrize("number", [errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG])
def test_an_error_of_the_disk_is_one_line(number: int) -> None:
    code, text = outcome(OSError(number, os.strerror(number), "/x/y")) or (None, "")
    assert code == ExitCode.USER
    assert text.startswith("error: ")
    assert "/x/y" in text


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_hard_links_the_lock_still_excludes(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(os, "link", fails(number))
    first = RunLock(tmp_path)
    assert first.acquire()
    assert "hard links" in capsys.readouterr().out
    with pytest.raises(UserError, match="in use by"):
        RunLock(tmp_path).acquire()
    first.release()
    assert RunLock(tmp_path).acquire()


def test_without_symbolic_links_the_newest_checkpoint_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "symlink_to", fails(errno.EPERM))
    folder = CheckpointFolder(tmp_path)
    folder.save({"epoch": 3}, 7)
    assert torch.load(folder.newest, weights_only=True)["epoch"] == 3


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_a_sweep_can_be_read_and_says_what_is_missing(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert number in NOT_SUPPORTED
    (tmp_path / "x.lock").touch()
    monkeypatch.setattr(fcntl, "flock", fails(number))
    assert not Lock.is_held(tmp_path / "x.lock")
    with Lock.wait(tmp_path / "ledger.lock"):
        pass
    with pytest.raises(UserError, match=r"result_dir: .*no locks"):
        Lock.try_acquire(tmp_path / "x.lock")


# Terminals and containers


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_a_terminal_cannot_show_ends_no_command(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding=encoding))
    assert cli.run("bip", "bip", {"show": lambda: print("雪 größe")}, ["show"]) == 0
    sys.stdout.flush()
    assert b"\\u96ea" in printed.getvalue()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_compiled_passes_in_a_container_that_lets_us_write_nothing() -> None:
    """A user id without a name, no home, and code that is not his."""
    code = "import contextlib, numba, os, tempfile, torch, bip.pruning.select"
    code += "; os.setgid(55555); os.setuid(55555); import bip.pruning.kernels"
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "PYTHONPATH": str(ROOT)}
    env |= {"NUMBA_CACHE_DIR": "", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd="/", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_ranks_that_start_at_once_compile_once_on_the_nodes_own_disk(tmp_path: Path) -> None:
    code = "import numpy as np; from bip.pruning import kernels; one = np.ones(1, np.float32)"
    code += "; kernels.mask_out(1, one, np.ones(1, np.uint8), one)"
    env = os.environ | {"TMPDIR": str(tmp_path), "NUMBA_DEBUG_CACHE": "1", "NUMBA_CACHE_DIR": ""}
    ranks = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    printed = "".join(rank.communicate()[0] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert printed.count("data saved") == 1
    assert printed.count("data loaded") == 2
    folder = tmp_path / f"bip-numba-{os.getuid()}"
    assert all(str(folder) in line for line in printed.splitlines() if "saved" in line)


@pytest.mark.parametrize("direct", [True, False])
def test_compiled_passes_leave_torch_its_number_of_threads(direct: bool) -> None:
    """On a node of more cores than the task was given."""
    code = "import numpy as np, torch; from bip import compiled; from bip.pruning import kernels"
    code += "; torch.set_num_threads(2); n = 2 * compiled.THREAD_WORTH; one = np.ones(n, 'float32')"
    code += f"; parts = 2 if {direct} else compiled.share(n)"
    code += "; kernels.mask_out(parts, one, np.ones(n, np.uint8), one)"
    code += "; print(parts, torch.get_num_threads())"
    env = os.environ | {"NUMBA_NUM_THREADS": "5"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["2", "2"]


def test_a_job_that_was_suspended_while_it_compiled_stops_no_other(tmp_path: Path) -> None:
    folder = tmp_path / f"bip-numba-{os.getuid()}"
    folder.mkdir(mode=0o700)
    code = "import numpy as np; from bip.pruning import kernels; one = np.ones(1, np.float32)"
    code += "; import bip.compiled; bip.compiled.LOCK_SECONDS = 0.5"
    code += "; kernels.mask_out(1, one, np.ones(1, np.uint8), one)"
    env = os.environ | {"TMPDIR": str(tmp_path), "NUMBA_CACHE_DIR": ""}
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=120)


def test_compiled_code_is_taken_from_no_other_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own = Path(compiled._private_folder())
    assert own.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    (tmp_path / "bip-numba-4242").mkdir(mode=0o777)  # made by somebody else
    assert Path(compiled._private_folder()) not in (own, tmp_path / "bip-numba-4242")


# One value a channel


def test_batch_norm_cannot_train_on_one_value_a_channel(tmp_path: Path) -> None:
    network = models.build("resnet18", 10)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(UserError, match=r"batch_size: .*resnet18"):
        models.check_batch_of_one(network, "resnet18", 3, 8)
    models.check_batch_of_one(network, "resnet18", 3, 32)
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())
    config = load_config(arguments("pretrain", tmp_path, batch_size=4, accumulate=2))
    assert [config.trains_on_one_image(world) for world in (1, 2)] == [False, True]
