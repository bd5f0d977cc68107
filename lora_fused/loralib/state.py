"""Which parameters train, and which belong into a checkpoint."""

from __future__ import annotations

from torch import Tensor, nn

from lora_fused.linear import FusedLoRALinear
from lora_fused.loralib.linear import LoRALayer


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freeze all but the adapters and, by `bias`, no bias, "all", or those of LoRA layers."""
    _check_bias(bias)
    for name, p in model.named_parameters():
        if "lora_" not in name:
            p.requires_grad = bias == "all" and "bias" in name
    if bias == "lora_only":
        for module in model.modules():
            layer_bias = getattr(module, "bias", None)
            if isinstance(module, LoRALayer | FusedLoRALinear) and layer_bias is not None:
                layer_bias.requires_grad = True


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """The adapters' part of the state dict, with the biases that `bias` names."""
    _check_bias(bias)
    state = model.state_dict()
    wanted = {name for name in state if "lora_" in name}
    if bias == "all":
        wanted |= {name for name in state if "bias" in name}
    elif bias == "lora_only":
        wanted |= {name.split("lora_")[0] + "bias" for name in wanted} & state.keys()
    return {name: tensor for name, tensor in state.items() if name in wanted}


def _check_bias(bias: str) -> None:
    if bias not in ("none", "all", "lora_only"):
        raise NotImplementedError(f"bias is {bias!r}, expected 'none', 'all' or 'lora_only'.")
