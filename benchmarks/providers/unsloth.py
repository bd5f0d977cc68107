"""unsloth's autograd function for one projection, by way of its `apply_lora_o`.

Written against unsloth 2026.10.9, which imports and runs on a CPU. The function takes a projection
of PEFT and an activation of three dimensions, and ignores a bias of the base layer: unsloth
itself leaves layers with one to PEFT, and so do we.
"""

import os
import tempfile
from types import SimpleNamespace

from torch import Tensor

from benchmarks.providers import peft
from benchmarks.providers.imported import leaving_others_alone
from benchmarks.providers.provider import Call, NotServed
from benchmarks.tensors import CaseTensors


def layer(t: CaseTensors, dropout: float) -> Call:
    if t.bias is not None:
        raise NotServed("unsloth leaves layers with a bias to PEFT")
    # At import it writes generated code, by default into the working directory.
    elsewhere = os.path.join(tempfile.gettempdir(), "unsloth_compiled_cache")
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", elsewhere)
    with leaving_others_alone("unsloth"):
        from unsloth.kernels.fast_lora import apply_lora_o

    block = SimpleNamespace(o_proj=peft.layer(t, dropout))

    def call(x: Tensor) -> Tensor:
        y: Tensor = apply_lora_o(block, x.unsqueeze(0)).squeeze(0)
        return y

    return call
