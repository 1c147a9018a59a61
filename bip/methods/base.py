"""The interface between a method and the rest of the program.

A method is one class in one file of this folder. Its class attributes describe it and are read
without importing torch. An instance runs the method in one run, one iteration at a time (`step`).
It is built from levels and parts: a level (bip/training/levels.py) owns an optimizer and the
tensors that it moves; `parts` has the network, θ, scores and mask, the batches and the clock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from bip.pruning.choices import Scope, ScoreInit
from bip.settings import MethodSettings

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from bip.config import RunConfig
    from bip.pruning.state import PrunedParameters
    from bip.training.forward import Batch, ForwardBackward, Report
    from bip.training.levels import LowerLevel, UpperLevel
    from bip.training.optim import Clock

Mode = Literal["pretrain", "prune", "finetune"]
Start = Literal["fresh", "dense", "pruned"]
FirstScores = Literal["scaled", ScoreInit]

# Settings that act in some methods only: those of every method with a mask, and those of methods
# that train scores.
MASK = frozenset({"k", "layer_type", "scope", "ranking", "recalibrate_bn"})
SCORES = frozenset({"scaled_score_init", "scores_init_type", "dead_filters", "score_gain"})


@dataclass
class Parts:
    """What a method works with on this rank.

    `batches(level, number)` yields a level's batches from the given number on; `start` is the
    iteration that the run begins or resumes at; `average` is the mean over ranks, in place.
    """

    config: RunConfig
    network: nn.Module
    pruned: PrunedParameters | None
    forward_backward: ForwardBackward
    batches: Callable[[str, int], Iterator[Batch]]
    clock: Clock
    start: int = 0
    average: Callable[[Tensor], Tensor] = lambda values: values


class Method(ABC):
    """One way to train or prune a network.

    `name`: what --trainer takes and tables show.
    `trainer`: its name in RUN_IDs; the same, but for methods of the published code.
    `starts_from`: the network that a run begins with: "fresh" (initialised by the run), "dense"
    (source_net, not pruned) or "pruned" (source_net, with its mask).
    `in_rounds`: in a series each k, from large to small, starts from the k before.
    `needs_finetuning`: it does not train the weights that it keeps.
    `has_mask`: whether the run has θ, scores and a mask beside the network.
    `default_scope`: the rankings of unstructured pruning where --scope is not given.
    `score_init`: how the scores start (`bip.pruning.scores`), if its settings do not say so.
    `settings`: the settings that its file declares, or shares with others.
    `keys`: the settings that act in it, of those that do not act in every method; `settings` are
    added.
    """

    name: ClassVar[str]
    trainer: ClassVar[str]
    summary: ClassVar[str]
    mode: ClassVar[Mode]
    starts_from: ClassVar[Start] = "dense"
    in_rounds: ClassVar[bool] = False
    needs_finetuning: ClassVar[bool] = False
    has_mask: ClassVar[bool] = True
    default_scope: ClassVar[Scope] = "global"
    score_init: ClassVar[FirstScores | None] = None
    settings: ClassVar[type[MethodSettings]] = MethodSettings
    keys: ClassVar[frozenset[str]] = MASK

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" in vars(cls) and "trainer" not in vars(cls):
            cls.trainer = cls.name
        cls.keys = cls.keys | cls.settings.model_fields.keys()

    @classmethod
    def lower_batches(cls, config: RunConfig) -> int:
        """Lower batches of one iteration; an epoch is one pass over the lower batches."""
        return 1

    @classmethod
    def forward_backwards(cls, config: RunConfig) -> int:
        """What one iteration costs."""
        return 1

    @classmethod
    def cost(cls, config: RunConfig, done: int, iterations: int) -> int:
        """Forward-backwards of the first `done` of so many iterations."""
        return done * cls.forward_backwards(config)

    @classmethod
    def iterations_of(cls, config: RunConfig, budget: int) -> int:
        """How many iterations a budget of forward-backwards pays for, `prepare` included."""
        left = budget - cls.start_cost(config)
        return bisect_right(range(left + 1), left, key=lambda n: cls.cost(config, n, n)) - 1

    @classmethod
    def start_cost(cls, config: RunConfig) -> int:
        """What `prepare` costs, in forward-backwards."""
        return 0

    @classmethod  # noqa: B027
    def check(cls, config: RunConfig) -> None:
        """Raise ValueError, naming the key, where its settings do not fit each other."""

    @classmethod
    def identity(cls, config: RunConfig) -> dict[str, Any]:
        """Of its settings what changes numbers, where that is not the value as given."""
        return {}

    @classmethod
    def rewinds_to(cls, config: RunConfig) -> Path | None:
        """The checkpoint that the weights start from, with the mask of source_net."""
        return None

    @classmethod
    def from_dense(cls, values: dict[str, Any], dense: RunConfig) -> dict[str, Any]:
        """A series' settings of a run, completed by what its dense run writes."""
        return values

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.optimizers: dict[str, Optimizer] = {}  # by level, for checkpoints

    @abstractmethod
    def step(self, iteration: int) -> list[Report]:
        """One iteration, the same on every rank; a report for each forward-backward."""

    def prepare(self) -> None:  # noqa: B027
        """Called once per run, before iteration 0: for methods that score or prune at the start."""

    def keeps_k(self, done: int) -> bool:
        """Whether the mask keeps k after `done` iterations: only then is the network a result."""
        return True

    def facts(self) -> dict[str, float]:
        """Numbers of the last iteration for the log. Called every `print_freq` iterations."""
        return {}

    def term_norms(self) -> Tensor | None:
        """(2, layers): norms of the implicit and the direct gradient term of the scores, if any."""
        return None

    def lower_level(self, **options: Any) -> LowerLevel:
        from bip.training.levels import LowerLevel

        level = LowerLevel(self.parts, **options)
        self.optimizers["lower"] = level.optimizer
        return level

    def upper_level(self, **options: Any) -> UpperLevel:
        from bip.training.levels import UpperLevel

        level = UpperLevel(self.parts, **options)
        self.optimizers["upper"] = level.optimizer
        return level
