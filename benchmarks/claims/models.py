"""The paper's models by their configurations, with LoRA where the paper put it (Wq and Wv).

Under `torch.device("meta")` they cost nothing, GPT-3 included.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
    RobertaModel,
)

import lora_fused.loralib as ours
from lora_fused import FusedLoRALinear

GPT2_SMALL = GPT2Config()
GPT2_MEDIUM = GPT2Config(n_layer=24, n_embd=1024, n_head=16)
GPT2_LARGE = GPT2Config(n_layer=36, n_embd=1280, n_head=20)
GPT3_175B = GPT2Config(n_layer=96, n_embd=12288, n_head=96, n_positions=2048)


def roberta_base() -> nn.Module:
    return RobertaModel(RobertaConfig(vocab_size=50265, max_position_embeddings=514))


def roberta_large() -> nn.Module:
    config = RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, hidden_size=1024, num_hidden_layers=24,
        num_attention_heads=16, intermediate_size=4096,
    )  # fmt: skip
    return RobertaModel(config)


def deberta_xxl() -> nn.Module:
    config = DebertaV2Config(
        vocab_size=128100, hidden_size=1536, num_hidden_layers=48, num_attention_heads=24,
        intermediate_size=6144,
    )  # fmt: skip
    return DebertaV2Model(config)


def gpt2_medium() -> nn.Module:
    return GPT2Model(GPT2_MEDIUM)


def gpt2_large() -> nn.Module:
    return GPT2Model(GPT2_LARGE)


def gpt3_175b() -> nn.Module:
    return GPT2Model(GPT3_175B)


def add_lora(model: nn.Module, r: int, library: Any = ours, alpha: float = 32.0) -> nn.Module:
    """LoRA of rank r on every Wq and Wv; everything else frozen.

    Encoders have them as layers of their own; GPT-2's c_attn holds q, k and v side by side and
    becomes a MergedLinear of `library` (loralib or lora_fused.loralib) with q and v enabled.
    """
    for parent, name, layer in list(_projections(model)):
        if name == "c_attn":
            setattr(parent, name, _merged_linear(layer, r, library, alpha))
        else:
            setattr(parent, name, FusedLoRALinear.from_linear(layer, r=r, lora_alpha=alpha))
    ours.mark_only_lora_as_trainable(model)
    return model


def _projections(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    wanted = ("query", "value", "query_proj", "value_proj", "c_attn")
    for module in model.modules():
        for name, child in module.named_children():
            if name in wanted:
                yield module, name, child


def _merged_linear(layer: Any, r: int, library: Any, alpha: float) -> nn.Module:
    K, N = layer.weight.shape
    merged: nn.Module = library.MergedLinear(
        K, N, r=r, lora_alpha=alpha, enable_lora=[True, False, True], fan_in_fan_out=True,
        merge_weights=False, device=layer.weight.device, dtype=layer.weight.dtype,
    )  # fmt: skip
    assert isinstance(merged.weight, Tensor) and isinstance(merged.bias, Tensor)
    with torch.no_grad():
        merged.weight.copy_(layer.weight)
        merged.bias.copy_(layer.bias)
    return merged


class Adapter(nn.Module):
    """h + up(relu(down(norm(h)))): the layer that the paper compares with."""

    def __init__(self, width: int, bottleneck: int, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.up(torch.relu(self.down(self.norm(h))))


class WithAdapter(nn.Module):
    """A sublayer whose first output passes an adapter."""

    def __init__(self, inner: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.inner, self.adapter = inner, adapter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(*args, **kwargs)
        if isinstance(out, tuple):
            return (self.adapter(out[0]), *out[1:])
        return self.adapter(out)


def add_adapters_l(model: Any, bottleneck: int) -> nn.Module:
    """Lin et al. (2020): one adapter a block, after the MLP, behind a LayerNorm of its own."""
    return _add_adapters(model, ("mlp",), bottleneck, norm=True)


def add_adapters_h(model: Any, bottleneck: int) -> nn.Module:
    """Houlsby et al. (2019): two adapters a block, after attention and after the MLP."""
    return _add_adapters(model, ("attn", "mlp"), bottleneck, norm=False)


def _add_adapters(model: Any, sublayers: tuple[str, ...], bottleneck: int, norm: bool) -> Any:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for block in model.h:
        for name in sublayers:
            adapter = Adapter(model.embed_dim, bottleneck, norm).to(model.wte.weight)
            setattr(block, name, WithAdapter(getattr(block, name), adapter))
    return model


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
