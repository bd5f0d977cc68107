"""Backends. Each module offers the same four operations, for x [..., K], dy [..., N] and M rows:

    shrink(route, x, a, scale, mask)            s  = scale · (mask ⊙ x) aᵀ            [M, R]
    matmul(route, "forward", x, w, s, b, bias)  y  = x wᵀ + s bᵀ + bias               [..., N]
    matmul(route, "dx", dy, w, ds, a, mask)     dx = dy w + mask ⊙ (ds a)             [..., K]
    shrink_reduce(route, dy, b, scale, s, …)    ds = scale · dy b,  db = dyᵀ s
    reduce(route, ds, x, mask, dtype)           da = dsᵀ (mask ⊙ x)                   [R, K]

on tensors of the compute dtype, w [N, K], a [R, K] and b [N, R] as they are stored, with any
strides; and `not_supported_reasons(problem)`: an empty list means that the backend can run the
problem.
"""

from __future__ import annotations

from types import ModuleType

from lora_fused.backends import cpu, torch_ops

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "torch": torch_ops}
"""By name, in the order in which "auto" tries them."""
