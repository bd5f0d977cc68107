#include "instantiate.cuh"

LORA_FUSED_SM80_VARIANTS_32BIT(LORA_FUSED_SM80_KERNEL, tf32, float)
