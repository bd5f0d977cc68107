"""axolotl's autograd function for one projection, `apply_lora_linear`.

Written against axolotl 0.19.0; its kernels import bitsandbytes. The function takes a projection of
PEFT and an activation of three dimensions.
"""

from importlib.util import find_spec

from torch import Tensor

from benchmarks.providers import peft
from benchmarks.providers.imported import leaving_others_alone
from benchmarks.providers.provider import Call, NotServed
from benchmarks.tensors import CaseTensors


def layer(t: CaseTensors, dropout: float) -> Call:
    if t.fan_in_fan_out:
        raise NotServed("axolotl reads the weight as [out, in], GPT-2's Conv1D stores [in, out]")
    with leaving_others_alone("axolotl"):
        from axolotl.kernels.lora import apply_lora_linear

    projection = peft.layer(t, dropout)

    def call(x: Tensor) -> Tensor:
        y: Tensor = apply_lora_linear(projection, x.unsqueeze(0)).squeeze(0)
        return y

    return call


def lacks(device: str) -> str | None:
    return (
        None if find_spec("bitsandbytes") else "axolotl's kernels need bitsandbytes, not installed"
    )
