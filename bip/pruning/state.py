"""θ, scores and mask of one network, as flat buffers outside it; the network itself holds z.

The problem is bi-linear: mask and weights meet only in z = m ⊙ θ, so both levels' gradients follow
from one gradient g = ∇_z l(z) (arXiv 2210.04092, Algorithm A1 and eq. A4).

Four rules make this work under DDP, autocast, torch.compile and any memory format: z's storage is
rewritten in place and never reassigned; `requires_grad` is never toggled; every forward has its
own autocast context; g is complete (accumulated, unscaled, all-reduced) before it is used.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from fractions import Fraction

import torch
from torch import Tensor, nn

from bip.errors import UserError
from bip.pruning.choices import PATTERNS, Scope
from bip.pruning.layout import Followers, Layout, PrunableTensor, Segment
from bip.pruning.passes import mask_out, upper_gradient, write_products
from bip.pruning.select import Alone, Exchange, NanError, Selector, make_selector
from bip.pruning.select_pattern import PatternSelector, in_groups

Timed = Callable[[str], contextlib.AbstractContextManager[None]]  # times a part of the step
BATCH_NORM_EPS = 1e-5  # torch's default
TINY = 1e-18  # in size next to zero; its square is still a normal float32


class PrunedParameters:
    """The pruned-parameter state of one network.

    weights (θ), scores (s): leaf tensors (n,), in logical order for any memory format of the
    network; torch.optim owns them. mask (m): (n,) of 0 and 1, uint8. `gradient` (n,) is shared by
    the two levels, which never need it at the same time.
    """

    def __init__(
        self,
        network: nn.Module,
        layout: Layout,
        k: Decimal,
        scope: Scope,
        exchange: Exchange | None = None,
        balanced: bool = False,
    ) -> None:
        """`balanced`: groups are ranked by their scores' norm over the root of their size, and
        each layer keeps one at least: one ranking of groups of unequal sizes needs both.
        """
        named = dict(network.named_parameters(remove_duplicate=False))
        self.layout, self.k, self.scope = layout, k, scope
        self.followers: tuple[Followers, ...] = ()
        self.keeps_constants = False  # the mask was made where pruned filters keep their bias
        self.z = [named[tensor.name] for tensor in layout.tensors]
        device = self.z[0].device
        dtype = self.z[0].dtype
        segments = layout.segments(k, scope)
        self.selector: Selector
        if layout.layer_type in PATTERNS:
            self.selector = PatternSelector(layout.tensors, segments, device)
        else:
            self.selector = make_selector(segments, exchange or Alone(), device)
        flat = torch.cat([z.detach().reshape(-1) for z in self.z])
        self.weights = nn.Parameter(flat)
        self.scores = nn.Parameter(torch.zeros_like(flat))
        self.mask = torch.ones(layout.size, dtype=torch.uint8, device=device)
        # The last selection's number of ones and checksum, for comparison between ranks.
        self.proof = torch.zeros(2, dtype=torch.int64, device=device)
        self.gradient = torch.zeros(layout.size, dtype=dtype, device=device)
        self.balanced = balanced
        self.timed: Timed = lambda _part: contextlib.nullcontext()
        if layout.is_grouped:
            self._norms = torch.zeros(layout.groups, dtype=torch.float32, device=device)
            self._group_mask = torch.zeros(layout.groups, dtype=torch.uint8, device=device)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The rankings, each with the number that it keeps."""
        return self.selector.segments

    def keep(self, counts: Sequence[int]) -> None:
        """From the next update of the mask on keep `counts`, one for each of `segments`.

        For a schedule of k, or a budget of each layer; a ratio's are `counts(k)`. Does not wait
        for the device. Raises ValueError unless each is at least 1 and at most its segment's size.
        """
        self.selector.keep(counts)

    def counts(self, k: Decimal | Fraction) -> list[int]:
        """How many each of `segments` keeps at the ratio k."""
        return [segment.keep for segment in self.layout.segments(k, self.scope)]

    @torch.no_grad()
    def rank(self, values: Tensor, counts: Sequence[int]) -> None:
        """Keep the `counts` largest |values| (n,) of the segments; they become the scores.

        z follows, whatever it was.
        """
        self.scores.copy_(values)
        self.keep(counts)
        self.update_mask()
        self.write_z()

    @staticmethod
    def view(flat: Tensor, tensor: PrunableTensor) -> Tensor:
        """One prunable tensor's part of a flat buffer, in its own shape."""
        return flat[tensor.start : tensor.stop].view(tensor.shape)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Every prunable tensor's part of a flat buffer."""
        return [self.view(flat, tensor) for tensor in self.layout.tensors]

    @torch.no_grad()
    def write_z(self) -> None:
        """z = m ⊙ θ, in place in the network's own parameters."""
        write_products(self.weights, self.mask, self.z)

    @torch.no_grad()
    def take_gradient(self) -> None:
        """g = ∇_z l from the network's .grad fields into `gradient`, in logical order."""
        for flat, z in zip(self.views(self.gradient), self.z, strict=True):
            flat.copy_(gradient_of(z))

    def _gradients(self) -> Iterator[tuple[slice, Tensor]]:
        """g in parts: (place in the flat buffers, that part of g). Read only.

        On a GPU one part, which needs few kernels. On the CPU the network's own .grad of each
        tensor, which saves a copy of g.
        """
        if self.gradient.device.type != "cpu":
            self.take_gradient()
            yield slice(0, self.layout.size), self.gradient
            return
        for tensor, z in zip(self.layout.tensors, self.z, strict=True):
            # This copies if the memory format differs.
            yield slice(tensor.start, tensor.stop), gradient_of(z).reshape(-1)

    @torch.no_grad()
    def set_lower_gradient(self) -> None:
        """θ.grad = m ⊙ g, in `gradient`."""
        for part, g in self._gradients():
            mask_out(g, self.mask[part], self.gradient[part])
        self.weights.grad = self.gradient

    @torch.no_grad()
    def set_upper_gradient(self, inv_gamma: float) -> None:
        """s.grad = sign(s) ⊙ (θ − (1/γ) m ⊙ g) ⊙ g, in `gradient`.

        The ranking is by |s|, whose derivative is sign(s). At s = 0 it is undefined and taken as
        +1, so that a score of zero can move. inv_gamma = 0 gives HYDRA's θ ⊙ g.
        """
        for part, g in self._gradients():
            upper_gradient(
                g, self.weights[part], self.mask[part], self.scores[part], inv_gamma,
                self.gradient[part],
            )  # fmt: skip
        self.scores.grad = self.gradient

    @torch.no_grad()
    def set_straight_gradient(self, pruned_scale: float) -> None:
        """s.grad = g where the mask keeps, `pruned_scale` · g elsewhere, in `gradient`.

        The straight-through gradient of scores that are the weights before pruning.
        """
        self.take_gradient()
        if pruned_scale != 1:
            self.gradient.mul_(torch.where(self.mask > 0, 1.0, pruned_scale))
        self.scores.grad = self.gradient

    def layers_with_dead_filters(self) -> list[int]:
        """The convolutions of which a filter is pruned whole, by number. Waits for the device."""
        masks = enumerate(self.views(self.mask))
        return [i for i, m in masks if m.dim() > 2 and not m.flatten(1).any(1).all()]

    @torch.no_grad()
    def scale_dead_filters(self, layers: Sequence[int] | None = None) -> None:
        """Scale s.grad of wholly pruned filters down to the mean size of the living ones'.

        A filter that is pruned whole gives zero, where batch-norm in training mode has the slope
        1/sqrt(eps), about 316; a living filter has 1/σ. Unscaled, the scores of dead filters
        outgrow all others within a few steps, and the mask becomes noise. Filters of one layer
        keep their order. Does not wait for the device. `layers`: only these, by number.
        """
        for layer in range(len(self.z)) if layers is None else layers:
            tensor = self.layout.tensors[layer]
            gradient, mask = self.view(self.gradient, tensor), self.view(self.mask, tensor)
            if mask.dim() <= 2:
                continue  # no convolution: its outputs are the classes, or unnormalised
            lives = mask.flatten(1).amax(1)
            if gradient.device.type == "cpu" and bool(lives.all()):
                continue
            sizes = gradient.flatten(1).abs().sum(1)
            living, dead = lives.sum(), (1 - lives).sum()
            mean = (sizes * lives).sum() / living.clamp(min=1)
            mean_of_dead = (sizes * (1 - lives)).sum() / dead.clamp(min=1)
            ratio = torch.where(living > 0, mean / mean_of_dead, 0.0).nan_to_num(1.0)
            # No further down than by batch-norm's slope: living filters may have converged.
            factor = torch.where(lives > 0, 1.0, ratio.clamp(BATCH_NORM_EPS**0.5, 1.0))
            gradient.mul_(factor.view(-1, *[1] * (gradient.dim() - 1)))

    @torch.no_grad()
    def term_norms(self, inv_gamma: float) -> Tensor:
        """(2, layers): ‖(1/γ) m ⊙ g ⊙ g‖ and ‖θ ⊙ g‖, the implicit and the direct term.

        Of filters that are not pruned whole: the others' gradient is batch-norm's doing.
        """
        shape = 2, len(self.z)
        squares = torch.zeros(shape, dtype=torch.float64, device=self.gradient.device)
        parts = zip(self.z, self.views(self.weights), self.views(self.mask), strict=True)
        for layer, (z, weights, mask) in enumerate(parts):
            g = gradient_of(z)
            lives = mask.flatten(1).amax(1).view(-1, *[1] * (mask.dim() - 1))
            direct = g * weights * lives
            implicit = (g * g).mul_(mask).mul_(inv_gamma)
            for i, term in enumerate((implicit, direct)):
                squares[i, layer] = term.square_().sum(dtype=torch.float64)
        return squares.sqrt()

    @torch.no_grad()
    def update_mask(self) -> None:
        """m = top-k(|s|): exactly `keep_count` groups, ties to the lowest flat index.

        The same on all ranks. Structured groups rank by the L2 norm of their scores. Does not
        write z. Raises UserError naming the tensor if a score is NaN (on CUDA: `check` does).
        """
        self._update(())

    @torch.no_grad()
    def update_mask_and_z(self) -> None:
        """`update_mask` and z = m ⊙ θ. z must be up to date before too (after `write_z` it is).

        Where the network's memory format allows it, one pass that writes only what changes.
        """
        self._update(self.z)

    def check(self) -> None:
        """Raise UserError if a selection on CUDA met a NaN. Waits for the device."""
        with self._naming_nan():
            self.selector.check()

    def _update(self, z: Sequence[Tensor]) -> None:
        with self.timed("threshold"), self._naming_nan():
            if not self.layout.is_grouped:
                scores = self.scores.detach().float()
                self.proof = self.selector.update(scores, self.mask, self.weights.detach(), z)
                return
            self.proof = self.selector.update(self._group_norms(), self._group_mask)
            self._spread(self._group_mask, self.mask)
            write_products(self.weights, self.mask, z)

    def _spread(self, groups: Tensor, flat: Tensor) -> None:
        """Write each structured group's value (groups,) to its weights in the `flat` buffer."""
        for tensor, view in zip(self.layout.tensors, self.views(flat), strict=True):
            part = groups[tensor.first_group : tensor.first_group + tensor.groups]
            view.copy_(part.view([-1 if d == tensor.axis else 1 for d in range(view.dim())]))

    @torch.no_grad()
    def shrink(self, power: int) -> None:
        """θ = sign(s)·(|s|^power − T^power)^(1/power) of kept scores, after an update of the mask.

        T is the largest |score| that its ranking prunes. Of a structured group the norm shrinks,
        and every weight by the same factor. A power of 1 is the soft threshold, a large one nears
        the hard one. Does not write z. Does not wait for the device.
        """
        grouped = self.layout.is_grouped
        sizes = self._group_norms() if grouped else self.scores.detach().abs()
        mask = self._group_mask if grouped else self.mask
        factor = torch.empty_like(sizes)
        ranked = (self._rankings(flat) for flat in (sizes, mask, factor))
        for size, kept, out in zip(*ranked, strict=True):
            cut = (size * (1 - kept)).amax(-2, keepdim=True)
            ratio = (cut / size).nan_to_num(0.0).clamp(max=1)  # 0 / 0: nothing is pruned
            out.copy_((1 - ratio**power) ** (1 / power))
        if grouped:
            self._spread(factor, self.weights)
            self.weights.mul_(self.scores)
        else:
            torch.mul(self.scores, factor, out=self.weights.data)

    def _rankings(self, flat: Tensor) -> Iterator[Tensor]:
        """A flat buffer in parts (..., n, places) whose n are ranked together."""
        if self.layout.layer_type in PATTERNS:
            for tensor in self.layout.tensors:
                yield in_groups(flat, tensor, self.segments[0].size)
        else:
            for segment in self.segments:
                yield flat[segment.start : segment.stop, None]

    def _group_norms(self) -> Tensor:
        for tensor, score in zip(self.layout.tensors, self.views(self.scores), strict=True):
            part = slice(tensor.first_group, tensor.first_group + tensor.groups)
            others = [d for d in range(score.dim()) if d != tensor.axis]
            norms = torch.linalg.vector_norm(score, dim=others)
            if self.balanced:
                norms /= (tensor.size // tensor.groups) ** 0.5
                norms.scatter_(0, norms.argmax(0, keepdim=True), torch.inf)  # it stays
            self._norms[part] = norms
        return self._norms

    @contextlib.contextmanager
    def _naming_nan(self) -> Iterator[None]:
        """Raise a selector's NanError as a UserError that names the tensor."""
        try:
            yield
        except NanError as error:
            scores = zip(self.layout.tensors, self.views(self.scores), strict=True)
            bad = [f" of {tensor.name}" for tensor, score in scores if bool(score.isnan().any())]
            raise UserError(
                f"scores{bad[0] if bad else ''} are NaN; lower the learning rate (mask_lr or lr) "
                f"[{error}]"
            ) from None

    @torch.no_grad()
    def replace(self, fraction: float) -> Tensor:
        """Drop that fraction of the kept groups, smallest |θ| first, and grow the largest |g|.

        As many in each segment, which keeps its count; g is the network's. A dropped one competes
        to be grown. Grown weights that the mask did not keep become zero; returns where (n,) bool.
        """
        counts = [segment.keep for segment in self.segments]
        before = self.mask > 0
        self.take_gradient()
        # Kept weights of zero come before pruned ones.
        sizes = torch.where(before, self.weights.abs().clamp(min=TINY), 0)
        self.rank(sizes, [count - int(fraction * count) for count in counts])
        self.rank(torch.where(self.mask > 0, torch.inf, self.gradient.abs()), counts)
        grown = (self.mask > 0) & ~before
        self.weights.mul_(~grown)
        self.scores.copy_(self.weights)
        self.write_z()
        return grown

    @torch.no_grad()
    def drop_pruned(self) -> None:
        """θ = m ⊙ θ: pruned weights forget their values."""
        mask_out(self.weights.detach(), self.mask, self.weights.data)

    @torch.no_grad()
    def write_followers(self) -> None:
        """Zero the bias and batch-norm pair of every pruned filter, in place.

        Only for a final mask: during pruning the filter would never get a gradient again.
        """
        for follower in self.followers:
            kept = self.view(self.mask, follower.tensor).flatten(1).amax(1)
            for parameter in follower.parameters:
                parameter.mul_(kept)

    def empty_layers(self) -> list[str]:
        """The layers that the mask prunes whole, by their weights. Waits for the device."""
        masks = zip(self.layout.tensors, self.views(self.mask), strict=True)
        return [tensor.name for tensor, mask in masks if not bool(mask.any())]

    def kept(self) -> int:
        """Number of weights kept. Waits for the device."""
        return int(torch.count_nonzero(self.mask))


def gradient_of(z: Tensor) -> Tensor:
    assert z.grad is not None, "a backward pass comes first"
    return z.grad
