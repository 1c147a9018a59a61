"""The two levels that methods are built from. Each owns an optimizer and the tensors it moves."""

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from bip.config import RunConfig
from bip.methods.base import Parts
from bip.training import fused
from bip.training.forward import Batch, Report
from bip.training.optim import Clock, build_optimizer, lower_rate, set_rate, split_parameters


class LowerLevel:
    """Trains θ, biases and batch-norm for a fixed mask; every parameter of a dense network.

    `repeats` steps an iteration. Where `mask_is_final`, what follows a pruned filter stays zero.
    `owned` is trained in place of θ; its gradient is then its method's to set. A step is
    `take_gradient`, then `update`.
    """

    def __init__(
        self,
        parts: Parts,
        repeats: int = 1,
        mask_is_final: bool = False,
        owned: nn.Parameter | None = None,
    ) -> None:
        self.parts, self.repeats, self.mask_is_final = parts, repeats, mask_is_final
        self.owns_weights = parts.pruned is not None and owned is None
        pruned = parts.pruned
        norm, others = split_parameters(parts.network, pruned.z if pruned else ())
        if pruned is not None:
            others = [pruned.weights if owned is None else owned, *others]
        trained_norm = [] if parts.config.freeze_bn else norm
        self.optimizer = build_optimizer(parts.config, others, trained_norm)
        self.batches: Iterator[Batch] = parts.batches("lower", parts.start * repeats)

    def step(self, iteration: int) -> list[Report]:
        reports = []
        for repeat in range(self.repeats):
            reports.append(self.take_gradient(iteration, repeat))
            self.update()
        return reports

    def take_gradient(self, iteration: int, repeat: int = 0) -> Report:
        """One forward-backward on the next batch; sets the learning rate."""
        parts = self.parts
        set_rate(self.optimizer, lower_rate(parts.config, iteration, parts.clock))
        draw = iteration * self.repeats + repeat
        return parts.forward_backward(next(self.batches), "lower", draw)

    def update(self) -> None:
        """Move what the level owns by the gradient taken, then z."""
        pruned = self.parts.pruned
        if pruned is not None and self.owns_weights and fused.lower_step(self.optimizer, pruned):
            self.optimizer.step()  # biases and batch-norm; θ has no .grad now
        else:
            self.move_weights()
            if pruned is not None:
                pruned.write_z()
        if pruned is not None and self.mask_is_final:
            pruned.write_followers()

    def move_weights(self) -> None:
        """Move what the level owns by the gradient taken; z is not written yet."""
        if self.parts.pruned is not None:
            self.parts.pruned.set_lower_gradient()
        self.optimizer.step()


class UpperLevel:
    """Moves the scores by the hypergradient, then updates the mask; θ stays fixed.

    `inv_gamma` is 1/γ; 0 leaves out the implicit term. `rate` gives the learning rate.
    `owns_norm`: batch-norm affine moves with the scores. `measures_terms`: the norms of both
    gradient terms are computed whenever a line is logged, not at the end of an epoch alone.
    """

    def __init__(
        self,
        parts: Parts,
        inv_gamma: float = 0.0,
        rate: Callable[[RunConfig, int, Clock], float] = lower_rate,
        weight_decay: float | None = None,
        owns_norm: bool = False,
        measures_terms: bool = False,
    ) -> None:
        assert parts.pruned is not None
        self.parts, self.pruned, self.inv_gamma = parts, parts.pruned, inv_gamma
        self.rate, self.measures_terms = rate, measures_terms
        self.term_norms: Tensor | None = None  # (2, layers), of the last step that measured them
        norm, _ = split_parameters(parts.network, parts.pruned.z)
        trained_norm = norm if owns_norm and not parts.config.freeze_bn else []
        scores = [parts.pruned.scores]
        self.optimizer = build_optimizer(parts.config, scores, trained_norm, weight_decay)
        self.batches: Iterator[Batch] = parts.batches("upper", parts.start)

    def step(self, iteration: int) -> list[Report]:
        report = self.parts.forward_backward(next(self.batches), "upper", iteration)
        self.move_scores(iteration)
        self.pruned.update_mask_and_z()
        return [report]

    def move_scores(self, iteration: int) -> None:
        """The optimizer's step, by the gradient that the last backward pass left; not yet m."""
        parts = self.parts
        set_rate(self.optimizer, self.rate(parts.config, iteration, parts.clock))
        every = parts.config.print_freq if self.measures_terms else parts.clock.per_epoch
        if any(parts.clock.is_due(iteration + 1, due) for due in (every, parts.clock.per_epoch)):
            self.term_norms = self.pruned.term_norms(self.inv_gamma)
        scaled = parts.config.dead_filters == "scaled"
        if not fused.upper_step(self.optimizer, self.pruned, self.inv_gamma, scaled):
            self.pruned.set_upper_gradient(self.inv_gamma)
            if scaled:
                self.pruned.scale_dead_filters()
        self.optimizer.step()

    def facts(self) -> dict[str, float]:
        """The norm of the last step's implicit term, over that of its direct term."""
        if self.term_norms is None:
            return {}
        implicit, direct = self.term_norms.norm(dim=1).tolist()
        return {"implicit_over_direct": implicit / direct} if direct else {}
