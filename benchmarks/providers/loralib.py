"""loralib, the reference implementation of the LoRA paper."""

from collections.abc import Callable
from typing import Any

from torch import nn

from benchmarks.providers.provider import Call
from benchmarks.tensors import CaseTensors


def layer(t: CaseTensors, dropout: float) -> Call:
    import loralib

    return filled(loralib.Linear, t, dropout)


def filled(cls: Callable[..., Any], t: CaseTensors, dropout: float) -> Any:
    """A loralib.Linear or FusedLoRALinear (one constructor, same parameters) on these tensors."""
    (n, k), rank = t.w.shape, t.a.shape[0]
    layer = cls(
        k,
        n,
        r=rank,
        lora_alpha=int(t.scaling * rank),
        lora_dropout=dropout,
        fan_in_fan_out=t.fan_in_fan_out,
        merge_weights=False,
        bias=t.bias is not None,
        device="meta",
    )
    layer.weight = nn.Parameter(t.stored_weight, requires_grad=False)
    if t.bias is not None:
        layer.bias = nn.Parameter(t.bias, requires_grad=False)
    layer.lora_A, layer.lora_B = t.a, t.b
    return layer
