"""θ, scores and mask of one network, as flat buffers outside it; the network itself holds z.

The problem is bi-linear: mask and weights meet only in z = m ⊙ θ, so both levels' gradients follow
from one gradient g = ∇_z l(z) (arXiv 2210.04092, Algorithm A1 and eq. A4).

Four rules make this work under DDP, autocast, torch.compile and any memory format: z's storage is
rewritten in place and never reassigned; `requires_grad` is never toggled; every forward has its
own autocast context; g is complete (accumulated, unscaled, all-reduced) before it is used.
"""

import contextlib
from collections.abc import Iterator, Sequence
from decimal import Decimal

import torch
from torch import Tensor, nn

from bip.errors import UserError
from bip.pruning.choices import Scope
from bip.pruning.layout import Followers, Layout, PrunableTensor, Segment
from bip.pruning.passes import mask_out, upper_gradient, write_products
from bip.pruning.select import Alone, Exchange, NanError, make_selector


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
    ) -> None:
        named = dict(network.named_parameters(remove_duplicate=False))
        self.layout = layout
        self.followers: tuple[Followers, ...] = ()
        self.z = [named[tensor.name] for tensor in layout.tensors]
        device = self.z[0].device
        dtype = self.z[0].dtype
        self.selector = make_selector(layout.segments(k, scope), exchange or Alone(), device)
        flat = torch.cat([z.detach().reshape(-1) for z in self.z])
        self.weights = nn.Parameter(flat)
        self.scores = nn.Parameter(torch.zeros_like(flat))
        self.mask = torch.ones(layout.size, dtype=torch.uint8, device=device)
        # The last selection's number of ones and checksum, for comparison between ranks.
        self.proof = torch.zeros(2, dtype=torch.int64, device=device)
        self.gradient = torch.zeros(layout.size, dtype=dtype, device=device)
        if layout.layer_type != "unstructured":
            self._norms = torch.zeros(layout.groups, dtype=torch.float32, device=device)
            self._group_mask = torch.zeros(layout.groups, dtype=torch.uint8, device=device)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The rankings, each with the number that it keeps."""
        return self.selector.segments

    def keep(self, counts: Sequence[int]) -> None:
        """From the next update of the mask on keep `counts`, one for each of `segments`.

        For a schedule of k, or a budget for each layer. For a new k the counts are
        `[keep_count(k, segment.size) for segment in pruned.segments]`. Does not wait for the
        device. Raises ValueError unless each is at least 1 and at most its segment's size.
        """
        self.selector.keep(counts)

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
            flat.copy_(_grad(z))

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
            yield slice(tensor.start, tensor.stop), _grad(z).reshape(-1)

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
    def term_norms(self, inv_gamma: float) -> Tensor:
        """(2,): the norms ‖(1/γ) m ⊙ g ⊙ g‖ of the implicit and ‖θ ⊙ g‖ of the direct term."""
        squares = torch.zeros(2, dtype=torch.float64, device=self.gradient.device)
        for part, g in self._gradients():
            direct = g * self.weights[part]
            implicit = (g * g).mul_(self.mask[part]).mul_(inv_gamma)
            for i, term in enumerate((implicit, direct)):
                squares[i] += term.square_().sum(dtype=torch.float64)
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
        with self._naming_nan():
            if self.layout.layer_type == "unstructured":
                scores = self.scores.detach().float()
                self.proof = self.selector.update(scores, self.mask, self.weights.detach(), z)
                return
            self.proof = self.selector.update(self._group_norms(), self._group_mask)
        for tensor, view in zip(self.layout.tensors, self.views(self.mask), strict=True):
            kept = self._group_mask[tensor.first_group : tensor.first_group + tensor.groups]
            view.copy_(kept.view([-1 if d == tensor.axis else 1 for d in range(view.dim())]))
        write_products(self.weights, self.mask, z)

    def _group_norms(self) -> Tensor:
        for tensor, score in zip(self.layout.tensors, self.views(self.scores), strict=True):
            part = slice(tensor.first_group, tensor.first_group + tensor.groups)
            others = [d for d in range(score.dim()) if d != tensor.axis]
            self._norms[part] = torch.linalg.vector_norm(score, dim=others)
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
    def write_followers(self) -> None:
        """Zero the bias and batch-norm pair of every pruned filter, in place.

        Only for a final mask: during pruning the filter would never get a gradient again.
        """
        for follower in self.followers:
            kept = self.view(self.mask, follower.tensor).flatten(1).amax(1)
            for parameter in follower.parameters:
                parameter.mul_(kept)

    def kept(self) -> int:
        """Number of weights kept. Waits for the device."""
        return int(torch.count_nonzero(self.mask))


def _grad(z: Tensor) -> Tensor:
    assert z.grad is not None, "a backward pass comes first"
    return z.grad
