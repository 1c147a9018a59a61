"""Masks: exact counts, the right elements, deterministic ties, whole groups, the prunable set."""

import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import nn

from bip import models
from bip.errors import UserError
from bip.pruning.layout import find_prunable, keep_count
from bip.pruning.state import PrunedParameters
from tests.runs import LAYER_TYPES
from tests.unit.networks import small_net

pytestmark = pytest.mark.usefixtures("both_devices")
RATIOS = st.decimals("0.0001", "1", places=4)

# How many to keep


@given(digits=st.integers(1, 10**6), n=st.integers(1, 10**8))
def test_keep_count_is_exact_on_the_decimal_as_written(digits: int, n: int) -> None:
    """ceil(k·n) in integers: n − floor((1 − k)·n) by another road."""
    k = Decimal(digits).scaleb(-6)
    expected = -(-digits * n // 10**6)
    assert keep_count(k, n) == max(1, expected)


@given(k=RATIOS, n=st.integers(1, 300))
def test_keep_count_is_the_least_count_that_reaches_k(k: Decimal, n: int) -> None:
    assert keep_count(k, n) == next(c for c in range(1, n + 1) if Fraction(c) >= Fraction(k) * n)


def test_keep_count_known_values() -> None:
    assert keep_count(Decimal("0.8"), 1000) == 800  # floats keep 801
    assert keep_count(Decimal("0.1"), 10) == 1
    assert keep_count(Decimal("1"), 7) == 7
    assert keep_count(Decimal("0.0001"), 7) == 1
    for ratio in ("0", "-0.1", "1.0001"):
        with pytest.raises(ValueError, match="keep_count"):
            keep_count(Decimal(ratio), 10)


# Which ones


def top(values: NDArray[np.float32], keep: int) -> NDArray[np.float32]:
    """The oracle: a stable sort by falling magnitude, so that ties go to the lowest index."""
    mask = np.zeros(values.size, np.float32)
    mask[np.argsort(-np.abs(values), kind="stable")[:keep]] = 1
    return mask


def make(
    network: nn.Module, layer_type: Any, k: Any, scope: Any, scores: Any = None
) -> PrunedParameters:
    pruned = PrunedParameters(network, find_prunable(network, layer_type), Decimal(k), scope)
    with torch.no_grad():
        if scores is None:
            pruned.scores.normal_()
        else:
            pruned.scores.copy_(torch.as_tensor(scores))
    return pruned


# Few distinct magnitudes make ties; the rest is what floats can be.
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-39, 1.0, -1.0, 1.0000001, 3.4e38, np.inf, -np.inf]
VALUES = st.one_of(
    st.sampled_from(SPECIAL), st.floats(width=32, allow_nan=False, allow_infinity=False)
)


@given(data=st.data(), k=RATIOS, scope=st.sampled_from(["global", "layer"]))
def test_unstructured_masks(data: st.DataObject, k: Decimal, scope: str) -> None:
    network = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Conv2d(1, 2, 2))
    sizes = [35, 21, 8]
    values = data.draw(hnp.arrays(np.float32, sum(sizes), elements=VALUES))
    pruned = make(network, "unstructured", k, scope, values)
    pruned.update_mask()
    mask = pruned.mask.numpy()
    parts = [slice(0, 64)] if scope == "global" else [slice(0, 35), slice(35, 56), slice(56, 64)]
    for part in parts:
        expected = top(values[part], keep_count(k, mask[part].size))
        np.testing.assert_array_equal(mask[part], expected)


GROUPS = {"filter": (0, ["conv1", "conv2", "conv3"]), "channel": (1, ["conv2", "conv3"])}


@pytest.mark.parametrize("layer_type", GROUPS)
@given(data=st.data(), k=RATIOS, scope=st.sampled_from(["global", "layer"]))
def test_group_masks(data: st.DataObject, layer_type: str, k: Decimal, scope: str) -> None:
    """Small whole numbers as scores: their norms are exact, so ties are ties for the oracle too."""
    network = small_net()
    axis, layers = GROUPS[layer_type]
    shapes = [tuple(network.get_submodule(name).weight.shape) for name in layers]
    scores = [
        data.draw(hnp.arrays(np.float32, shape, elements=st.integers(-2, 2))) for shape in shapes
    ]
    flat = np.concatenate([s.reshape(-1) for s in scores])
    pruned = make(network, layer_type, k, scope, flat)
    pruned.update_mask()
    assert [t.name for t in pruned.layout.tensors] == [f"{name}.weight" for name in layers]

    squares = [(np.moveaxis(s, axis, 0).reshape(s.shape[axis], -1) ** 2).sum(1) for s in scores]
    kept = []
    for mask in pruned.views(pruned.mask):
        groups = np.moveaxis(mask.numpy(), axis, 0).reshape(mask.shape[axis], -1)
        assert (groups == groups[:, :1]).all(), "a group is kept or pruned whole"
        kept.append(groups[:, 0])
    if scope == "global":
        squares, kept = [np.concatenate(squares)], [np.concatenate(kept)]
    for expected, actual in zip(squares, kept, strict=True):
        np.testing.assert_array_equal(actual, top(expected, keep_count(k, expected.size)))


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
def test_nan_is_an_error_that_names_the_tensor(layer_type: str) -> None:
    pruned = make(small_net(), layer_type, "0.5", "layer")
    tensor = pruned.layout.tensors[1]
    with torch.no_grad():
        pruned.view(pruned.scores, tensor).view(-1)[3] = float("nan")

    def update() -> None:
        pruned.update_mask()
        pruned.check()  # on a GPU nothing waits for the answer before this

    with pytest.raises(UserError, match=re.escape(tensor.name)):
        update()


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("layer_type", LAYER_TYPES)
def test_counts_may_change_at_any_step(layer_type: str, scope: str) -> None:
    """As by a schedule of k, or a budget of each layer; no buffer moves."""
    network = small_net()
    pruned = make(network, layer_type, "0.9", scope)
    buffers = [pruned.weights, pruned.scores, pruned.mask, *pruned.z]
    places = [buffer.data_ptr() for buffer in buffers]
    pruned.update_mask_and_z()
    budgets = [
        [keep_count(Decimal(k), s.size) for s in pruned.segments] for k in ("0.8", "0.3", "1")
    ]
    budgets.append([1 + s.size // (2 + row) for row, s in enumerate(pruned.segments)])
    for counts in budgets:
        pruned.keep(counts)
        pruned.update_mask_and_z()
        fresh = make(network, layer_type, "1", scope, pruned.scores)
        fresh.keep(counts)
        fresh.update_mask()
        assert torch.equal(pruned.mask, fresh.mask)
        assert [s.keep for s in pruned.segments] == counts
        z = torch.cat([p.detach().flatten() for p in pruned.z])
        assert torch.equal(z, pruned.mask * pruned.weights.detach())
    assert [buffer.data_ptr() for buffer in buffers] == places
    for wrong in (0, pruned.segments[0].size + 1):
        with pytest.raises(ValueError, match=f"cannot keep {wrong}"):
            pruned.keep([wrong, *counts[1:]])


# What can be pruned


def names(network: nn.Module, layer_type: Any) -> list[str]:
    return [tensor.name for tensor in find_prunable(network, layer_type).tensors]


def test_the_prunable_set() -> None:
    network = small_net()
    convs = ["conv1.weight", "conv2.weight", "conv3.weight"]
    for layer_type, pruned, dense in (
        ("unstructured", [*convs, "linear.weight"], ()),
        ("filter", convs, ("linear.weight",)),
        ("channel", convs[1:], ("conv1.weight", "linear.weight")),  # never the image's colours
    ):
        assert names(network, layer_type) == pruned
        assert find_prunable(network, layer_type).dense == dense  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no weights"):
        find_prunable(nn.Sequential(nn.Linear(3, 3)), "filter")


def test_channel_mode_keeps_the_colours_however_low_their_scores() -> None:
    network = small_net()
    before = network.conv1.weight.clone()
    make(network, "channel", "0.01", "layer").update_mask_and_z()
    assert torch.equal(network.conv1.weight, before)
    assert (network.conv2.weight != 0).any(dim=(0, 2, 3)).sum() == 1


def test_tied_weights_count_once_and_are_rewritten_under_both_names() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2), nn.Embedding(6, 4), nn.Linear(4, 6))
    network.append(nn.Linear(4, 4))
    network[4].weight = network[0].weight
    network[3].weight = network[2].weight
    pruned = make(network, "unstructured", "0.5", "layer")
    assert names(network, "unstructured") == ["0.weight", "1.weight", "3.weight"]
    assert pruned.layout.size == 16 + 8 + 24
    pruned.update_mask_and_z()
    for one, other, kept in ((0, 4, 8), (2, 3, 12)):
        assert int((network[one].weight != 0).sum()) == kept
        assert network[one].weight is network[other].weight


def test_what_is_not_a_module_weight_is_named_as_dense() -> None:
    layout = find_prunable(nn.TransformerEncoderLayer(8, 2, 16), "unstructured")
    assert "self_attn.in_proj_weight" in layout.dense
    assert [t.name for t in layout.tensors] == [
        "self_attn.out_proj.weight", "linear1.weight", "linear2.weight",
    ]  # fmt: skip


def test_grouped_convolutions() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(8, 2)
    )
    with pytest.raises(UserError, match=r"grouped convolution 1\b") as raised:
        find_prunable(network, "channel")
    assert "\n" not in str(raised.value)
    assert len(names(network, "filter")) == 2
    assert len(names(network, "unstructured")) == 3


def test_a_convolution_that_gives_the_classes_keeps_its_filters() -> None:
    """The other end of the published defect that deletes image colours."""
    layout = find_prunable(models.build("torchvision/squeezenet1_1", 10), "filter")
    assert "classifier.1.weight" not in [tensor.name for tensor in layout.tensors]
    assert "classifier.1.weight" in layout.dense
    assert len(layout.tensors) == 25
