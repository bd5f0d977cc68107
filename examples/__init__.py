"""Fine-tuning with PEFT, stock and with lora_fused, side by side."""
