"""Both programs: exit codes from one table, commands as functions, help with the program's name."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
import tyro

from bip import cli
from bip.__main__ import main as bip
from bip.errors import ExitCode, LostWorker, Stopped, UserError, outcome
from launch.__main__ import main as launch
from tests.launch.conftest import ROOT


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("lr: too high"), 2, "error: lr: too high"),
        (LostWorker("worker 3 is gone"), 2, "error: worker 3 is gone"),
        (Stopped("SIGTERM", 7), 75, "stopped by SIGTERM at step 7"),
        (OSError(errno.ESTALE, "Stale file handle", "f"), 74, "Stale file handle"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_one_table_for_both_programs(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("bip.exporting.export.export", fail)
    monkeypatch.setattr("launch.__main__.read_status", fail)
    assert bip(["export", "a", "b"]) == launch(["status", "folder"]) == code
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(message in line for line in lines)


def test_what_is_no_users_error_keeps_its_traceback() -> None:
    assert outcome(ValueError("bug")) is None
    assert outcome(OSError(errno.EBADF, "Bad file descriptor")) is None


def command(
    folder: Path,
    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")] = "",
    json: bool = False,
    *,
    given: str = "by main",
) -> int:
    """What it does.

    Args:
        folder: where.
    """
    assert given == "by main"
    assert isinstance(folder, Path)
    return len(f"{folder}{run}") + 100 * json


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("f", 1), ("f rr", 3), ("f --json", 101), ("--json f rr", 103), ("--folder f", 1),
        ("--folder=f rr", 3), ("f --no-json", 1),
    ],
)  # fmt: skip
def test_a_parameter_is_given_by_position_or_as_a_flag(words: str, code: int) -> None:
    assert cli.call({"c": command}, ["c", *words.split()], "prog") == code


@pytest.mark.parametrize("words", ["c", "c f rr x", "c f --jsn", "c f --given x", "d"])
def test_bad_words_are_one_line(words: str) -> None:
    with pytest.raises(UserError) as error:
        cli.call({"c": command}, words.split(), "prog")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("called", "main", "name", "nested"),
    [
        ("/x/bin/bip", bip, "bip", "data info"),
        ("/x/bip/__main__.py", bip, "python -m bip", "data info"),
        ("/x/bin/bip-launch", launch, "bip-launch", "doctor"),
        ("/x/launch/__main__.py", launch, "python -m launch", "series"),
    ],
)
def test_help_starts_with_the_programs_name(
    called: str,
    main: Any,
    name: str,
    nested: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: {name} COMMAND")
    assert main([]) == 2
    with pytest.raises(SystemExit) as stop:
        main([*nested.split(), "--help"])
    assert not stop.value.code
    assert f"usage: {name} {nested} " in capsys.readouterr().out


def test_a_misspelt_command_gets_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["serie"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'serie' (perhaps you meant series)" in line


def test_a_closed_pipe_ends_a_command_quietly() -> None:
    """As in `bip --help | head`."""
    code = (
        "from bip import cli\n"
        "def c() -> None:\n"
        "    'Print.'\n"
        "    print('x' * 100000, flush=True)\n"
        "raise SystemExit(cli.run('bip', 'bip', {'c': c}, ['c']))"
    )
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, cwd=ROOT, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (ExitCode.BROKEN_PIPE, b"")
