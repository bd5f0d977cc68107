"""Every kernel in the interpreter: the algorithm, index arithmetic and masks, in all dtypes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_fused.backends import triton
from lora_fused.backends.triton.candidates import default_tiles, rank_block
from lora_fused.config import Mask, Tiles
from lora_fused.reference import dropout_threshold, keep_mask
from lora_fused.testing import make_case
from tests.triton.operations import check_operations, problem_of, route_of, run_operations, spread

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(40, 56, 72, 5), (33, 64, 31, 16), (1, 100, 70, 48), (70, 48, 33, 100), (17, 16, 48, 1)]
SMALL = Tiles(32, 32, 32, num_warps=4, num_stages=3)
SKINNY = Tiles(16, 32, 64, num_warps=4, num_stages=3)


def names(value: object) -> str:
    return str(value).removeprefix("torch.").replace(", ", "x").strip("()")


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=names)
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_split(dtype: torch.dtype, shape: tuple[int, ...], dropout_p: float) -> None:
    case = make_case(*shape, dtype, bias=True, dropout_p=dropout_p)
    check_operations(case, route_of(case))


@pytest.mark.parametrize("shape", SHAPES, ids=names)
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_one_pass(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    case = make_case(*shape, dtype, bias=True)
    block_r = max(16, 1 << (shape[3] - 1).bit_length())
    tiles = [replace(base, block_r=block_r) for base in (SMALL, SKINNY)]
    check_operations(case, route_of(case, "one_pass", forward=tiles[0], dx=tiles[1]))


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_descriptors(persistent: bool, dropout_p: float, fan_in_fan_out: bool) -> None:
    case = make_case(
        70, 104, 48, 24, torch.bfloat16,
        bias=True, dropout_p=dropout_p, fan_in_fan_out=fan_in_fan_out,
    )  # fmt: skip
    tiles = replace(SMALL, descriptors=True, persistent=persistent)
    check_operations(case, route_of(case, forward=tiles, dx=tiles))


def test_descriptors_give_way_where_tma_cannot_reach() -> None:
    """Rows of 33 elements do not begin at multiples of 16 bytes."""
    case = make_case(20, 33, 17, 4, torch.bfloat16)
    tiles = replace(SMALL, descriptors=True, persistent=True)
    check_operations(case, route_of(case, forward=tiles, dx=tiles))


@pytest.mark.parametrize("strategy", ["split", "one_pass"])
def test_any_strides(strategy: str) -> None:
    case = spread(make_case(35, 40, 50, 8, torch.bfloat16, bias=True))
    tiles = replace(SMALL, block_r=16)
    check_operations(case, route_of(case, strategy, forward=tiles, dx=tiles))


def test_transposed_activations_and_weight() -> None:
    case = make_case(35, 40, 50, 8, torch.float16, fan_in_fan_out=True)
    case = replace(case, x=case.x.t().contiguous().t(), dy=case.dy.t().contiguous().t())
    check_operations(case, route_of(case))


def test_offsets_beyond_32_bits() -> None:
    """Rows of x and dy 2**27 elements apart: the last lies beyond 2**31 elements."""
    case = make_case(20, 40, 50, 8, torch.bfloat16)
    apart = 1 << 27
    memory = torch.empty(19 * apart + 128, dtype=torch.bfloat16)  # only what is written gets pages
    x, dy = memory.as_strided((20, 40), (apart, 1)), memory.as_strided((20, 50), (apart, 1), 64)
    x.copy_(case.x)
    dy.copy_(case.dy)
    case = replace(case, x=x, dy=dy)
    check_operations(case, route_of(case))


def test_expanded_gradient() -> None:
    """dy of y.sum() has strides of zero."""
    case = make_case(35, 40, 50, 8, torch.float32)
    case = replace(case, dy=torch.ones(1, 1).expand(35, 50))
    check_operations(case, route_of(case))


@pytest.mark.parametrize("strategy", ["split", "one_pass"])
def test_fp32_adapters_over_bf16(strategy: str) -> None:
    case = make_case(35, 40, 50, 8, torch.bfloat16, adapter_dtype=torch.float32, bias=True)
    tiles = replace(SMALL, block_r=16)
    check_operations(case, route_of(case, strategy, forward=tiles, dx=tiles))


@pytest.mark.parametrize("splits", [1, 2, 7])
def test_split_contractions_add_up_and_repeat(splits: int) -> None:
    """However the contraction is split; twice the same bits."""
    case = make_case(70, 66, 40, 20, torch.bfloat16, dropout_p=0.2)
    problem = problem_of(case)
    tiles = {
        name: replace(default_tiles(problem, name), splits=splits) for name in ("shrink", "reduce")
    }
    route = route_of(case, **tiles)
    check_operations(case, route)
    first, again = run_operations(case, route), run_operations(case, route)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("R", [1, 8, 24, 48, 64, 130, 384, 512])
def test_every_rank(R: int) -> None:
    case = make_case(20, 32, 48, R, torch.bfloat16)
    check_operations(case, route_of(case))


def test_rank_zero() -> None:
    case = make_case(20, 32, 48, 1, torch.float32, bias=True)
    y = triton.matmul(route_of(case), "forward", case.x, case.weight, None, None, case.bias)
    torch.testing.assert_close(y, case.x @ case.weight.T + case.bias)


def test_no_tokens() -> None:
    case = make_case(0, 32, 48, 4, torch.bfloat16, bias=True)
    outputs = run_operations(case, route_of(case))
    assert outputs["y"].shape == (0, 48) and outputs["dx"].shape == (0, 32)
    assert not outputs["da"].any() and not outputs["db"].any()


@pytest.mark.parametrize("seed", [0, 77, (1 << 63) + 5, (1 << 64) - 1])
@pytest.mark.parametrize(("rows", "cols"), [(7, 40), (40, 41), (3, 8), (5, 3)])
def test_masks_are_the_cpus(seed: int, rows: int, cols: int) -> None:
    """x = 1, a = one-hot rows: s shows the mask of forward, da and dx show theirs."""
    case = make_case(rows, cols, 9, cols, torch.float32, dropout_p=0.4)
    eye = torch.eye(cols)
    case = replace(case, x=torch.ones(rows, cols), lora_A=eye, seed=seed)
    route, mask = route_of(case), Mask(seed, dropout_threshold(0.4))
    keep = keep_mask(seed, rows, cols, 0.4)
    assert torch.equal(triton.shrink(route, case.x, eye, 1.0, mask), keep.float())
    ones = torch.ones(rows, cols)
    dy, w = torch.zeros(rows, 9), case.weight
    dx = triton.matmul(route, "dx", dy, w, ones, eye, mask=mask)
    assert torch.equal(dx, keep.float())
    da = triton.reduce(route, torch.eye(rows), case.x, mask, torch.float32)
    assert torch.equal(da, keep.float())


def test_mask_of_a_seed_on_the_device_and_far_rows() -> None:
    """A tensor seed; everything dropped; counters beyond 32 bits are in the emulator's tests."""
    case = make_case(20, 32, 48, 4, torch.float32)
    seed = torch.tensor(123456789012345)
    got = triton.shrink(route_of(case), case.x, case.lora_A, 1.0, Mask(seed, 65536))
    assert not got.any()
    want = triton.shrink(route_of(case), case.x, case.lora_A, 1.0, Mask(123456789012345, 9000))
    assert torch.equal(
        triton.shrink(route_of(case), case.x, case.lora_A, 1.0, Mask(seed, 9000)), want
    )


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_library_gemm_with_our_rank_term(dropout_p: float) -> None:
    """`library`: torch's GEMM, and where a mask is to be regenerated only our rank-R term."""
    case = make_case(35, 40, 50, 8, torch.bfloat16, bias=True, dropout_p=dropout_p)
    check_operations(case, route_of(case, "library"))


def test_accumulation_into_a_given_buffer() -> None:
    case = make_case(35, 40, 50, 8, torch.float32)
    route = route_of(case)
    ds, start = torch.randn(35, 8), torch.randn(35, 40)
    got = triton.matmul(route, "dx", case.dy, case.weight, ds, case.lora_A, out=start.clone())
    torch.testing.assert_close(got, start + case.dy @ case.weight + ds @ case.lora_A)


def test_one_gradient_alone() -> None:
    case = make_case(35, 40, 50, 8, torch.bfloat16)
    route, outputs = route_of(case), run_operations(case, route_of(case))
    ds = triton.shrink(route, case.dy, case.lora_B.t(), case.scaling)
    assert torch.equal(triton.reduce(route, ds, case.x, None, torch.bfloat16), outputs["da"])
    _, db = triton.shrink_reduce(route, case.dy, None, 1.0, outputs["s"], False, torch.bfloat16)
    assert db is not None and torch.equal(db, outputs["db"])
    assert triton.reduce_pair(route, None, None, None, None, None, None, None) == (None, None)


def test_columns_of_a_stacked_s() -> None:
    """A member of a group reads its columns of the stacked s."""
    case = make_case(35, 40, 50, 8, torch.bfloat16)
    stacked = torch.randn(35, 24).bfloat16()
    route, part = route_of(case), stacked[:, 8:16]
    strided = triton.matmul(route, "forward", case.x, case.weight, part, case.lora_B)
    dense = triton.matmul(route, "forward", case.x, case.weight, part.contiguous(), case.lora_B)
    assert torch.equal(strided, dense)


def test_rank_blocks() -> None:
    assert [rank_block(R) for R in (1, 16, 17, 48, 64, 512)] == [16, 16, 32, 64, 64, 64]
