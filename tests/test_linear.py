"""FusedLoRALinear: an nn.Linear and a loralib layer in every way that users rely on."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from lora_fused import FusedLoRALinear
from tests.conftest import Path, native_isas
from tests.linear_layers import expected, layer_with_adapter

# --- construction ---------------------------------------------------------------------------------


def test_it_is_a_linear_with_loralibs_parameters() -> None:
    layer = FusedLoRALinear(40, 24, r=4, lora_alpha=8)
    assert isinstance(layer, nn.Linear)
    assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == {
        "weight": (24, 40), "bias": (24,), "lora_A": (4, 40), "lora_B": (24, 4)
    }  # fmt: skip
    trainable = {n for n, p in layer.named_parameters() if p.requires_grad}
    assert trainable == {"bias", "lora_A", "lora_B"}
    assert layer.scaling == 2.0 and type(layer.scaling) is float
    assert torch.equal(layer.lora_B, torch.zeros(24, 4))
    bound = (6 / ((1 + 5) * 40)) ** 0.5
    assert 0.5 * bound < layer.lora_A.abs().max().item() <= bound
    assert 0.5 * bound < layer.weight.abs().max().item() <= bound


def test_rslora_scaling() -> None:
    assert FusedLoRALinear(8, 8, r=16, lora_alpha=8, use_rslora=True).scaling == 2.0


def test_scaling_may_be_changed(main_path: Path) -> None:
    layer, x = layer_with_adapter(backend=main_path.backend), torch.randn(3, 40)
    for scaling in (0.5, 3, 0.0):
        layer.scaling = scaling
        torch.testing.assert_close(layer(x), expected(layer, x))


def test_a_new_layer_computes_its_base(main_path: Path) -> None:
    linear, x = nn.Linear(40, 24), torch.randn(3, 40)
    layer = FusedLoRALinear.from_linear(linear, backend=main_path.backend)
    torch.testing.assert_close(layer(x), linear(x))


def test_rank_zero_is_a_plain_trainable_linear() -> None:
    layer = FusedLoRALinear(40, 24, r=0)
    assert set(dict(layer.named_parameters())) == {"weight", "bias"}
    assert layer.weight.requires_grad
    x = torch.randn(3, 40)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    layer.merge()
    assert not layer.merged


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_and_gradients(path: Path, fan_in_fan_out: bool, bias: bool) -> None:
    layer = layer_with_adapter(bias=bias, fan_in_fan_out=fan_in_fan_out, backend=path.backend)
    assert layer.weight.shape == ((40, 24) if fan_in_fan_out else (24, 40))
    x = torch.randn(5, 7, 40, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, expected(layer, x))
    dy = torch.randn_like(y)
    y.backward(dy)
    weight = layer.weight.t() if fan_in_fan_out else layer.weight
    total = weight + layer.scaling * layer.lora_B.detach() @ layer.lora_A.detach()
    torch.testing.assert_close(x.grad, dy @ total)
    assert layer.weight.grad is None
    if bias:
        torch.testing.assert_close(layer.bias.grad, dy.sum((0, 1)))


def test_from_linear_shares_the_parameters() -> None:
    linear = nn.Linear(40, 24).double()
    layer = FusedLoRALinear.from_linear(linear, r=4, lora_alpha=8, lora_dropout=0.05)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not linear.weight.requires_grad and layer.bias.requires_grad
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float64
    assert (layer.in_features, layer.out_features, layer.r) == (40, 24, 4)
    assert layer.scaling == 2.0 and layer.lora_dropout == 0.05


def test_from_linear_keeps_the_mode_and_takes_conv1d() -> None:
    class Conv1D(nn.Module):  # transformers' class, in short
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = (
                nn.Parameter(torch.randn(40, 24)),
                nn.Parameter(torch.randn(24)),
            )

    conv = Conv1D().eval()
    layer = FusedLoRALinear.from_linear(conv, fan_in_fan_out=True)
    assert not layer.training and layer.weight is conv.weight
    x = torch.randn(3, 40)
    torch.testing.assert_close(layer(x), x @ conv.weight + conv.bias)


def test_from_linear_without_bias_and_on_meta() -> None:
    layer = FusedLoRALinear.from_linear(nn.Linear(8, 6, bias=False, device="meta"), r=2)
    assert layer.bias is None and layer.lora_A.is_meta
    assert layer(torch.empty(3, 8, device="meta")).shape == (3, 6)


# --- moving, copying, saving ----------------------------------------------------------------------


def test_meta_then_materialised() -> None:
    layer = FusedLoRALinear(40, 24, r=4, device="meta", dtype=torch.bfloat16, fan_in_fan_out=True)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer.weight.dtype == layer.lora_A.dtype == torch.bfloat16
    assert layer.weight.isfinite().all() and (layer.lora_B == 0).all()
    assert layer(torch.randn(3, 40, dtype=torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("state", ["plain", "merged", "prepacked", "merged and prepacked"])
def test_copies_are_equal_and_independent(copier: str, state: str) -> None:
    layer = layer_with_adapter(lora_dropout=0.1).eval()
    original = layer.weight.detach().clone()
    if "merged" in state:
        layer.merge()
    if "prepacked" in state and native_isas():
        layer.prepack()
    x = torch.randn(3, 40)
    before = layer(x)
    if copier == "deepcopy":
        twin = copy.deepcopy(layer)
    elif copier == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    torch.testing.assert_close(twin(x), before)
    assert layer.prepacked == ("prepacked" in state and bool(native_isas()))
    assert repr(twin).replace(", prepacked=True", "") == repr(layer).replace(", prepacked=True", "")
    twin.unmerge()
    assert torch.equal(twin.weight, original)
    with torch.no_grad():
        twin.weight.zero_()
        twin.lora_A.zero_()
    assert torch.equal(layer(x), before)


def test_to_dtype() -> None:
    layer = layer_with_adapter().to(torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in layer.parameters())
    x = torch.randn(3, 40, dtype=torch.bfloat16)
    torch.testing.assert_close(layer(x), expected(layer, x), atol=0.1, rtol=0.05)


def test_repr() -> None:
    layer = FusedLoRALinear(40, 24, r=4, lora_alpha=6, lora_dropout=0.1, use_rslora=True)
    assert repr(layer) == (
        "FusedLoRALinear(in_features=40, out_features=24, bias=True, r=4, scaling=3, "
        "lora_dropout=0.1, use_rslora=True)"
    )


def test_no_warning_in_ordinary_use(main_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = layer_with_adapter(backend=main_path.backend, lora_dropout=0.1)
        layer(torch.randn(3, 40)).sum().backward()
        layer.merge()
        layer.unmerge()


# --- state dicts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("r", [0, 4])
def test_state_dicts_of_loralib_both_ways(fan_in_fan_out: bool, r: int) -> None:
    loralib = pytest.importorskip("loralib")
    theirs = loralib.Linear(40, 24, r=r, lora_alpha=8, fan_in_fan_out=fan_in_fan_out)
    if r:
        nn.init.normal_(theirs.lora_B)
    ours = FusedLoRALinear(40, 24, r=r, lora_alpha=8, fan_in_fan_out=fan_in_fan_out)
    x = torch.randn(3, 40)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))


def test_state_dict_of_linear_loads_when_not_strict() -> None:
    linear, layer = nn.Linear(40, 24), layer_with_adapter()
    with pytest.raises(
        RuntimeError, match=r"Missing key\(s\) in state_dict: \"lora_A\", \"lora_B\""
    ):
        layer.load_state_dict(linear.state_dict())
    result = layer.load_state_dict(linear.state_dict(), strict=False)
    assert set(result.missing_keys) == {"lora_A", "lora_B"} and not result.unexpected_keys
    assert torch.equal(layer.weight, linear.weight)


def test_loralibs_helpers_work() -> None:
    loralib = pytest.importorskip("loralib")
    model = nn.Sequential(layer_with_adapter(), nn.Linear(24, 8))
    loralib.mark_only_lora_as_trainable(model, bias="lora_only")
    # loralib's "lora_only" looks for its own base class, which ours is not: the bias stays frozen.
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {"0.lora_A", "0.lora_B"} <= trainable <= {"0.lora_A", "0.lora_B", "0.bias"}
    assert set(loralib.lora_state_dict(model)) == {"0.lora_A", "0.lora_B"}


@pytest.mark.parametrize("assign", [False, True])
def test_assigning_load(assign: bool) -> None:
    source, target = layer_with_adapter(), layer_with_adapter()
    target.load_state_dict(source.state_dict(), assign=assign)
    x = torch.randn(3, 40)
    torch.testing.assert_close(target(x), source(x))
