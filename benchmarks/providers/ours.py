"""lora_fused itself."""

from benchmarks.providers.loralib import filled
from benchmarks.providers.provider import Call
from benchmarks.tensors import CaseTensors
from lora_fused import FusedLoRALinear


def layer(t: CaseTensors, dropout: float) -> Call:
    return filled(FusedLoRALinear, t, dropout)


def prepacked(t: CaseTensors, dropout: float) -> Call:
    layer = filled(FusedLoRALinear, t, dropout)
    layer.prepack()
    return layer
