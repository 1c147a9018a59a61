"""What a GPU would run, as far as a CPU can prove it: the CUDA selector, and steps that never wait.

Steps run on the meta device, whose tensors have shapes but no values. So all code takes the paths
of a GPU, and whatever needs a value on the host fails: there is none.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bip.pruning.layout import Segment
from bip.pruning.select import Alone
from bip.pruning.select_cuda import CudaSelector
from tests.runs import LAYER_TYPES
from tests.unit.networks import Setup, make_setup, random_batch
from tests.unit.scores_for_ranking import make_scores, sorted_mask

# Operations whose result or its shape depends on values, so that the host waits for the device.
WAITS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "bincount",
    "_unique", "_unique2", "unique_dim", "unique_consecutive", "histc", "allclose",
}  # fmt: skip
COPIES = {"_to_copy", "copy_", "_copy_from", "_copy_from_and_resize"}
SEGMENTS = (Segment("a", 0, 600, 30), Segment("b", 600, 1000, 90))


class NoWaiting(TorchDispatchMode):
    """Raises AssertionError at any operation for which the host would wait for the device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        assert name not in WAITS, f"{func} waits for the device"
        if name == "index":
            masks = [t for t in args[1] if t is not None and t.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{func} with a mask waits for its number of ones"
        if name == "repeat_interleave":
            assert kwargs.get("output_size") is not None, f"{func} waits for the sum of repeats"
        if name in COPIES:
            devices = {str(t.device) for t in tensors}
            if (target := kwargs.get("device")) is not None:
                devices.add(str(target))
            assert len(devices) < 2, f"{func} copies between {devices}"
        return func(*args, **kwargs)


@pytest.fixture
def gpu_like(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Setup]:
    """Setups on the meta device, after the step in which optimizers make their state.

    torch has no fused SGD and no autocast there; on a GPU neither waits.
    """
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    sgd = torch.optim.SGD
    monkeypatch.setattr(
        torch.optim, "SGD", lambda groups, fused, **options: sgd(groups, foreach=True, **options)
    )

    def make(method: str, layer_type: str = "unstructured", **settings: Any) -> Setup:
        setup = make_setup(method, layer_type, device="meta", **settings)  # type: ignore[arg-type]
        assert setup.pruned is None or isinstance(setup.pruned.selector, CudaSelector)
        setup.method.step(0)
        return setup

    return make


STEPS = {
    "bip": {},
    "bip simultaneous": {"levels": "simultaneous"},
    "hydra": {},
    "finetune": {},
    "feather": {},
    "gmp": {"mask_every": 1},
}


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("case", STEPS)
def test_a_step_never_waits_for_the_device(
    case: str, layer_type: str, gpu_like: Callable[..., Setup]
) -> None:
    setup = gpu_like(case.split()[0], layer_type, **STEPS[case])
    with NoWaiting():
        for iteration in (1, 2):
            reports = setup.method.step(iteration)
    assert all(report.loss.is_meta for report in reports)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: bool((x > 0).any()),
        lambda x: torch.empty_like(x, device="cpu").copy_(x),
        lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.int64, device="meta")),
    ],
)
def test_the_check_finds_what_waits(call: Callable[[Tensor], object]) -> None:
    with NoWaiting(), pytest.raises((AssertionError, RuntimeError)):
        call(torch.ones(3, device="meta"))


def test_the_selector_is_one_graph(no_kernels: None) -> None:
    """Under torch.compile and torch.export, and with the same result."""
    values, weights = make_scores("ties", 1000, 1), make_scores("normal", 1000, 2)
    selector = CudaSelector(SEGMENTS, Alone(), torch.device("cpu"))
    mask, z = torch.zeros(1000, dtype=torch.uint8), [torch.empty(300), torch.empty(700)]
    compiled = torch.compile(selector.update, fullgraph=True, backend="eager")
    proof = compiled(values, mask, weights, z)
    assert torch.equal(mask, sorted_mask(values, SEGMENTS))
    assert torch.equal(torch.cat(z), mask * weights)

    class Selection(nn.Module):
        def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
            own = torch.zeros(1000, dtype=torch.uint8)
            return selector.update(values, own), own

    exported = torch.export.export(Selection(), (values,)).module()
    again, own = exported(make_scores("normal", 1000, 3))
    assert torch.equal(own, sorted_mask(make_scores("normal", 1000, 3), SEGMENTS))
    assert again[0] == proof[0] == 120


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("case", ["bip", "bip simultaneous", "hydra", "finetune"])
def test_gpu_paths_train_as_cpu_paths(
    case: str, layer_type: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Equal masks, and weights and scores up to rounding."""
    make = partial(make_setup, case.split()[0], layer_type, **STEPS[case])  # type: ignore[arg-type]
    ours = make()
    request.getfixturevalue("no_kernels")
    others = make()
    assert others.pruned is not None is not ours.pruned
    assert isinstance(others.pruned.selector, CudaSelector)
    for setup in (ours, others):
        for iteration in range(3):
            setup.method.step(iteration)
    assert torch.equal(ours.pruned.mask, others.pruned.mask)
    assert torch.equal(ours.pruned.proof, others.pruned.proof)
    for name in ("weights", "scores"):
        torch.testing.assert_close(getattr(others.pruned, name), getattr(ours.pruned, name))
    images = random_batch(9)[0]
    torch.testing.assert_close(others.network(images), ours.network(images))
