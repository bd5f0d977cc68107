"""LyCORIS: its LoRA module, on the branch (bypass) or by rebuilding the weight (its default).

Written against lycoris-lora 4.1.3, whose fused kernels are for CUDA; on a CPU it runs torch's
operations. The module's dropout falls on the branch's output, PEFT's on its input.
"""

from typing import Any

from benchmarks.providers.plain import frozen_linear
from benchmarks.providers.provider import Call, NotServed
from benchmarks.tensors import CaseTensors


def bypass(t: CaseTensors, dropout: float) -> Call:
    """x Wᵀ + the branch."""
    return _module(t, dropout, bypass_mode=True)


def rebuild(t: CaseTensors, dropout: float) -> Call:
    """x Wᵀ + x ΔWᵀ with ΔW = (W + scaling · B A) − W, formed at every call."""
    return _module(t, dropout, bypass_mode=False)


def _module(t: CaseTensors, dropout: float, bypass_mode: bool) -> Any:
    if dropout:
        raise NotServed("LyCORIS drops elements of the branch's output, not of x")
    from lycoris.modules.locon import LoConModule

    rank = t.a.shape[0]
    module = LoConModule(
        "layer",
        frozen_linear(t),
        lora_dim=rank,
        alpha=t.scaling * rank,
        bypass_mode=bypass_mode,
    )
    module.lora_down.weight, module.lora_up.weight = t.a, t.b
    return module.to(t.x.device).train()
