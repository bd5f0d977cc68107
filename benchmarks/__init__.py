"""What does a LoRA layer cost? `python -m benchmarks` measures it on this machine.

Each provider (the frozen nn.Linear, plain torch, PEFT, loralib, lora_fused) runs the same layer
on the same tensors; its numerics are checked before it is timed. Start reading at run.py; the
JSON that comes out is described in schema.md.
"""
