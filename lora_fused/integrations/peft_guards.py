"""When may a PEFT layer's forward be replaced, and when must PEFT's own code run? In words.

The fused call reads the parameters of base_layer, lora_A, lora_B and lora_dropout and calls none of
them, so whatever would have happened in those calls (hooks, patched forwards, subclasses, tensor
subclasses) is a reason to leave the layer to PEFT. What is not known to be safe is a reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lora_fused.functional import is_distributed
from lora_fused.integrations.guards import (
    Options,
    drops_now,
    has_global_hooks,
    type_name,
    why_no_torch_mask,
    why_not_bypassed,
    why_not_dropout,
    why_not_input,
    why_not_plain,
)
from lora_fused.linear import parameter

BASE_ADAPTER = "__base__"


def why_stock_layer(layer: Any, adapters: Sequence[str], options: Options) -> str | None:
    """Why this layer with these adapters must run on PEFT's own forward; None if it need not.

    What depends on the input is left to why_stock_input. Both run at every call, so they read
    `_modules` and `_parameters`, which is several times faster than nn.Module's attributes.
    """
    base = layer._modules["base_layer"]
    if type(base) is not nn.Linear and not is_conv1d(base):
        return f"the base layer is a {type_name(base)}, not exactly nn.Linear or Conv1D"
    bias = parameter(base, "bias")
    why = (
        why_not_bypassed(base, "the base layer")
        or why_not_plain(parameter(base, "weight"), "the base weight")
        or (None if bias is None else why_not_plain(bias, "the base bias"))
    )
    if why is not None:
        return why
    if has_global_hooks():
        return "global module hooks are registered"
    for adapter in adapters:
        why = _why_stock_adapter(layer, adapter, options)
        if why is not None:
            return why
    if several_masks(layer, adapters) and is_distributed(parameter(base, "weight")):
        return "several adapters with dropout: on a DTensor only one mask can be drawn"
    return None


def _why_stock_adapter(layer: Any, adapter: str, options: Options) -> str | None:
    if layer.use_dora.get(adapter, False):
        return "the adapter uses DoRA"
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if variant is not None:
        return f"the adapter is a {type_name(variant)}, not plain LoRA"
    for name in ("lora_A", "lora_B"):
        module = child(layer, name, adapter)
        if type(module) is not nn.Linear:
            return f"{name} is a {type_name(module)}, not exactly nn.Linear"
        weight = parameter(module, "weight")
        why = why_not_bypassed(module, name) or why_not_plain(weight, name)
        if why is not None:
            return why
        if not options.cast_adapters and weight.dtype != layer.base_layer.weight.dtype:
            return "the adapter has another dtype than the base weight, and cast_adapters is off"
    if parameter(child(layer, "lora_A", adapter), "bias") is not None:
        return "lora_A has a bias"
    if type(layer.scaling[adapter]) is not float and type(layer.scaling[adapter]) is not int:
        return f"scaling is a {type_name(layer.scaling[adapter])}, not a number"
    return why_not_dropout(child(layer, "lora_dropout", adapter))


def why_stock_input(layer: Any, x: Any, adapters: Sequence[str], options: Options) -> str | None:
    """Why a layer that may be fused must not be for this input."""
    weight = parameter(layer._modules["base_layer"], "weight")
    why = why_not_input(x, weight, layer.in_features)
    if why is not None:
        return why
    for adapter in adapters:
        lora_A = parameter(child(layer, "lora_A", adapter), "weight")
        if lora_A.dtype != x.dtype and not getattr(layer, "cast_input_dtype_enabled", True):
            return "casting of the input is disabled, and the adapter has another dtype"
        if lora_A.device != x.device:
            return "the adapter is on another device than the input"
        if is_distributed(lora_A) != is_distributed(x):
            return "the input is a DTensor, and the adapter is not, or the reverse"
    if options.match_torch_rng and any(drops(layer, name) for name in adapters):
        return why_no_torch_mask(x)
    return None


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is exactly transformers' Conv1D; asked without importing transformers."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def drops(layer: Any, adapter: str) -> bool:
    """Whether dropout changes the input of this adapter now."""
    return drops_now(child(layer, "lora_dropout", adapter))


def several_masks(layer: Any, adapters: Sequence[str]) -> bool:
    """Whether adapters cannot be stacked into one, because each draws a mask of its own."""
    return len(adapters) > 1 and any(drops(layer, name) for name in adapters)


def child(layer: nn.Module, container: str, name: str) -> Any:
    """layer.<container>[name] of a ModuleDict."""
    return layer._modules[container]._modules[name]  # type: ignore[union-attr]
