"""Several adapters with scales and dropout masks of their own: every output, on every path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_fused import lora_linear
from lora_fused.config import Config, Tiles
from lora_fused.dispatch import forcing
from lora_fused.functional import draw_seed
from lora_fused.reference import dropout_threshold, effective_scaling, keep_mask
from lora_fused.several import Adapter, call_several
from lora_fused.testing import Case, assert_close_to_ref, make_case
from tests import fake_backend
from tests.conftest import TORCH, Path
from tests.gpu_double import pretended_gpu

SEED = 11
RANKS, SCALINGS, PROBABILITIES = (4, 9, 1), (2.0, 0.5, 2.0), (0.3, 0.0, 0.6)


def layers(M: int, K: int, N: int, dtype: torch.dtype, **changes: Any) -> list[Case]:
    """One case per adapter; what they share (x, weight, bias, dy) is that of the first."""
    return [
        make_case(M, K, N, R, dtype, scaling=scaling, seed=i, **changes)
        for i, (R, scaling) in enumerate(zip(RANKS, SCALINGS, strict=True))
    ]


def own_masks(x: Tensor, ps: Sequence[float], by_torch: bool) -> list[Tensor | None]:
    """The masks of a call that follows torch.manual_seed(SEED): drawn by torch, or regenerated."""
    torch.manual_seed(SEED)
    if by_torch:
        keep = ((1 - dropout_threshold(p) / 65536, torch.empty(x.shape, dtype=torch.bool))
                for p in ps)  # fmt: skip
        return [mask.bernoulli_(share) if share < 1 else None for share, mask in keep]
    return [
        keep_mask(int(draw_seed(x.device)), *x.shape, p) if dropout_threshold(p) > 0 else None
        for p in ps
    ]


def leaves_of(cases: list[Case], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """x, weight, bias and the adapters as leaves that want gradients; in dtype, if given."""
    first = cases[0]
    found = {"x": first.x, "weight": first.weight}
    if first.bias is not None:
        found["bias"] = first.bias
    for i, case in enumerate(cases):
        found |= {f"a{i}": case.lora_A, f"b{i}": case.lora_B}
    if dtype is not None:
        found = {name: t.to(first.x.dtype).to(dtype) for name, t in found.items()}
    return {name: t.detach().clone().requires_grad_() for name, t in found.items()}


def by_definition(
    cases: list[Case], dtype: torch.dtype, ps: Sequence[float], masks: Sequence[Tensor | None]
) -> dict[str, Tensor]:
    """y and every gradient by autograd through the formula, in a dtype."""
    t = leaves_of(cases, dtype)
    y = t["x"] @ t["weight"].mT
    for i, (case, p, mask) in enumerate(zip(cases, ps, masks, strict=True)):
        dropped = t["x"] if mask is None else t["x"] * mask
        scale = effective_scaling(case.scaling, p)
        y = y + (scale * (dropped @ t[f"a{i}"].mT)) @ t[f"b{i}"].mT
    y = y + t["bias"] if "bias" in t else y
    y.backward(cases[0].dy.to(dtype))
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in t.items()}}  # type: ignore[dict-item]


def ours(
    cases: list[Case], ps: Sequence[float], masks: Sequence[Tensor | None] | None, backend: str
) -> dict[str, Tensor]:
    """The same by call_several, with its own masks or given ones."""
    t = leaves_of(cases)
    adapters = [
        Adapter(t[f"a{i}"], t[f"b{i}"], case.scaling, p, None if masks is None else masks[i])
        for i, (case, p) in enumerate(zip(cases, ps, strict=True))
    ]
    torch.manual_seed(SEED)
    y = call_several(t["x"], t["weight"], t.get("bias"), adapters, backend)
    y.backward(cases[0].dy)
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in t.items()}}  # type: ignore[dict-item]


def check(cases: list[Case], ps: Sequence[float] = PROBABILITIES, backend: str = "auto") -> None:
    masks = own_masks(cases[0].x, ps, backend == "torch")
    truth = by_definition(cases, torch.float64, ps, masks)
    baseline = by_definition(cases, cases[0].x.dtype, ps, masks)
    got = ours(cases, ps, None, backend)
    assert got.keys() == truth.keys()
    for name, tensor in got.items():
        assert_close_to_ref(name, tensor, truth[name], baseline[name])


@pytest.mark.parametrize("M", [1, 7, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_output(path: Path, M: int, dtype: torch.dtype) -> None:
    check(layers(M, 72, 56, dtype, bias=True), backend=path.backend)


@pytest.mark.parametrize("ps", [(0.5, 0.5, 0.5), (0.0, 0.2, 0.0), (1.0, 0.4, 1e-6)], ids=str)
def test_probabilities(main_path: Path, ps: tuple[float, ...]) -> None:
    check(layers(30, 72, 56, torch.float32), ps, main_path.backend)


def test_weight_stored_the_other_way_round(main_path: Path) -> None:
    check(layers(30, 72, 56, torch.bfloat16, fan_in_fan_out=True), backend=main_path.backend)


def test_wide_adapters(main_path: Path) -> None:
    cases = layers(30, 72, 56, torch.bfloat16, adapter_dtype=torch.float32)
    check(cases, backend=main_path.backend)
    got = ours(cases, PROBABILITIES, None, main_path.backend)
    assert {name: t.dtype for name, t in got.items()} == {
        **dict.fromkeys(("y", "x", "weight"), torch.bfloat16),
        **dict.fromkeys(("a0", "b0", "a1", "b1", "a2", "b2"), torch.float32),
    }


def test_given_masks(main_path: Path) -> None:
    cases, ps = layers(30, 72, 56, torch.float32, bias=True), (0.25, 0.0, 0.5)
    masks = [torch.rand(30, 72) >= p if p > 0 else None for p in ps]
    got = ours(cases, ps, masks, main_path.backend)
    truth = by_definition(cases, torch.float64, ps, masks)
    baseline = by_definition(cases, torch.float32, ps, masks)
    for name, tensor in got.items():
        assert_close_to_ref(name, tensor, truth[name], baseline[name])


@pytest.mark.parametrize("needed", ["x", "weight", "a1", "b1", "none"])
def test_only_what_is_asked_for(main_path: Path, needed: str) -> None:
    cases = layers(7, 72, 56, torch.float32)
    t = leaves_of(cases)
    expected = ours(cases, PROBABILITIES, None, main_path.backend)
    for name, leaf in t.items():
        leaf.requires_grad_(name == needed)
    torch.manual_seed(SEED)
    adapters = [
        Adapter(t[f"a{i}"], t[f"b{i}"], case.scaling, p)
        for i, (case, p) in enumerate(zip(cases, PROBABILITIES, strict=True))
    ]
    y = call_several(t["x"], t["weight"], None, adapters, main_path.backend)
    torch.testing.assert_close(y, expected["y"])
    assert y.requires_grad == (needed != "none")
    if y.requires_grad:
        y.backward(cases[0].dy)
        assert [name for name, leaf in t.items() if leaf.grad is not None] == [needed]
        torch.testing.assert_close(t[needed].grad, expected[needed])


def test_kernels_keep_no_mask(main_path: Path) -> None:
    cases = layers(64, 512, 56, torch.float32)
    x = cases[0].x.requires_grad_()
    adapters = [Adapter(c.lora_A, c.lora_B, c.scaling, 0.5) for c in cases]
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        weight = cases[0].weight.requires_grad_()
        y = call_several(x, weight, None, adapters, main_path.backend)
    assert sum(t.shape == x.shape for t in saved) == 1
    kept = [call.keep is not None for call in y.grad_fn.calls]  # type: ignore[union-attr]
    assert kept == [main_path == TORCH] * 3


def test_twice_backward_and_none_in_double() -> None:
    cases = layers(7, 72, 56, torch.float32)
    x = cases[0].x.requires_grad_()
    adapters = [Adapter(c.lora_A, c.lora_B, c.scaling, 0.5) for c in cases]
    y = call_several(x, cases[0].weight, None, adapters, "auto")
    (first,) = torch.autograd.grad(y, x, cases[0].dy, retain_graph=True)
    (again,) = torch.autograd.grad(y, x, cases[0].dy, retain_graph=True)
    assert torch.equal(first, again)
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(y, x, cases[0].dy, create_graph=True)


def test_autocast(main_path: Path) -> None:
    cases = layers(30, 72, 56, torch.float32, bias=True)
    low = layers(30, 72, 56, torch.bfloat16, bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        t = leaves_of(cases)
        adapters = [
            Adapter(t[f"a{i}"], t[f"b{i}"], case.scaling, p)
            for i, (case, p) in enumerate(zip(cases, PROBABILITIES, strict=True))
        ]
        torch.manual_seed(SEED)
        y = call_several(t["x"], t["weight"], t["bias"], adapters, main_path.backend)
    assert y.dtype == torch.bfloat16
    y.backward(low[0].dy)
    masks = own_masks(cases[0].x, PROBABILITIES, main_path == TORCH)
    truth = by_definition(low, torch.float64, PROBABILITIES, masks)
    baseline = by_definition(low, torch.bfloat16, PROBABILITIES, masks)
    assert_close_to_ref("y", y, truth["y"], baseline["y"])
    for name, leaf in t.items():
        assert leaf.grad is not None and leaf.grad.dtype == torch.float32
        assert_close_to_ref(name, leaf.grad, truth[name], baseline[name])


def test_equal_to_one_adapter_where_nothing_is_dropped() -> None:
    cases = layers(30, 72, 56, torch.float64)
    x, weight = cases[0].x, cases[0].weight
    adapters = [Adapter(c.lora_A, c.lora_B, c.scaling) for c in cases]
    y = call_several(x, weight, None, adapters, "auto")
    expected = x @ weight.T
    for c in cases:
        expected = expected + lora_linear(
            x, torch.zeros_like(weight), c.lora_A, c.lora_B, c.scaling
        )
    torch.testing.assert_close(y, expected)


def test_on_a_gpu_the_masks_are_bytes() -> None:
    """The kernels of one launch are not asked, and each mask is drawn on the device."""
    tiles = Tiles(128, 256, 64, num_warps=8, num_stages=3)
    split = Config("triton", "split", "split", forward_tiles=tiles, dx_tiles=tiles,
                   shrink_tiles=tiles)  # fmt: skip
    cases = layers(30, 72, 56, torch.float32, bias=True)
    with pretended_gpu(), forcing(split):
        got = ours(cases, PROBABILITIES, None, "auto")
        assert fake_backend.calls.count("matmul forward") == 1
    masks = own_masks(cases[0].x, PROBABILITIES, by_torch=True)
    truth = by_definition(cases, torch.float64, PROBABILITIES, masks)
    baseline = by_definition(cases, torch.float32, PROBABILITIES, masks)
    for name, tensor in got.items():
        assert_close_to_ref(name, tensor, truth[name], baseline[name])


def test_recorded_by_torch_compile() -> None:
    torch._dynamo.reset()
    cases = layers(30, 72, 56, torch.float32)
    adapters = [Adapter(c.lora_A, c.lora_B, c.scaling, p)
                for c, p in zip(cases, (0.0, 0.5, 1.0), strict=True)]  # fmt: skip

    def call(x: Tensor) -> Tensor:
        return call_several(x, cases[0].weight, None, adapters, "auto")

    x = cases[0].x
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(x), compiled(x))
    mean = sum(compiled(x) for _ in range(800)) / 800
    without = [a._replace(dropout_p=0.0) for a in adapters[:2]]
    expected = call_several(x, cases[0].weight, None, without, "auto")
    spread = (compiled(x) - expected).abs().max()
    assert (mean - expected).abs().max() < 0.2 * spread
