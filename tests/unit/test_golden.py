"""The losses of the first CPU steps of each trainer and layer type, as recorded in golden.json.

A change that should not alter numbers must not alter these. One that should is recorded again by

    python -m tests.unit.test_golden

and its diff belongs in the same commit.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.runs import LAYER_TYPES, Finished, train

GOLDEN = Path(__file__).with_name("golden.json")
SHORT: dict[str, Any] = {"max_steps": 6, "normalize": True}
# The first four keep the rules of version 0.1, and its losses.
STREAM: dict[str, Any] = {"stage_order": "replayed"}
OLD = STREAM | {"dead_filters": "full", "mask_until": 1}
TRAINERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bip": ("bip", OLD),
    "accelerate": ("bip", OLD | {"accelerate": True}),
    "hydra": ("hydra", STREAM | {"dead_filters": "full"}),
    "finetune": ("finetune", STREAM | {"lr": 0.02}),
    "now": ("bip", {"mask_until": 1}),
    "simultaneous": ("bip", {"levels": "simultaneous", "mask_until": 1}),
    "omp": ("omp", {"lr": 0.02}),
}
CASES = ["pretrain", *(f"{t}-{layer}" for t in TRAINERS for layer in LAYER_TYPES)]


class Recipes:
    """The runs, each made once in `folder`: fine-tuning starts from BiP's, that from pretrain's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[str, Finished] = {}

    def run(self, case: str) -> Finished:
        if case not in self.made:
            self.made[case] = self._train(case)
        return self.made[case]

    def _train(self, case: str) -> Finished:
        if case == "pretrain":
            return train("pretrain", self.folder, **SHORT)
        trainer, layer_type = case.split("-")
        kind, settings = TRAINERS[trainer]
        before = self.run(f"bip-{layer_type}" if trainer == "finetune" else "pretrain")
        settings = SHORT | settings | {"layer_type": layer_type, "k": 0.5}
        return train(kind, self.folder, source_net=before.newest, **settings)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Recipes:
    return Recipes(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("case", CASES)
def test_losses_are_the_recorded_ones(case: str, recipes: Recipes) -> None:
    recorded = json.loads(GOLDEN.read_text())
    assert list(recorded) == CASES
    assert len(recorded[case]) == 6
    assert recipes.run(case).losses == pytest.approx(recorded[case], rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_two_runs_on_one_machine_are_equal_bit_for_bit(
    case: str, recipes: Recipes, tmp_path: Path
) -> None:
    first, second = recipes.run(case), Recipes(tmp_path).run(case)
    assert first.losses == second.losses
    for key in ("weights_sha256", "mask_sha256", "top1", "kept"):
        assert first.result[key] == second.result[key]


def test_the_seed_matters(recipes: Recipes, tmp_path: Path) -> None:
    other = train("pretrain", tmp_path, **SHORT, seed=1)
    assert other.losses != recipes.run("pretrain").losses


def record() -> None:
    """Write golden.json."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        recipes = Recipes(Path(folder))
        losses = {case: [round(x, 7) for x in recipes.run(case).losses] for case in CASES}
    lines = [f"  {json.dumps(case)}: {json.dumps(values)}" for case, values in losses.items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    record()
