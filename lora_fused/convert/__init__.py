"""Adapters from one library to another, through files or live models, bit for bit.

    from lora_fused import convert

    adapter = convert.from_torchtune("adapter_0.pt", rotary=convert.Rotary(32, 8), lora_alpha=16)
    convert.to_peft(adapter, "my-adapter")          # adapter_model.safetensors, adapter_config.json
    convert.apply_to(model, adapter)                # or straight onto a model, by FusedLoRALinear

Every from_… gives an Adapter, every to_… takes one. Tensors are never rounded or cast; what another
library cannot express is refused in a sentence.
"""

from lora_fused.convert.adapter import Adapter, LayerAdapter
from lora_fused.convert.files import read_tensors, write_tensors
from lora_fused.convert.joined import join_layers, split_layers
from lora_fused.convert.kohya import from_kohya, to_kohya
from lora_fused.convert.live import apply_to
from lora_fused.convert.loralib import from_loralib, to_loralib
from lora_fused.convert.megatron import Heads, from_megatron, to_megatron
from lora_fused.convert.peft import from_peft, to_peft
from lora_fused.convert.torchtune import Rotary, from_torchtune, to_torchtune

__all__ = [
    "Adapter",
    "Heads",
    "LayerAdapter",
    "Rotary",
    "apply_to",
    "from_kohya",
    "from_loralib",
    "from_megatron",
    "from_peft",
    "from_torchtune",
    "join_layers",
    "read_tensors",
    "split_layers",
    "to_kohya",
    "to_loralib",
    "to_megatron",
    "to_peft",
    "to_torchtune",
    "write_tensors",
]
