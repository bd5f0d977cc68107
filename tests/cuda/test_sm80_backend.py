"""The mma.sync matmul through lora_fused.backends.cuda: Python, launcher, kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_fused.backends import cuda, cuda_native, cuda_sm80
from lora_fused.config import Config, Mask, Member, Problem, Route, Tiles, group_columns
from lora_fused.devices import DEVICES
from lora_fused.reference import keep_mask
from lora_fused.testing import assert_close_to_ref

from .emulated import EmulatedGpu
from .problems import Data, data, mask_of, strided
from .sm80 import SHIPPED, tf32

A100 = DEVICES["A100"]
SCALE = 1.5


def small(dtype: torch.dtype) -> Tiles:
    problem = Problem(64, 64, 64, 16, dtype, "cuda", device=A100)
    found = cuda_sm80.candidates(problem, A100, "forward")
    return min((c.tiles for c in found), key=lambda t: t.block_m * t.block_n)


def route(d: Data, strategy: str = "s_first", **changes) -> Route:
    (M, K), (N, R) = d.x.shape, d.lora_B.shape
    problem = replace(Problem(M, K, N, R, d.x.dtype, "cuda", device=A100), **changes)
    tiles = small(d.x.dtype)
    config = Config("cuda", strategy, strategy, forward_tiles=tiles, dx_tiles=tiles)
    needs = frozenset({"x", "lora_A", "lora_B"})
    return Route(problem, config, d.x.dtype, False, needs, (M, K), (M, N), (d.x.dtype,) * 4)


def results(d: Data, dtype: torch.dtype, mask: Mask | None, round_inputs: bool = False) -> dict:
    """y, s, dx and ds in a precision."""
    x, w, a, b, bias, dy = (t.to(dtype) for t in d.all())
    if round_inputs:
        x, w, a, b, dy = (tf32(t) for t in (x, w, a, b, dy))
    keep = torch.ones((), dtype=dtype)
    if mask is not None:
        keep = keep_mask(mask.seed, *x.shape, mask.threshold / 65536).to(dtype)
    s, ds = SCALE * ((keep * x) @ a.T), SCALE * (dy @ b)
    return {"y": x @ w.T + s @ b.T + bias, "s": s, "dx": dy @ w + keep * (ds @ a), "ds": ds}


def check(d: Data, got: dict[str, torch.Tensor], mask: Mask | None = None) -> None:
    truth = results(d, torch.float64, mask)
    baseline = results(d, d.x.dtype, mask, d.x.dtype == torch.float32)
    for name, tensor in got.items():
        assert_close_to_ref(name, tensor, truth[name], baseline[name])


def run_both(d: Data, mask: Mask | None = None, launches: int = 1) -> EmulatedGpu:
    r = route(d)
    with EmulatedGpu() as gpu:
        gpu.see(*d.all())
        for _ in range(launches):
            y, s = cuda.shrink_matmul(
                r, "forward", d.x, d.weight, d.lora_A, d.lora_B, SCALE, d.bias, mask
            )
            dx, ds = cuda.shrink_matmul(
                r, "dx", d.dy, d.weight, d.lora_B, d.lora_A, SCALE, None, mask
            )
    gpu.check()
    check(d, {"y": y, "s": s, "dx": dx, "ds": ds}, mask)
    return gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_layer(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_native, "tf32_is_allowed", lambda: True)
    gpu = run_both(data(40, 72, 104, 20, dtype))
    kernels = [launch.kernel.rsplit("_", 2)[-2:] for launch in gpu.launches]
    assert kernels == [["k", "major"], ["mn", "major"]]
    names = {v.name: v for v in SHIPPED}
    for launch in gpu.launches:
        v = names[launch.kernel]
        assert launch.block == (v.threads, 1, 1) and launch.shared == v.shared_bytes


def test_dropout_and_a_second_call_on_the_same_workspace() -> None:
    run_both(data(40, 72, 136, 16, torch.bfloat16), mask_of(0.25), launches=2)


def test_a_rank_of_several_s_tiles() -> None:
    run_both(data(40, 72, 72, 140, torch.bfloat16))


@pytest.mark.parametrize("layout", ["column", "padded", "offset", "strided"])
def test_any_strides_take_the_kernel_that_reads_elements(layout: str) -> None:
    d = data(40, 72, 72, 16, torch.bfloat16)
    for name in ("x", "dy", "lora_A", "lora_B"):
        setattr(d, name, strided(getattr(d, name), layout))
    run_both(d)


def test_odd_sizes() -> None:
    gpu = run_both(data(37, 71, 101, 5, torch.bfloat16))
    assert all(launch.kernel.endswith("_any") for launch in gpu.launches)


def test_split_takes_s_from_another_kernel() -> None:
    d = data(40, 72, 136, 24, torch.bfloat16)
    expected = results(d, torch.float64, None)
    s, ds = (expected[name].to(d.x.dtype) for name in ("s", "ds"))
    r = route(d, strategy="split")
    with EmulatedGpu() as gpu:
        gpu.see(*d.all(), s, ds)
        y = cuda.matmul(r, "forward", d.x, d.weight, s, d.lora_B, d.bias)
        dx = cuda.matmul(r, "dx", d.dy, d.weight, ds, d.lora_A)
    gpu.check()
    check(d, {"y": y, "dx": dx})


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_group(p: float) -> None:
    """Forward one launch; dx a launch for each member, added up."""
    layers = [data(40, 72, N, R, torch.bfloat16) for N, R in ((136, 16), (40, 5), (72, 24))]
    for layer in layers[1:]:
        layer.x = layers[0].x
    masks = [mask_of(p, 99 + i) if p else None for i in range(3)]
    needs = frozenset[str]()
    members = [
        Member(d.weight, d.lora_A, d.lora_B, d.bias, SCALE, m, needs, d.x.dtype, d.x.dtype)
        for d, m in zip(layers, masks, strict=True)
    ]
    ranks = [len(m.lora_A) for m in members]
    sizes = tuple((len(m.weight), rank) for m, rank in zip(members, ranks, strict=True))
    r = route(layers[0], group=sizes)
    with EmulatedGpu() as gpu:
        gpu.see(*(t for d in layers for t in d.all()))
        ys, s = cuda.group_forward(r, layers[0].x, members)
        assert len(gpu.launches) == 1
        dx, _, _ = cuda.group_backward(r, [d.dy for d in layers], layers[0].x, s, members)
        assert len(gpu.launches) == 4
    gpu.check()
    assert dx is not None
    sums = []
    for dtype in (torch.float64, torch.bfloat16):
        each = [results(d, dtype, m)["dx"] for d, m in zip(layers, masks, strict=True)]
        sums.append(each[0] + each[1] + each[2])
    assert_close_to_ref("dx", dx, *sums)
    offsets, _ = group_columns(ranks)
    for d, m, y, at, rank in zip(layers, masks, ys, offsets, ranks, strict=True):
        check(d, {"y": y, "s": s[:, at : at + rank]}, m)


def test_candidates_are_the_instantiations() -> None:
    shipped = {
        (v.block_m, v.block_n, v.block_k, v.threads // 32, v.stages, v.element_bytes)
        for v in SHIPPED
        if v.layout != "any"
    }
    offered = {
        (t.block_m, t.block_n, t.block_k, t.num_warps, t.num_stages, dtype.itemsize)
        for dtype, tiles in cuda_sm80._TILES.items()
        for t in tiles
    }
    assert shipped == offered


def test_refusals_are_sentences() -> None:
    d = data(40, 72, 72, 16, torch.bfloat16)
    r = route(d)
    r = replace(r, config=replace(r.config, forward_tiles=Tiles(block_m=7, persistent=True)))
    with EmulatedGpu() as gpu, pytest.raises(ValueError, match="a tile of sm80"):
        gpu.see(*d.all())
        cuda.shrink_matmul(r, "forward", d.x, d.weight, d.lora_A, d.lora_B, SCALE)


def test_fp32_needs_torchs_leave_to_round() -> None:
    problem = Problem(64, 64, 64, 16, torch.float32, "cuda", device=A100)
    assert cuda_sm80.candidates(problem, A100, "forward") == []
    assert "which torch forbids" in cuda_sm80.reasons_against(problem)[0]


@pytest.mark.parametrize(
    ("capability", "offered"), [(80, True), (86, True), (90, False), (100, False)]
)
def test_offered_where_it_is_the_fast_path(capability: int, offered: bool) -> None:
    device = replace(A100, capability=capability)
    problem = Problem(64, 64, 64, 16, torch.bfloat16, "cuda", device=device)
    assert bool(cuda_sm80.candidates(problem, device, "forward")) == offered
    odd = replace(problem, K=71)
    assert cuda_sm80.candidates(odd, device, "dx") == []
