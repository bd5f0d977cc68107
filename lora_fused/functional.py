"""lora_linear: the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_fused import checks
from lora_fused.autograd import LoRALinearFunction, lora_forward
from lora_fused.backends.cpu import PackedWeight
from lora_fused.backends.torch_ops import flatten
from lora_fused.config import Call, Mask, Route
from lora_fused.dispatch import route_for
from lora_fused.reference import dropout_threshold, effective_scaling, keep_mask, lora_linear_ref


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y = x Wᵀ + scaling · (dropout(x) Aᵀ) Bᵀ + bias (LoRA, Hu et al., arXiv 2106.09685, eq. 3).

    Equal to `F.linear(x, weight, bias) + scaling * (F.dropout(x, p, training) @ A.T @ B.T)` up to
    rounding and the random stream of the dropout, in one pass over x and y.

    Args:
        x: [..., K], float32, bfloat16, float16 or float64.
        weight: [N, K], any strides: pass `w.t()` for a weight stored [in, out] (fan_in_fan_out).
        lora_A: [R, K]. lora_B: [N, R]. Any floating dtype; cast to that of x, never the reverse.
            Their gradients are returned in their own dtype. R may be 0.
        scaling: lora_alpha / r, usually. A constant.
        bias: [N], any floating dtype.
        dropout_p: probability of dropping an element of x on the LoRA branch, rounded to 1/65536.
        training: no dropout if False.
        seed: of the dropout mask, 64 bits. None draws one from torch's generator of x's device, so
            that torch.manual_seed and activation checkpointing reproduce the mask. Where plain
            torch computes the layer, torch draws the mask itself then, no less reproducibly.
        backend: "auto", "torch", "cpu" (native kernels), "triton" or "cuda".

    Returns:
        y [..., N] in the compute dtype: autocast's if it is on, else that of x.

    Raises:
        ValueError: tensors on different devices, shapes that do not fit, dropout_p outside [0, 1],
        an
            unknown backend or one that cannot run this call.
        TypeError: weight and x of different dtypes outside autocast, or a dtype that is not
        floating.

    Under torch.func transforms (grad, vmap, jvp, …) the plain torch formula runs instead; outside
    them double backward and forward-mode differentiation are refused.
    """
    p = dropout_p if training else 0.0
    return call_layer(x, weight, lora_A, lora_B, bias, scaling, p, seed, backend)


def call_layer(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: int | Tensor | None,
    backend: str,
    packed: PackedWeight | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """lora_linear as modules call it: adapters may be None (a plain linear), the weight packed.

    keep [..., K], bool: the dropout mask, drawn by the caller with probability dropout_p. Not
    where calls are recorded or transformed.
    """
    if is_distributed(weight) or is_distributed(x):
        from lora_fused.distributed import call_sharded

        return call_sharded(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, backend)
    if torch._C._are_functorch_transforms_active() or is_traced():
        return _recorded(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, backend)
    mask, scale = None, scaling
    if keep is not None:
        keep = flatten(keep)
        scale = scaling / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
    elif dropout_p != 0.0 or seed is not None:
        checks.check_dropout(dropout_p, seed)
        if lora_A is not None and dropout_threshold(dropout_p) > 0:
            mask = make_mask(draw_seed(x.device) if seed is None else seed, dropout_p)
            scale = effective_scaling(scaling, dropout_p)
    if type(scale) is not float:
        checks.check_scaling(scaling)
    dropout = mask is not None or keep is not None
    if keep is None:
        route = route_for(x, weight, lora_A, lora_B, bias, dropout, backend, packed)
    else:
        params = (weight, lora_A, lora_B, bias)
        route = route_for(x, *params, dropout, backend, packed, given_mask=True)
    if x.dtype != route.compute:
        x = x.to(route.compute)
    if mask is not None and seed is None and route.config.backend == "torch":
        keep, mask = drawn_mask(route, mask, x.device), None
    call = Call(route, scale, mask, packed, keep)
    if route.needs:
        return LoRALinearFunction.apply(x, weight, lora_A, lora_B, bias, call)
    return lora_forward(call, x, weight, lora_A, lora_B, bias, wants_s=False)[0]


def _recorded(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: int | Tensor | None,
    backend: str,
) -> Tensor:
    """The call as torch can record it (an operator) or transform it (the plain formula)."""
    from lora_fused import ops

    functorch = torch._C._are_functorch_transforms_active()
    nothing_to_prepare = dropout_p == 0.0 and seed is None and x.dtype == weight.dtype
    if nothing_to_prepare and not functorch and torch.compiler.is_compiling():
        # Compiled code asks again at every call whatever is asked here; the operator checks too.
        checks.check_scaling(scaling)
        params = weight, lora_A, lora_B, bias
        y: Tensor = ops.LORA_LINEAR(x, *params, None, scaling, 0.0, backend)[0]
        return y
    checks.check_scaling(scaling)
    checks.check_dropout(dropout_p, seed)
    compute = checks.compute_dtype(x)
    checks.check_call(x, weight, lora_A, lora_B, bias, compute, checks.autocast_is_on(x))
    if x.dtype != compute:
        x = x.to(compute)
    if lora_A is None or dropout_threshold(dropout_p) == 0:
        seed = None
    elif seed is None:
        seed = draw_seed(x.device)
    if functorch:
        return _plain_formula(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed)
    operands = (x, weight, lora_A, lora_B, bias, seed_tensor(seed, x.device))
    y = ops.LORA_LINEAR(*operands, scaling, dropout_p, backend)[0]
    return y


def is_traced() -> bool:
    """Whether somebody records operations (torch.compile, export, jit.trace, a dispatch mode).

    They see a call only if it goes through an operator registered with torch.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def is_distributed(t: Tensor) -> bool:
    """Whether a tensor is a DTensor. Answered without importing torch.distributed for others."""
    if type(t) is Tensor or type(t) is torch.nn.Parameter:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(t, DTensor)


def draw_seed(device: torch.device) -> Tensor:
    """63 random bits from torch's default generator of the device, as a tensor that stays there."""
    return torch.randint(0x7FFFFFFFFFFFFFFF, (), dtype=torch.int64, device=device)


def draw_seeds(count: int) -> list[int]:
    """The seeds that so many calls of draw_seed for the CPU would draw, by one."""
    seeds: list[int] = torch.randint(0x7FFFFFFFFFFFFFFF, (count,), dtype=torch.int64).tolist()
    return seeds


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor | None:
    """The seed as operators take it; the 64 bits are kept, whatever their sign."""
    if seed is None or isinstance(seed, Tensor):
        return seed
    signed = seed - (1 << 64) if seed >= 1 << 63 else seed
    return torch.full((), signed, dtype=torch.int64, device=device)


def make_mask(seed: int | Tensor | None, dropout_p: float) -> Mask:
    """On the CPU the seed becomes a number; elsewhere it stays on its device, without a sync."""
    assert seed is not None
    if isinstance(seed, Tensor) and seed.device.type == "cpu":
        seed = int(seed.item())
    return Mask(seed, dropout_threshold(dropout_p))


def drawn_mask(route: Route, mask: Mask, device: torch.device) -> Tensor:
    """A mask of bytes [M, K] instead of one to regenerate, where none of our kernels run.

    To regenerate it with torch's operations would take longer than the whole layer. Only for a seed
    that nobody asked for: the bits are not those of reference.keep_mask.
    """
    keep = torch.empty(route.problem.M, route.problem.K, dtype=torch.bool, device=device)
    return keep.bernoulli_(1.0 - mask.threshold / 65536)


def _plain_formula(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: int | Tensor | None,
) -> Tensor:
    """The same maths in differentiable torch operations, which torch.func can transform."""
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if lora_A is None or lora_B is None:
        return torch.nn.functional.linear(x, weight, bias)
    keep, scale = None, scaling
    if seed is not None:
        K = weight.shape[1]
        keep = keep_mask(seed, x.numel() // max(K, 1), K, dropout_p, device=x.device)
        scale = effective_scaling(scaling, dropout_p)
    return lora_linear_ref(x, weight, lora_A.to(x.dtype), lora_B.to(x.dtype), scale, bias, keep)[0]
