"""LoraLinear: the layer that a hub kernel offers for peft.tuners.lora.layer.Linear (see hub)."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lora_fused.integrations.guards import NOTHING_TO_FUSE, Options
from lora_fused.integrations.peft_call import (
    adapters_of_call,
    fused_call,
    mixed_batch_call,
    why_stock,
)

__all__ = ["LoraLinear"]

_OPTIONS = Options()
_announced: set[str] = set()


class LoraLinear(nn.Module):
    """PEFT's LoRA linear layer: kernelize() puts this forward on each of PEFT's layers.

    A call that is not plain LoRA on plain tensors runs on PEFT's own forward, with one warning for
    each reason.
    """

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapters = adapters_of_call(self, x, args, kwargs)
        reason = why_stock(self, x, args, kwargs, adapters, _OPTIONS)
        if reason is not None:
            _announce(reason)
            y: Tensor = type(self).forward(self, x, *args, **kwargs)
            return y
        if kwargs and kwargs.get("adapter_names") is not None:
            return mixed_batch_call(self, x, kwargs["adapter_names"], _OPTIONS)
        return fused_call(self, x, adapters, _OPTIONS)


def _announce(reason: str) -> None:
    if reason in NOTHING_TO_FUSE or reason in _announced or torch.compiler.is_compiling():
        return
    _announced.add(reason)
    warnings.warn(f"lora_fused: a layer runs on PEFT's own forward: {reason}.", stacklevel=3)
