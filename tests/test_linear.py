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
from lora_fused.backends import cpu
from lora_fused.merged import fingerprint
from tests.conftest import Path, native_isas

needs_native = pytest.mark.skipif(not native_isas(), reason="this CPU runs no native kernels")


def layer_with_adapter(
    in_features: int = 40, out_features: int = 24, r: int = 4, **options: object
) -> FusedLoRALinear:
    """A layer whose lora_B is not zero: a broken adapter hides behind a zero one."""
    layer = FusedLoRALinear(in_features, out_features, r=r, **options)  # type: ignore[arg-type]
    if r > 0 and not layer.weight.is_meta:
        nn.init.normal_(layer.lora_B)
    return layer


def expected(layer: FusedLoRALinear, x: torch.Tensor) -> torch.Tensor:
    """The output by definition, from what the layer's parameters say now."""
    weight = layer.weight.detach().t() if layer.fan_in_fan_out else layer.weight.detach()
    total = weight + layer.scaling * layer.lora_B.detach() @ layer.lora_A.detach()
    return nn.functional.linear(x, total, layer.bias.detach() if layer.bias is not None else None)


# --- construction -------------------------------------------------------------------------------


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


# --- moving, copying, saving --------------------------------------------------------------------


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


# --- state dicts --------------------------------------------------------------------------------


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


# --- merging ------------------------------------------------------------------------------------


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


# --- prepacking: the output always follows the weight -------------------------------------------


def tracked(layer: FusedLoRALinear, x: torch.Tensor) -> None:
    """The layer's output is that of the weight that can be read from it."""
    got = layer(x)
    torch.testing.assert_close(got, expected(layer, x), atol=1e-4, rtol=1e-4)


def grow(p: torch.Tensor) -> None:
    p.add_(1.0)


WRITES = {
    "data in place": lambda layer: layer.weight.data.add_(1.0),
    "data assigned": lambda layer: setattr(layer.weight, "data", layer.weight.data + 1.0),
    "data element": lambda layer: layer.weight.data[0].fill_(3.0),
    "copy_": lambda layer: layer.weight.copy_(torch.ones(layer.weight.shape)),
    "augmented": lambda layer: layer.weight.__iadd__(1.0),
    "detach alias": lambda layer: layer.weight.detach().add_(1.0),
    "numpy alias": lambda layer: layer.weight.detach().numpy().__iadd__(1.0),
    "dlpack alias": lambda layer: torch.from_dlpack(layer.weight.detach()).add_(1.0),
    "dlpack of the parameter": lambda layer: torch.from_dlpack(layer.weight).add_(1.0),
    "numpy of the parameter": lambda layer: layer.weight.numpy().__iadd__(1.0),
    "storage": lambda layer: layer.weight.untyped_storage().fill_(0),
    "view": lambda layer: layer.weight.view(-1).add_(1.0),
    "init": lambda layer: nn.init.ones_(layer.weight),
    "foreach": lambda layer: torch._foreach_add_([layer.weight], 1.0),
    "out argument": lambda layer: torch.add(torch.ones(layer.weight.shape), 1, out=layer.weight),
    "state_dict alias": lambda layer: layer.state_dict()["weight"].add_(1.0),
    "load_state_dict": lambda layer: layer.load_state_dict(
        {k: v + 1 for k, v in layer.state_dict().items()}
    ),
    "load_state_dict assign": lambda layer: layer.load_state_dict(
        {k: v + 1 for k, v in layer.state_dict().items()}, assign=True
    ),
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "new parameter": lambda layer: setattr(
        layer, "weight", nn.Parameter(torch.ones(layer.weight.shape), requires_grad=False)
    ),
    "parameters()": lambda layer: [grow(p.data) for p in layer.parameters()],
    "merge and unmerge": lambda layer: (layer.merge(), layer.unmerge()),
    "half and back": lambda layer: layer.to(torch.bfloat16).to(torch.float32),
    "vector_to_parameters": lambda layer: nn.utils.vector_to_parameters(
        torch.ones(sum(p.numel() for p in layer.parameters())), layer.parameters()
    ),
    "share_memory": lambda layer: layer.share_memory(),
    "swap_tensors": lambda layer: torch.utils.swap_tensors(
        layer.weight, nn.Parameter(torch.ones(layer.weight.shape), requires_grad=False)
    ),
    "nothing": lambda layer: None,
}


@needs_native
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_no_write_is_missed_by_a_pack(own_path: Path, write: str, fan_in_fan_out: bool) -> None:
    layer = layer_with_adapter(fan_in_fan_out=fan_in_fan_out, backend="cpu")
    x = torch.randn(33, 40)
    original = layer(x)
    layer.prepack()
    assert layer.prepacked
    torch.testing.assert_close(layer(x), original)
    with torch.no_grad():
        WRITES[write](layer)
    harmless = ("nothing", "merge and unmerge", "half and back", "share_memory")
    if write not in harmless:
        assert not torch.allclose(layer(x), original, atol=1e-3)
    tracked(layer, x)
    layer.prepack()
    assert layer.prepacked
    tracked(layer, x)


@needs_native
def test_an_alias_taken_before_packing_is_cut_off_and_taken_after_is_live() -> None:
    layer, x = layer_with_adapter(backend="cpu"), torch.randn(3, 40)
    before = layer.weight.data
    layer.prepack()
    packed = layer(x)
    before.add_(1.0)
    assert torch.equal(layer(x), packed)  # as after layer.to(device): no longer the same memory
    tracked(layer, x)
    alias = layer.weight.data
    alias.add_(1.0)
    tracked(layer, x)
    assert not torch.allclose(layer(x), packed)


@needs_native
def test_metadata_does_not_end_a_pack() -> None:
    layer = layer_with_adapter(backend="cpu").prepack()
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    assert weight.shape == (24, 40) and weight.dtype == torch.float32 and not weight.requires_grad
    assert weight.device.type == "cpu" and weight.numel() == 960 and weight.dim() == 2
    assert weight.grad is None and weight.is_floating_point() and weight.nbytes == 3840
    assert sum(p.numel() for p in layer.parameters()) == 960 + 24 + 160 + 96
    repr(layer), layer.zero_grad(), layer.train(), hash(weight)
    nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    layer(torch.randn(3, 40)).sum().backward()
    optimizer.step()
    assert layer.prepacked


@needs_native
def test_training_the_adapter_over_a_packed_base(own_path: Path) -> None:
    packed = layer_with_adapter(backend="cpu")
    plain = copy.deepcopy(packed)
    packed.prepack()
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.01) for layer in (packed, plain)]
    for step in range(3):
        x = torch.randn(50, 40, generator=torch.Generator().manual_seed(step))
        for layer, optimizer in zip((packed, plain), optimizers, strict=True):
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
    assert packed.prepacked
    torch.testing.assert_close(packed.lora_A, plain.lora_A)
    torch.testing.assert_close(packed.lora_B, plain.lora_B)


@needs_native
def test_optimizer_step_on_an_unfrozen_weight_ends_the_pack() -> None:
    layer, x = layer_with_adapter(backend="cpu"), torch.randn(3, 40)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer.prepack()
    layer.weight.requires_grad_(True)
    before = layer(x)
    before.sum().backward()
    optimizer.step()
    assert not layer.prepacked and layer.weight.grad is not None
    assert not torch.allclose(layer(x), before)
    tracked(layer, x)


@needs_native
def test_backward_uses_the_weight_of_its_forward() -> None:
    layer = layer_with_adapter(backend="cpu").prepack()
    x = torch.randn(3, 40, requires_grad=True)
    y = layer(x)
    total = (layer.lora_B @ layer.lora_A).detach() * layer.scaling
    dx = y.detach() @ total
    weight = layer.weight.detach().clone()
    layer.weight.data.zero_()
    y.backward(y.detach())
    torch.testing.assert_close(x.grad, dx + y.detach() @ weight)


@needs_native
def test_tied_layers_share_one_pack() -> None:
    linear, x = nn.Linear(40, 24), torch.randn(3, 40)
    first, second = (FusedLoRALinear.from_linear(linear, r=2, backend="cpu") for _ in range(2))
    expected_output = linear(x)
    first.prepack()
    assert second.prepacked
    torch.testing.assert_close(second(x), expected_output)
    torch.testing.assert_close(linear(x), expected_output)  # reads the weight: the pack ends
    assert not first.prepacked
    with torch.no_grad():
        linear.weight.zero_()
    torch.testing.assert_close(first(x), linear(x))


@needs_native
def test_merged_layers_can_be_packed() -> None:
    layer, x = layer_with_adapter(backend="cpu").eval(), torch.randn(33, 40)
    before = layer(x)
    layer.merge()
    layer.prepack()
    assert layer.merged and layer.prepacked
    torch.testing.assert_close(layer(x), before)
    layer.unmerge()
    assert not layer.merged and not layer.prepacked
    torch.testing.assert_close(layer(x), before)


@needs_native
def test_merging_a_packed_layer_and_back_keeps_the_pack() -> None:
    layer, x = layer_with_adapter(backend="cpu").eval().prepack(), torch.randn(33, 40)
    before = layer(x)
    layer.merge()
    assert not layer.prepacked
    layer.unmerge()
    assert layer.prepacked and torch.equal(layer(x), before)


@needs_native
def test_other_dtypes_than_the_packed_one_use_the_weight() -> None:
    layer, x = layer_with_adapter(backend="cpu").prepack(), torch.randn(33, 40)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected(layer, x), atol=0.2, rtol=0.05)


@needs_native
def test_packs_of_another_instruction_set_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_fused import dispatch

    layer, x = layer_with_adapter(backend="cpu").prepack(), torch.randn(33, 40)
    before = layer(x)
    for isa in native_isas():
        monkeypatch.setenv("LORA_FUSED_CPU_ISA", isa)
        dispatch.forget_choices()
        torch.testing.assert_close(layer(x), before)


@needs_native
def test_code_that_goes_around_python_finds_nan_and_cannot_write() -> None:
    layer = layer_with_adapter(backend="cpu").prepack()
    hidden = torch.Tensor.data.__get__
    with torch._C.DisableTorchFunctionSubclass():
        raw = hidden(layer.weight)
        assert raw.isnan().all()
        with pytest.raises(RuntimeError, match="refers to a single memory location"):
            raw.add_(1.0)


@needs_native
def test_memory_of_a_pack_is_as_documented() -> None:
    layer = FusedLoRALinear(512, 256, r=4, dtype=torch.bfloat16).prepack()
    values, pack = layer.weight.__dict__["_packed"]
    assert pack.nbytes <= 2 * values.nbytes * 1.1 + 4096


def test_trainable_weights_are_not_packed() -> None:
    with pytest.raises(
        RuntimeError, match=r"^prepack: the weight is trainable, expected a frozen one\.$"
    ):
        FusedLoRALinear(8, 8, r=0).prepack()


def test_prepack_where_it_cannot_run_warns_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, x = layer_with_adapter(), torch.randn(3, 40)
    before = layer(x)
    monkeypatch.setattr(cpu, "native", lambda: None)
    with pytest.warns(
        UserWarning, match=r"^prepack: left as it is: the native kernels are not built\.$"
    ):
        layer.prepack()
    assert not layer.prepacked
    monkeypatch.undo()
    torch.testing.assert_close(layer(x), before)
    double = layer_with_adapter().double()
    with pytest.warns(UserWarning, match="there are no native kernels for float64"):
        double.prepack()


def test_no_warning_in_ordinary_use(main_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = layer_with_adapter(backend=main_path.backend, lora_dropout=0.1)
        layer(torch.randn(3, 40)).sum().backward()
        layer.merge()
        layer.unmerge()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cols", [8, 7])
def test_fingerprint_sees_no_memory_layout(dtype: torch.dtype, cols: int) -> None:
    flat = torch.randn(1 + 6 * cols).to(dtype)
    weight = flat[1:].view(6, cols)  # begins in the middle of an 8-byte word
    assert fingerprint(weight) == fingerprint(weight.clone())
    assert fingerprint(weight) == fingerprint(weight.t().contiguous().t())
