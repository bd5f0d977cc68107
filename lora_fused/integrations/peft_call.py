"""What PEFT's lora.Linear computes, by lora_linear: for any object with its attributes.

Imports nothing of PEFT's, so that it also serves where only torch may be imported (see hub).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_fused.functional import call_layer
from lora_fused.integrations.guards import (
    DISABLED,
    MERGED,
    NO_ADAPTER,
    Options,
    torch_mask,
)
from lora_fused.integrations.peft_guards import (
    BASE_ADAPTER,
    child,
    drops,
    is_conv1d,
    several_masks,
    why_stock_input,
    why_stock_layer,
)
from lora_fused.linear import parameter
from lora_fused.several import Adapter, call_several

_KNOWN_ARGUMENTS = {"adapter_names", "alora_offsets"}


def adapters_of_call(layer: Any, x: Any, args: Any, kwargs: dict[str, Any]) -> list[str]:
    """The adapters with weights in this layer that a call asks for. Raises what PEFT raises."""
    adapter_names = kwargs.get("adapter_names") if kwargs else None
    if adapter_names is None:
        lora_A = layer._modules["lora_A"]._modules
        return [name for name in layer.active_adapters if name in lora_A]
    layer._check_forward_args(x, *args, **kwargs)
    return [name for name in dict.fromkeys(adapter_names) if name in layer.lora_A]


def why_stock(
    layer: Any,
    x: Any,
    args: Any,
    kwargs: dict[str, Any],
    adapters: Sequence[str],
    options: Options,
) -> str | None:
    """Why a call must go to PEFT's forward, in words; None if it may be fused."""
    if layer.disable_adapters:
        return DISABLED
    if layer.merged:
        return MERGED
    if not adapters:
        return NO_ADAPTER
    mixed = bool(kwargs) and kwargs.get("adapter_names") is not None
    if args or (kwargs and _has_more_than_names(kwargs)):
        return "the call has extra arguments"
    if mixed and (not isinstance(x, Tensor) or x.dim() < 2):
        return "a mixed batch needs an input of two dimensions or more"
    if mixed:
        whys = (why_stock_layer(layer, [adapter], options) for adapter in adapters)
        why = next((why for why in whys if why is not None), None)
    else:
        why = why_stock_layer(layer, adapters, options)
    return why or why_stock_input(layer, x, adapters, options)


def _has_more_than_names(kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.keys() - _KNOWN_ARGUMENTS) or kwargs.get("alora_offsets") is not None


def fused_call(layer: Any, x: Tensor, adapters: Sequence[str], options: Options) -> Tensor:
    """What PEFT's forward computes with these adapters, in one pass over x and y."""
    if several_masks(layer, adapters):
        weight, bias = _weight(layer), _bias(layer, adapters)
        each = [_with_mask(layer, name, x, options) for name in adapters]
        return call_several(x, weight, bias, each, options.backend)
    weight, lora_A, lora_B, bias, scaling = operands(layer, adapters)
    p, keep = 0.0, None
    if adapters and drops(layer, adapters[0]):
        _, _, _, p, keep = _with_mask(layer, adapters[0], x, options)
    return call_layer(x, weight, lora_A, lora_B, bias, scaling, p, None, options.backend, keep=keep)


def _with_mask(layer: Any, name: str, x: Tensor, options: Options) -> Adapter:
    """One adapter with its dropout, and torch's mask where that is wanted."""
    lora_A, lora_B, scaling = _one_adapter(layer, [name])
    p, keep = 0.0, None
    if drops(layer, name):
        p = child(layer, "lora_dropout", name).p
        if options.match_torch_rng:
            keep = torch_mask(x, p, lora_A.dtype)
    return Adapter(lora_A, lora_B, scaling, p, keep)


def operands(layer: Any, adapters: Sequence[str]) -> tuple[Any, Any, Any, Any, float]:
    """weight [N, K], lora_A, lora_B, bias and scaling; without adapters the latter are None."""
    if not adapters:
        return _weight(layer), None, None, _bias(layer, adapters), 1.0
    lora_A, lora_B, scaling = _one_adapter(layer, adapters)
    return _weight(layer), lora_A, lora_B, _bias(layer, adapters), scaling


def _weight(layer: Any) -> Tensor:
    """The base weight [N, K], whichever way it is stored."""
    base = layer._modules["base_layer"]
    weight: Tensor = parameter(base, "weight")
    return weight.t() if is_conv1d(base) else weight


def _one_adapter(layer: Any, adapters: Sequence[str]) -> tuple[Tensor, Tensor, float]:
    """lora_A, lora_B and scaling; several adapters become one of the sum of their ranks."""
    if len(adapters) == 1:
        name = adapters[0]
        lora_A, lora_B = child(layer, "lora_A", name), child(layer, "lora_B", name)
        return parameter(lora_A, "weight"), parameter(lora_B, "weight"), float(layer.scaling[name])
    a = [parameter(child(layer, "lora_A", name), "weight") for name in adapters]
    b = [parameter(child(layer, "lora_B", name), "weight") for name in adapters]
    scaling = [float(layer.scaling[name]) for name in adapters]
    if len(set(scaling)) == 1:
        return torch.cat(a), torch.cat(b, dim=1), scaling[0]
    # Scaled in fp32, so that lora_B is rounded once at most, when it is cast to the compute dtype.
    scaled = [
        t.to(torch.promote_types(t.dtype, torch.float32)) * scale
        for t, scale in zip(b, scaling, strict=True)
    ]
    return torch.cat(a), torch.cat(scaled, dim=1), 1.0


def _bias(layer: Any, adapters: Sequence[str]) -> Tensor | None:
    """The base bias, plus the scaled biases of lora_B (lora_bias=True), added in fp32."""
    bias: Tensor | None = parameter(layer._modules["base_layer"], "bias")
    for name in adapters:
        lora_bias = parameter(child(layer, "lora_B", name), "bias")
        if lora_bias is None:
            continue
        wide = torch.promote_types(lora_bias.dtype, torch.float32)
        scaled = lora_bias.to(wide) * layer.scaling[name]
        bias = scaled if bias is None else bias.to(wide) + scaled
    return bias


def mixed_batch_call(
    layer: Any, x: Tensor, adapter_names: Sequence[str], options: Options
) -> Tensor:
    """Row i of the batch with adapter i: one fused call per adapter on its rows."""
    rows_of: dict[str, list[int]] = {}
    for row, name in enumerate(adapter_names):
        rows_of.setdefault(name if name in layer.lora_A else BASE_ADAPTER, []).append(row)
    parts = []
    for name, rows in rows_of.items():
        part = x if len(rows_of) == 1 else x[rows]
        parts.append(fused_call(layer, part, [] if name == BASE_ADAPTER else [name], options))
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([row for rows in rows_of.values() for row in rows], device=x.device)
    return torch.cat(parts)[order.argsort()]
