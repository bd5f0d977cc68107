"""Backends. Each module offers the same operations, for x [..., K], dy [..., N] and M rows:

    shrink(route, x, a, scale, mask)            s  = scale · (mask ⊙ x) aᵀ            [M, R]
    matmul(route, "forward", x, w, s, b, bias)  y  = x wᵀ + s bᵀ + bias               [..., N]
    matmul(route, "dx", dy, w, ds, a, mask)     dx = dy w + mask ⊙ (ds a)             [..., K]
    shrink_reduce(route, dy, b, scale, s, …)    ds = scale · dy b,  db = dyᵀ s
    reduce(route, ds, x, mask, dtype)           da = dsᵀ (mask ⊙ x)                   [R, K]

on tensors of the compute dtype, w [N, K], a [R, K] and b [N, R] as they are stored, with any
strides; and `not_supported_reasons(problem)`: an empty list means that the backend can run the
problem. matmul runs the strategies of two launches (`library`, `split`, and those of the CPU).

A module may offer more. What it lacks is put together from the operations above:

    shrink_matmul(route, "forward", x, w, a, b, scale, bias, mask) -> y, s     one launch, for
    shrink_matmul(route, "dx", dy, w, b, a, scale, None, mask) -> dx, ds       FUSED_STRATEGIES
    reduce_pair(route, ds, x, mask, da_dtype, dy, s, db_dtype) -> da, db       one launch
    shrink_matmul_reduce(route, dy, w, a, b, scale, x, s, da_dtype, db_dtype) -> dx, da, db
                                                one launch, where dx_tiles.reduce_parts says so
    expand(route, "dx", dx, ds, a, mask)        dx += mask ⊙ (ds a)            else torch's
    group_forward(route, x, members) -> ys, s                                  see group.py
    group_backward(route, dys, x, s, members) -> dx, das, dbs
    takes_wide_adapters(problem) -> bool        fused kernels read fp32 adapters beside bf16
    candidates(problem, device, operation) -> list[Candidate]                  for GPUs
    left_out(problem) -> list[str]              why it has no candidate of some strategies

`tests/fake_backend.py` is all of it in plain torch.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from lora_fused.backends import cpu, torch_ops

NAMES = ("cpu", "cuda", "triton", "torch")
"""Every backend, in the order in which "auto" tries them."""

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "torch": torch_ops}
"""The modules loaded so far; `load` adds the others at their first use."""

_missing: dict[str, str] = {}


def load(name: str) -> ModuleType | None:
    """The module of a backend, imported at its first use; None where it cannot be imported."""
    if name not in BACKENDS and name not in _missing:
        try:
            BACKENDS[name] = importlib.import_module(f".{name}", __name__)
        except ImportError as error:
            _missing[name] = str(error)
    return BACKENDS.get(name)


def why_missing(name: str) -> str:
    """Why `load` gave no module."""
    return f"it is not in this installation ({_missing.get(name, 'not tried')})"
