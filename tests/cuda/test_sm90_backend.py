"""The Hopper matmul through lora_fused.backends.cuda: Python, launcher, tensor maps, kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_fused.backends import cuda, cuda_sm90
from lora_fused.backends.cuda_candidates import candidates
from lora_fused.config import Config, Mask, Member, Problem, Route, group_columns
from lora_fused.devices import DEVICES
from lora_fused.reference import keep_mask
from lora_fused.testing import assert_close_to_ref

from .emulated import EmulatedGpu
from .problems import Data, data, mask_of, strided

H100 = DEVICES["H100"]
SCALE = 1.5


def route(d: Data, block_n: int = 128, strategy: str = "s_first", **changes) -> Route:
    (M, K), (N, R) = d.x.shape, d.lora_B.shape
    problem = replace(Problem(M, K, N, R, d.x.dtype, "cuda", device=H100), **changes)
    tiles = cuda_sm90.tiles(block_n)
    config = Config("cuda", strategy, strategy, forward_tiles=tiles, dx_tiles=tiles)
    needs = frozenset({"x", "lora_A", "lora_B"})
    return Route(problem, config, d.x.dtype, False, needs, (M, K), (M, N), (d.x.dtype,) * 4)


def results(d: Data, dtype: torch.dtype, mask: Mask | None) -> dict[str, torch.Tensor]:
    """y, s, dx and ds in a precision."""
    x, w, a, b, bias, dy = (t.to(dtype) for t in d.all())
    keep = torch.ones((), dtype=dtype)
    if mask is not None:
        keep = keep_mask(mask.seed, *x.shape, mask.threshold / 65536).to(dtype)
    s, ds = SCALE * ((keep * x) @ a.T), SCALE * (dy @ b)
    return {"y": x @ w.T + s @ b.T + bias, "s": s, "dx": dy @ w + keep * (ds @ a), "ds": ds}


def check(d: Data, got: dict[str, torch.Tensor], mask: Mask | None = None) -> None:
    truth, baseline = results(d, torch.float64, mask), results(d, d.x.dtype, mask)
    for name, tensor in got.items():
        assert_close_to_ref(name, tensor, truth[name], baseline[name])


def run_both(d: Data, r: Route, mask: Mask | None = None, launches: int = 1) -> EmulatedGpu:
    with EmulatedGpu("sm_90a") as gpu:
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


@pytest.mark.parametrize(
    ("shape", "dtype", "block_n"),
    [
        ((130, 72, 136, 16), torch.bfloat16, 128),
        ((70, 136, 264, 5), torch.float16, 256),
        ((40, 72, 72, 140), torch.bfloat16, 128),
    ],
    ids=str,
)
def test_layer(shape: tuple[int, int, int, int], dtype: torch.dtype, block_n: int) -> None:
    d = data(*shape, dtype)
    gpu = run_both(d, route(d, block_n))
    cluster = "2,1,1" if shape[0] > 128 else None
    assert [launch.told.get("cluster") for launch in gpu.launches] == [cluster] * 2
    assert all(launch.block == (384, 1, 1) for launch in gpu.launches)
    assert all(launch.shared == cuda_sm90.shared_bytes(block_n) for launch in gpu.launches)


def test_dropout_and_a_second_call_on_the_same_workspace() -> None:
    d = data(40, 72, 136, 16, torch.bfloat16)
    run_both(d, route(d), mask_of(0.25), launches=2)


def test_split_takes_s_from_another_kernel() -> None:
    d = data(130, 72, 136, 24, torch.bfloat16)
    expected = results(d, torch.float64, None)
    s, ds = (expected[name].to(d.x.dtype) for name in ("s", "ds"))
    r = route(d, strategy="split")
    with EmulatedGpu("sm_90a") as gpu:
        gpu.see(*d.all(), s, ds)
        y = cuda.matmul(r, "forward", d.x, d.weight, s, d.lora_B, d.bias)
        dx = cuda.matmul(r, "dx", d.dy, d.weight, ds, d.lora_A)
    gpu.check()
    check(d, {"y": y, "dx": dx})


@pytest.mark.parametrize("layout", ["column", "padded", "offset", "strided"])
def test_any_strides_of_activations_and_adapters(layout: str) -> None:
    d = data(40, 72, 72, 16, torch.bfloat16)
    for name in ("x", "dy", "lora_A", "lora_B"):
        setattr(d, name, strided(getattr(d, name), layout))
    run_both(d, route(d))


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_group(p: float) -> None:
    layers = [data(70, 72, N, R, torch.bfloat16) for N, R in ((136, 16), (40, 16), (72, 16))]
    for layer in layers[1:]:
        layer.x = layers[0].x
    masks = [mask_of(p, 99 + i) if p else None for i in range(3)]
    check_group(layers, masks)


def test_group_of_different_ranks() -> None:
    layers = [data(40, 72, N, R, torch.float16) for N, R in ((72, 8), (136, 40))]
    layers[1].x = layers[0].x
    check_group(layers, [None, None])


def check_group(layers: list[Data], masks: list[Mask | None]) -> None:
    first, needs = layers[0], frozenset({"lora_A", "lora_B"})
    members = [
        Member(d.weight, d.lora_A, d.lora_B, d.bias, SCALE, m, needs, d.x.dtype, d.x.dtype)
        for d, m in zip(layers, masks, strict=True)
    ]
    ranks = [len(m.lora_A) for m in members]
    sizes = tuple((len(m.weight), rank) for m, rank in zip(members, ranks, strict=True))
    r = route(first, group=sizes)
    with EmulatedGpu("sm_90a") as gpu:
        gpu.see(*(t for d in layers for t in d.all()))
        ys, s = cuda.group_forward(r, first.x, members)
        dx, das, dbs = cuda.group_backward(r, [d.dy for d in layers], first.x, s, members)
    gpu.check()
    assert dx is not None
    sums = []
    for dtype in (torch.float64, first.x.dtype):
        each = [results(d, dtype, m) for d, m in zip(layers, masks, strict=True)]
        sums.append(torch.stack([one["dx"] for one in each]).sum(0))
    assert_close_to_ref("dx", dx, *sums)
    offsets, _ = group_columns(ranks)
    for d, m, y, first_column, rank in zip(layers, masks, ys, offsets, ranks, strict=True):
        check(d, {"y": y, "s": s[:, first_column : first_column + rank]}, m)
    assert all(da is not None and db is not None for da, db in zip(das, dbs, strict=True))


def test_refusals_are_sentences() -> None:
    d = data(40, 72, 72, 16, torch.bfloat16)
    with EmulatedGpu("sm_90a") as gpu:
        gpu.see(*d.all())
        with pytest.raises(ValueError, match="block_n: got 64, expected 128 or 256"):
            tiles = replace(cuda_sm90.tiles(128), block_n=64)
            layer = cuda_sm90.Layer(d.x, d.weight, None, d.lora_B, d.x[:, :16], d.dy)
            cuda_sm90._NARROW[64] = 64
            try:
                cuda_sm90.run(tiles, "forward", [layer])
            finally:
                del cuda_sm90._NARROW[64]
        with pytest.raises(ValueError, match="shrink_group: got 17, expected 1 to 16"):
            cuda_sm90.run(cuda_sm90.tiles(128, 17), "forward", [layer])


def test_candidates_name_their_limits() -> None:
    good = Problem(256, 128, 128, 16, torch.bfloat16, "cuda", device=H100)
    assert {c.strategy for c in cuda_sm90.candidates(good, H100, "forward")} == {"s_first", "split"}
    assert all(c in candidates(good, H100, "dx") for c in cuda_sm90.candidates(good, H100, "dx"))
    for bad in (
        replace(good, dtype=torch.float32),
        replace(good, weight_layout="column"),
        replace(good, K=130),
        replace(good, given_mask=True),
        replace(good, group=((64, 16),) * 4),
        replace(good, aligned=False),
        replace(good, device=replace(H100, capability=80)),
    ):
        assert cuda_sm90.reasons_against(bad)
        assert not cuda_sm90.candidates(bad, bad.device or H100, "forward")
    assert not cuda_sm90.reasons_against(replace(good, R=4, aligned=False))
