"""LoRAFusion: three Triton kernels around the rank's bottleneck, `fused_linear_lora`.

Written against CentML/lorafusion at commit c48d7fd (it is on no package index); importing it needs
a CUDA device. The function takes an activation of three dimensions and draws its dropout seed from
Python's `random`.
"""

from torch import Tensor

from benchmarks.providers.imported import leaving_others_alone
from benchmarks.providers.provider import Call, NotServed
from benchmarks.tensors import CaseTensors


def layer(t: CaseTensors, dropout: float) -> Call:
    rank = t.a.shape[0]
    if rank < 16 or rank & (rank - 1):
        raise NotServed(f"LoRAFusion's kernels take ranks 16, 32, 64, …, got {rank}")
    if t.fan_in_fan_out:
        raise NotServed("LoRAFusion reads the weight as [out, in], GPT-2's Conv1D stores [in, out]")
    with leaving_others_alone("lorafusion"):
        from lorafusion.ops.lora_v1 import fused_linear_lora

    def call(x: Tensor) -> Tensor:
        y: Tensor = fused_linear_lora(
            x=x.unsqueeze(0),
            linear_w=t.w,
            lora_a=t.a,
            lora_b=t.b,
            alpha=t.scaling,
            dropout_p=dropout,
            linear_bias=t.bias,
        )
        return y.squeeze(0)

    return call
