"""`bip profile`: sections that add up, a trace that names them, nothing else written."""

import json
import re
import time
from pathlib import Path

import pytest
import torch

from bip.__main__ import main
from bip.profiling import REST, Sections
from tests.runs import CONFIGS


def profile(tmp_path: Path, kind: str, *more: str) -> int:
    place = ["--result-dir", str(tmp_path / "results"), "--iterations", "2"]
    return main(["profile", "--configs", str(CONFIGS / f"{kind}.yml"), *place, *more])


@pytest.mark.parametrize(
    ("kind", "steps", "has_threshold"), [("bip", 2, True), ("finetune", 1, False)]
)
def test_an_iteration_is_compared_with_dense_steps(
    kind: str, steps: int, has_threshold: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.json"
    assert profile(tmp_path, kind, "--trace", str(trace)) == 0
    printed = capsys.readouterr().out
    assert f"{steps} dense step" in printed
    times = {name: float(ms) for name, ms in re.findall(r"^  (\w+) +([\d.]+)", printed, re.M)}
    assert ("threshold" in times) == has_threshold
    assert times.keys() >= {"data", "forward", "backward", "update"}
    assert times.pop("all") == pytest.approx(sum(times.values()), abs=0.05)
    assert min(times["forward"], times["backward"]) > 0
    named = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert named >= {"data", "forward", "backward"}
    assert [*tmp_path.iterdir()] == [trace], "nothing but the trace is written"


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (("--iterations", "0"), "iterations"),
        (("--trace", "/nonexistent/trace.json"), "trace"),
        (("--source-net", "/nonexistent.pth"), "nonexistent.pth"),
        (("--iteration", "3"), "--iterations"),
    ],
)
def test_wrong_flags_are_one_line(
    flags: tuple[str, ...], key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile(tmp_path, "bip", *flags) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert key in message


def test_time_in_an_inner_section_counts_there_alone() -> None:
    sections = Sections(torch.device("cpu"))
    inner = sections.around("inner", lambda: time.sleep(0.05))
    inner()
    began = time.perf_counter()
    sections.restart()
    with sections.section("outer"):
        inner()
        time.sleep(0.02)
        inner()
    found = sections.take()
    assert {*found} == {"outer", "inner", REST}
    assert found["inner"] >= 0.1
    assert found["outer"] >= 0.02
    assert sum(found.values()) <= time.perf_counter() - began
