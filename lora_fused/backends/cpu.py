"""The operations by the native module lora_fused._C, for x86 CPUs with AVX2 or better.

No other file imports that module.

_C takes raw pointers, sizes and strides in elements. Everything handed over here is an ordinary
strided CPU tensor of the compute dtype; the weight is never copied, whatever its strides.
"""

from __future__ import annotations

import functools
import importlib
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_fused.backends import torch_ops
from lora_fused.config import Config, Mask, Problem, Route

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ALIGNMENT = 64


@dataclass(frozen=True)
class CpuInfo:
    """What the dispatcher's rule may look at."""

    isa: str
    vendor: str
    family: int
    model: int
    brand: str
    flags: frozenset[str]


class PackedWeight(NamedTuple):
    """A weight packed for both directions, as bytes only the same instruction set understands."""

    isa: str
    dtype: torch.dtype
    forward: Tensor
    dx: Tensor

    @property
    def nbytes(self) -> int:
        return self.forward.nbytes + self.dx.nbytes


@functools.cache
def native() -> Any:
    """The native module, or None where it was not built."""
    try:
        module = importlib.import_module(".._C", __package__)
    except ImportError:
        return None
    module.bind_torch(Tensor, torch.nn.Parameter)
    return module


@functools.cache
def isa() -> str:
    """The instruction set in use: the best one supported, or the one LORA_FUSED_CPU_ISA names.

    "" where there is none. Raises ValueError if the variable names one that cannot run here.
    """
    module = native()
    supported = module.supported_isas() if module else []
    forced = os.environ.get("LORA_FUSED_CPU_ISA", "")
    if forced and module and forced not in supported:
        raise ValueError(
            f"LORA_FUSED_CPU_ISA is {forced!r}, expected one of {', '.join(supported) or 'none'}."
        )
    return forced if forced and module else (supported[-1] if supported else "")


@functools.cache
def info() -> CpuInfo:
    """The CPU and the instruction set in use. Only where the native module is there."""
    facts = native().cpu_info()
    return CpuInfo(
        isa=isa(),
        vendor=facts["vendor"],
        family=facts["family"],
        model=facts["model"],
        brand=facts["brand"],
        flags=frozenset(facts["flags"]),
    )


def not_supported_reasons(problem: Problem) -> list[str]:
    """Why the native kernels cannot run the problem; empty if they can."""
    reasons = []
    if problem.device_type != "cpu":
        reasons.append(f"the tensors are on {problem.device_type}")
    if problem.dtype not in DTYPE_CODES:
        name = str(problem.dtype).removeprefix("torch.")
        reasons.append(f"there are no native kernels for {name}")
    if not problem.plain:
        reasons.append("a tensor is not an ordinary strided torch.Tensor")
    if problem.M == 0 or problem.K == 0 or problem.N == 0:
        reasons.append("the problem is empty")
    if native() is None:
        reasons.append("the native kernels are not built")
    elif not isa():
        reasons.append("the CPU has no AVX2")
    return reasons


def shrink(route: Route, x: Tensor, a: Tensor, scale: float, mask: Mask | None = None) -> Tensor:
    """See torch_ops.shrink."""
    config = route.config
    if config.forward == "library" and mask is None:
        return torch_ops.shrink(route, x, a, scale)
    x, sm, sk = rows(x)
    M, R, dtype = route.problem.M, a.shape[0], x.dtype
    s = torch.empty(M, R, dtype=dtype)
    seed, threshold = (0, 0) if mask is None else words(mask)
    native().shrink(
        config.isa, DTYPE_CODES[dtype], M, route.problem.K, R,
        x.data_ptr(), sm, sk, a.data_ptr(), *a.stride(),
        scale, seed, threshold, s.data_ptr(), config.threads,
    )  # fmt: skip
    return s


def matmul(
    route: Route,
    direction: str,
    x: Tensor,
    weight: Tensor,
    s: Tensor | None,
    adapter: Tensor | None,
    bias: Tensor | None = None,
    mask: Mask | None = None,
    packed: PackedWeight | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See torch_ops.matmul. Strategy `packed` reads the pack, the others the plain weight."""
    config = route.config
    strategy = config.forward if direction == "forward" else config.dx
    if strategy in ("own", "packed"):
        return _own(route, direction, x, weight, s, adapter, bias, mask, packed, out)
    if strategy == "library" and mask is None:
        return torch_ops.matmul(route, direction, x, weight, s, adapter, bias, out=out)
    y = torch_ops.matmul(route, direction, x, weight, None, None, bias, out=out)
    if s is not None and adapter is not None:
        expand(route, direction, y, s, adapter, mask)
    return y


def _own(
    route: Route,
    direction: str,
    x: Tensor,
    weight: Tensor,
    s: Tensor | None,
    adapter: Tensor | None,
    bias: Tensor | None,
    mask: Mask | None,
    packed: PackedWeight | None,
    out: Tensor | None,
) -> Tensor:
    """The extended matmul: the rank runs as R more steps of the contraction."""
    config, problem, dtype = route.config, route.problem, x.dtype
    forward = direction == "forward"
    x, sm, sk = rows(x)
    (N, K), (w_sn, w_sk) = (problem.N, problem.K), weight.stride()
    shape = route.y_shape
    if not forward:
        N, K, w_sn, w_sk, shape = K, N, w_sk, w_sn, route.x_shape
    y = torch.empty(shape, dtype=dtype) if out is None else out
    seed, threshold = (0, 0) if mask is None else words(mask)
    panels = 0 if packed is None else panels_of(config, direction, packed, dtype)
    if bias is not None and bias.stride(0) != 1:
        bias = bias.contiguous()
    R, *rank_term = _rank_term(s, adapter, forward)
    native().matmul(
        config.isa, DTYPE_CODES[dtype], problem.M, N, K, R,
        x.data_ptr(), sm, sk, weight.data_ptr(), w_sk, w_sn, panels, *rank_term,
        0 if bias is None else bias.data_ptr(), out is not None, seed, threshold,
        y.data_ptr(), N, config.threads,
    )  # fmt: skip
    return y


def panels_of(config: Config, direction: str, packed: PackedWeight, dtype: torch.dtype) -> int:
    """The address of the pack for a direction; 0 where its strategy does not read this pack."""
    strategy = config.forward if direction == "forward" else config.dx
    if strategy != "packed" or packed.isa != config.isa or packed.dtype != dtype:
        return 0
    return (packed.forward if direction == "forward" else packed.dx).data_ptr()


def expand(
    route: Route, direction: str, y: Tensor, s: Tensor, adapter: Tensor, mask: Mask | None
) -> None:
    """See torch_ops.expand: the extended matmul with nothing but its extension."""
    config, N = route.config, y.shape[-1]
    seed, threshold = (0, 0) if mask is None else words(mask)
    R, *rank_term = _rank_term(s, adapter, direction == "forward")
    native().matmul(
        config.isa, DTYPE_CODES[y.dtype], route.problem.M, N, 0, R,
        0, 0, 1, 0, 1, 0, 0, *rank_term, 0, True, seed, threshold,
        y.data_ptr(), N, config.threads,
    )  # fmt: skip


def shrink_reduce(
    route: Route,
    dy: Tensor,
    b: Tensor | None,
    scale: float,
    s: Tensor | None,
    need_ds: bool,
    db_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:
    """See torch_ops.shrink_reduce. dy is read once for both."""
    config = route.config
    if config.dx == "library":
        return torch_ops.shrink_reduce(route, dy, b, scale, s, need_ds, db_dtype)
    dy, sm, sn = rows(dy)
    M, N, R = route.problem.M, route.problem.N, route.problem.R
    ds = torch.empty(M, R, dtype=dy.dtype) if need_ds else None
    db = None if db_dtype is None else torch.empty(N, R, dtype=native_dtype(db_dtype))
    native().shrink_reduce(
        config.isa, DTYPE_CODES[dy.dtype], M, N, R, dy.data_ptr(), sm, sn,
        *((0, R, 1) if b is None else (b.data_ptr(), *b.stride())), scale,
        0 if ds is None else ds.data_ptr(), 0 if s is None else s.data_ptr(),
        *((0, 0) if db is None else (db.data_ptr(), DTYPE_CODES[db.dtype])), R, 1, config.threads,
    )  # fmt: skip
    return ds, db if db is None or db.dtype == db_dtype else db.to(db_dtype)


def reduce(route: Route, ds: Tensor, x: Tensor, mask: Mask | None, dtype: torch.dtype) -> Tensor:
    """See torch_ops.reduce. Accumulated in fp32 and rounded once, to dtype."""
    config = route.config
    if config.dx == "library" and mask is None:
        return torch_ops.reduce(route, ds, x, None, dtype)
    x, sm, sk = rows(x)
    M, K, R = route.problem.M, route.problem.K, ds.shape[1]
    da = torch.empty(R, K, dtype=native_dtype(dtype))
    seed, threshold = (0, 0) if mask is None else words(mask)
    native().reduce(
        config.isa, DTYPE_CODES[x.dtype], M, K, R,
        ds.data_ptr(), x.data_ptr(), sm, sk, seed, threshold,
        da.data_ptr(), DTYPE_CODES[da.dtype], K, 1, config.threads,
    )  # fmt: skip
    return da if da.dtype == dtype else da.to(dtype)


def pack(weight: Tensor, threads: int) -> PackedWeight:
    """Pack weight [N, K] (any strides) for both directions."""
    return PackedWeight(isa(), weight.dtype, _pack(weight.t(), threads), _pack(weight, threads))


def _pack(w: Tensor, threads: int) -> Tensor:
    """The packed bytes of the logical operand w [contraction, outputs]."""
    code, (K, N) = DTYPE_CODES[w.dtype], w.shape
    nbytes = native().packed_bytes(isa(), code, K, N)
    buffer = torch.empty(nbytes + _ALIGNMENT, dtype=torch.uint8)
    panels = buffer.narrow(0, -buffer.data_ptr() % _ALIGNMENT, nbytes)
    native().pack(isa(), code, K, N, w.data_ptr(), *w.stride(), panels.data_ptr(), threads)
    return panels


def rows(x: Tensor) -> tuple[Tensor, int, int]:
    """x [..., cols] as M rows: the tensor to keep alive, its row stride and its column stride.

    Only activations whose every stride jumps are copied, as torch's own GEMM would do.
    """
    if x.dim() == 2:
        sm, sk = x.stride()
        if sk == 1 or sm == 1:
            return x, sm, sk
    if not x.is_contiguous():
        x = torch_ops.flatten(x)
        if 1 not in x.stride():
            x = x.contiguous()
        return x, x.stride(0), x.stride(1)
    return x, x.shape[-1], 1


def words(mask: Mask) -> tuple[int, int]:
    """Seed and threshold of a mask as native code takes them."""
    return int(mask.seed) & 0xFFFFFFFFFFFFFFFF, mask.threshold


def _rank_term(
    s: Tensor | None, adapter: Tensor | None, forward: bool
) -> tuple[int, int, int, int, int, int]:
    """R, s, s_sm, l, l_sr, l_sn of the native matmul."""
    if s is None or adapter is None:
        return 0, 0, 0, 0, 0, 0
    first, second = adapter.stride()
    l_sr, l_sn = (second, first) if forward else (first, second)
    return s.shape[1], s.data_ptr(), s.stride(0), adapter.data_ptr(), l_sr, l_sn


def native_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which native code writes what is wanted in another one."""
    return dtype if dtype in DTYPE_CODES else torch.float32
