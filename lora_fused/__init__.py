"""lora_fused: the LoRA linear layer, fused, at the price of the frozen layer."""

from lora_fused import ops
from lora_fused.explain import explain
from lora_fused.functional import lora_linear
from lora_fused.group import LoRAWeights, lora_linear_group
from lora_fused.linear import FusedLoRALinear

__version__ = "0.1.0"

__all__ = [
    "FusedLoRALinear",
    "LoRAWeights",
    "__version__",
    "explain",
    "lora_linear",
    "lora_linear_group",
    "ops",
]
