"""loralib's checkpoints, and live layers of loralib, of lora_fused.loralib and FusedLoRALinear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_fused.convert.adapter import Adapter, LayerAdapter
from lora_fused.convert.files import Source, pairs, read_tensors

Merged = Mapping[str, Sequence[bool]]


def from_loralib(
    source: Source,
    *,
    lora_alpha: float | None = None,
    use_rslora: bool = False,
    merged: Merged | None = None,
) -> Adapter:
    """A LoRA adapter of loralib: a live model, a state dict or a saved one.

    lora_alpha: loralib stores none; of a live model it is read, with use_rslora (a live
    FusedLoRALinear has it). merged: enable_lora of the MergedLinear layers, by the end of their
    names ({"c_attn": [True, False, True]}); of a live model it is read. A MergedLinear becomes one
    layer with block-diagonal lora_B.

    Raises ValueError if lora_alpha or an entry of merged is missing, or for a convolution, whose
    adapters in loralib have no counterpart elsewhere.
    """
    live = _live_layers(source) if isinstance(source, nn.Module) else {}
    found, others = pairs(read_tensors(source), ".lora_A", ".lora_B")
    layers = {}
    for name, (a, b) in found.items():
        module = live.get(name)
        if hasattr(module, "conv"):
            raise ValueError(f"{name}: loralib's convolutions have no counterpart elsewhere.")
        rslora = bool(getattr(module, "use_rslora", use_rslora))
        alpha = lora_alpha if module is None else _alpha_of(module, rslora)
        if alpha is None:
            raise ValueError("from_loralib: lora_alpha is None; the file does not hold it.")
        enabled = getattr(module, "enable_lora", None) or _enabled(name, merged)
        layer = _unpacked(name, a, b, alpha, enabled)
        layers[name] = replace(
            layer, use_rslora=rslora, embedding=isinstance(module, nn.Embedding) or layer.embedding
        )
    return Adapter(layers, others)


def to_loralib(adapter: Adapter, *, merged: Merged | None = None) -> dict[str, Tensor]:
    """The state dict that loralib's and our layers load with strict=False.

    merged: enable_lora of the layers that are MergedLinear, as for from_loralib. What loralib does
    not store goes into the model that loads it: r, lora_alpha and use_rslora.

    Raises ValueError for a lora_bias, a DoRA magnitude, or a lora_B that is not block-diagonal.
    """
    tensors = dict(adapter.others)
    for name, layer in adapter.layers.items():
        layer.refuse(name, "loralib", "lora_bias", "magnitude")
        enabled = _enabled(name, merged)
        b = layer.lora_B if enabled is None else _packed(name, layer, enabled)
        tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = layer.lora_A, b
    return tensors


def _live_layers(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if "lora_A" in m._parameters}


def _alpha_of(module: Any, use_rslora: bool) -> float:
    """lora_alpha, or what scaling says if somebody changed that."""
    r = module.r
    plain = module.lora_alpha / (r**0.5 if use_rslora else r)
    if plain == module.scaling:
        return float(module.lora_alpha)
    return float(module.scaling * (r**0.5 if use_rslora else r))


def _enabled(name: str, merged: Merged | None) -> list[bool] | None:
    for end, enabled in (merged or {}).items():
        if name == end or name.endswith(f".{end}"):
            return list(enabled)
    return None


def _unpacked(
    name: str, a: Tensor, b: Tensor, alpha: float, enabled: Sequence[bool] | None
) -> LayerAdapter:
    if enabled is None:
        if a.shape[0] != b.shape[1]:
            raise ValueError(
                f"{name}: lora_A has shape {list(a.shape)} and lora_B {list(b.shape)}: "
                "a MergedLinear; pass its enable_lora in merged."
            )
        return LayerAdapter(a, b, alpha)
    nothing = b.new_empty(b.shape[0] // sum(enabled), 0)
    blocks = iter(b.chunk(sum(enabled)))
    rows = [next(blocks) if on else nothing for on in enabled]
    return LayerAdapter(a, torch.block_diag(*rows), alpha * sum(enabled))


def _packed(name: str, layer: LayerAdapter, enabled: Sequence[bool]) -> Tensor:
    """lora_B [out / slices · enabled, r] of a block-diagonal one."""
    N, R = layer.lora_B.shape
    groups = sum(enabled)
    if N % len(enabled) != 0 or groups == 0 or R % groups != 0:
        raise ValueError(f"{name}: lora_B {[N, R]} does not fit enable_lora {list(enabled)}.")
    size, r = N // len(enabled), R // groups
    first_columns = [sum(enabled[:i]) * r for i in range(len(enabled))]
    blocks = [
        layer.lora_B[i * size : (i + 1) * size, first_columns[i] : first_columns[i] + r]
        for i, on in enumerate(enabled)
        if on
    ]
    packed = torch.cat(blocks)
    again = _unpacked(name, layer.lora_A, packed, layer.alpha / groups, enabled)
    if not torch.equal(again.lora_B, layer.lora_B):
        raise ValueError(f"{name}: lora_B is not block-diagonal, which MergedLinear needs.")
    return packed
