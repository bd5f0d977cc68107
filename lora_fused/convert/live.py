"""Adapters onto a live model: its linear layers become FusedLoRALinear."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_fused.convert.adapter import Adapter, LayerAdapter
from lora_fused.linear import FusedLoRALinear


def apply_to(model: nn.Module, adapter: Adapter, lora_dropout: float = 0.0) -> nn.Module:
    """Put a FusedLoRALinear with its adapter in the place of each linear layer that has one.

    Base weights are shared, not copied; so are the adapters' tensors if they are on the layer's
    device. Takes nn.Linear and transformers' Conv1D; a FusedLoRALinear already there gets another
    adapter. from_loralib(model) is the way back. Returns the model.

    Raises ValueError, before anything is changed, for a layer that is not there, that is no linear
    layer, or whose shape does not fit, and for lora_bias and DoRA.
    """
    modules = dict(model.named_modules())
    for name, layer in adapter.layers.items():
        if name not in modules:
            raise ValueError(f"apply_to: the model has no module {name!r}.")
        _check(name, modules[name], layer)
    for name, layer in adapter.layers.items():
        parent, _, last = name.rpartition(".")
        setattr(modules[parent], last, _fused(modules[name], layer, lora_dropout))
    return model


def _is_conv1d(module: Any) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _check(name: str, module: Any, layer: LayerAdapter) -> None:
    layer.refuse(name, "FusedLoRALinear", "lora_bias", "magnitude", "embedding")
    if not isinstance(module, nn.Linear) and not _is_conv1d(module):
        raise ValueError(f"apply_to: {name} is a {type(module).__name__}, expected nn.Linear.")
    stored_t = _is_conv1d(module) or getattr(module, "fan_in_fan_out", False)
    shape = list(module.weight.shape)[:: -1 if stored_t else 1]
    found = [layer.lora_B.shape[0], layer.lora_A.shape[1]]
    if found != shape or layer.lora_A[0].numel() != found[1]:
        raise ValueError(f"apply_to: the adapter of {name} is for {found}, the layer is {shape}.")


def _fused(module: Any, layer: LayerAdapter, lora_dropout: float) -> FusedLoRALinear:
    fused = FusedLoRALinear.from_linear(
        module, layer.rank, layer.alpha, lora_dropout, layer.use_rslora,
        _is_conv1d(module) or getattr(module, "fan_in_fan_out", False),
    )  # fmt: skip
    fused.lora_A = _parameter(layer.lora_A, module)
    fused.lora_B = _parameter(layer.lora_B, module)
    return fused


def _parameter(t: Tensor, module: nn.Module) -> nn.Parameter:
    return nn.Parameter(t.detach().flatten(1).to(module.weight.device))  # type: ignore[arg-type]
