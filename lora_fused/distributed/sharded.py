"""One LoRA linear call on DTensors: bring the operands into place, compute locally."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate

from lora_fused.distributed.rules import Layout, from_the_front, layout_of
from lora_fused.reference import dropout_threshold

# 2^64 / golden ratio; odd, so that different slices have different seeds.
_SEED_STEP = 0x9E3779B97F4A7C15
_checked_meshes: set[Any] = set()


def call_sharded(
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
    """lora_fused.functional.call_layer for DTensors; y is a DTensor.

    The placement of the weight decides (see lora_fused.distributed.rules): the other operands are
    redistributed where they lie differently, and y stays where it was computed: split along
    out_features, Partial, or as x. Gradients come back in the placements of their parameters.

    Dropout: ranks with the same x must drop the same elements, so their generators must be in the
    same state (checked once per mesh); where x is split, each rank draws its own mask.

    Raises TypeError for a plain tensor among DTensors, ValueError for another mesh than x's, and
    RuntimeError for generators that differ.
    """
    operands = (x, weight, lora_A, lora_B, bias)
    mesh = _common_mesh(operands)
    assert isinstance(x, DTensor) and isinstance(weight, DTensor)
    layouts = [
        layout_of(xp, wp, x.dim()) for xp, wp in zip(x.placements, weight.placements, strict=True)
    ]
    if lora_A is not None and dropout_threshold(dropout_p) > 0:
        seed = _seed_of_this_rank(seed, layouts, mesh, x.device)
    local = [_local(operand, i, layouts, x.dim()) for i, operand in enumerate(operands)]
    y = _call_locally(local, scaling, dropout_p, seed, backend)
    shape = torch.Size((*x.shape[:-1], weight.shape[0]))
    return DTensor.from_local(
        y, mesh, _placements([layout.y for layout in layouts], x.dim()), run_check=False,
        shape=shape, stride=_contiguous_strides(shape),
    )  # fmt: skip


def _call_locally(
    local: list[Tensor | None], scaling: float, dropout_p: float, seed: Any, backend: str
) -> Tensor:
    from lora_fused.functional import call_layer

    x, weight, lora_A, lora_B, bias = local
    assert x is not None and weight is not None
    return call_layer(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, backend)


def _common_mesh(operands: Sequence[Tensor | None]) -> DeviceMesh:
    names = ("x", "weight", "lora_A", "lora_B", "bias")
    mesh: DeviceMesh | None = None
    for name, tensor in zip(names, operands, strict=True):
        if tensor is None:
            continue
        if not isinstance(tensor, DTensor):
            raise TypeError(
                f"lora_linear: {name} is a plain {type(tensor).__name__}, expected a DTensor as "
                "the other operands are (ColwiseLoRA and RowwiseLoRA convert the input)."
            )
        mesh = tensor.device_mesh if mesh is None else mesh
        if tensor.device_mesh != mesh:
            raise ValueError(
                f"lora_linear: {name} is on {tensor.device_mesh}, expected {mesh}, the mesh of x."
            )
    assert mesh is not None
    return mesh


def _local(operand: Tensor | None, i: int, layouts: list[Layout], dims: int) -> Tensor | None:
    """This rank's part of operand i of the five, in its layout; autograd comes back the same way.

    The gradient of a replicated operand may be Partial: redistribute's backward sums it.
    """
    if operand is None:
        return None
    assert isinstance(operand, DTensor)
    placements = [layout.operands[i] for layout in layouts]
    once = [mesh_dim for mesh_dim, p in enumerate(placements) if p.is_partial()]
    wanted = _placements([Replicate() if p.is_partial() else p for p in placements], dims)
    gradient = _placements([layout.gradients[i] for layout in layouts], dims)
    local = operand.redistribute(placements=wanted).to_local(grad_placements=gradient)
    if isinstance(local, AsyncCollectiveTensor):
        local = local.wait()
    if any(operand.device_mesh.get_local_rank(mesh_dim) > 0 for mesh_dim in once):
        local = _AddedElsewhere.apply(local)
    return local


class _AddedElsewhere(torch.autograd.Function):
    """Zeros in place of a bias that another rank adds; the gradient is that of the bias."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor) -> Tensor:
        return torch.zeros_like(bias)

    @staticmethod
    def backward(ctx: Any, dbias: Tensor) -> Tensor:
        return dbias


def _placements(per_mesh_dim: Sequence[Placement], dims: int) -> list[Placement]:
    return [from_the_front(placement, dims) for placement in per_mesh_dim]


def _contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step = step * max(size, 1)
    return tuple(reversed(strides))


def _seed_of_this_rank(
    seed: int | Tensor | None, layouts: list[Layout], mesh: DeviceMesh, device: torch.device
) -> Tensor:
    """One seed for all ranks that hold the same slice of x, another for every other slice."""
    from lora_fused.functional import draw_seed, seed_tensor

    if isinstance(seed, DTensor):
        seed = seed.to_local()
    if seed is None:
        seed = draw_seed(device)
        _check_generators(seed, layouts, mesh)
    slice_index = 0
    for mesh_dim, layout in enumerate(layouts):
        if not layout.x.is_replicate():
            slice_index = slice_index * mesh.size(mesh_dim) + mesh.get_local_rank(mesh_dim)
    tensor = seed_tensor(seed, device)
    assert tensor is not None
    # NOTE: int64 arithmetic wraps around, as seeds should.
    offset = (slice_index * _SEED_STEP + (1 << 63)) % (1 << 64) - (1 << 63)
    return tensor + offset


def _check_generators(seed: Tensor, layouts: list[Layout], mesh: DeviceMesh) -> None:
    """Once per mesh: ranks with the same x must have drawn the same seed."""
    if torch.compiler.is_compiling() or type(seed) is not Tensor:  # a fake seed has no value
        return
    for mesh_dim, layout in enumerate(layouts):
        key = (mesh, mesh_dim)
        if not layout.x.is_replicate() or key in _checked_meshes:
            continue
        extremes = torch.stack([seed, -seed])
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=mesh.get_group(mesh_dim))
        if int(extremes.sum()) != 0:
            raise RuntimeError(
                "lora_linear: ranks that hold the same x drew different dropout seeds; expected "
                "equal generators: call torch.manual_seed with one number on all ranks of the "
                "tensor-parallel mesh."
            )
        _checked_meshes.add(key)
