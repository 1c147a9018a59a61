"""Iterative magnitude pruning: nested masks, rewound weights, the rounds of a series."""

import json
from pathlib import Path

import pytest
import torch

from bip.cli import parse_flags
from bip.config import RunConfig, load_config
from bip.distributed.group import Group, Ranks
from bip.errors import UserError
from bip.pruning.layout import keep_count
from bip.run import Run
from bip.training.checkpoint import read_checkpoint
from launch.__main__ import main
from launch.plan import SeriesOptions, make_plan
from launch.status import status
from tests.launch.conftest import DIGITS
from tests.runs import LAYER_TYPES, Finished, arguments, train

ALONE = Group(Ranks(0, 1, 0, 1), torch.device("cpu"))


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
def test_masks_nest_and_keep_the_largest_of_what_was_left(
    layer_type: str, source: Path, tmp_path: Path
) -> None:
    before: Finished | None = None
    for k in ("0.5", "0.3", "0.2"):
        path = before.best if before else source
        after = train("imp", tmp_path, source_net=path, k=k, layer_type=layer_type, max_steps=4)
        if before is not None:
            for name, mask in after.masks.items():
                left = before.masks[name]
                assert not (mask > left).any()
                if layer_type == "unstructured":
                    continue
                axis = 0 if layer_type == "filter" else 1
                groups = mask.transpose(0, axis).flatten(1).amax(1)
                assert int(groups.sum()) == keep_count(k, len(groups))
        if before is not None and layer_type == "unstructured":
            sizes = torch.cat([(before.weights[n] * m).flatten() for n, m in before.masks.items()])
            kept = torch.cat([mask.flatten() for mask in after.masks.values()])
            assert int(kept.sum()) == keep_count(k, len(kept))
            assert sizes[kept == 1].abs().min() >= sizes[kept == 0].abs().max()
        spent = before.result["forward_backwards"] if before else 0
        assert after.result["forward_backwards"] == spent + 4
        before = after


def test_a_kept_weight_of_zero_stays_before_a_pruned_one(source: Path, tmp_path: Path) -> None:
    first = train("imp", tmp_path, source_net=source, k=0.5, max_steps=2)
    state = read_checkpoint(first.best)
    for name in first.masks:
        state["state_dict"][name].zero_()
    torch.save(state, tmp_path / "zero.pth.tar")
    config = load_config(
        arguments("imp", tmp_path, source_net=tmp_path / "zero.pth.tar", k=0.4, max_steps=2)
    )
    run = Run(config, ALONE)
    before = torch.cat([mask.flatten() for mask in first.masks.values()])
    assert not (run.pruned.mask > before).any()


def test_weights_are_rewound_bit_for_bit_to_the_saved_epoch(tmp_path: Path) -> None:
    plain = train("pretrain", tmp_path / "plain", epochs=2)
    dense = train("pretrain", tmp_path, epochs=2, rewind_epoch=1)
    assert dense.result["weights_sha256"] == plain.result["weights_sha256"]
    assert dense.folder.name == plain.folder.name
    saved = dense.folder / "checkpoint" / "model_rewind-1.pth.tar"
    settings = {"source_net": dense.best, "k": 0.3, "max_steps": 2}
    kept = Run(load_config(arguments("imp", tmp_path, **settings)), ALONE)
    settings |= {"rewind": "weights", "rewind_net": saved}
    run = Run(load_config(arguments("imp", tmp_path, **settings)), ALONE)
    assert torch.equal(run.pruned.mask, kept.pruned.mask)
    early = read_checkpoint(saved)["state_dict"]
    assert read_checkpoint(saved)["progress"]["iteration"] == len(dense.losses) // 2
    for tensor, theta in zip(
        run.pruned.layout.tensors, run.pruned.views(run.pruned.weights), strict=True
    ):
        assert torch.equal(theta, early[tensor.name])
    own = run.network.state_dict()
    masked = {tensor.name for tensor in run.pruned.layout.tensors}
    assert all(torch.equal(own[name], early[name]) for name in own.keys() - masked)
    assert run.config.run_id != kept.config.run_id


def test_rewinding_needs_its_network_and_a_round_a_larger_one(
    source: Path, pruned_runs: dict[str, Finished], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"rewind_net: missing; .* --rewind-epoch"):
        load_config(arguments("imp", tmp_path, source_net=source, rewind="weights"))
    with pytest.raises(UserError, match=r"rewind_epoch: .*earlier"):
        train("pretrain", tmp_path, rewind_epoch=1, max_steps=2)
    first = train("imp", tmp_path, source_net=source, k=0.3, max_steps=2)
    for path, k, named in (
        (first.best, "0.3", "k 0.3"), (pruned_runs["unstructured"].best, "0.2", "trainer"),
    ):  # fmt: skip
        config = load_config(arguments("imp", tmp_path, source_net=path, k=k))
        with pytest.raises(UserError, match=f"source_net: .*{named}"):
            Run(config, ALONE)


def test_a_local_series_runs_its_rounds_one_after_the_other(tmp_path: Path) -> None:
    line = ["series", "--configs", str(DIGITS / "imp.yml"), "--series", "0.2,0.5,0.35"]
    line += ["--stages", "pretrain,prune", "--rewind", "weights", "--rewind-epoch", "1"]
    line += ["--budget", "10", "--result-dir", str(tmp_path), "--exp-name", "rounds"]
    assert main(line) == 0
    rows = [row for row in status(tmp_path / "rounds") if row.stage == "prune"]
    assert [(row.k, row.state) for row in rows] == [(k, "done") for k in ("0.5", "0.35", "0.2")]
    assert rows[0].kept > rows[1].kept > rows[2].kept  # type: ignore[operator]
    results = [json.loads((Path(row.folder) / "result.json").read_text()) for row in rows]
    assert [result["forward_backwards"] for result in results] == [3, 6, 10], "one budget for all"


def test_a_budget_gives_each_round_an_iteration_at_least() -> None:
    line = ["--configs", str(DIGITS / "imp.yml"), "--series", "unstructured", "--budget", "20"]
    line += ["--stages", "pretrain,prune"]
    with pytest.raises(UserError, match=r"budget: 20 .* 21 rounds .* at least 21"):
        make_plan(parse_flags([SeriesOptions, RunConfig], line, "series", ""))
