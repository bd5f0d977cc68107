"""Accelerated torchtune layers compute what torchtune computes; on the real one or a stand-in."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tune import DoRALinear, LoRALinear  # isort: skip (it finds torchtune)

import lora_fused
from lora_fused.integrations.torchtune import accelerate, explain, restore
from lora_fused.testing import assert_close_to_ref


class Attention(nn.Module):
    """torchtune's names; q, k and v get one input."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.q_proj = LoRALinear(16, 16, rank=4, alpha=8, **options)
        self.k_proj = LoRALinear(16, 8, rank=4, alpha=8, **options)
        self.v_proj = LoRALinear(16, 8, rank=4, alpha=8, **options)
        self.output_proj = LoRALinear(32, 16, rank=4, alpha=8, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.output_proj(torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1))


def attention(dtype: torch.dtype = torch.float32, **options: Any) -> Attention:
    model = Attention(**options).to(dtype)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
        if "lora_b" in name:
            nn.init.normal_(p)
    return model


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(1)
    model.zero_grad()
    inputs = x.clone().requires_grad_()
    y = model(inputs)
    y.float().square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert inputs.grad is not None
    return {"y": y.detach(), "x": inputs.grad, **gradients}


CASES: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {}), (torch.float32, {"use_bias": True}), (torch.float32, {"dropout": 0.4}),
    (torch.bfloat16, {}), (torch.bfloat16, {"use_bias": True}),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "options"), CASES, ids=str)
@pytest.mark.parametrize("group", ["always", "never"])
def test_equal_to_torchtune(dtype: torch.dtype, options: dict[str, Any], group: str) -> None:
    model, x = attention(dtype, **options), torch.randn(64, 16).to(dtype)
    truth, baseline = results(copy.deepcopy(model).double(), x.double()), results(model, x)
    report = accelerate(model, verbose=False, match_torch_rng=True, group=group)
    assert len(report.fused) == 4
    results(model, x)
    got = results(model, x)
    assert got.keys() == truth.keys() and len(got) == 10
    for name, tensor in got.items():
        assert_close_to_ref(name, tensor, truth[name], baseline[name])
    now = explain(model)
    assert now.fused_calls == 8 and not now.stock_calls
    assert now.group_calls == (1 if group == "always" and "dropout" not in options else 0)


def test_dropout_of_our_own() -> None:
    model, x = attention(dropout=0.5), torch.randn(6, 16)
    accelerate(model, verbose=False)
    first, again = results(model, x), results(model, x)
    assert all(torch.equal(first[name], again[name]) for name in first)
    torch.manual_seed(2)
    assert not torch.equal(model(x), first["y"])


def test_autocast() -> None:
    model, x = attention(), torch.randn(6, 16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        accelerate(model, verbose=False)
        got = model(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=5e-2, atol=5e-2)
    assert explain(model).fused_calls == 4


def test_nothing_but_the_class_changes() -> None:
    model, x = attention(), torch.randn(6, 16)
    before = {n: id(p) for n, p in model.named_parameters()}
    expected, params = results(model, x), model.q_proj.adapter_params()
    accelerate(model, verbose=False)
    assert isinstance(model.q_proj, LoRALinear) and type(model.q_proj) is not LoRALinear
    assert {n: id(p) for n, p in model.named_parameters()} == before
    assert model.q_proj.adapter_params() == params
    twin = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(twin(x), model(x))
    restore(model)
    assert type(model.q_proj) is LoRALinear and not model._forward_hooks
    assert all(torch.equal(t, expected[name]) for name, t in results(model, x).items())


def disable(layer: Any) -> None:
    layer.disabled = True


def hook(layer: Any) -> None:
    layer.lora_a.register_forward_hook(lambda m, a, y: y * 2)


REASONS = {
    "the adapters are disabled": disable,
    "lora_a has hooks": hook,
    "lora_a is a Identity, not exactly nn.Linear": lambda m: setattr(m, "lora_a", nn.Identity()),
    "lora_dropout is a AlphaDropout, not exactly nn.Dropout": lambda m: setattr(
        m, "dropout", nn.AlphaDropout(0.1)
    ),
}


@pytest.mark.filterwarnings("ignore:lora_fused")
@pytest.mark.parametrize("reason", REASONS)
def test_left_to_torchtune(reason: str) -> None:
    model, x = attention(), torch.randn(6, 16)
    if "Identity" in reason:
        model.q_proj.lora_b = nn.Linear(16, 16, bias=False)
    REASONS[reason](model.q_proj)
    expected = results(model, x)
    report = accelerate(model, verbose=False, group="always")
    assert report.not_fused == {"q_proj": reason}
    for name, tensor in results(model, x).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4)
    assert dict(explain(model).stock_calls) == {reason: 1}
    assert f"1 by torchtune: {reason}" in str(explain(model))


def test_a_quantised_base_is_left_to_torchtune() -> None:
    model = attention()
    model.q_proj._quantize_base = True
    report = accelerate(model, verbose=False)
    assert report.not_fused == {"q_proj": "the base weight is quantised"}


def test_another_dtype_is_an_error_as_in_torchtune() -> None:
    model, x = attention(), torch.randn(6, 16)
    model.q_proj.lora_a.double()
    accelerate(model, verbose=False)
    with pytest.warns(UserWarning, match="another dtype than"), pytest.raises(RuntimeError):
        model(x)


def test_the_report() -> None:
    model = nn.ModuleDict({
        "a": LoRALinear(4, 4, rank=1, alpha=1), "b": DoRALinear(4, 4, rank=1, alpha=1),
    })  # fmt: skip
    assert "accelerate(model) has not been called" in str(explain(model))
    assert str(accelerate(model, verbose=False)).splitlines()[:2] == [
        "lora_fused: 1 of 2 adapter layers fused",
        "    not fused: 1 torchtune.DoRALinear: not exactly LoRALinear (b)",
    ]
    with pytest.raises(ValueError, match="group is 'some'"):
        accelerate(model, group="some")


def test_explained_call_by_call() -> None:
    model = attention(dropout=0.1)
    accelerate(model, verbose=False)
    model.k_proj.disabled = True
    first, second, *_ = lora_fused.explain(model, torch.randn(3, 16)).layers
    assert (first.problem.M, first.problem.R, first.problem.dropout) == (3, 4, True)
    assert second.why == ("the adapters are disabled",)


def test_compiled() -> None:
    torch._dynamo.reset()
    model, x = attention(), torch.randn(6, 16)
    accelerate(model, verbose=False, group="always")
    eager = [results(model, x) for _ in range(2)][1]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for name, tensor in results(compiled, x).items():
        torch.testing.assert_close(tensor, eager[name.removeprefix("_orig_mod.")],
                                   rtol=1e-4, atol=1e-4)  # fmt: skip
