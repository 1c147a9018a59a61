"""The wheel, installed in an empty environment and used in an empty folder."""

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = (
    "configs/**/*.yml",
    "configs/**/*.csv",
    "slurm/task.sh",
    "slurm/profiles/*",
    "slurm/templates/*",
)
Run = Callable[[str], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools writes to the tree, and packs what an old build left in it."""
    folder = tmp_path_factory.mktemp("wheel")
    parts = ("bip", "launch", "configs", "slurm", "*.py", "*.cfg", "*.toml", "README.md", "LIC*")
    paths = [path for part in parts for path in ROOT.glob(part)]
    subprocess.run(["cp", "-r", *paths, "-t", folder], check=True)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (built,) = folder.glob("dist/*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel. It sees the dependencies of this one, but not an
    editable install: those start with a .pth file, which is only read in the own environment."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "dependencies.pth").write_text("\n".join(others))
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "-q"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--no-compile", wheel], check=True)
    return folder


@pytest.fixture
def run(environment: Path, tmp_path: Path) -> Run:
    """Run a script of the environment in an empty folder; it must succeed."""
    kept = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    path = f"{tmp_path / 'bin'}:{environment / 'bin'}:{os.environ['PATH']}"

    def run_script(command: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command.split(), cwd=tmp_path, env=kept | {"PATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run_script


def test_it_holds_all_source_files_and_all_shipped_files(wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    code = {str(path.relative_to(ROOT)) for part in ("bip", "launch")
            for path in (ROOT / part).rglob("*.py")}  # fmt: skip
    files = {str(path.relative_to(ROOT)) for part in SHIPPED for path in ROOT.glob(part)}
    missing = (code | {"bip/py.typed", "launch/py.typed", "launch/report/page.html"}) - packed
    assert not missing, "a package without __init__.py?"
    assert {f"bip/_files/{name}" for name in files} <= packed
    assert {name.split("/")[0] for name in packed if ".dist-info" not in name} == {"bip", "launch"}


@pytest.mark.parametrize(("script", "module"), [("bip", "bip"), ("bip-launch", "launch")])
def test_the_scripts_are_the_modules(script: str, module: str, run: Run) -> None:
    own, other = (run(f"{name} --help").stdout for name in (script, f"python -m {module}"))
    assert own.replace(f"{script} ", f"python -m {module} ") == other


def test_a_shipped_file_is_found_by_its_name_in_the_repository(run: Run) -> None:
    for name in ("configs/CIFAR10/bip.yml", "slurm/dev/cluster.sh"):
        path = Path(run(f"python -m bip.shipped {name}").stdout.strip())
        assert path.read_bytes() == (ROOT / name).read_bytes()


def test_it_trains(run: Run, tmp_path: Path) -> None:
    """With its own settings file, found by the name that it has in the repository."""
    pytest.importorskip("sklearn", reason="the Digits images come with scikit-learn")
    done = run("bip train --configs configs/Digits/pretrain.yml --exp-name x --max-steps 2")
    assert done.stderr.count("_files/configs/Digits/pretrain.yml") == 1, "printed once"
    assert len(list(tmp_path.glob("trained_models/x/pretrain/*/result.json"))) == 1


def commands(folder: Path, **lines: str) -> None:
    """Stand-ins for SLURM's commands, by the shell line of each."""
    (folder / "bin").mkdir()
    for name, line in lines.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{line}\n")
        (folder / "bin" / name).chmod(0o755)


def test_its_templates_find_task_sh(run: Run, tmp_path: Path) -> None:
    commands(tmp_path, srun='echo "$@"')
    for name in ("run", "series"):
        template = run(f"python -m bip.shipped slurm/templates/{name}.sbatch").stdout.strip()
        done = run(f"env SLURM_CPUS_PER_TASK=1 SLURM_ARRAY_TASK_ID=2 bash {template} --exp-name x")
        assert "-m bip train" in done.stdout


def test_its_batch_script_finds_task_sh_and_the_code(
    run: Run, tmp_path: Path, environment: Path
) -> None:
    """SLURM's commands are stand-ins: a partition, an empty queue, and sbatch keeps the script."""
    pytest.importorskip("sklearn", reason="the Digits images come with scikit-learn")
    keep = f'cp "$1" {tmp_path}/script; echo "Submitted batch job 7"'
    silent = dict.fromkeys(("srun", "squeue", "scancel", "sacctmgr"), "")
    commands(tmp_path, sbatch=keep, scontrol="echo PartitionName=low State=UP", **silent)
    (tmp_path / "mine.yml").write_text("{executor: slurm, partition: low}")
    run(
        "bip-launch series --configs configs/Digits/pretrain.yml --profile mine.yml --no-wait"
        " --exp-name z"
    )
    script = (tmp_path / "script").read_text()
    (task,) = re.findall(r"^source (\S+)", script, re.MULTILINE)
    assert Path(task).read_bytes() == (ROOT / "slurm" / "task.sh").read_bytes()
    (code,) = re.findall(r"PYTHONPATH=([^\s$]+)\$", script)
    assert (tmp_path / "trained_models" / "z" / "code") in Path(code).parents
    # The snapshot is complete: its default profile lies beside its own code.
    load = "import launch.profile as p; print(p.__file__, p.load_profile(None).executor)"
    done = subprocess.run(
        [environment / "bin" / "python", "-c", load], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": code, "PYTHONSAFEPATH": "1"},
    )  # fmt: skip
    assert done.stdout == f"{code}/launch/profile.py local\n", done.stderr
