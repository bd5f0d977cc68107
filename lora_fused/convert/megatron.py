"""Megatron-Bridge's adapters: `<m>.adapter.linear_in.weight`, `.linear_out.weight`, its names.

One adapter serves q, k and v (linear_qkv, rows by groups of heads), one serves gate and up
(linear_fc1). Tensors are whole: gather tensor-parallel shards first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora_fused.convert.adapter import Adapter
from lora_fused.convert.adapter import LayerAdapter as Layer
from lora_fused.convert.files import Source, pairs, read_tensors
from lora_fused.convert.joined import join_rows, split_rows

_A, _B = ".adapter.linear_in.weight", ".adapter.linear_out.weight"
_LAYER = re.compile(r"(?:module\.)*(?:decoder\.)?layers\.(\d+)\.(.*)")
_HF_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")
_SAME = {"self_attention.linear_proj": "self_attn.o_proj", "mlp.linear_fc2": "mlp.down_proj"}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


@dataclass(frozen=True)
class Heads:
    """How linear_qkv's rows are laid out: for each of num_kv_heads groups its q rows, k, v."""

    num_heads: int
    num_kv_heads: int

    def split(self, b: Tensor, name: str) -> list[Tensor]:
        """q, k and v rows of linear_qkv's [out, …], each in the order of the heads."""
        groups, per_group = self.num_kv_heads, self.num_heads // self.num_kv_heads
        if b.shape[0] % (groups * (per_group + 2)) != 0:
            raise ValueError(f"{name}: {b.shape[0]} rows do not fit {self}.")
        size = b.shape[0] // (groups * (per_group + 2))
        rows = b.view(groups, per_group + 2, size, *b.shape[1:])
        parts = (rows[:, :per_group], rows[:, per_group], rows[:, per_group + 1])
        return [part.reshape(-1, *b.shape[1:]) for part in parts]

    def join(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """linear_qkv's rows of those of q, k and v."""
        groups, inner = self.num_kv_heads, q.shape[1:]
        size = q.shape[0] // self.num_heads
        parts = [t.view(groups, -1, size, *inner) for t in (q, k, v)]
        return torch.cat(parts, dim=1).reshape(-1, *inner)


def from_megatron(source: Source, *, heads: Heads, lora_alpha: float | None = None) -> Adapter:
    """A LoRA adapter of Megatron-Bridge with Hugging Face's module names.

    source: a live model with LoRALinear modules, its state dict, or a file of it. lora_alpha: of a
    live model it is read (adapter.alpha). q, k and v share linear_qkv's lora_A, gate and up that
    of linear_fc1. Modules with other names keep them.

    Raises ValueError if lora_alpha is missing or the rows do not fit the heads.
    """
    alphas = {}
    if isinstance(source, nn.Module):
        modules = source.named_modules()
        alphas = {n: float(m.adapter.alpha) for n, m in modules if hasattr(m, "adapter")}
    layers: dict[str, Layer] = {}
    for name, (a, b) in pairs(read_tensors(source), _A, _B)[0].items():
        alpha = alphas.get(name, lora_alpha)
        if alpha is None:
            raise ValueError("from_megatron: lora_alpha is None; the file does not hold it.")
        layers.update(_to_hf(name, Layer(a, b, float(alpha)), heads))
    return Adapter(layers)


def to_megatron(adapter: Adapter, *, heads: Heads) -> dict[str, Tensor]:
    """The state dict of Megatron-Bridge's adapters.

    Parts of one layer that have different lora_A get a rank that is the sum of theirs. Raises
    ValueError if Megatron cannot express it: several ranks or alphas afterwards, a part of q/k/v
    or gate/up missing, a lora_bias, DoRA, embeddings.
    """
    layers: dict[str, Layer] = {}
    for name, layer in adapter.layers.items():
        layer.refuse(name, "Megatron-Bridge", "lora_bias", "magnitude", "embedding")
        match = _HF_LAYER.fullmatch(name)
        prefix, kind = ("", name) if match is None else (f"model.layers.{match[1]}.", match[2])
        theirs = "" if match is None else f"decoder.layers.{match[1]}."
        if kind in _QKV:
            parts = _parts(adapter, prefix, _QKV)
            joined = join_rows(parts, name)
            sizes = [part.lora_B.shape[0] for part in parts]
            b = heads.join(*joined.lora_B.split(sizes))
            layers[f"{theirs}self_attention.linear_qkv"] = replace(joined, lora_B=b)
        elif kind in _GATE_UP:
            layers[f"{theirs}mlp.linear_fc1"] = join_rows(_parts(adapter, prefix, _GATE_UP), name)
        else:
            back = {hf: own for own, hf in _SAME.items()}
            layers[theirs + back.get(kind, kind)] = layer
    whole = Adapter(layers)
    whole.one("rank", "Megatron-Bridge")
    whole.one("plain_alpha", "Megatron-Bridge")
    return {
        key: tensor
        for name, layer in layers.items()
        for key, tensor in ((name + _A, layer.lora_A), (name + _B, layer.lora_B))
    }


def _to_hf(name: str, layer: Layer, heads: Heads) -> dict[str, Layer]:
    match = _LAYER.fullmatch(name)
    if match is None:
        return {name: layer}
    prefix, kind = f"model.layers.{match[1]}.", match[2]
    if kind == "self_attention.linear_qkv":
        rows = heads.split(layer.lora_B, name)
        joined = replace(layer, lora_B=torch.cat(rows))
        parts = split_rows(joined, [len(part) for part in rows], name)
        return dict(zip((prefix + part for part in _QKV), parts, strict=True))
    if kind == "mlp.linear_fc1":
        half = layer.lora_B.shape[0] // 2
        parts = split_rows(layer, [half, half], name)
        return dict(zip((prefix + part for part in _GATE_UP), parts, strict=True))
    return {prefix + _SAME.get(kind, kind): layer}


def _parts(adapter: Adapter, prefix: str, names: tuple[str, ...]) -> list[Layer]:
    missing = [name for name in names if prefix + name not in adapter.layers]
    if missing:
        raise ValueError(f"to_megatron: there is no adapter for {prefix}{missing[0]}.")
    return [adapter.layers[prefix + name] for name in names]
