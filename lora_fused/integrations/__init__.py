"""lora_fused inside other libraries: one module per library, imported on request only."""
