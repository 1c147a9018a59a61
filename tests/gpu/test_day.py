"""The GPU day's rehearsal: it keeps each result, goes on where it stopped, and never pretends."""

import json
from pathlib import Path

import pytest
import torch

from tests.gpu import day

ITEMS = ("tests-loaders", "one-rank", "data-cifar")


def rehearse(out: Path, *words: str) -> int:
    return day.main(["--rehearse", "--out", str(out), *words])


@pytest.fixture(autouse=True)
def _same_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_a_rehearsal_is_labelled_everywhere_and_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rehearse(tmp_path, "--only", ITEMS[0], "--minutes", "0") == 0
    assert "no time left" in capsys.readouterr().out
    assert not [*tmp_path.glob("*.json")]
    assert rehearse(tmp_path, "--only", ",".join(ITEMS[:2])) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert rehearse(tmp_path, "--only", ",".join(ITEMS)) == 0
    assert capsys.readouterr().out.count("done before") == 2
    assert before == {path: path.stat().st_mtime_ns for path in before}
    records = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ITEMS}
    for record in records.values():
        assert record["device"].startswith("rehearsal on CPU")
        assert record["date"]
        assert "--rehearse" in record["command"]
    assert records["tests-loaders"]["figures"]["skipped"] > 0
    assert records["one-rank"]["figures"]["ddp_over_plain"] > 0
    assert records["data-cifar"]["figures"]["memory_over_torchvision"] > 0
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.startswith(f"## {records['one-rank']['date'][:10]}, rehearsal on CPU")
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > len(ITEMS)
    assert all("(rehearsal on CPU)" in row for row in rows)


def test_an_item_that_is_cut_or_fails_is_run_again(tmp_path: Path) -> None:
    options = day.parse(["--rehearse", "--out", str(tmp_path)])
    cut = day.run_item("step-resnet20s-eager", options, 0.5)
    assert "cut after" in cut["error"]
    assert not day.is_done(cut)
    assert not day.is_done({"figures": {"partial": True}})
    missing = day.run_item("no-such-item", options, 60)
    assert "KeyError: 'no-such-item'" in missing["error"]


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["--only", "step"], "step-resnet18-eager"),
        (["--rehearse"], "give another folder"),
        pytest.param(
            [], "--rehearse", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
        ),
    ],
)
def test_what_cannot_run_is_one_line(
    words: list[str], remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one-rank.json").write_text(json.dumps({"device": "another GPU", "figures": {}}))
    assert day.main(["--out", str(tmp_path), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert remedy in line
