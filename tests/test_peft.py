"""Accelerated PEFT models compute what stock PEFT computes, and do it on the fused path."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from lora_fused.integrations.peft import accelerate, explain
from tests.peft_models import (
    GPT2_LAYERS,
    LLAMA_LAYERS,
    adapted,
    assert_equal_to_stock,
    gpt2,
    llama,
    outputs_of,
    tokens,
)

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "bias-all": {"bias": "all"},
    "bias-lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "patterns": {"rank_pattern": {"o_proj": 9, "c_fc": 9}, "alpha_pattern": {"o_proj": 3}},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "pissa": {"init_lora_weights": "pissa"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    ("build", "calls"), [(llama, LLAMA_LAYERS), (gpt2, GPT2_LAYERS)], ids=["llama", "gpt2"]
)
def test_configs(build: Any, calls: int, config: dict[str, Any]) -> None:
    assert_equal_to_stock(adapted(build(), **config), fused_calls=calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("build", "calls"), [(llama, LLAMA_LAYERS), (gpt2, GPT2_LAYERS)], ids=["llama", "gpt2"]
)
def test_dropout_masks_of_torch(build: Any, calls: int, dtype: torch.dtype) -> None:
    model = adapted(build(dtype), lora_dropout=0.4)
    assert_equal_to_stock(model, fused_calls=calls, match_torch_rng=True)


def test_the_random_stream_is_that_of_stock() -> None:
    model = adapted(llama(), lora_dropout=0.4)
    fused = copy.deepcopy(model)
    accelerate(fused, match_torch_rng=True, verbose=False)
    outputs_of(model)
    state = torch.get_rng_state()
    outputs_of(fused)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_of_our_own() -> None:
    model = adapted(llama(), lora_dropout=0.4)
    accelerate(model, verbose=False)
    first, again, other = outputs_of(model), outputs_of(model), outputs_of(model, seed=2)
    assert explain(model).fused_calls == 3 * LLAMA_LAYERS
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert not torch.equal(tensor, other[name])
    model.eval()
    assert_equal_to_stock(model, fused_calls=LLAMA_LAYERS)


def test_dropout_has_the_right_mean() -> None:
    model = adapted(gpt2(), lora_dropout=0.3, target_modules=["c_fc"], r=2)
    layer = model.base_model.model.transformer.h[0].mlp.c_fc
    x = torch.randn(4, 48)
    with torch.no_grad():
        expected = layer.eval()(x)
        spread = layer(x) - layer.base_layer(x)
        accelerate(layer.train(), verbose=False)
        mean = sum(layer(x) for _ in range(2000)) / 2000
    assert (mean - expected).abs().max() < 0.15 * spread.abs().max()


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_probabilities_at_the_ends(p: float) -> None:
    model = adapted(llama(), lora_dropout=p)
    assert_equal_to_stock(model, fused_calls=LLAMA_LAYERS)
    assert_equal_to_stock(model, fused_calls=LLAMA_LAYERS, match_torch_rng=True)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_bf16(build: Any) -> None:
    calls = LLAMA_LAYERS if build is llama else GPT2_LAYERS
    assert_equal_to_stock(adapted(build(torch.bfloat16), lora_bias=True), fused_calls=calls)


def test_fp32_adapters_on_a_bf16_model() -> None:
    model = adapted(llama(torch.bfloat16), adapter_dtype_of_base=False)
    got = assert_equal_to_stock(model, fused_calls=LLAMA_LAYERS, round_adapters_to=torch.bfloat16)
    assert all(t.dtype == torch.float32 for name, t in got.items() if "lora_" in name)
    report = accelerate(copy.deepcopy(model), verbose=False)
    assert "14 adapters in torch.float32 are read in the dtype of the input" in str(report)
    cast_up = accelerate(model, cast_adapters=False, verbose=False)
    assert not cast_up.fused
    assert "cast_adapters is off" in str(cast_up)


def test_fp32_adapters_are_saved_in_the_activations_dtype() -> None:
    saved: list[torch.dtype] = []
    model = adapted(llama(torch.bfloat16), adapter_dtype_of_base=False)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    accelerate(layer, verbose=False)
    x = torch.randn(5, 48, dtype=torch.bfloat16, requires_grad=True)

    def pack(t: torch.Tensor) -> torch.Tensor:
        if not isinstance(t, torch.nn.Parameter):
            saved.append(t.dtype)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    assert saved == [torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast(dtype: torch.dtype) -> None:
    model = adapted(llama(dtype), adapter_dtype_of_base=False)
    context = partial(torch.autocast, "cpu", torch.bfloat16)
    assert_equal_to_stock(model, fused_calls=LLAMA_LAYERS, context=context)


def test_trainable_base_weights() -> None:
    model = adapted(llama())
    for p in model.parameters():
        p.requires_grad_()
    got = assert_equal_to_stock(model, fused_calls=LLAMA_LAYERS)
    assert any("q_proj.base_layer.weight" in name for name in got)


@pytest.mark.parametrize("alpha", [8, 3], ids=["same-scaling", "other-scaling"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_two_active_adapters(alpha: int, dtype: torch.dtype) -> None:
    model = adapted(llama(dtype), lora_bias=True)
    second = copy.deepcopy(model.peft_config["default"])
    second.lora_alpha, second.rank_pattern = alpha, {"q_proj": 6}
    model.add_adapter("second", second)
    model.to(dtype)
    model.base_model.set_adapter(["default", "second"])
    got = assert_equal_to_stock(model, fused_calls=LLAMA_LAYERS)
    assert sum("second" in name for name in got) == 3 * LLAMA_LAYERS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("build", "calls"), [(llama, LLAMA_LAYERS), (gpt2, GPT2_LAYERS)], ids=["llama", "gpt2"]
)
def test_two_active_adapters_with_dropout(build: Any, calls: int, dtype: torch.dtype) -> None:
    """Each adapter has a mask of its own, drawn in PEFT's order."""
    model = adapted(build(dtype), lora_dropout=0.4, lora_bias=True)
    second = copy.deepcopy(model.peft_config["default"])
    second.lora_alpha, second.r, second.lora_dropout = 3, 6, 0.1
    model.add_adapter("second", second)
    model.to(dtype)
    model.base_model.set_adapter(["default", "second"])
    got = assert_equal_to_stock(model, fused_calls=calls, match_torch_rng=True)
    assert sum("second" in name for name in got) == 3 * calls


def test_masks_of_two_active_adapters_are_independent() -> None:
    model = adapted(gpt2(), lora_dropout=0.5, target_modules=["c_fc"])
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "second"])
    layer = model.base_model.model.transformer.h[0].mlp.c_fc
    for part in (layer.lora_A, layer.lora_B):
        part["second"].load_state_dict(part["default"].state_dict())
    accelerate(layer, verbose=False)
    with torch.no_grad():
        layer.scaling["second"] = -layer.scaling["default"]  # equal masks would cancel
        x = torch.randn(5, 48)
        assert (layer(x) - layer.base_layer(x)).abs().mean() > 0.1
        layer.eval()
        torch.testing.assert_close(layer(x), layer.base_layer(x))
    assert explain(layer).fused_calls == 2


def test_adapters_of_different_layers() -> None:
    model = adapted(llama(), target_modules=["q_proj"])
    model.add_adapter("second", copy.deepcopy(adapted(llama()).peft_config["default"]))
    model.base_model.set_adapter(["default", "second"])
    assert_equal_to_stock(model, fused_calls=LLAMA_LAYERS)
    model.base_model.set_adapter("default")
    assert_equal_to_stock(model, fused_calls=2, stock_calls=LLAMA_LAYERS - 2)


@pytest.mark.parametrize("names", ["ab_ab", "bbbbb", "baaab", "_bb__"])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_mixed_batch(build: Any, names: str) -> None:
    adapter_names = [name.replace("_", "__base__") for name in names]
    model = adapted(build())
    for name in ("a", "b"):
        model.add_adapter(name, copy.deepcopy(model.peft_config["default"]))
    model.eval()
    fused = copy.deepcopy(model)
    accelerate(fused, verbose=False)
    ids = tokens(rows=5)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(ids, adapter_names=adapter_names).logits
        baseline = model(ids, adapter_names=adapter_names).logits
        got = fused(ids, adapter_names=adapter_names).logits
    torch.testing.assert_close(got, baseline)
    assert (got - truth).abs().max() <= 3 * (baseline - truth).abs().max()
    assert explain(fused).fused_calls == (LLAMA_LAYERS if build is llama else GPT2_LAYERS)


def test_mixed_batch_errors_are_those_of_stock() -> None:
    model = adapted(llama()).eval()
    accelerate(model, verbose=False)
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        model(tokens(), adapter_names=["default"])


def test_scale_may_change_at_any_time() -> None:
    model = adapted(llama())
    accelerate(model, verbose=False)
    first = outputs_of(model)["logits"]
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(3.0)
    assert not torch.equal(outputs_of(model)["logits"], first)
    assert_equal_to_stock(model, fused_calls=LLAMA_LAYERS)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(p: float, reentrant: bool) -> None:
    model = adapted(llama(), lora_dropout=p)
    accelerate(model, verbose=False)
    plain = outputs_of(model)
    base = model.base_model.model
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    checkpointed = outputs_of(model)
    assert explain(model).fused_calls > 2 * LLAMA_LAYERS
    for name, tensor in plain.items():
        assert torch.equal(tensor, checkpointed[name]), name


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_the_loss_curve_is_that_of_stock(p: float) -> None:
    model = adapted(llama(), lora_dropout=p)
    fused = copy.deepcopy(model)
    accelerate(fused, match_torch_rng=True, verbose=False)
    curves = []
    for each in (model, fused):
        torch.manual_seed(4)
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9)
        losses = []
        for _ in range(12):
            optimizer.zero_grad()
            loss = each(tokens(), labels=tokens()).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[0][-1] < curves[0][0] - 0.1
    assert explain(fused).fused_calls == 12 * LLAMA_LAYERS
