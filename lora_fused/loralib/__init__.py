"""A drop-in for loralib (Hu et al., https://github.com/microsoft/LoRA): `import ... as lora`.

    import lora_fused.loralib as lora

    layer = lora.Linear(768, 768, r=8, lora_alpha=16)
    lora.mark_only_lora_as_trainable(model)
    torch.save(lora.lora_state_dict(model), "adapter.pt")

Same names, arguments, parameter names and shapes, so checkpoints go both ways. Different on
purpose: un-merging restores the weight bit for bit (loralib's drifts); state_dict() of a merged
linear layer holds the original weight; MergedLinear never builds ΔW, and works with no slice
enabled; Conv1d and Conv3d work with kernels wider than 1.
"""

from lora_fused.loralib.linear import Linear, LoRALayer, MergedLinear
from lora_fused.loralib.others import Conv1d, Conv2d, Conv3d, ConvLoRA, Embedding
from lora_fused.loralib.state import lora_state_dict, mark_only_lora_as_trainable

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvLoRA",
    "Embedding",
    "Linear",
    "LoRALayer",
    "MergedLinear",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
]
