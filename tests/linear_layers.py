"""Layers with an adapter that is not zero, and what they must compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_fused import FusedLoRALinear
from tests.conftest import native_isas

needs_native = pytest.mark.skipif(not native_isas(), reason="this CPU runs no native kernels")


def layer_with_adapter(
    in_features: int = 40, out_features: int = 24, r: int = 4, **options: object
) -> FusedLoRALinear:
    """A layer whose lora_B is not zero: a broken adapter hides behind a zero one."""
    layer = FusedLoRALinear(in_features, out_features, r=r, **options)  # type: ignore[arg-type]
    if r > 0 and not layer.weight.is_meta:
        nn.init.normal_(layer.lora_B)
    return layer


def expected(layer: FusedLoRALinear, x: torch.Tensor) -> torch.Tensor:
    """The output by definition, from what the layer's parameters say now."""
    weight = layer.weight.detach().t() if layer.fan_in_fan_out else layer.weight.detach()
    total = weight + layer.scaling * layer.lora_B.detach() @ layer.lora_A.detach()
    return nn.functional.linear(x, total, layer.bias.detach() if layer.bias is not None else None)
