"""The commands of the README and its pages are the programs' own, with flags that exist; the first
series runs."""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bip.__main__ import main as bip
from launch.__main__ import main as launch
from tests.launch.conftest import ROOT

KNOWN = [("bip", name) for name in ("train", "evaluate", "export", "compare", "profile")]
KNOWN += [("bip", "data build-lmdb"), ("bip", "data convert")]
KNOWN += [("launch", name) for name in ("series", "status", "report", "logs", "cancel", "doctor")]
FOREIGN = {"--cpus-per-task", "--gpus-per-node", "--ntasks-per-node", "--time"}  # of sbatch
FOREIGN |= {"--no-deps"}  # of pip
PROGRAMS = {"bip": bip, "launch": launch, "bip-launch": launch}


PAGES = [ROOT / name for name in ("README.md", "configs/README.md", "slurm/README.md")]


def commands() -> Iterator[list[str]]:
    """The words of each command in a shell block."""
    text = "\n".join(page.read_text() for page in PAGES)
    for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words: list[str] = []
            for word in [*shlex.split(line, comments=True), "&&"]:
                if word not in ("&&", "||", ";", "|", "&"):
                    words.append(word)
                elif words:
                    yield words
                    words = []


def of_program(words: list[str]) -> list[str]:
    """The program and its arguments, if it is one of the project's; else []."""
    words = [word for at, word in enumerate(words) if at or "=" not in word]
    if len(words) > 2 and Path(words[0]).name.startswith("python") and words[1] == "-m":
        words = words[2:]
    return words if Path(words[0]).name in PROGRAMS else []


OURS = [words for words in map(of_program, commands()) if words]


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_a_command_has_flags_that_exist(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    program, *rest = words
    nested = 2 if rest[0] == "data" else 1
    with pytest.raises(SystemExit) as stop:
        PROGRAMS[Path(program).name]([*rest[:nested], "--help"])
    assert not stop.value.code
    known = re.findall(r"--[\w-]+", capsys.readouterr().out)
    flags = {word.split("=")[0] for word in rest if word.startswith("--")}
    assert {flag.replace("_", "-") for flag in flags} <= {*known}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    """Flags in its text are of a command of ours, or of a tool that it names; links and files."""
    text = page.read_text()
    known = {*FOREIGN}
    for program, name in KNOWN:
        with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
            PROGRAMS[program]([*name.split(), "--help"])
        known |= {*re.findall(r"--[\w-]+", out.getvalue())}
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    flags = {
        flag.replace("_", "-") for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*(?![\w.-])", prose)
    }
    assert flags <= known
    named = re.findall(r"\]\(([^)#:]+)\)", text)
    named += re.findall(r"`((?:bip|launch|configs|slurm|tests)/[\w./-]+)`", text)
    named = [name for name in named if not re.search("NAME|FAMILY", name)]
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_readme_stays_short() -> None:
    assert len(PAGES[0].read_text().splitlines()) <= 220


def test_there_are_commands_of_both_programs_and_their_files_exist() -> None:
    assert {Path(words[0]).name for words in OURS} >= {"bip", "launch"}
    named = {word for words in commands() for word in words}
    files = {word for word in named if word.startswith(("configs/", "slurm/", "tests/"))}
    assert [name for name in files if not (ROOT / name).exists()] == []


@pytest.mark.slow
def test_the_main_command_runs_a_series(tmp_path: Path) -> None:
    """The first `series`, with fewer k and one more stage: installing is the CI's own part."""
    pytest.importorskip("sklearn", reason="the Digits images come with scikit-learn")
    words = list(next(words for words in OURS if words[1] == "series"))
    words[words.index("--series") + 1] = "0.5,0.1"
    words[words.index("--stages") + 1] += ",finetune"

    def launch(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "launch", *words], cwd=ROOT, capture_output=True, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=400,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    line = [*words[1:], "--epochs", "1", "--result-dir", str(tmp_path)]
    launch(*line)
    rows = json.loads(launch("status", *map(str, tmp_path.iterdir()), "--json"))
    assert [(row["stage"], row["k"], row["state"]) for row in rows] == [
        ("pretrain", "1", "done"),
        *((stage, k, "done") for stage in ("prune", "finetune") for k in ("0.5", "0.1")),
    ]
    results = [json.loads((Path(row["folder"]) / "result.json").read_text()) for row in rows]
    for row, result in zip(rows, results, strict=True):
        assert (result["kept"], result["epochs"], result["top1"]) == (row["kept"], 1, row["top1"])
    one, other, *tuned = [result["mask_sha256"] for result in results[1:]]
    assert one != other
    assert tuned == [one, other], "each fine-tuning has the mask of its own pruning"
    assert "5 of 5 runs were finished before" in launch(*line)


def test_ci_runs_the_readmes_test_command() -> None:
    assert ["bash", "tests/run.sh"] in commands()
    assert "bash tests/run.sh" in (ROOT / ".ci" / "run").read_text()
