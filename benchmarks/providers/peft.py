"""Hugging Face PEFT: its LoRA layer around an nn.Linear, or around GPT-2's Conv1D."""

from typing import Any

from torch import nn

from benchmarks.providers.plain import frozen_linear
from benchmarks.providers.provider import Call
from benchmarks.tensors import CaseTensors


def layer(t: CaseTensors, dropout: float) -> Call:
    from peft import LoraConfig, inject_adapter_in_model

    rank = t.a.shape[0]
    config = LoraConfig(
        r=rank,
        lora_alpha=int(t.scaling * rank),
        lora_dropout=dropout,
        target_modules=["layer"],
        fan_in_fan_out=t.fan_in_fan_out,
    )
    model = inject_adapter_in_model(config, nn.ModuleDict({"layer": _base(t)}))
    projection: Any = model.get_submodule("layer")
    projection.lora_A["default"].weight = t.a
    projection.lora_B["default"].weight = t.b
    return projection.train()


def _base(t: CaseTensors) -> nn.Module:
    if not t.fan_in_fan_out:
        return frozen_linear(t)
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(t.w.shape[0], t.w.shape[1])
    conv.weight = nn.Parameter(t.stored_weight, requires_grad=False)
    if t.bias is None:
        raise ValueError("transformers' Conv1D always has a bias")
    conv.bias = nn.Parameter(t.bias, requires_grad=False)
    return conv
