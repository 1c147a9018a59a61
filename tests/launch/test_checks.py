"""What `launch doctor` tries on a machine, and its verdict."""

from dataclasses import replace
from pathlib import Path

import pytest

from bip.errors import UserError
from launch import checks
from launch.__main__ import main
from launch.checks import Settings
from launch.doctor import lines_of, verdict
from launch.profile import Finding
from tests.launch.conftest import DIGITS

BIP = str(DIGITS / "bip.yml")


def test_a_machine_is_tried_and_the_last_line_is_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn", reason="the Digits images come with scikit-learn")
    path = tmp_path / "p.yml"
    path.write_text("executor: local\ncpus_per_task: 9999\n")
    words = ["doctor", str(path), "--folder", str(tmp_path / "not" / "yet")]
    assert main([*words, "--configs", BIP]) == 0
    lines = capsys.readouterr().out.splitlines()
    subjects = [line[9:].partition(":")[0] for line in lines if line[0] != " "]
    assert subjects[:2] == ["CPUs", "launch cancel"]
    assert [*checks.CHECKS] == [name for name in subjects if name in checks.CHECKS]
    assert lines[-1] == "verdict  safe, but see the warnings: CPUs"
    # A path is not cut.
    assert all(len(line) <= 80 or len(line.split()) == 1 for line in lines)
    assert [*tmp_path.iterdir()] == [path], "nothing is left"
    assert main([*words, "--arch", "x"]) == 2
    assert main([*words, "--configs", "none.yml"]) == 2


@pytest.mark.parametrize(
    ("seconds", "level"), [(None, "ok"), (1e9, "ok"), (1e-9, "error")], ids=str
)
def test_a_save_of_real_size_is_compared_with_the_time_there_is(
    seconds: float | None, level: str, tmp_path: Path
) -> None:
    settings = Settings(str(tmp_path), seconds=seconds, configs=BIP, arch="resnet20s")
    (found,) = checks.check_save(settings)
    assert found.level == level
    # θ, scores and the momentum of both, 4 bytes each, of the 270 thousand weights.
    assert int(found.text.split()[1]) == 4
    assert ("GraceTime" in found.text) == (level == "error")


def test_a_check_that_fails_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    (found,) = checks.check_ranks(Settings(str(tmp_path)))
    assert found.level == "error"
    assert "GLOO_SOCKET_IFNAME" in found.text
    settings = Settings(str(tmp_path), configs=BIP.replace("Digits", "CIFAR10"))
    with pytest.raises(UserError, match="build-lmdb"):
        next(checks.check_images(replace(settings, data_dir=str(tmp_path))))


@pytest.mark.parametrize(
    ("script", "named"),
    [("kill -SEGV $$", "ranks: the check did not end: ended by signal 11"),
     ("echo no driver >&2; exit 3", "ranks: the check did not end: no driver")],
)  # fmt: skip
def test_a_check_that_crashes_is_an_error(script: str, named: str, tmp_path: Path) -> None:
    begun = f"""echo noise; echo '{checks.MARK}{{"begins": "ranks"}}'; """
    (found,) = checks.findings(Settings(str(tmp_path)), ["bash", "-c", begun + script])
    assert found == Finding("error", named)


@pytest.mark.parametrize(
    ("levels", "text"),
    [((), "safe"), (("warning",), "safe, but see the warnings: b"),
     (("warning", "error", "error"), "not safe: b")],
)  # fmt: skip
def test_the_verdict_names_what_is_wrong(levels: tuple[str, ...], text: str) -> None:
    found = [Finding("ok", "a: fine"), *(Finding(level, "b: wrong") for level in levels)]  # type: ignore[arg-type]
    assert verdict(found, Settings("", configs="x")) == f"verdict  {text}"
    assert "--configs FILE" in verdict(found, Settings(""))


def test_a_long_finding_is_folded_and_nothing_is_cut() -> None:
    text = "partition low: " + "a-word of it " * 20
    lines = lines_of(Finding("warning", text)).splitlines()
    # A path is not cut.
    assert all(len(line) <= 80 or len(line.split()) == 1 for line in lines)
    assert " ".join(" ".join(lines).split()) == f"warning {text.strip()}"
