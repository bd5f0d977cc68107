"""lora_fused.loralib computes, trains, merges and saves what loralib does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_fused import explain
from lora_fused import loralib as ours
from lora_fused.testing import assert_close_to_ref

theirs = pytest.importorskip("loralib")

LAYERS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {
    "linear": ("Linear", (12, 20), {"r": 4, "lora_alpha": 8}, (5, 12)),
    "linear-fan_in": ("Linear", (12, 20), {"r": 4, "fan_in_fan_out": True}, (2, 3, 12)),
    "linear-r0": ("Linear", (12, 20), {}, (5, 12)),
    "merged-101": (
        "MergedLinear", (12, 30), {"r": 4, "lora_alpha": 8, "enable_lora": [True, False, True]},
        (5, 12),
    ),
    "merged-11-fan_in": (
        "MergedLinear", (12, 30),
        {"r": 2, "enable_lora": [True, True], "fan_in_fan_out": True, "bias": False}, (2, 3, 12),
    ),
    "merged-r0": ("MergedLinear", (12, 30), {"enable_lora": [False, True, False]}, (5, 12)),
    "embedding": ("Embedding", (11, 6), {"r": 3, "padding_idx": 2}, (4, 5)),
    "embedding-r0": ("Embedding", (11, 6), {}, (4, 5)),
    "conv1d-1": ("Conv1d", (4, 6, 1), {"r": 2}, (2, 4, 7)),
    "conv2d-3": ("Conv2d", (4, 6, 3), {"r": 2, "padding": 1}, (2, 4, 7, 7)),
    "conv2d-groups": ("Conv2d", (4, 6, 3), {"r": 2, "groups": 2}, (2, 4, 7, 7)),
    "conv3d-1": ("Conv3d", (4, 6, 1), {"r": 2}, (2, 4, 3, 3, 3)),
}  # fmt: skip


def pair(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, Any, Tensor]:
    """The same layer of loralib and of ours, with adapters that are not zero, and an input."""
    name, args, kwargs, shape = LAYERS[kind]
    stock = getattr(theirs, name)(*args, **{**kwargs, **changes})
    layer = getattr(ours, name)(*args, **{**kwargs, **changes})
    with torch.no_grad():
        for parameter_name, p in stock.named_parameters():
            if "lora_" in parameter_name:
                nn.init.normal_(p, std=0.3)
    layer.load_state_dict(stock.state_dict())
    x = torch.randint(11, shape) if name == "Embedding" else torch.randn(shape).to(dtype)
    return stock.to(dtype), layer.to(dtype), x


def results(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_(x.is_floating_point())
    layer.zero_grad()
    y = layer(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    y.backward(dy)
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **gradients, **({} if x.grad is None else {"x": x.grad})}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", LAYERS)
def test_equal_to_loralib(kind: str, dtype: torch.dtype) -> None:
    stock, layer, x = pair(kind, dtype)
    got, baseline = results(layer, x), results(stock, x)
    wide = x.double() if x.is_floating_point() else x
    truth = results(copy.deepcopy(stock).double(), wide)
    assert got.keys() == baseline.keys()
    for name, tensor in got.items():
        assert_close_to_ref(name, tensor, truth[name], baseline[name])


@pytest.mark.parametrize("kind", LAYERS)
def test_same_parameters(kind: str) -> None:
    stock, layer, _ = pair(kind)
    expected = [(n, p.shape, p.requires_grad) for n, p in stock.named_parameters()]
    assert [(n, p.shape, p.requires_grad) for n, p in layer.named_parameters()] == expected
    base = type(stock).__mro__[1]
    assert isinstance(layer, ours.LoRALayer) and (base is theirs.layers.ConvLoRA or base in
                                                  type(layer).__mro__)  # fmt: skip
    fresh = [t.abs().sum() > 0 for t in type(layer)(*LAYERS[kind][1], **LAYERS[kind][2])
             .state_dict().values()]  # fmt: skip
    stock.reset_parameters()
    assert fresh == [t.abs().sum() > 0 for t in stock.state_dict().values()]


@pytest.mark.parametrize("kind", LAYERS)
def test_eval_merges_and_train_restores(kind: str) -> None:
    stock, layer, x = pair(kind)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    unmerged = layer(x)
    stock.eval()
    for _ in range(20):
        layer.eval()
        assert layer.merged or layer.r == 0
        torch.testing.assert_close(layer(x), stock(x))
        torch.testing.assert_close(layer(x), unmerged)
        layer.train()
        assert not layer.merged
    assert torch.equal(layer(x), unmerged)
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("kind", ["linear", "merged-101", "embedding", "conv2d-3"])
def test_without_merging(kind: str) -> None:
    stock, layer, x = pair(kind, merge_weights=False)
    for each in (layer, stock):
        each.eval()
    assert not layer.merged
    torch.testing.assert_close(layer(x), stock(x))


@pytest.mark.parametrize("kind", ["embedding", "conv2d-3"])
def test_written_while_merged(kind: str) -> None:
    _, layer, x = pair(kind)
    expected = layer(x)
    weight = layer.eval()._weight()
    with torch.no_grad():
        weight.mul_(2)
    doubled = layer(x)
    assert not torch.allclose(layer.train()(x), expected, atol=1e-3)
    torch.testing.assert_close(layer.eval()(x), doubled)


@pytest.mark.parametrize("name", ["Conv1d", "Conv3d"])
def test_convolutions_that_loralib_cannot_do(name: str) -> None:
    layer = getattr(ours, name)(4, 6, 3, r=2)
    x = torch.randn(2, 4, *[5] * (layer.conv.weight.dim() - 2))
    torch.testing.assert_close(layer(x), layer.conv(x))
    nn.init.normal_(layer.lora_B)
    changed = layer(x)
    assert not torch.allclose(changed, layer.conv(x))
    torch.testing.assert_close(layer.eval()(x), changed)


def test_merged_linear_without_a_slice() -> None:
    layer = ours.MergedLinear(12, 30, r=4, enable_lora=[False, False])
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert not hasattr(layer, "lora_A") and layer.eval()(x).shape == (5, 30)


def test_merged_linear_has_one_mask() -> None:
    _, layer, _ = pair("merged-11-fan_in", lora_dropout=0.5)
    with torch.no_grad():
        layer.lora_A[2:] = layer.lora_A[:2]
        layer.lora_B[15:] = layer.lora_B[:15]
        layer.weight.zero_()
    x = torch.randn(50, 12)
    y, other = layer(x), layer(x)
    torch.testing.assert_close(y[:, :15], y[:, 15:])
    assert not torch.allclose(y, other)
    spread = layer.eval()(x)
    mean = torch.stack([layer.train()(x) for _ in range(500)]).mean(0)
    assert (mean - spread).abs().max() < 0.2 * spread.abs().max()


def test_fused_and_explained() -> None:
    layer = ours.MergedLinear(12, 30, r=4, enable_lora=[True, False, True])
    (report,) = explain(layer, torch.randn(5, 12)).layers
    assert report.problem is not None and report.problem.R == 8


def test_from_linear() -> None:
    linear = nn.Linear(12, 20)
    layer = ours.Linear.from_linear(linear, r=4)
    assert type(layer) is ours.Linear and layer.weight is linear.weight


def test_errors() -> None:
    with pytest.raises(ValueError, match="2 slices, expected a divisor of out_features, 7"):
        ours.MergedLinear(3, 7, r=1, enable_lora=[True, False])
    with pytest.raises(TypeError, match="kernel_size is"):
        ours.Conv2d(2, 2, (3, 3))
    with pytest.raises(NotImplementedError, match="bias is 'some'"):
        ours.mark_only_lora_as_trainable(nn.Linear(1, 1), "some")
    with pytest.raises(NotImplementedError, match="bias is 'some'"):
        ours.lora_state_dict(nn.Linear(1, 1), "some")


def model_of(library: Any) -> nn.Module:
    return nn.Sequential(
        library.Embedding(11, 12, r=2),
        library.Linear(12, 12, r=3),
        nn.Linear(12, 12),
        library.MergedLinear(12, 24, r=2, enable_lora=[False, True]),
    )


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_state_of_a_model(bias: str) -> None:
    models = {library: model_of(library) for library in (theirs, ours)}
    states, trainable = [], []
    for library, model in models.items():
        library.mark_only_lora_as_trainable(model, bias)
        trainable.append([n for n, p in model.named_parameters() if p.requires_grad])
        states.append(library.lora_state_dict(model, bias))
    assert trainable[0] == trainable[1]
    assert states[0].keys() == states[1].keys()
    for model, state in zip(models.values(), reversed(states), strict=True):
        missing = model.load_state_dict(state, strict=False)
        assert not missing.unexpected_keys
        assert torch.equal(model[1].lora_A, state["1.lora_A"])
