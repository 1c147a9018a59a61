"""The README's two commands are what is tested."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.conftest import ROOT

README = (ROOT / "README.md").read_text()


def main_command() -> str:
    """The README's first command, one line."""
    return re.findall(r"```bash\n(.*?)```", README, re.DOTALL)[0].strip()


@pytest.mark.slow
def test_the_main_command_prunes_a_series(tmp_path: Path) -> None:
    """On a shortened series, with this environment: installing is the CI's own part."""
    pytest.importorskip("sklearn", reason="the Digits images come with scikit-learn")
    make, install, run = main_command().split(" && ")
    assert make == "python3 -m venv .venv"
    assert install.startswith(".venv/bin/pip install")
    words = shlex.split(run)
    assert words[0] == ".venv/bin/python"
    words[0] = sys.executable
    assert words[words.index("--series") + 1] == "unstructured"
    words[words.index("--series") + 1] = "0.5,0.0092"
    done = subprocess.run(
        [*words, "--result-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "0.0092" in done.stdout
    assert len(list(tmp_path.glob("digits/prune/*/result.json"))) == 2
    assert "fine" in done.stderr + done.stdout, "k < 0.01 without fine-tuning gets advice"


def test_ci_runs_the_readmes_test_command() -> None:
    assert "\nbash tests/run.sh\n" in README
    assert "bash tests/run.sh" in (ROOT / ".ci" / "run").read_text()
