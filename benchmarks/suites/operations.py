"""The operations of lora_fused.backends, one by one, as the layer calls them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.tensors import CaseTensors
from lora_fused.autograd import lora_forward
from lora_fused.backends import BACKENDS, cpu
from lora_fused.config import Call, Route

FORWARD, DX = "forward", "dx"

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Operands:
    """What the operations read. s [M, R] and ds [M, R] are inputs here, rounded as in the layer."""

    t: CaseTensors
    s: Tensor
    ds: Tensor

    def to(self, dtype: torch.dtype) -> Operands:
        t = self.t
        a, b = (torch.nn.Parameter(p.detach().to(dtype)) for p in (t.a, t.b))
        cast = replace(
            t, x=t.x.detach().to(dtype), w=t.w.to(dtype), a=a, b=b, dy=t.dy.to(dtype),
            bias=None if t.bias is None else t.bias.to(dtype),
        )  # fmt: skip
        return Operands(cast, self.s.to(dtype), self.ds.to(dtype))


@dataclass(frozen=True)
class Operation:
    """run: by a backend along a route. plain: the formula, in the dtype of its operands.

    direction: whose strategy it follows. work: its FLOPs (a multiply-add is two), and how many
    elements of operands and results there are. matmul: it has the big product, whose bare form is
    then what it is compared with. shrinks: it makes s itself, so that one launch may do it all.
    """

    name: str
    direction: str
    run: Callable[[Route, Operands, cpu.PackedWeight | None], Outputs]
    plain: Callable[[Operands], Outputs]
    work: Callable[[int, int, int, int], tuple[int, int]]
    matmul: bool = False
    shrinks: bool = False


def _bias(y: Tensor, t: CaseTensors) -> Tensor:
    return y if t.bias is None else y + t.bias


def _shrink(route: Route, o: Operands, packed: object) -> Outputs:
    return {"s": BACKENDS[route.config.backend].shrink(route, o.t.x, o.t.a, o.t.scaling)}


def _forward(route: Route, o: Operands, packed: object) -> Outputs:
    ops, t = BACKENDS[route.config.backend], o.t
    return {"y": ops.matmul(route, "forward", t.x, t.w, o.s, t.b, t.bias, packed=packed)}


def _layer(route: Route, o: Operands, packed: object) -> Outputs:
    t = o.t
    y, s = lora_forward(Call(route, t.scaling, packed=packed), t.x, t.w, t.a, t.b, t.bias)
    assert s is not None
    return {"s": s, "y": y}


def _ds(route: Route, o: Operands, packed: object) -> Outputs:
    ops, t = BACKENDS[route.config.backend], o.t
    ds, _ = ops.shrink_reduce(route, t.dy, t.b, t.scaling, None, True, None)
    return {"ds": ds}


def _ds_db(route: Route, o: Operands, packed: object) -> Outputs:
    ops, t = BACKENDS[route.config.backend], o.t
    ds, db = ops.shrink_reduce(route, t.dy, t.b, t.scaling, o.s, True, t.b.dtype)
    return {"ds": ds, "db": db}


def _dx(route: Route, o: Operands, packed: object) -> Outputs:
    ops, t = BACKENDS[route.config.backend], o.t
    return {"dx": ops.matmul(route, "dx", t.dy, t.w, o.ds, t.a, packed=packed)}


def _da(route: Route, o: Operands, packed: object) -> Outputs:
    ops, t = BACKENDS[route.config.backend], o.t
    return {"da": ops.reduce(route, o.ds, t.x, None, t.a.dtype)}


def plain_s(o: Operands) -> Tensor:
    return o.t.scaling * (o.t.x @ o.t.a.t())


def _plain_layer(o: Operands) -> Outputs:
    s = plain_s(o)
    return {"s": s, "y": _bias(o.t.x @ o.t.w.t() + s @ o.t.b.t(), o.t)}


def _reductions(route: Route, o: Operands, packed: object) -> Outputs:
    """In one launch where the backend has one for both."""
    ops, t = BACKENDS[route.config.backend], o.t
    if route.config.reduce_tiles is not None:
        da, db = ops.reduce_pair(route, o.ds, t.x, None, t.a.dtype, t.dy, o.s, t.b.dtype)
    else:
        _, db = ops.shrink_reduce(route, t.dy, None, t.scaling, o.s, False, t.b.dtype)
        da = ops.reduce(route, o.ds, t.x, None, t.a.dtype)
    return {"da": da, "db": db}


def _plain_ds(o: Operands) -> Tensor:
    return o.t.scaling * (o.t.dy @ o.t.b)


OPERATIONS = (
    Operation(
        "shrink x", FORWARD, _shrink,
        plain=lambda o: {"s": plain_s(o)},
        work=lambda M, K, N, R: (2 * M * K * R, M * K + R * K + M * R),
    ),
    Operation(
        "matmul y", FORWARD, _forward,
        plain=lambda o: {"y": _bias(o.t.x @ o.t.w.t() + o.s @ o.t.b.t(), o.t)},
        work=lambda M, K, N, R: (2 * M * N * (K + R), M * K + N * K + M * N + R * (M + N)),
        matmul=True,
    ),
    Operation(
        "shrink x, matmul y", FORWARD, _layer,
        plain=_plain_layer,
        work=lambda M, K, N, R: (
            2 * M * (N * (K + R) + K * R), M * K + N * K + M * N + R * (M + N + K)
        ),
        matmul=True, shrinks=True,
    ),
    Operation(
        "shrink dy", DX, _ds,
        plain=lambda o: {"ds": _plain_ds(o)},
        work=lambda M, K, N, R: (2 * M * N * R, M * N + N * R + M * R),
    ),
    Operation(
        "shrink dy, reduce db", DX, _ds_db,
        plain=lambda o: {"ds": _plain_ds(o), "db": o.t.dy.t() @ o.s},
        work=lambda M, K, N, R: (4 * M * N * R, M * N + 2 * N * R + 2 * M * R),
    ),
    Operation(
        "matmul dx", DX, _dx,
        plain=lambda o: {"dx": o.t.dy @ o.t.w + o.ds @ o.t.a},
        work=lambda M, K, N, R: (2 * M * K * (N + R), M * N + N * K + M * K + R * (M + K)),
        matmul=True,
    ),
    Operation(
        "reduce da", DX, _da,
        plain=lambda o: {"da": o.ds.t() @ o.t.x},
        work=lambda M, K, N, R: (2 * M * K * R, M * K + M * R + R * K),
    ),
    Operation(
        "reduce da, reduce db", DX, _reductions,
        plain=lambda o: {"da": o.ds.t() @ o.t.x, "db": o.t.dy.t() @ o.s},
        work=lambda M, K, N, R: (2 * M * R * (K + N), M * (K + N) + R * (K + N) + 2 * M * R),
    ),
)  # fmt: skip
