"""FusedLoRALinear.prepack: the output always follows the weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_fused import FusedLoRALinear
from lora_fused.backends import cpu
from tests.conftest import Path, native_isas
from tests.linear_layers import expected, layer_with_adapter, needs_native


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
