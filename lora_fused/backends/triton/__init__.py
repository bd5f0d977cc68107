"""The operations by Triton kernels, for every GPU that Triton compiles for.

With TRITON_INTERPRET=1 set before the first call, CPU tensors run through Triton's interpreter,
which is slow and there for tests. Nothing is imported from Triton before it is needed. Launches go
to torch's current stream, workspaces come from torch's allocator, and nothing waits for the device.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math

import torch
from torch import Tensor

from lora_fused.backends import torch_ops
from lora_fused.backends.torch_ops import flatten
from lora_fused.backends.triton import launch
from lora_fused.backends.triton.candidates import (
    candidates,
    default_tiles,
    left_out,
    target_of,
)
from lora_fused.backends.triton.group import group_backward, group_forward
from lora_fused.config import Mask, Problem, Route

__all__ = [
    "candidates", "group_backward", "group_forward", "left_out", "matmul",
    "not_supported_reasons", "reduce", "reduce_pair", "shrink", "shrink_matmul", "shrink_reduce",
    "takes_wide_adapters",
]  # fmt: skip

MIN_VERSION = (3, 7)  # 3.6 cannot hand a tuple with None in it to a device function
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_SIZE = 1 << 30  # the kernels count in 32 bits, offsets in 64


def not_supported_reasons(problem: Problem) -> list[str]:
    """Why the Triton kernels cannot run the problem; empty if they can."""
    reasons = []
    version = triton_version()
    if version is None:
        reasons.append("triton is not installed")
    elif version < MIN_VERSION:
        needed = ".".join(map(str, MIN_VERSION))
        reasons.append(f"triton is {'.'.join(map(str, version))}, needed is {needed} or later")
    if problem.device_type == "cpu":
        if not launch.interpreted():
            reasons.append("the tensors are on the cpu and TRITON_INTERPRET is not set")
    elif problem.device_type != "cuda":
        reasons.append(f"the tensors are on {problem.device_type}")
    elif problem.device is not None and not target_of(problem.device):
        reasons.append(f"no kernels are compiled and tested for {problem.device}")
    if problem.dtype not in DTYPES:
        name = str(problem.dtype).removeprefix("torch.")
        reasons.append(f"there are no Triton kernels for {name}")
    if not problem.plain:
        reasons.append("a tensor is not an ordinary strided torch.Tensor")
    if problem.K == 0 or problem.N == 0:
        reasons.append("the problem is empty")
    if max(problem.M, problem.K, problem.N) > _MAX_SIZE:
        reasons.append(f"a size is beyond {_MAX_SIZE}")
    if problem.R > 512:
        reasons.append(f"the rank is {problem.R}, at most 512 is supported")
    return reasons


@functools.cache
def triton_version() -> tuple[int, int] | None:
    """(major, minor) of the installed Triton, without importing it."""
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows"):
        try:
            major, minor = importlib.metadata.version(name).split(".")[:2]
            return int(major), int(minor)
        except (importlib.metadata.PackageNotFoundError, ValueError):
            continue
    return None


def takes_wide_adapters(problem: Problem) -> bool:
    """The kernels round fp32 adapters to the compute dtype themselves, tile by tile."""
    return problem.adapter_dtype == torch.float32


def shrink(route: Route, x: Tensor, a: Tensor, scale: float, mask: Mask | None = None) -> Tensor:
    """See torch_ops.shrink."""
    tiles = route.config.shrink_tiles
    if tiles is None and mask is None:
        return torch_ops.shrink(route, x, a.to(x.dtype), scale)
    x = flatten(x)
    s = x.new_empty(x.shape[0], a.shape[0])
    launch.shrink(tiles or default_tiles(route.problem, "shrink"), [(x, a, s, scale, mask)])
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
    packed: object = None,
    out: Tensor | None = None,
) -> Tensor:
    """See torch_ops.matmul. `library` is torch's GEMM, with our masked rank-R term at most."""
    strategy = route.config.forward if direction == "forward" else route.config.dx
    if strategy == "split":
        return _matmul(route, direction, x, weight, None, s, adapter, 1.0, bias, mask, out)
    if s is None or mask is None:
        return torch_ops.matmul(route, direction, x, weight, s, adapter, bias, out=out)
    y = torch_ops.matmul(route, direction, x, weight, None, None, bias, out=out)
    return _matmul(route, direction, None, weight, None, s, adapter, 1.0, None, mask, y)


def shrink_matmul(
    route: Route,
    direction: str,
    x: Tensor,
    weight: Tensor,
    shrink_adapter: Tensor,
    expand_adapter: Tensor,
    scale: float,
    bias: Tensor | None = None,
    mask: Mask | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, s) in one launch.

    "forward": x [..., K], s = scale · x Aᵀ [M, R], y = x Wᵀ + s Bᵀ + bias.
    "dx": x is dy [..., N], s is ds = scale · dy B [M, R], y is dx = dy W + ds A.
    """
    if mask is not None:
        raise ValueError("one launch for s and y is not offered with dropout; use split.")
    forward = direction == "forward"
    s = x.new_empty(math.prod(x.shape[:-1]), shrink_adapter.shape[0 if forward else 1])
    y = _matmul(
        route, direction, x, weight, shrink_adapter, s, expand_adapter, scale, bias, None, None
    )
    return y, s


def shrink_reduce(
    route: Route,
    dy: Tensor,
    b: Tensor | None,
    scale: float,
    s: Tensor | None,
    need_ds: bool,
    db_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:
    """See torch_ops.shrink_reduce."""
    ds = db = None
    if need_ds and b is not None:
        ds = shrink(route, dy, b.t(), scale)
    if db_dtype is not None and s is not None:
        db = reduce_pair(route, None, None, None, None, dy, s, db_dtype)[1]
    return ds, db


def reduce(route: Route, ds: Tensor, x: Tensor, mask: Mask | None, dtype: torch.dtype) -> Tensor:
    """See torch_ops.reduce."""
    da = reduce_pair(route, ds, x, mask, dtype, None, None, None)[0]
    assert da is not None
    return da


def reduce_pair(
    route: Route,
    ds: Tensor | None,
    x: Tensor | None,
    mask: Mask | None,
    da_dtype: torch.dtype | None,
    dy: Tensor | None,
    s: Tensor | None,
    db_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:
    """da [R, K] = dsᵀ (mask ⊙ x) and db [N, R] = dyᵀ s, each if its dtype is given.

    One launch for both, and one for the sums in fixed order where the tokens are split.
    """
    members: list[tuple[Tensor, Tensor, Mask | None, bool, torch.dtype]] = []
    if da_dtype is not None:
        assert ds is not None and x is not None
        members.append((flatten(x), ds, mask, True, da_dtype))
    if db_dtype is not None:
        assert dy is not None and s is not None
        members.append((flatten(dy), s, None, False, db_dtype))
    if not members:
        return None, None
    tiles = route.config.reduce_tiles
    if tiles is None and (mask is None or da_dtype is None):
        found = [launch.library_reduce(*member) for member in members]
    else:
        found = launch.reduce(tiles or default_tiles(route.problem, "reduce"), members)
    return None if da_dtype is None else found[0], None if db_dtype is None else found[-1]


def _matmul(
    route: Route,
    direction: str,
    x: Tensor | None,
    weight: Tensor,
    a: Tensor | None,
    s: Tensor | None,
    adapter: Tensor | None,
    scale: float,
    bias: Tensor | None,
    mask: Mask | None,
    out: Tensor | None,
) -> Tensor:
    """Both directions as y = x w + mask ⊙ (s l) + bias; with `a` s is written, not read."""
    if direction == "forward":
        shape, w, l = route.y_shape, weight.t(), None if adapter is None else adapter.t()
    else:
        shape, w, l, a = route.x_shape, weight, adapter, None if a is None else a.t()
    y = weight.new_empty(shape) if out is None else out
    x = None if x is None else flatten(x)
    member = launch.matmul_member(x, w, flatten(y), s, l, a, scale, bias, mask)
    tiles = route.config.tiles(direction) or default_tiles(route.problem, direction)
    launch.matmul(tiles, [member], summed=True, accumulate=out is not None)
    return y
