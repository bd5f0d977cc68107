"""Tiny random models with adapters, and the comparison with stock PEFT, for the tests of PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lora_fused.integrations import peft as ours
from lora_fused.testing import assert_close_together

VOCABULARY = 61
DRAWS = 4
LLAMA_LAYERS, GPT2_LAYERS = 14, 8


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Two blocks with seven linear layers each; k and v are narrower than q."""
    config = LlamaConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def gpt2(dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    """Two blocks with four Conv1D layers with bias each."""
    config = GPT2Config(
        n_embd=48, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=32,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).to(dtype)


def targets(model: nn.Module) -> list[str]:
    if isinstance(model, GPT2LMHeadModel):
        return ["c_attn", "c_proj", "c_fc"]
    return ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config_for(model: nn.Module, **changes: Any) -> LoraConfig:
    """LoRA on every linear layer, with lora_B not zero."""
    settings: dict[str, Any] = {
        "r": 4, "lora_alpha": 8, "target_modules": targets(model), "init_lora_weights": False,
        "fan_in_fan_out": isinstance(model, GPT2LMHeadModel),
    }  # fmt: skip
    return LoraConfig(**{**settings, **changes})


def adapted(model: nn.Module, adapter_dtype_of_base: bool = True, **changes: Any) -> PeftModel:
    return get_peft_model(
        model, config_for(model, **changes), autocast_adapter_dtype=not adapter_dtype_of_base
    )


class Block(nn.Module):
    """One layer to adapt, and a call that passes arguments on."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Linear(12, 20, bias=bias)

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Tensor:
        return self.proj(x, *args, **kwargs)


def small(adapters: int = 1, **changes: Any) -> nn.Module:
    settings = {"r": 3, "target_modules": ["proj"], "init_lora_weights": False, **changes}
    model = get_peft_model(Block(), LoraConfig(**settings))
    for i in range(1, adapters):
        model.add_adapter(f"other{i}", LoraConfig(**settings))
    return model


def layer_of(model: nn.Module) -> Any:
    return model.base_model.model.proj


def count(model: nn.Module) -> int:
    """How many layers have our class."""
    return sum(type(module) is ours.FusedLinear for module in model.modules())


def tokens(rows: int = 3, length: int = 7, draw: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(5 + 10 * draw)
    return torch.randint(0, VOCABULARY, (rows, length), generator=generator)


def outputs_of(
    model: nn.Module,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    seed: int = 1,
    draw: int = 0,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Logits, the gradient of every parameter that gets one, and that of the embedded input."""
    model.zero_grad()
    embedded = model.get_input_embeddings()(tokens(draw=draw)).detach().requires_grad_()
    torch.manual_seed(seed)
    with context():
        logits = model(inputs_embeds=embedded, **kwargs).logits
    generator = torch.Generator().manual_seed(6 + 10 * draw)
    dy = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    (logits.double() * dy).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert embedded.grad is not None
    return {"logits": logits.detach(), "input": embedded.grad, **gradients}


def draws_of(
    model: nn.Module, context: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> list[dict[str, Tensor]]:
    """outputs_of on DRAWS inputs."""
    return [outputs_of(model, context, draw=draw) for draw in range(DRAWS)]


def assert_equal_to_stock(
    model: nn.Module,
    *,
    fused_calls: int,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    round_adapters_to: torch.dtype | None = None,
    stock_calls: int = 0,
    **options: Any,
) -> dict[str, Tensor]:
    """Accelerate a copy of a stock model; hold its outputs and gradients to the numerics rule.

    With round_adapters_to the truth and the baseline are those of adapters in that dtype. The
    calls are those of one pass. Returns the outputs of the first.
    """
    baseline_model = copy.deepcopy(model)
    if round_adapters_to is not None:
        for name, p in baseline_model.named_parameters():
            if "lora_" in name:
                p.data = p.data.to(round_adapters_to)
    truth = draws_of(copy.deepcopy(baseline_model).double())
    baseline = draws_of(baseline_model, context)
    fused = copy.deepcopy(model)
    ours.accelerate(fused, verbose=False, **options)
    before = ours.explain(fused)
    got = draws_of(fused, context)
    after = ours.explain(fused)
    assert after.fused_calls - before.fused_calls == fused_calls * DRAWS, str(after)
    by_stock = sum(after.stock_calls.values()) - sum(before.stock_calls.values())
    assert by_stock == stock_calls * DRAWS, str(after)
    assert_close_together(got, truth, baseline)
    return got[0]
