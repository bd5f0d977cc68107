"""torch.compile over the naive formula and over PEFT's layer."""

import os
import shutil
import types
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.providers import peft, plain
from benchmarks.providers.provider import Call
from benchmarks.tensors import CaseTensors


def naive(t: CaseTensors, dropout: float) -> Call:
    return _compiled(plain.naive(t, dropout))


def peft_layer(t: CaseTensors, dropout: float) -> Call:
    return _compiled(peft.layer(t, dropout))


def lacks(device: str) -> str | None:
    """What torch.compile's code generator needs on the device."""
    if device == "cpu":
        compilers = (os.environ.get("CXX") or "g++", "clang++")
        return None if any(map(shutil.which, compilers)) else "torch.compile finds no C++ compiler"
    return None if find_spec("triton") else "torch.compile needs triton, which is not installed"


def _compiled(call: Call) -> Call:
    """The whole call as one graph for these very shapes, or an error: nothing falls back to eager.

    Dynamo counts recompilations per code object and gives up after a few, so that each layer gets a
    code object of its own.
    """

    def run(x: Tensor) -> Tensor:
        return call(x)

    own = types.FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__)
    compiled: Call = torch.compile(own, fullgraph=True, dynamic=False)
    return compiled
