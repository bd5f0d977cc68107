"""Tensor parallelism on 2 and 4 gloo processes: every layout against one process, and the rules."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

from lora_fused import FusedLoRALinear, LoRAWeights, lora_linear, lora_linear_group
from lora_fused.distributed import ColwiseLoRA, RowwiseLoRA
from lora_fused.testing import Case, assert_close_to_ref, make_case
from tests.processes import JobFailed, World

R, S0, S1 = Replicate(), Shard(0), Shard(1)
# placements of x, weight, lora_A, lora_B, bias
PLACEMENTS: dict[str, tuple[Placement, ...]] = {
    "replicate": (R, R, R, R, R),
    "tokens": (S0, R, R, R, R),
    "sequence": (S1, R, R, R, R),
    "column": (R, S0, R, S0, S0),
    "row": (Shard(2), S1, S1, R, R),
    "column, nothing in place": (S1, S0, S0, S1, R),
    "row, nothing in place": (R, S1, R, S0, S0),
}
FOUR = list(enumerate(("x", "weight", "lora_A", "lora_B")))
NAMES = ("x", "weight", "lora_A", "lora_B", "bias")
CASES = 8
GRADIENTS = ("dx", "dweight", "da", "db", "dbias")


def mesh_of(*sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", sizes)


def plain_formula(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, bias: Tensor | None
) -> Tensor:
    linear = nn.functional.linear
    y: Tensor = linear(x, weight, bias) + scaling * linear(linear(x, lora_A), lora_B)
    return y


def distributed(
    case: Case, mesh: DeviceMesh, placements: list[tuple[Placement, ...]], run: Any
) -> dict[str, Tensor]:
    """y and all gradients of `run` on DTensors; placements: one tuple per mesh dimension."""
    values = {**vars(case), "x": case.x.view(2, -1, case.x.shape[1])}
    leaves: list[Any] = []
    for i, name in enumerate(NAMES):
        where = [per_dim[i] for per_dim in placements]
        t = values[name]
        leaves.append(None if t is None else distribute_tensor(t, mesh, where).requires_grad_())
    x, weight, lora_A, lora_B, bias = leaves
    y = run(x, weight, lora_A, lora_B, case.scaling, bias)
    dy = distribute_tensor(case.dy.view(y.shape), mesh, [R] * mesh.ndim)
    (y * dy).sum().backward()
    out = {"y": y.full_tensor().flatten(0, 1).detach()}
    for name, leaf in zip(GRADIENTS, leaves, strict=True):
        if leaf is not None:
            if run is lora_linear:
                assert leaf.grad.placements == leaf.placements, name
            out[name] = leaf.grad.full_tensor().view(-1, leaf.shape[-1]).squeeze(0)
    return out


def compare(
    sizes: tuple[int, ...], kinds: list[str], shape: tuple[int, ...], **options: Any
) -> None:
    """Ours on DTensors, and plain torch on the same DTensors, against one process in float64.

    Several cases are judged together: of one with so few elements a baseline is exact by luck.
    """
    mesh = mesh_of(*sizes)
    placements = [PLACEMENTS[kind] for kind in kinds]
    cases = [make_case(*shape, seed=seed, **options) for seed in range(CASES)]
    got, baseline = (
        [distributed(case, mesh, placements, run) for case in cases]
        for run in (lora_linear, plain_formula)
    )
    truth = [case.truth() for case in cases]
    assert len(got[0]) == (6 if cases[0].bias is not None else 5)
    for name in got[0]:
        tensors = (torch.stack([each[name] for each in some]) for some in (got, truth, baseline))
        ours, true, plain = (t.flatten(1) for t in tensors)
        assert_close_to_ref(name, ours, true, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", PLACEMENTS)
def test_every_layout_equals_one_process(
    world: World, kind: str, bias: bool, dtype: torch.dtype
) -> None:
    world.run(partial(compare, dtype=dtype, bias=bias), (2,), [kind], (12, 24, 20, 5))


@pytest.mark.parametrize("kind", ["column", "row", "sequence"])
@pytest.mark.parametrize("shape", [(14, 27, 22, 3), (6, 3, 2, 1), (4, 5, 7, 4)], ids=str)
def test_sizes_that_do_not_divide_by_the_ranks(
    world4: World, kind: str, shape: tuple[int, ...]
) -> None:
    world4.run(partial(compare, bias=True), (4,), [kind], shape)


@pytest.mark.parametrize("kind", ["column", "row"])
def test_transposed_weight(world: World, kind: str) -> None:
    world.run(partial(compare, fan_in_fan_out=True), (2,), [kind], (12, 24, 20, 5))


@pytest.mark.parametrize("kinds", [("tokens", "column"), ("sequence", "row"), ("row", "column")])
def test_two_mesh_dimensions(world4: World, kinds: tuple[str, str]) -> None:
    world4.run(partial(compare, bias=True), (2, 2), list(kinds), (12, 24, 20, 5))


def y_placements(kind: str) -> list[str]:
    case, mesh = make_case(12, 24, 20, 5), mesh_of(2)
    values = {**vars(case), "x": case.x.view(2, -1, 24)}
    tensors = [distribute_tensor(values[n], mesh, [PLACEMENTS[kind][i]]) for i, n in FOUR]
    ys = [
        lora_linear(*tensors, scaling=2.0),
        torch.ops.lora_fused.lora_linear(*tensors, None, None, 2.0, 0.0, "auto")[0],
        *lora_linear_group(tensors[0], [LoRAWeights(*tensors[1:], scaling=2.0)] * 2),
    ]
    for y in ys[1:]:
        torch.testing.assert_close(y.full_tensor(), ys[0].full_tensor())
    return [str(y.placements[0]) for y in ys]


@pytest.mark.parametrize(
    ("kind", "placement"), [("column", "S(2)"), ("row", "P(sum)"), ("sequence", "S(1)")]
)
def test_y_stays_where_it_was_computed(world: World, kind: str, placement: str) -> None:
    assert world.run(y_placements, kind) == [[placement] * 4] * 2


def collectives_of(kind: str) -> dict[str, int]:
    """The collectives of forward and backward of one call on operands in place."""
    from torch.distributed.tensor.debug import CommDebugMode

    case, mesh = make_case(12, 24, 20, 5), mesh_of(2)
    values = {**vars(case), "x": case.x.view(2, -1, 24)}
    tensors = [distribute_tensor(values[n], mesh, [PLACEMENTS[kind][i]]) for i, n in FOUR]
    tensors = [t.requires_grad_(i != 1) for i, t in enumerate(tensors)]
    with CommDebugMode() as mode:
        y = lora_linear(*tensors, scaling=2.0)
        y = y.redistribute(placements=[y.placements[0] if kind == "column" else R])
        y.backward(torch.ones_like(y))
    return {str(op).rsplit(".", 1)[-1]: n for op, n in mode.get_comm_counts().items()}


def test_only_the_collectives_that_the_layouts_need(world: World) -> None:
    # column: dx and dA are sums over the ranks. row: y and dB are.
    assert world.run(collectives_of, "column") == [{"all_reduce": 2}] * 2
    assert world.run(collectives_of, "row") == [{"all_reduce": 2}] * 2


def operator_gradients(kind: str) -> None:
    """The sharding rules: the registered operators on DTensors, forward and backward."""

    def run(x: Tensor, w: Tensor, a: Tensor, b: Tensor, scaling: float, bias: Any) -> Tensor:
        y: Tensor = torch.ops.lora_fused.lora_linear(x, w, a, b, bias, None, scaling, 0.0, "auto")[
            0
        ]
        return y

    case, mesh = make_case(12, 24, 20, 5, bias=True), mesh_of(2)
    got = distributed(case, mesh, [PLACEMENTS[kind]], run)
    baseline, truth = case.baseline(), case.truth()
    for name, tensor in got.items():
        expected = truth[name]
        assert_close_to_ref(name, tensor.view_as(expected), expected, baseline[name])


@pytest.mark.parametrize("kind", PLACEMENTS)
def test_sharding_rules_of_the_operators(world: World, kind: str) -> None:
    world.run(operator_gradients, kind)


def operator_dropout(kind: str) -> None:
    """A seed means the mask of one process, whatever the placements."""
    case, mesh = make_case(12, 24, 20, 5), mesh_of(2)
    values = {**vars(case), "x": case.x.view(2, -1, 24)}
    plain = [values[name] for _, name in FOUR]
    options = (None, torch.tensor(5), 2.0, 0.5, "auto")
    expected = torch.ops.lora_fused.lora_linear(*plain, *options)
    tensors = [distribute_tensor(t, mesh, [PLACEMENTS[kind][i]]) for i, t in enumerate(plain)]
    got = torch.ops.lora_fused.lora_linear(*tensors, *options)
    for tensor, want in zip(got, expected, strict=True):
        torch.testing.assert_close(tensor.full_tensor(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["tokens", "column", "row"])
def test_a_seed_means_one_mask_for_the_operator(world: World, kind: str) -> None:
    world.run(operator_dropout, kind)


def errors() -> None:
    case, mesh = make_case(12, 24, 20, 5), mesh_of(2)
    x, w, a, b = (distribute_tensor(vars(case)[n], mesh, [R]) for _, n in FOUR)
    with pytest.raises(TypeError, match="x is a plain Tensor, expected a DTensor"):
        lora_linear(case.x, w, a, b, 2.0)
    with pytest.raises(TypeError, match="weight is a plain Tensor, expected a DTensor"):
        lora_linear(x, case.weight, a, b, 2.0)
    with pytest.raises(ValueError, match="lora_B has shape"):
        lora_linear(x, w, a, b[:, :3], 2.0)
    other = distribute_tensor(case.lora_B, DeviceMesh("cpu", [1, 0]), [R])
    with pytest.raises(ValueError, match=r"expected .* the mesh of x"):
        lora_linear(x, w, a, other, 2.0)
    with pytest.raises(TypeError, match="ColwiseLoRA: the module is a Linear, expected a Fused"):
        parallelize_module(nn.Sequential(nn.Linear(4, 4)), mesh, {"0": ColwiseLoRA()})
    merged = FusedLoRALinear(4, 4, r=2)
    merged.merge()
    with pytest.raises(RuntimeError, match=r"RowwiseLoRA: the layer is merged; unmerge\(\) it"):
        parallelize_module(nn.Sequential(merged), mesh, {"0": RowwiseLoRA()})


def test_errors_are_sentences(world: World) -> None:
    world.run(errors)


def test_a_failing_job_is_reported() -> None:
    """The harness itself: without this, a test whose job never ran could pass."""
    world = World(1)
    with pytest.raises(JobFailed, match="ZeroDivisionError"):
        world.run(divmod, 1, 0)
    assert world.run(divmod, 7, 2) == [(3, 1)]
    world.stop()
