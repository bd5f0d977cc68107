"""When may a PEFT layer's forward be replaced, and when must PEFT's own code run? In words.

The fused call reads the parameters of base_layer, lora_A, lora_B and lora_dropout and calls none of
them, so whatever would have happened in those calls (hooks, patched forwards, subclasses, tensor
subclasses) is a reason to leave the layer to PEFT. What is not known to be safe is a reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from transformers.pytorch_utils import Conv1D

from lora_fused import checks

DISABLED = "the adapters are disabled"
MERGED = "the adapter is merged into the base weight"
NO_ADAPTER = "no active adapter has weights in this layer"
# Nothing is lost to stock PEFT for these: it computes the base layer alone.
NOTHING_TO_FUSE = frozenset({DISABLED, MERGED, NO_ADAPTER})

BASE_ADAPTER = "__base__"
_STOCK_FORWARDS: dict[type, Any] = {
    kind: kind.forward for kind in (nn.Linear, Conv1D, nn.Dropout, nn.Identity)
}
_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


@dataclass(frozen=True)
class Options:
    """How an accelerated layer computes; see lora_fused.integrations.peft.accelerate."""

    backend: str = "auto"
    match_torch_rng: bool = False
    cast_adapters: bool = True


def why_stock_layer(layer: Any, adapters: Sequence[str], options: Options) -> str | None:
    """Why this layer with these adapters must run on PEFT's own forward; None if it need not.

    What depends on the input is left to why_stock_input. Both run at every call, so they read
    `_modules` and `_parameters`, which is several times faster than nn.Module's attributes.
    """
    base = layer._modules["base_layer"]
    if type(base) is not nn.Linear and type(base) is not Conv1D:
        return f"the base layer is a {_name(base)}, not exactly nn.Linear or Conv1D"
    bias = parameter(base, "bias")
    why = (
        why_not_bypassed(base, "the base layer")
        or why_not_plain(parameter(base, "weight"), "the base weight")
        or (None if bias is None else why_not_plain(bias, "the base bias"))
    )
    if why is not None:
        return why
    if nn_module._has_any_global_hook():
        return "global module hooks are registered"
    for adapter in adapters:
        why = _why_stock_adapter(layer, adapter, options)
        if why is not None:
            return why
    if len(adapters) > 1 and any(drops(layer, name) for name in adapters):
        return "several adapters are active with dropout: each has its own mask"
    return None


def _why_stock_adapter(layer: Any, adapter: str, options: Options) -> str | None:
    if layer.use_dora.get(adapter, False):
        return "the adapter uses DoRA"
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if variant is not None:
        return f"the adapter is a {_name(variant)}, not plain LoRA"
    for name in ("lora_A", "lora_B"):
        module = child(layer, name, adapter)
        if type(module) is not nn.Linear:
            return f"{name} is a {_name(module)}, not exactly nn.Linear"
        weight = parameter(module, "weight")
        why = why_not_bypassed(module, name) or why_not_plain(weight, name)
        if why is not None:
            return why
        if not options.cast_adapters and weight.dtype != layer.base_layer.weight.dtype:
            return "the adapter has another dtype than the base weight, and cast_adapters is off"
    if parameter(child(layer, "lora_A", adapter), "bias") is not None:
        return "lora_A has a bias"
    if type(layer.scaling[adapter]) is not float and type(layer.scaling[adapter]) is not int:
        return f"scaling is a {_name(layer.scaling[adapter])}, not a number"
    return _why_not_dropout(child(layer, "lora_dropout", adapter))


def _why_not_dropout(dropout: nn.Module) -> str | None:
    if type(dropout) is not nn.Identity:
        if type(dropout) is not nn.Dropout:
            return f"lora_dropout is a {_name(dropout)}, not exactly nn.Dropout"
        if dropout.inplace:
            return "lora_dropout works in place"
    return why_not_bypassed(dropout, "lora_dropout")


def why_stock_input(layer: Any, x: Any, adapters: Sequence[str], options: Options) -> str | None:
    """Why a layer that may be fused must not be for this input."""
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"the input is a {_name(x)}, not a plain torch.Tensor"
    weight = parameter(layer._modules["base_layer"], "weight")
    if x.device != weight.device:
        return "the input and the base weight are on different devices"
    if x.layout != torch.strided or x.dim() == 0 or x.shape[-1] != layer.in_features:
        return "the input does not fit the layer"
    if torch._C._is_any_autocast_enabled() and checks.autocast_is_on(x):
        if torch.float64 in (x.dtype, weight.dtype) or not x.dtype.is_floating_point:
            return "autocast leaves float64 and integers alone"
    elif x.dtype != weight.dtype:
        return "the input and the base weight have different dtypes"
    for adapter in adapters:
        lora_A = parameter(child(layer, "lora_A", adapter), "weight")
        if lora_A.dtype != x.dtype and not getattr(layer, "cast_input_dtype_enabled", True):
            return "casting of the input is disabled, and the adapter has another dtype"
        if lora_A.device != x.device:
            return "the adapter is on another device than the input"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is on"
    if options.match_torch_rng and any(drops(layer, name) for name in adapters):
        return _why_no_torch_mask()
    return None


def _why_no_torch_mask() -> str | None:
    from lora_fused.functional import is_traced

    if is_traced() or torch._C._are_functorch_transforms_active():
        return "match_torch_rng does not work where calls are recorded or transformed"
    return None


def why_not_bypassed(module: nn.Module, what: str) -> str | None:
    """Why calling a module is more than the computation of its class."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return f"{what} has hooks"
    if "forward" in module.__dict__ or type(module).forward is not _STOCK_FORWARDS[type(module)]:
        return f"the forward of {what} is patched"
    return None


def why_not_plain(t: Tensor, what: str) -> str | None:
    """Why a parameter is more than its values in memory."""
    if type(t) is not nn.Parameter and type(t) is not Tensor:
        return f"{what} is a {_name(t)}, not a plain Parameter"
    if t.dtype not in _DTYPES:
        return f"{what} has dtype {t.dtype}"
    if t.is_meta:
        return f"{what} is on the meta device"
    if t.layout != torch.strided:
        return f"{what} has layout {t.layout}"
    return None


def drops(layer: Any, adapter: str) -> bool:
    """Whether dropout changes the input of this adapter now."""
    dropout = child(layer, "lora_dropout", adapter)
    return type(dropout) is nn.Dropout and dropout.training and dropout.p > 0


def child(layer: nn.Module, container: str, name: str) -> Any:
    """layer.<container>[name] of a ModuleDict."""
    return layer._modules[container]._modules[name]  # type: ignore[union-attr]


def parameter(module: Any, name: str) -> Any:
    """module.<name>, which is not in _parameters where FSDP has put a view in its place."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def _name(value: Any) -> str:
    return type(value).__name__
