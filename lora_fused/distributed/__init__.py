"""Tensor parallelism: LoRA layers whose tensors are DTensors of torch.distributed.

    mesh = init_device_mesh("cuda", (4,))
    parallelize_module(model, mesh, {"up": ColwiseLoRA(), "down": RowwiseLoRA()})

Importing this package registers the sharding rules of the operators. DDP and FSDP2 need nothing
from here: they hand the layers plain tensors.
"""

from lora_fused.distributed.rules import LAYOUTS, Layout
from lora_fused.distributed.sharded import call_sharded
from lora_fused.distributed.styles import ColwiseLoRA, RowwiseLoRA

__all__ = ["LAYOUTS", "ColwiseLoRA", "Layout", "RowwiseLoRA", "call_sharded"]
