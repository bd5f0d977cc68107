"""What must run on PEFT's own forward does, gives its numbers, is counted and explained."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear

from lora_fused.integrations.peft import accelerate, explain
from tests.peft_models import (
    LLAMA_LAYERS,
    Block,
    adapted,
    layer_of,
    llama,
    outputs_of,
    small,
)


def assert_falls_back(model: nn.Module, reason: str, x: Any = None, **kwargs: Any) -> None:
    """The layer gives stock PEFT's numbers by stock PEFT's code, and says why."""
    x = torch.randn(4, 12) if x is None else x
    torch.manual_seed(3)
    expected = layer_of(model)(x)
    report = accelerate(model, verbose=False, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        assert torch.equal(layer_of(model)(x), expected)
    now = explain(model)
    assert now.fused_calls == 0 and list(now.stock_calls.values()) == [1]
    (counted,) = now.stock_calls
    assert reason in counted, counted
    assert reason in str(now)
    assert counted in report.not_fused.values() or report.fused


VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "the adapter uses DoRA"),
    "alora": ({"alora_invocation_tokens": [1]}, "the adapter is a ALoraLinearVariant"),
    "mica": ({"init_lora_weights": "mica"}, "the adapter is a MiCALinearVariant"),
}


@pytest.mark.parametrize(("config", "reason"), VARIANTS.values(), ids=VARIANTS)
def test_variants(config: dict[str, Any], reason: str) -> None:
    model = small(**config)
    assert_falls_back(model, reason)
    assert reason in str(explain(model).not_fused)


def test_dora_model_in_full() -> None:
    model = adapted(llama(), use_dora=True)
    stock = outputs_of(copy.deepcopy(model))
    report = accelerate(model, verbose=False)
    assert not report.fused and len(report.not_fused) == LLAMA_LAYERS
    for name, tensor in outputs_of(model).items():
        assert torch.equal(tensor, stock[name])
    assert sum(explain(model).stock_calls.values()) == LLAMA_LAYERS


def hook(*args: Any) -> None:
    return None


PARTS = {
    "the base layer": lambda layer: layer.base_layer,
    "lora_A": lambda layer: layer.lora_A["default"],
    "lora_B": lambda layer: layer.lora_B["default"],
    "lora_dropout": lambda layer: layer.lora_dropout["default"],
}
HOOKS = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
         "register_full_backward_pre_hook")  # fmt: skip


@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize("part", PARTS)
def test_hooks_on_what_is_bypassed(part: str, register: str) -> None:
    model = small(lora_dropout=0.2)
    getattr(PARTS[part](layer_of(model)), register)(hook)
    assert_falls_back(model, f"{part} has hooks")


def test_hooks_come_and_go() -> None:
    model, x = small(), torch.randn(2, 12)
    accelerate(model, verbose=False)
    handle = layer_of(model).lora_A["default"].register_forward_hook(lambda m, a, y: y * 0)
    with pytest.warns(UserWarning, match="lora_A has hooks"):
        hooked = model(x)
    assert torch.equal(hooked, layer_of(model).base_layer(x))
    handle.remove()
    assert not torch.equal(model(x), hooked)
    assert explain(model).fused_calls == 1


def test_hooks_on_the_layer_itself_work() -> None:
    model, x = small(), torch.randn(2, 12)
    accelerate(model, verbose=False)
    plain = model(x)
    layer_of(model).register_forward_hook(lambda m, a, y: y + 1)
    assert torch.equal(model(x), plain + 1)
    assert explain(model).fused_calls == 2


def test_global_hooks() -> None:
    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        assert_falls_back(small(), "global module hooks are registered")
    finally:
        handle.remove()


@pytest.mark.parametrize("part", PARTS)
def test_forward_patched_on_an_instance(part: str) -> None:
    model = small(lora_dropout=0.2)
    module = PARTS[part](layer_of(model))
    module.forward = lambda x: type(module).forward(module, x)
    assert_falls_back(model, f"the forward of {part} is patched")


def test_forward_patched_on_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    original = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: original(self, x) * 1)
    assert_falls_back(small(), "the forward of the base layer is patched")


def test_forward_patched_on_the_lora_layer() -> None:
    """As the offload hooks of accelerate do: there the swap of the class would have no effect."""
    model = small()
    layer = layer_of(model)
    layer.forward = layer.forward
    report = accelerate(model, verbose=False)
    assert "its forward is patched on the instance" in str(report) and not report.fused


def test_forward_patched_on_the_lora_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Linear, "forward", lambda self, x: x * 0)
    report = accelerate(small(), verbose=False)
    assert "lora.Linear.forward is patched by tests.test_peft_guards" in str(report)
    assert not report.fused


def test_offload_hooks_of_accelerate() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model, x = small(), torch.randn(2, 12)
    expected = model(x)
    accelerate(model, verbose=False)
    hooks.add_hook_to_module(layer_of(model).base_layer, hooks.ModelHook())
    with pytest.warns(UserWarning, match="the forward of the base layer is patched"):
        assert torch.equal(model(x), expected)


class OtherLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_subclass_of_linear() -> None:
    model = Block()
    model.proj = OtherLinear(12, 20)
    model = get_peft_model(model, LoraConfig(target_modules=["proj"], init_lora_weights=False))
    assert_falls_back(model, "the base layer is a OtherLinear, not exactly nn.Linear or Conv1D")


def change(what: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    """A small model with its layer changed by `what`."""

    def build() -> nn.Module:
        model = small(lora_dropout=0.2)
        what(layer_of(model))
        return model

    return build


def parametrize_base(layer: Any) -> None:
    nn.utils.parametrize.register_parametrization(layer.base_layer, "weight", nn.Identity())


def replace_dropout(layer: Any) -> None:
    layer.lora_dropout["default"] = nn.AlphaDropout(0.2)


def inplace_dropout(layer: Any) -> None:
    layer.lora_dropout["default"] = nn.Dropout(0.0, inplace=True)


def tensor_scaling(layer: Any) -> None:
    layer.scaling["default"] = torch.tensor(2.0)


class Subclass(Tensor):
    pass


def subclass_weight(layer: Any) -> None:
    layer.base_layer.weight = nn.Parameter(
        layer.base_layer.weight.detach().as_subclass(Subclass), requires_grad=False
    )


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "parametrized": (parametrize_base, "the base layer is a ParametrizedLinear"),
    "dropout": (replace_dropout, "lora_dropout is a AlphaDropout, not exactly nn.Dropout"),
    "inplace": (inplace_dropout, "lora_dropout works in place"),
    "scaling": (tensor_scaling, "scaling is a Tensor, not a number"),
    "subclass": (subclass_weight, "the base weight is a Subclass, not a plain Parameter"),
}


@pytest.mark.parametrize(("what", "reason"), CHANGES.values(), ids=CHANGES)
def test_changed_layers(what: Callable[[Any], Any], reason: str) -> None:
    assert_falls_back(change(what)(), reason)


def test_input_subclass() -> None:
    x = torch.randn(4, 12).as_subclass(Subclass)
    assert_falls_back(small(), "the input is a Subclass, not a plain torch.Tensor", x)


def test_forward_mode_differentiation() -> None:
    model, x, t = small(), torch.randn(2, 12), torch.randn(2, 12)
    accelerate(model, verbose=False)
    with torch.autograd.forward_ad.dual_level(), pytest.warns(UserWarning, match="forward-mode"):
        y = model(torch.autograd.forward_ad.make_dual(x, t))
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    assert torch.allclose(tangent, model(t) - model(torch.zeros_like(t)), atol=1e-6)


def test_errors_are_those_of_stock() -> None:
    model = small()
    accelerate(model, verbose=False)
    with pytest.warns(UserWarning, match="does not fit"), pytest.raises(RuntimeError, match="mat1"):
        model(torch.randn(4, 13))
    with pytest.warns(UserWarning, match="different dtypes"), pytest.raises(RuntimeError):
        model(torch.randn(4, 12, dtype=torch.float64))
    with pytest.warns(UserWarning, match="extra arguments"), pytest.raises(TypeError):
        model(torch.randn(4, 12), scale=2.0)
    with pytest.warns(UserWarning, match="the input is a NoneType"), pytest.raises(TypeError):
        model(None)
