"""The contenders: one small adapter each, all on the same values.

A provider that is not installed stays in the list and says so. `build` returns a `Built`, whose
`forward` runs without autograd and whose `forward_backward` computes dx and, for LoRA, da and db.
"""

from benchmarks.providers import loralib, ours, peft, plain
from benchmarks.providers.provider import Built, Provider

__all__ = [
    "FROZEN",
    "LORALIB",
    "NAIVE",
    "OURS",
    "PEFT",
    "PREPACKED",
    "PROVIDERS",
    "SMART",
    "Built",
    "Provider",
]

FROZEN, NAIVE, SMART, PEFT = "frozen", "naive", "smart", "peft"
LORALIB, OURS, PREPACKED = "loralib", "ours", "ours-prepacked"
PROVIDERS = (
    Provider(FROZEN, "frozen nn.Linear", plain.frozen, lora=False),
    Provider(NAIVE, "naive torch", plain.naive),
    Provider(SMART, "smart torch", plain.smart),
    Provider(PEFT, "PEFT", peft.layer, needs="peft"),
    Provider(LORALIB, "loralib", loralib.layer, needs="loralib"),
    Provider(OURS, "lora_fused", ours.layer, ours=True),
    Provider(PREPACKED, "lora_fused prepacked", ours.prepacked, ours=True, native=True),
)
