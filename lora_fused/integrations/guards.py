"""Why a layer of another library must run on its own forward: what is the same for every library.

A fused call reads parameters and calls none of the modules that hold them, so whatever would have
happened in those calls (hooks, patched forwards, subclasses, tensor subclasses) is a reason to
leave the layer to its library. What is not known to be safe is a reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from lora_fused import checks
from lora_fused.functional import is_distributed, is_traced

DISABLED = "the adapters are disabled"
MERGED = "the adapter is merged into the base weight"
NO_ADAPTER = "no active adapter has weights in this layer"
# Nothing is lost to the other library for these: it computes the base layer alone.
NOTHING_TO_FUSE = frozenset({DISABLED, MERGED, NO_ADAPTER})

STOCK_FORWARDS: dict[type, Any] = {
    kind: kind.forward for kind in (nn.Linear, nn.Dropout, nn.Identity)
}
_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


@dataclass(frozen=True)
class Options:
    """How an accelerated layer computes; see the accelerate of each library."""

    backend: str = "auto"
    match_torch_rng: bool = False
    cast_adapters: bool = True


def why_not_input(x: Any, weight: Tensor, in_features: int) -> str | None:
    """Why an input is not what the fused call is made for, whatever the adapters."""
    if is_distributed(weight):
        if not is_distributed(x):
            return f"the base weight is a DTensor, the input a {type_name(x)}"
    elif type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"the input is a {type_name(x)}, not a plain torch.Tensor"
    if x.device != weight.device:
        return "the input and the base weight are on different devices"
    if x.layout != torch.strided or x.dim() == 0 or x.shape[-1] != in_features:
        return "the input does not fit the layer"
    if torch._C._is_any_autocast_enabled() and checks.autocast_is_on(x):
        if torch.float64 in (x.dtype, weight.dtype) or not x.dtype.is_floating_point:
            return "autocast leaves float64 and integers alone"
    elif x.dtype != weight.dtype:
        return "the input and the base weight have different dtypes"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is on"
    return None


def why_no_torch_mask(x: Tensor) -> str | None:
    """Why torch's own dropout mask cannot be drawn here."""
    if is_distributed(x):
        return "match_torch_rng does not work on DTensors"
    if is_traced() or torch._C._are_functorch_transforms_active():
        return "match_torch_rng does not work where calls are recorded or transformed"
    return None


def has_global_hooks() -> bool:
    """Whether hooks are registered for the calls of all modules."""
    return nn_module._has_any_global_hook()


def drops_now(dropout: nn.Module) -> bool:
    """Whether a dropout module changes its input now."""
    return type(dropout) is nn.Dropout and dropout.training and dropout.p > 0


def why_not_bypassed(module: nn.Module, what: str) -> str | None:
    """Why calling a module is more than the computation of its class.

    Asked of every module at every call, hence __dict__: nn.Module's __getattr__ slows attributes.
    """
    own = module.__dict__
    if (
        own["_forward_hooks"] or own["_forward_pre_hooks"]
        or own["_backward_hooks"] or own["_backward_pre_hooks"]
    ):  # fmt: skip
        return f"{what} has hooks"
    kind = type(module)
    if "forward" in own or _is_patched(kind):
        return f"the forward of {what} is patched"
    return None


def _is_patched(kind: Any) -> bool:
    """Whether the forward of a class is another than it was written with."""
    stock = STOCK_FORWARDS.get(kind)
    if stock is not None:
        return kind.forward is not stock
    return bool(kind.forward.__module__ != kind.__module__)


def why_not_dropout(dropout: nn.Module) -> str | None:
    """Why lora_dropout is not what the fused call can do instead."""
    if type(dropout) is not nn.Identity:
        if type(dropout) is not nn.Dropout:
            return f"lora_dropout is a {type_name(dropout)}, not exactly nn.Dropout"
        if dropout.inplace:
            return "lora_dropout works in place"
    return why_not_bypassed(dropout, "lora_dropout")


def why_not_plain(t: Tensor, what: str) -> str | None:
    """Why a parameter is more than its values in memory, or in the memory of a mesh."""
    if type(t) is not nn.Parameter and type(t) is not Tensor and not is_distributed(t):
        return f"{what} is a {type_name(t)}, not a plain Parameter"
    if t.dtype not in _DTYPES:
        return f"{what} has dtype {t.dtype}"
    if t.is_meta:
        return f"{what} is on the meta device"
    if t.layout != torch.strided:
        return f"{what} has layout {t.layout}"
    return None


def type_name(value: Any) -> str:
    """The name of a value's class."""
    return type(value).__name__


def torch_mask(x: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """The mask that F.dropout would draw for x: bool, of its shape."""
    ones = torch.ones_like(x, dtype=dtype, requires_grad=False)
    return nn.functional.dropout(ones, p) != 0
