"""Chalk: the LoRA branch as one operation, added to the frozen layer's output.

Written against freesolo-chalk 0.5.7 (module `chalk`). Called as its own installer calls it, but for
every number of tokens: in production it hands fewer than 4096 tokens, and inference, to PEFT.
"""

from typing import Any

from torch import Tensor

from benchmarks.providers.imported import leaving_others_alone
from benchmarks.providers.plain import frozen_linear
from benchmarks.providers.provider import Call, NotServed
from benchmarks.tensors import CaseTensors


def layer(t: CaseTensors, dropout: float) -> Call:
    if dropout:
        raise NotServed("Chalk leaves layers with dropout to PEFT")
    with leaving_others_alone("chalk"):
        from chalk.ops.lora import load_lora

    delta: Any = load_lora()
    if delta is None:
        raise NotServed("Chalk's self-test on this device failed, it would leave the layer to PEFT")
    base = frozen_linear(t)

    def call(x: Tensor) -> Tensor:
        y: Tensor = base(x) + delta(x, t.a, t.b, t.scaling)
        return y

    return call
