"""BiP: bi-level-optimization pruning (Zhang et al., NeurIPS 2022, arXiv 2210.04092, Algorithm A1).

One iteration: the lower level trains θ for the present mask, on the lower batch; then the upper
level moves the scores by the hypergradient of eq. A4, on the upper batch, and updates the mask.
`accelerate` is the published cheaper variant: upper level first, without the implicit term.
With `levels` simultaneous both levels move by the gradient of one batch, which costs one
forward-backward an iteration instead of two. After the part `mask_until` of training the mask is
final and the weights alone are trained (published: 1, the mask moves to the end).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import AliasChoices

from bip.methods.base import MASK, SCORES, Method, Parts
from bip.settings import BILEVEL, MethodSettings, Positive, Rate, Schedule, setting

if TYPE_CHECKING:
    from torch import Tensor

    from bip.config import RunConfig
    from bip.training.forward import Report
    from bip.training.optim import Clock


def _unless_implicit(config: TwoLevels) -> str | None:
    return "--accelerate leaves the implicit term out" if config.accelerate else None


class TwoLevels(MethodSettings):
    lr2: Rate = setting(
        BILEVEL, 1e-4,
        "1/gamma, the weight of the implicit gradient term (the published code's default is 0.1; "
        "its files have 1e-4)",
        idle=_unless_implicit, validation_alias=AliasChoices("lr2", "inv_gamma"),
    )  # fmt: skip
    accelerate: bool = setting(
        BILEVEL, False, "leave out the implicit term and take the upper step first"
    )
    lower_steps: Positive = setting(BILEVEL, 1, "lower steps per upper step")
    levels: Literal["alternate", "simultaneous"] = setting(
        BILEVEL, "alternate", "each level by its own batch, or both by one batch at half the cost",
        before="alternate",
    )  # fmt: skip
    mask_until: float = setting(
        BILEVEL, 0.5,
        "part of training in which the mask moves, by mask_lr_schedule; then the weights alone do",
        before=1.0, ge=0, le=1,
    )  # fmt: skip
    mask_lr: Rate = setting(BILEVEL, 0.1, "learning rate of BiP's scores")
    mask_lr_schedule: Schedule = setting(BILEVEL, "cosine", "schedule of mask_lr")
    mask_wd: Rate | None = setting(BILEVEL, None, "weight decay of BiP's scores (default wd)")


class Bip(Method):
    name = "bip"
    trainer = "bilevel"
    summary = "trains weights and mask in turn, as two levels"
    mode = "prune"
    keys = MASK | SCORES
    settings = TwoLevels

    @classmethod
    def check(cls, config: RunConfig) -> None:
        own = TwoLevels.of(config)
        if own.levels == "simultaneous" and (own.accelerate or own.lower_steps > 1):
            raise ValueError(
                "levels: simultaneous moves both levels once by one batch; leave --accelerate and "
                "--lower-steps out"
            )

    @classmethod
    def identity(cls, config: RunConfig) -> dict[str, Any]:
        decay = TwoLevels.of(config).mask_wd
        return {"mask_wd": config.wd if decay is None else decay}

    @classmethod
    def lower_batches(cls, config: RunConfig) -> int:
        return TwoLevels.of(config).lower_steps

    @classmethod
    def forward_backwards(cls, config: RunConfig) -> int:
        own = TwoLevels.of(config)
        return own.lower_steps + (own.levels == "alternate")

    @classmethod
    def cost(cls, config: RunConfig, done: int, iterations: int) -> int:
        moving = min(done, cls._final_from(config, iterations))
        return moving * cls.forward_backwards(config) + (done - moving) * cls.lower_batches(config)

    @staticmethod
    def _final_from(config: RunConfig, iterations: int) -> int:
        """The first iteration in which the mask does not move any more."""
        return math.ceil(TwoLevels.of(config).mask_until * iterations)

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.own = own = TwoLevels.of(parts.config)
        self.lower = self.lower_level(repeats=own.lower_steps)
        self.upper = self.upper_level(
            inv_gamma=0.0 if own.accelerate else own.lr2,
            rate=mask_rate,
            weight_decay=own.mask_wd,
            measures_terms=True,
        )

    def step(self, iteration: int) -> list[Report]:
        if iteration >= self._final_from(self.parts.config, self.parts.clock.iterations):
            self.lower.mask_is_final = True
            self.upper.term_norms = None  # of no step any more
            return self.lower.step(iteration)
        if self.own.levels == "simultaneous":
            return self._step_both(iteration)
        if self.own.accelerate:
            return self.upper.step(iteration) + self.lower.step(iteration)
        return self.lower.step(iteration) + self.upper.step(iteration)

    def _step_both(self, iteration: int) -> list[Report]:
        pruned = self.upper.pruned
        report = self.lower.take_gradient(iteration)
        self.upper.move_scores(iteration)  # by θ as it was in the forward pass
        self.lower.move_weights()  # by m as it was there
        pruned.update_mask()
        pruned.write_z()
        return [report]

    def term_norms(self) -> Tensor | None:
        return self.upper.term_norms

    def facts(self) -> dict[str, float]:
        return self.upper.facts()


def mask_rate(config: RunConfig, iteration: int, clock: Clock) -> float:
    """`mask_lr` at an iteration: its schedule takes as long as the mask moves.

    (HYDRA's scores use `lr`.)
    """
    from bip.training.optim import schedule_factor

    own = TwoLevels.of(config)
    done = min(1.0, iteration / (own.mask_until * clock.iterations))
    return own.mask_lr * schedule_factor(own.mask_lr_schedule, done, config.drops)
