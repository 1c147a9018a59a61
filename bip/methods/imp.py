"""Iterative magnitude pruning: in rounds, keep the largest weights of those that are left.

Frankle & Carbin, "The Lottery Ticket Hypothesis" (arXiv 1803.03635). A run is one round: it starts
from the round before it, or from the dense network, and the k of a series are its rounds (20% of
the rest each, in the published series). Then the weights go on as they are with the learning-rate
schedule from its start (`--rewind lr`: Renda, Frankle & Carbin, arXiv 2003.02389), or go back to an
early epoch of the dense network (`--rewind weights`: Frankle et al., arXiv 1912.05671).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bip.errors import UserError
from bip.methods.finetune import Finetune
from bip.settings import PRUNING, InputFile, MethodSettings, setting

if TYPE_CHECKING:
    from bip.config import RunConfig


def _unless_rewound(config: Rewinding) -> str | None:
    return "--rewind lr keeps the weights" if config.rewind == "lr" else None


class Rewinding(MethodSettings):
    rewind: Literal["lr", "weights"] = setting(
        PRUNING, "lr", "imp: each round restarts the learning rate alone, or the weights too",
        before="lr",
    )  # fmt: skip
    rewind_net: InputFile | None = setting(
        PRUNING, None, "checkpoint that imp takes its weights from, with --rewind weights",
        numbers=False, idle=_unless_rewound,
    )  # fmt: skip


class IterativeMagnitude(Finetune):
    name = "imp"
    summary = "keeps the largest weights in rounds, the k of a series, and trains them in each"
    mode = "prune"
    starts_from = "dense"
    in_rounds = True
    score_init = "scaled"  # s = θ; of what the round before has pruned 0, so that masks nest
    settings = Rewinding

    @classmethod
    def check(cls, config: RunConfig) -> None:
        if Rewinding.of(config).rewind == "weights" and cls.rewinds_to(config) is None:
            raise ValueError(
                "rewind_net: missing; --rewind weights needs --rewind-net PATH, which a dense run "
                "with --rewind-epoch writes"
            )

    @classmethod
    def rewinds_to(cls, config: RunConfig) -> Path | None:
        given = Rewinding.of(config)
        return given.rewind_net if given.rewind == "weights" else None

    @classmethod
    def identity(cls, config: RunConfig) -> dict[str, Any]:
        path = cls.rewinds_to(config)
        return {} if path is None else {"rewind_net": f"{config.run_of(path)}/{path.name}"}

    @classmethod
    def from_dense(cls, values: dict[str, Any], dense: RunConfig) -> dict[str, Any]:
        if values.get("rewind") != "weights":
            return values
        if dense.rewind_epoch is None:
            raise UserError("rewind_epoch: missing; --rewind weights goes back to one of them")
        return {"rewind_net": dense.rewind_model} | values
