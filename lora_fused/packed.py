"""PackedParameter: a frozen weight, packed for the native kernels, that is never served stale.

Why a class. A pack is a copy, so it is right only as long as nobody writes the original. No cheap
check finds every write: `p.data.add_(1)`, a numpy or DLPack alias, and a write through an older
alias all leave `p._version` as it was, and a hash of the whole weight reads the whole weight,
which is what a small-batch call costs altogether. So the original is made unreachable instead:

* `pack_parameter(p)` copies the values into private memory, which nobody else has ever had a
  pointer to, packs that, and lets p stand for it: same object (optimizers and tied modules keep
  holding it), same shape, dtype, device and requires_grad, no data. Older aliases of the memory
  keep that old memory and are cut off, as they are by `module.to(device)`.
* The first operation that could read or write the values, or hand out an alias of them (`p.data`,
  `p.copy_()`, `p.detach()`, `p.numpy()`, `state_dict()`, an optimizer's step, …) ends the pack
  first: p gets a copy of the private values, becomes an ordinary Parameter again, and the
  operation runs on that. Only metadata is answered while packed; what is not known to be metadata
  ends the pack.
* Code that goes around Python's operators (C++ extensions given p) finds a broadcast NaN, which
  torch refuses to write in place: a loud error, never old values.

The private copy outlives the pack only in autograd graphs that were recorded with it, whose
backward therefore uses the values of their forward.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lora_fused.backends import cpu
from lora_fused.backends.cpu import PackedWeight
from lora_fused.config import Problem

_METADATA_ATTRIBUTES = (
    *("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "_version"),
    *("requires_grad", "grad", "grad_fn", "is_leaf", "_backward_hooks"),
    *("is_cpu", "is_cuda", "is_mps", "is_xpu", "is_meta"),
    *("is_sparse", "is_quantized", "is_mkldnn"),
)
_METADATA_METHODS = (
    *("size", "dim", "ndimension", "numel", "nelement", "element_size", "get_device"),
    *("is_floating_point", "is_complex", "is_signed", "__len__", "__hash__"),
)
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in _METADATA_ATTRIBUTES),
    *(getattr(Tensor, name) for name in _METADATA_METHODS),
    torch.numel,
    torch.is_floating_point,
    torch.is_complex,
}


class _Packed(NamedTuple):
    values: Tensor
    pack: PackedWeight


class PackedParameter(nn.Parameter):
    """A Parameter in the packed state. Made by pack_parameter only."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func not in _METADATA:
            for leaf in tree_leaves((args, kwargs)):
                if type(leaf) is PackedParameter:
                    unpack_parameter(leaf)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        copy = memo[id(self)] = nn.Parameter(read(self)[0].clone(), requires_grad=False)
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(read(self)[0], requires_grad=False).__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        return f"PackedParameter(shape={list(self.shape)}, dtype={self.dtype})"


def pack_parameter(p: nn.Parameter, fan_in_fan_out: bool) -> None:
    """Pack p ([N, K], or [K, N] if fan_in_fan_out) for both directions; nothing if it is packed.

    Memory while packed: the private copy and two packs, three times the weight; during the call
    once more. Raises RuntimeError if p is trainable; warns and does nothing where native code
    cannot run.
    """
    if type(p) is PackedParameter:
        return
    if p.requires_grad:
        raise RuntimeError("prepack: the weight is trainable, expected a frozen one.")
    reasons = not_packable_reasons(p)
    if reasons:
        warnings.warn(f"prepack: left as it is: {'; '.join(reasons)}.", stacklevel=3)
        return
    with torch.inference_mode(False), torch.no_grad():
        values = p.detach().clone(memory_format=torch.contiguous_format)
        pack = cpu.pack(values.t() if fan_in_fan_out else values, torch.get_num_threads())
        p.data = torch.full((1, 1), float("nan"), dtype=p.dtype).expand(p.shape)
    p._packed = _Packed(values, pack)  # type: ignore[attr-defined]
    p.__class__ = PackedParameter


def not_packable_reasons(p: nn.Parameter) -> list[str]:
    """Why a Parameter cannot be packed, in words; empty if it can."""
    reasons = []
    if type(p) is not nn.Parameter:
        reasons.append(f"the weight is a {type(p).__name__}, expected an ordinary Parameter")
    problem = Problem(1, p.shape[1], p.shape[0], 0, p.dtype, p.device.type)
    return reasons + cpu.not_supported_reasons(problem)


def unpack_parameter(p: nn.Parameter) -> None:
    """Make p an ordinary Parameter again, with a copy of the values; nothing if it is one."""
    packed = p.__dict__.pop("_packed", None)
    if packed is None:
        return
    p.__class__ = nn.Parameter
    with torch.inference_mode(False), torch.no_grad():
        p.data = packed.values.clone()


def read(p: Tensor) -> tuple[Tensor, PackedWeight | None]:
    """The values to compute with (private if packed: not to write or hand out) and the pack."""
    packed = p.__dict__.get("_packed") if type(p) is PackedParameter else None
    return (p, None) if packed is None else packed
