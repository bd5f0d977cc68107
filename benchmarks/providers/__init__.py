"""The contenders: one small adapter each, all on the same values.

PROVIDERS are those of a run that names none; PEERS and FORCED join by name. A provider that cannot
run here stays in the list and says why (`missing`); one that cannot serve a case raises
`NotServed`. `build` returns a `Built`, whose `forward` runs without autograd and whose
`forward_backward` computes dx and, for LoRA, da and db. No peer is imported before it is built.
docs/benchmarks.md says which is what, and at which version it was checked.
"""

from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.providers import (
    axolotl,
    chalk,
    compiled,
    lorafusion,
    loralib,
    lycoris,
    ours,
    peft,
    plain,
    strategies,
    unsloth,
)
from benchmarks.providers.provider import Built, NotServed, Provider, needs_cuda

__all__ = [
    "ALL_PROVIDERS",
    "FORCED",
    "FROZEN",
    "LORALIB",
    "NAIVE",
    "OURS",
    "PEERS",
    "PEFT",
    "PREPACKED",
    "PROVIDERS",
    "PROVIDER_NAMES",
    "SMART",
    "Built",
    "NotServed",
    "Provider",
    "named",
]

FROZEN, NAIVE, SMART, PEFT = "frozen", "naive", "smart", "peft"
LORALIB, OURS, PREPACKED = "loralib", "ours", "ours-prepacked"
PROVIDERS = (
    Provider(FROZEN, "frozen nn.Linear", plain.frozen, lora=False),
    Provider(NAIVE, "naive torch", plain.naive),
    Provider(SMART, "smart torch", plain.smart),
    Provider(PEFT, "PEFT", peft.layer, needs="peft"),
    Provider(LORALIB, "loralib", loralib.layer, needs="loralib", mixed=False),
    Provider(OURS, "lora_fused", ours.layer, ours=True),
    Provider(PREPACKED, "lora_fused prepacked", ours.prepacked, ours=True, native=True),
)
_FP32 = torch.float32
PEERS = (
    Provider("merged", "merged weight, no LoRA", plain.merged, lora=False, merged=True),
    Provider(
        "compile-naive",
        "torch.compile(naive)",
        compiled.naive,
        compiled=True,
        lacks=compiled.lacks,
    ),
    Provider(
        "compile-peft",
        "torch.compile(PEFT)",
        compiled.peft_layer,
        needs="peft",
        compiled=True,
        lacks=compiled.lacks,
    ),
    Provider("peft-fp32", "PEFT, fp32 adapters", peft.layer, needs="peft", adapter_dtype=_FP32),
    Provider("ours-fp32", "lora_fused, fp32 adapters", ours.layer, ours=True, adapter_dtype=_FP32),
    Provider("unsloth", "unsloth", unsloth.layer, needs="unsloth"),
    Provider("axolotl", "axolotl", axolotl.layer, needs="axolotl", lacks=axolotl.lacks),
    Provider("lycoris", "LyCORIS", lycoris.bypass, needs="lycoris"),
    Provider("lycoris-rebuild", "LyCORIS, rebuilt weight", lycoris.rebuild, needs="lycoris"),
    Provider("lorafusion", "LoRAFusion", lorafusion.layer, needs="lorafusion", lacks=needs_cuda),
    Provider("chalk", "Chalk", chalk.layer, needs="chalk", lacks=needs_cuda),
)
FORCED = (
    *(
        Provider(
            f"ours-{backend}",
            f"lora_fused by {backend}",
            partial(strategies.by_backend, backend),
            ours=True,
            native=backend == "cpu",
            lacks=partial(strategies.lacks, backend),
        )
        for backend in ("torch", *strategies.STRATEGIES)
    ),
    *(
        Provider(
            f"ours-{backend}-{strategy}",
            f"lora_fused by {backend}, {strategy}",
            partial(strategies.by_strategy, backend, strategy),
            ours=True,
            native=backend == "cpu",
            lacks=partial(strategies.lacks, backend),
        )
        for backend, names in strategies.STRATEGIES.items()
        for strategy in names
    ),
)
ALL_PROVIDERS = (*PROVIDERS, *PEERS, *FORCED)
_GROUPS = {"default": PROVIDERS, "peers": PEERS, "strategies": FORCED, "all": ALL_PROVIDERS}
PROVIDER_NAMES = (*_GROUPS, *(p.name for p in ALL_PROVIDERS))
"""What `named` knows: the groups, and the providers one by one."""


def named(names: Sequence[str] | None) -> list[Provider]:
    """The providers of these names and groups in their order, the frozen layer always first.

    None: the default ones.
    """
    wanted = {FROZEN}
    for name in names or ("default",):
        wanted |= {p.name for p in _GROUPS.get(name, ())} or {name}
    return [p for p in ALL_PROVIDERS if p.name in wanted]
