"""The report of a real series on Digits: tables, figures, and the page in a real browser."""

import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bip import run
from bip.attempts import Attempts
from bip.exporting.compare import iou
from bip.files import atomic_write_json
from bip.training.checkpoint import layer_masks, read_checkpoint
from launch.__main__ import main
from launch.plan import make_plan
from launch.report.gather import gather
from launch.sweep import Sweep
from tests.launch.conftest import DIGITS, ROOT
from tests.launch.test_kept_sweep import kept as kept

PUBLISHED = [*(ROOT / "configs" / "published").glob("*.csv")]
KS, SEEDS = ("0.5", "0.1", "0.02"), ("1", "2")
HEADS = {
    "runs": "k,seed,run_id,kept,total,sparsity,top1,top5,epochs,forward_backwards,seconds,ranks,"
    "device,attempts,source",
    "curves": "k,sparsity,seeds,top1_mean,top1_std,dense_top1",
    "tickets": "dense_top1,dense_std,dense_seeds,k,sparsity,top1",
    "training": "k,seed,run_id,epoch,test_top1,test_loss,train_loss",
    "layers": "k,seed,run_id,position,layer,kept,total,keep_ratio",
    "costs": "runs,epochs_mean,forward_backwards_mean,seconds_mean,device_hours,device",
}
HEADS = {name: "folder,dataset,arch,layer_type,method,settings," + h for name, h in HEADS.items()}
HEADS["attempts"] = "folder,run_id,number,start,end,waited,cause,host"
HEADS["overlaps"] = "kind,a,b,k_a,k_b,seed,iou"


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods x three k x two seeds, an epoch each, and an attempt that was preempted."""
    pytest.importorskip("sklearn", reason="the Digits images come with scikit-learn")
    place = {"result_dir": tmp_path_factory.mktemp("report"), "exp_name": "<b>$digits$"}
    axes = {"series": ",".join(KS), "seeds": ",".join(SEEDS), "trainers": "bip,omp"}
    plan = make_plan(
        {"configs": DIGITS / "bip.yml", "stages": "pretrain,prune", "max_steps": 6} | place | axes
    )
    Sweep(plan.folder).add(plan.runs)
    first = Attempts(plan.runs[0].config.run_folder)
    first.path.parent.mkdir(parents=True)
    first.record("start", host="node1", world=1, device="cpu")
    first.record("end", cause="SIGTERM", step=3)
    for planned in plan.runs:
        run.train(planned.config)
    return plan.folder


@pytest.fixture
def copy(series: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(series, tmp_path / "copy", symlinks=True))


@pytest.fixture(scope="module")
def out(series: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    assert main(["report", str(series), "--out", str(folder)]) == 0
    return folder


def rows(out: Path, name: str) -> list[dict[str, str]]:
    with open(out / f"{name}.csv", newline="") as stream:
        return [*csv.DictReader(stream)]


def result(folder: Path, row: dict[str, str]) -> Any:
    return json.loads((Path(row["source"]) / "result.json").read_text())


def test_tables_have_their_columns_in_both_formats(out: Path) -> None:
    from pyarrow import parquet

    for name, head in HEADS.items():
        text = (out / f"{name}.csv").read_text().splitlines()
        assert text[0] == head
        table = parquet.read_table(out / f"{name}.parquet")
        assert (",".join(table.column_names), table.num_rows) == (head, len(text) - 1)


def test_a_curve_is_the_mean_and_deviation_of_the_results_over_seeds(out: Path) -> None:
    runs = rows(out, "runs")
    assert len(runs) == 2 + 2 * len(KS) * len(SEEDS)
    for row in runs:
        assert float(row["top1"]) == result(out, row)["top1"]
    dense = statistics.fmean(float(r["top1"]) for r in runs if r["method"] == "dense")
    points = rows(out, "curves")
    assert len(points) == 2 * len(KS)
    for point in points:
        same = [r for r in runs if (r["method"], r["k"]) == (point["method"], point["k"])]
        values = [float(r["top1"]) for r in same]
        assert float(point["top1_mean"]) == pytest.approx(statistics.fmean(values))
        assert float(point["top1_std"]) == pytest.approx(statistics.stdev(values))
        assert float(point["dense_top1"]) == pytest.approx(dense)


def test_the_ticket_is_the_sparsest_k_that_matches_the_dense_accuracy(copy: Path) -> None:
    def with_top1(values: dict[float, float]) -> float | None:
        for path in copy.glob("prune/*-omp-*/result.json"):
            content = json.loads(path.read_text())
            atomic_write_json(path, content | {"top1": values[content["k"]]})
        (ticket,) = (t for t in gather([copy]).tickets() if t.method == "omp")
        return ticket.k

    assert with_top1({0.5: 100.0, 0.1: 100.0, 0.02: 0.0}) == 0.1
    assert with_top1({0.5: 100.0, 0.1: 0.0, 0.02: 100.0}) == 0.02
    assert with_top1(dict.fromkeys((0.5, 0.1, 0.02), 0.0)) is None


def test_layers_and_overlaps_are_those_of_the_checkpoints(series: Path, out: Path) -> None:
    masks = {}
    for row in rows(out, "runs")[2:]:
        state = read_checkpoint(Path(row["source"]) / "checkpoint" / "model_best.pth.tar")
        found = layer_masks(state)
        masks[row["method"], row["k"], row["seed"]] = found
        mine = [r for r in rows(out, "layers") if r["run_id"] == row["run_id"]]
        assert {r["layer"]: int(r["kept"]) for r in mine} == {
            name.removesuffix(".weight"): int(mask.sum()) for name, mask in found.items()
        }
        assert sum(int(r["kept"]) for r in mine) == int(row["kept"])

    def flat(method: str, k: str, seed: str) -> Any:
        import torch

        return torch.cat([mask.flatten() for mask in masks[method, k, seed].values()])

    overlaps = rows(out, "overlaps")
    assert len(overlaps) == 2 * 2 * 2 + 3 * 2  # neighbours; methods
    for row in overlaps:
        a, b = flat(row["a"], row["k_a"], row["seed"]), flat(row["b"], row["k_b"], row["seed"])
        assert float(row["iou"]) == pytest.approx(iou(a, b))


def test_attempts_have_their_cause_and_the_time_waited(out: Path) -> None:
    attempts = rows(out, "attempts")
    assert len(attempts) == 3 + 2 * len(KS) * len(SEEDS)
    assert [row["cause"] for row in attempts[:2]] == ["SIGTERM", "finished"]
    assert float(attempts[1]["waited"]) >= 0 == len(attempts[0]["waited"])


def test_figures_and_latex_are_written(out: Path) -> None:
    names = {"accuracy", "training", "timeline", "layers", "costs", "overlaps"}
    assert {path.stem for path in out.glob("*.png")} == names
    assert {path.stem for path in out.glob("*.pdf")} == names
    assert all((out / f"{n}.png").read_bytes().startswith(b"\x89PNG") for n in names)
    assert all((out / f"{n}.pdf").read_bytes().startswith(b"%PDF") for n in names)
    text = (out / "accuracy.tex").read_text()
    assert text.count(r"\\") == 1 + len(KS)
    assert text.count(r"\pm") == 2 * len(KS)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {  # what is damaged: (how, whether the run stays without its layers)
    "result.json cut": (lambda f: truncate(f / "result.json"), False),
    "no accuracy": (lambda f: atomic_write_json(f / "result.json", {"top1": None}), False),
    "no object": (lambda f: atomic_write_json(f / "result.json", []), False),
    "checkpoint cut": (lambda f: truncate((f / "checkpoint/checkpoint.pth.tar").resolve()), True),
    "checkpoint gone": (lambda f: shutil.rmtree(f / "checkpoint"), True),
    "another mask": (
        lambda f: shutil.copy(
            next(f.parent.glob("*bilevel*k0.1-s2*")) / "checkpoint" / "model_best.pth.tar",
            (f / "checkpoint/checkpoint.pth.tar").resolve(),
        ),
        True,
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_is_skipped_and_named(copy: Path, damage: str) -> None:
    folder = next(copy.glob("prune/*omp*k0.1-s1*"))
    harm, stays = DAMAGE[damage]
    before = gather([copy])
    harm(folder)
    facts = gather([copy])
    assert [line for line in facts.skipped if folder.name in line] == facts.skipped != []
    assert len(facts.runs) == len(before.runs) - (not stays)
    assert {row.run_id for row in facts.layers} == {r.run_id for r in before.runs} - {folder.name}


def test_damaged_logs_leave_out_only_their_lines(copy: Path) -> None:
    for path in copy.glob("*/*/*.jsonl"):
        path.write_bytes(b'[]\nnull\n{"event": "epoch", "epoch": "x"}\n{}\n' + path.read_bytes())
        with open(path, "ab") as stream:
            stream.write(b'{"event": "end", "time": 3}\n{"event": "start"}\n{"event": "ep')
    facts = gather([copy])
    assert len(facts.training) == 2 + 2 * len(KS) * len(SEEDS)
    assert facts.skipped == []


def test_settings_that_differ_make_curves_of_their_own(copy: Path) -> None:
    place = {"result_dir": copy.parent, "exp_name": copy.name, "stages": "prune"}
    source = next(copy.glob("pretrain/*s1-*/checkpoint/model_best.pth.tar"))
    more = {"lr": 0.01, "series": "0.5", "configs": DIGITS / "omp.yml", "source_net": source}
    plan = make_plan(more | place | {"max_steps": 6, "seeds": "1"})
    Sweep(plan.folder).add(plan.runs)
    run.train(plan.runs[0].config)
    labels = {*gather([copy]).labels().values()}
    assert {"bip", "omp, lr 0.01", "omp, lr 0.1"} == labels


def test_several_folders_stand_beside_each_other(series: Path, copy: Path) -> None:
    facts = gather([series, copy, series])
    assert len(facts.runs) == 2 * 2 * len(KS) * len(SEEDS), "a folder given twice counts once"
    assert {label.split(", ")[1] for label in facts.labels().values()} == {series.name, "copy"}


def test_published_figures_have_a_source_and_can_be_reported(tmp_path: Path) -> None:
    facts = gather(PUBLISHED)
    assert len(PUBLISHED) >= 4
    assert all(row.source for row in facts.runs)
    ticket = next(
        t for t in facts.tickets()
        if (t.folder, t.dataset, t.arch, t.method) == ("bip_paper", "CIFAR10", "resnet20s", "imp")
    )  # fmt: skip
    assert (ticket.sparsity, ticket.top1, ticket.dense_top1) == (0.672, 92.22, 92.12)
    assert main(["report", *map(str, PUBLISHED), "--out", str(tmp_path)]) == 0
    assert {path.stem for path in tmp_path.glob("*.png")} == {"accuracy", "costs"}


def test_published_figures_of_other_networks_are_left_out(series: Path, tmp_path: Path) -> None:
    own = tmp_path / "paper.csv"
    head = "dataset,arch,layer_type,method,sparsity,top1,dense_top1,minutes,source\n"
    own.write_text(head + "Digits,digits_net,unstructured,bip,0.9,97,98,,a paper\n")
    facts = gather([series, own, *PUBLISHED])
    assert {row.folder for row in facts.runs} == {series.name, "paper"}
    assert {Path(line.split(":")[0]) for line in facts.skipped} == {*PUBLISHED}


HEAD = "dataset,arch,layer_type,method,sparsity,top1,dense_top1,minutes,source\n"
WRONG = {
    "arch": "dataset\nDigits\n",
    "top1": HEAD + "Digits,digits_net,unstructured,bip,0.9,x,98,,a\n",
    "sparsity": HEAD + "Digits,digits_net,unstructured,bip,1.5,97,98,,a\n",
    "source": HEAD + "Digits,digits_net,unstructured,bip,0.9,97,98,,\n",
}


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_csv_is_one_line_that_names_it(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.csv"
    path.write_text(WRONG[key])
    assert main(["report", str(path), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "wrong.csv: line 2" in message
    assert key in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "case", ["no sweep", "nothing finished", "out is a file", "no out", "no folder"]
)
def test_nothing_to_report_is_one_line(
    case: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["report", str(copy), "--out", str(tmp_path / "out")]
    remedy = "--out"
    if case == "no sweep":
        argv[1], remedy = str(tmp_path), "series.json"
    elif case == "nothing finished":
        for path in copy.glob("*/*/result.json"):
            path.unlink()
        remedy = "launch status"
    elif case == "out is a file":
        (tmp_path / "out").touch()
        remedy = "out:"
    elif case == "no folder":
        argv[1:], remedy = [], "FOLDER"
    else:
        argv[1:] = [str(PUBLISHED[0])]
    assert main(argv) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert remedy in message


def test_without_the_extra_it_is_named(
    series: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["report", str(series), "--out", str(tmp_path / "out")]) == 2
    assert "bip-hpc[report]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_sweep_of_version_0_1_0_is_reported(kept: Path) -> None:
    facts = gather([kept])  # its fixture is without the finished run's checkpoint
    assert [(row.method, row.k) for row in facts.runs] == [("bip", 0.5)]
    assert facts.unfinished == {"kept": 3}
    assert ["checkpoint" in line for line in facts.skipped] == [True]


@pytest.fixture(scope="module")
def chromium() -> str:
    """The system's browser; as root on Debian it is installed where it is missing."""
    names = ("chromium", "chromium-browser", "google-chrome")
    if not any(map(shutil.which, names)) and os.geteuid() == 0 and shutil.which("apt-get"):
        options = ["-qy", "-o", "DPkg::Lock::Timeout=120"]
        subprocess.run(["apt-get", "-q", "update"], check=False)
        subprocess.run(
            ["apt-get", *options, "install", "--no-install-recommends", "chromium"], check=False
        )
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("NO BROWSER: the page is not tested; install chromium")
    return found


@pytest.fixture
def page(out: Path, chromium: str) -> Iterator[Any]:
    """The page, opened from its file. Errors and requests of any other address fail the test."""
    from playwright.sync_api import sync_playwright

    trouble: list[str] = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda r: r.url.startswith(("http", "ws")) and trouble.append(r.url))
        page.goto((out / "report.html").as_uri())
        page.wait_for_selector("body[data-ready]", timeout=60_000)
        yield page
        browser.close()
    assert trouble == []


def legend(page: Any) -> list[str]:
    return [text for text in page.locator("#accuracy .legendtext").all_text_contents() if text]


def test_the_page_shows_k_and_accuracy_and_filters(out: Path, page: Any, tmp_path: Path) -> None:
    assert page.title() == "Pruning report"
    assert "14 finished runs" in page.inner_text("#summary")
    point = next(r for r in rows(out, "curves") if (r["method"], r["k"]) == ("bip", "0.5"))
    page.locator("#accuracy .scatterlayer .trace").first.locator(".point").first.hover(force=True)
    shown = page.locator("#accuracy .hovertext").text_content(timeout=10_000)
    assert "k 0.5" in shown
    assert f"accuracy {float(point['top1_mean']):.2f}" in shown
    assert {"bip", "omp"} <= {*legend(page)}
    assert page.locator("#differences tr").count() == 1 + len(KS)
    assert page.locator("#layers .heatmaplayer image").count() == 1
    assert page.locator("#attempts .barlayer .point").count() >= 14
    page.get_by_label("single runs").check()
    page.get_by_label("omp").uncheck()
    assert "omp" not in legend(page)
    assert "bip" in legend(page)
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 20_000
