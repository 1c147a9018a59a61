"""θ, scores and mask of one network, as flat buffers outside it; the network itself holds z.

The problem is bi-linear: mask and weights meet only in z = m ⊙ θ, so one gradient g = ∇_z l(z)
gives both levels theirs (design: arXiv 2210.04092, Algorithm A1 and eq. A4).

Four rules keep DDP, autocast, torch.compile and any memory format out of it: z's storage is
rewritten in place and never reassigned; `requires_grad` is never toggled; every forward has its
own autocast context; g is complete (accumulated, unscaled, all-reduced) before it is used.
"""

from collections.abc import Iterator
from decimal import Decimal

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from bip.errors import UserError
from bip.pruning import kernels
from bip.pruning.layout import Followers, Layout, PrunableTensor, Scope
from bip.pruning.select_cpu import (
    Alone,
    Cut,
    Exchange,
    Threshold,
    add_proofs,
    move_mask_and_z,
    write_mask,
)
from bip.pruning.select_cuda import DeviceThreshold
from bip.pruning.select_cuda import write_mask as write_mask_on_device


class PrunedParameters:
    """The pruned-parameter state of one network.

    weights (θ), scores (s): leaf tensors (n,), in logical order whatever the network's memory
    format; torch.optim owns them. mask (m): (n,) of 0 and 1, uint8. `gradient` (n,) holds the
    gradient of the level whose step is being taken: the two levels never need theirs at once.
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
        self.segments = layout.segments(k, scope)
        self.followers: tuple[Followers, ...] = ()
        self.threshold: Threshold | DeviceThreshold
        self.z = [named[tensor.name] for tensor in layout.tensors]
        device = self.z[0].device
        dtype = self.z[0].dtype
        exchange = exchange or Alone()
        if device.type == "cpu":
            self.threshold = Threshold(self.segments, layout.groups, exchange)
        else:
            self.threshold = DeviceThreshold(self.segments, layout.groups, exchange, device)
        flat = torch.cat([z.detach().reshape(-1) for z in self.z])
        self.weights = nn.Parameter(flat)
        self.scores = nn.Parameter(torch.zeros_like(flat))
        self.mask = torch.ones(layout.size, dtype=torch.uint8, device=device)
        # Of the last selection: the number of ones and their checksum, for comparison.
        self.proof = torch.zeros(2, dtype=torch.int64, device=device)
        self.gradient = torch.zeros(layout.size, dtype=dtype, device=device)
        if layout.layer_type != "unstructured":
            self._norms = torch.zeros(layout.groups, dtype=torch.float32, device=device)
            self._group_mask = torch.zeros(layout.groups, dtype=torch.uint8, device=device)

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
        for z, weight, mask in zip(
            self.z, self.views(self.weights), self.views(self.mask), strict=True
        ):
            mask_out(weight, mask, z.detach())

    @torch.no_grad()
    def take_gradient(self) -> None:
        """g = ∇_z l from the network's .grad fields into `gradient`, in logical order."""
        for flat, z in zip(self.views(self.gradient), self.z, strict=True):
            flat.copy_(_grad(z))

    def _gradients(self) -> Iterator[tuple[slice, Tensor]]:
        """g in parts: (place in the flat buffers, that part of g). Only to be read.

        On a GPU one part, for few kernels. On the CPU the network's own .grad of each tensor, so
        that g is not moved through memory once more.
        """
        if self.gradient.device.type != "cpu":
            self.take_gradient()
            yield slice(0, self.layout.size), self.gradient
            return
        for tensor, z in zip(self.layout.tensors, self.z, strict=True):
            # A copy where the memory format is another.
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

        The ranking is by |s|, whose slope is sign(s); +1 is taken at s = 0, where it is free,
        so that a score of exactly zero can move. inv_gamma = 0 gives HYDRA's θ ⊙ g.
        """
        for part, g in self._gradients():
            upper_gradient(
                g, self.weights[part], self.mask[part], self.scores[part], inv_gamma,
                self.gradient[part],
            )  # fmt: skip
        self.scores.grad = self.gradient

    @torch.no_grad()
    def term_norms(self, inv_gamma: float) -> Tensor:
        """(2,): ‖(1/γ) m ⊙ g ⊙ g‖ and ‖θ ⊙ g‖, the implicit and the direct term."""
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

        Agreed by all ranks. Structured groups rank by the L2 norm of their scores. Does not
        write z. Raises UserError naming the tensor if a score is NaN (on CUDA: `check` does).
        """
        self._move_mask(write_z=False)

    @torch.no_grad()
    def update_mask_and_z(self) -> None:
        """`update_mask`, then z = m ⊙ θ, which must hold before too (after `write_z` it does).

        In one pass that writes only what changes, where the network's layout allows it.
        """
        self._move_mask(write_z=True)

    def check(self) -> None:
        """Raise UserError if a selection on CUDA met a NaN. Waits for the device."""
        if isinstance(self.threshold, DeviceThreshold) and (bad := self.threshold.nan).any():
            ranks = ", ".join(map(str, bad.nonzero().flatten().tolist()))
            raise UserError(f"{self._name_nan()} [in the slice of rank {ranks}]")

    def _move_mask(self, write_z: bool) -> None:
        structured = self.layout.layer_type != "unstructured"
        values = self._group_norms() if structured else self.scores.detach().float()
        mask = self._group_mask if structured else self.mask
        if isinstance(self.threshold, DeviceThreshold):
            keys, lasts = self.threshold.select(values)
            self.proof = write_mask_on_device(values, self.segments, keys, lasts, mask)
        else:
            try:
                cuts = self.threshold.select(values)
            except ValueError as error:
                raise UserError(f"{self._name_nan()} [{error}]") from None
            if write_z and not structured and self.weights.dtype == torch.float32:
                self._move_mask_and_z(values, cuts)
                return
            self._write_mask(values, cuts, mask)
        if structured:
            for tensor, view in zip(self.layout.tensors, self.views(self.mask), strict=True):
                kept = self._group_mask[tensor.first_group : tensor.first_group + tensor.groups]
                view.copy_(kept.view([-1 if d == tensor.axis else 1 for d in range(view.dim())]))
        if write_z:
            self.write_z()

    def _write_mask(self, values: Tensor, cuts: list[Cut], mask: Tensor) -> None:
        parts = (slice(segment.start, segment.stop) for segment in self.segments)
        proofs = [
            write_mask(values[part], cut, part.start, mask[part])
            for part, cut in zip(parts, cuts, strict=True)
        ]
        self.proof = torch.tensor(add_proofs(proofs))

    def _move_mask_and_z(self, values: Tensor, cuts: list[Cut]) -> None:
        proofs = []
        for row, (tensor, z) in enumerate(zip(self.layout.tensors, self.z, strict=True)):
            part = slice(tensor.start, tensor.stop)
            whole = cuts[0]  # one ranking of the network, or one per tensor
            cut = cuts[row] if len(cuts) > 1 else Cut(whole.key, whole.last - tensor.start)
            weights, mask = self.weights.detach()[part], self.mask[part]
            if z.is_contiguous():
                flat = z.detach().view(-1)
                proof = move_mask_and_z(values[part], cut, tensor.start, weights, mask, flat)
                increment_version(flat)
            else:  # channels_last: z's memory is in another order than the flat buffers'
                proof = write_mask(values[part], cut, tensor.start, mask)
                mask_out(weights.view(tensor.shape), mask.view(tensor.shape), z)
            proofs.append(proof)
        self.proof = torch.tensor(add_proofs(proofs))

    def _group_norms(self) -> Tensor:
        for tensor, score in zip(self.layout.tensors, self.views(self.scores), strict=True):
            part = slice(tensor.first_group, tensor.first_group + tensor.groups)
            others = [d for d in range(score.dim()) if d != tensor.axis]
            self._norms[part] = torch.linalg.vector_norm(score, dim=others)
        return self._norms

    def _name_nan(self) -> str:
        for tensor, score in zip(self.layout.tensors, self.views(self.scores), strict=True):
            if bool(score.isnan().any()):
                return f"scores of {tensor.name} are NaN; lower the learning rate (mask_lr or lr)"
        return "scores are NaN; lower the learning rate (mask_lr or lr)"

    @torch.no_grad()
    def write_followers(self) -> None:
        """Zero the bias and batch-norm pair of every pruned filter, in place.

        Only for a final mask: while pruning this would stop the filter's gradient for good.
        """
        for follower in self.followers:
            kept = self.view(self.mask, follower.tensor).flatten(1).amax(1)
            for parameter in follower.parameters:
                parameter.mul_(kept)

    def kept(self) -> int:
        """Weights kept. Waits for the device."""
        return int(torch.count_nonzero(self.mask))


def mask_out(values: Tensor, mask: Tensor, out: Tensor) -> None:
    """out = m ⊙ values, all of one shape. `out` may be `values`."""
    compiled = out.device.type == "cpu" and out.dtype in (torch.float32, torch.float64)
    if not (compiled and values.is_contiguous() and out.is_contiguous()):
        torch.mul(values, mask, out=out)
        return
    arrays = [tensor.view(-1).numpy() for tensor in (values, mask, out)]
    if (parts := kernels.use_threads(values.numel())) > 1:
        kernels.mask_out_parts(*arrays, parts)
    else:
        kernels.mask_out(*arrays)
    increment_version(out)  # autograd does not see what is written through numpy


def upper_gradient(
    g: Tensor, weights: Tensor, mask: Tensor, scores: Tensor, inv_gamma: float, out: Tensor
) -> None:
    """out = sign(s) ⊙ (θ − (1/γ) m ⊙ g) ⊙ g, with +1 at s = 0; all flat. `out` may be `g`."""
    if g.device.type != "cpu":
        slope = torch.addcmul(weights, mask, g, value=-inv_gamma).mul_(g)
        torch.where(scores < 0, -slope, slope, out=out)
        return
    arrays = [tensor.numpy() for tensor in (g, weights, mask, scores)]
    inverse, parts = arrays[0].dtype.type(inv_gamma), kernels.use_threads(g.numel())
    if parts > 1:
        kernels.upper_gradient_parts(*arrays, inverse, out.numpy(), parts)
    else:
        kernels.upper_gradient(*arrays, inverse, out.numpy())


def _grad(z: Tensor) -> Tensor:
    assert z.grad is not None, "a backward pass comes first"
    return z.grad
