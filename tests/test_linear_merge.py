"""FusedLoRALinear.merge and unmerge: the weight comes back bit for bit, come what may between."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_fused import FusedLoRALinear
from lora_fused.merged import fingerprint
from tests.conftest import Path
from tests.linear_layers import layer_with_adapter


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_hundred_merge_cycles_leave_the_weight_bit_identical(
    fan_in_fan_out: bool, dtype: torch.dtype
) -> None:
    layer = layer_with_adapter(fan_in_fan_out=fan_in_fan_out, dtype=dtype)
    parameter, original = layer.weight, layer.weight.detach().clone()
    for _ in range(100):
        layer.merge()
        assert layer.merged and not torch.equal(layer.weight, original)
        layer.unmerge()
    assert layer.weight is parameter and torch.equal(layer.weight, original)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_merged_layer_computes_the_same(main_path: Path, fan_in_fan_out: bool) -> None:
    layer = layer_with_adapter(fan_in_fan_out=fan_in_fan_out, backend=main_path.backend).eval()
    x = torch.randn(3, 40)
    before = layer(x)
    layer.merge()
    layer.merge()  # nothing
    torch.testing.assert_close(layer(x), before)
    layer.unmerge()
    layer.unmerge()  # nothing
    assert torch.equal(layer(x), before)


def test_merge_is_rounded_once() -> None:
    layer = layer_with_adapter(dtype=torch.bfloat16)
    delta = layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    exact = (layer.weight.double() + delta).bfloat16()
    layer.merge()
    assert (layer.weight != exact).float().mean() < 0.01  # fp32 and fp64 may round a tie apart


def test_eval_and_train_merge_only_when_asked() -> None:
    plain, merging = layer_with_adapter(), layer_with_adapter(merge_weights=True)
    assert not plain.eval().merged
    assert merging.eval().merged and merging.eval().merged
    assert not merging.train().merged


def test_state_dict_while_merged_is_the_unmerged_one() -> None:
    layer = layer_with_adapter()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    layer.merge()
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key
    for key, value in nn.Sequential(layer).state_dict(keep_vars=True).items():
        assert torch.equal(value, before[key.removeprefix("0.")])


def test_load_state_dict_while_merged_merges_what_was_loaded() -> None:
    layer, other, x = layer_with_adapter(), layer_with_adapter(), torch.randn(3, 40)
    layer.merge()
    layer.load_state_dict(other.state_dict())
    assert layer.merged
    torch.testing.assert_close(layer(x), other(x))
    layer.load_state_dict({"lora_B": torch.zeros(24, 4)}, strict=False)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, other.weight, other.bias))
    layer.unmerge()
    assert torch.equal(layer.weight, other.weight)


def test_to_while_merged_converts_the_original() -> None:
    layer = layer_with_adapter()
    original = layer.weight.detach().clone()
    layer.merge()
    layer.to(torch.bfloat16)
    assert layer.merged and layer.weight.dtype == torch.bfloat16
    layer.unmerge()
    assert torch.equal(layer.weight, original.bfloat16())


def test_adapter_changed_while_merged_takes_effect_at_the_next_merge() -> None:
    layer, x = layer_with_adapter(), torch.randn(3, 40)
    original = layer.weight.detach().clone()
    layer.merge()
    before = layer(x)
    with torch.no_grad():
        layer.lora_A.mul_(2)
    layer.scaling = 5.0
    assert torch.equal(layer(x), before)
    layer.unmerge()
    assert torch.equal(layer.weight, original)


@pytest.mark.parametrize("write", ["data", "no_grad", "one element"])
def test_weight_written_while_merged_is_kept(write: str) -> None:
    layer = layer_with_adapter()
    original = layer.weight.detach().clone()
    layer.merge()
    if write == "data":
        layer.weight.data.add_(1.0)
        change = torch.ones_like(original)
    elif write == "no_grad":
        with torch.no_grad():
            layer.weight.sub_(2.0)
        change = torch.full_like(original, -2.0)
    else:
        layer.weight.data[3, 5] += 0.25
        change = torch.zeros_like(original)
        change[3, 5] = 0.25
    with pytest.warns(UserWarning, match="weight was written while merged"):
        layer.unmerge()
    torch.testing.assert_close(layer.weight.detach(), original + change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_fingerprint_sees_values_and_places(dtype: torch.dtype) -> None:
    weight = torch.randn(13, 9, dtype=dtype)
    changes = [weight.flip(0), weight.flip(1), weight.clone(), weight.clone()]
    changes[2][12, 8] = -weight[12, 8]
    changes[3][0, 0] += 2.0
    prints = {fingerprint(t) for t in (weight, *changes)}
    assert len(prints) == 5
    assert fingerprint(weight.t().contiguous().t()) == fingerprint(weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cols", [8, 7])
def test_fingerprint_sees_no_memory_layout(dtype: torch.dtype, cols: int) -> None:
    flat = torch.randn(1 + 6 * cols).to(dtype)
    weight = flat[1:].view(6, cols)  # begins in the middle of an 8-byte word
    assert fingerprint(weight) == fingerprint(weight.clone())
    assert fingerprint(weight) == fingerprint(weight.t().contiguous().t())


def test_merging_one_of_two_layers_on_a_shared_weight_leaves_the_other_alone() -> None:
    linear, x = nn.Linear(40, 24), torch.randn(3, 40)
    first, second = (FusedLoRALinear.from_linear(linear, r=2) for _ in range(2))
    nn.init.normal_(first.lora_B)
    before = second(x)
    first.merge()
    assert torch.equal(second(x), before)
    torch.testing.assert_close(linear(x), before)


def test_merge_under_autocast_is_not_cast() -> None:
    one, x = layer_with_adapter(), torch.randn(3, 40)
    two = copy.deepcopy(one)
    one.merge()
    with torch.autocast("cpu", torch.bfloat16):
        two.merge()
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(one(x), two(x))
