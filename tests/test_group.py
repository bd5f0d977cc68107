"""lora_linear_group equals its members one by one, and reads x once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_fused import FusedLoRALinear, LoRAWeights, lora_linear_group
from lora_fused.backends import BACKENDS
from lora_fused.reference import effective_scaling, keep_mask, lora_linear_ref
from lora_fused.testing import assert_close_to_ref
from tests.conftest import Path

SIZES = ((48, 4), (24, 8), (24, 2))  # N, R of q, k, v
K = 64


def members(
    dtype: torch.dtype, dropout_p: float = 0.0, seeds: tuple[int | None, ...] = (1, 2, 3),
    scalings: tuple[float, ...] = (2.0, 2.0, 2.0), adapter_dtype: torch.dtype | None = None,
) -> list[LoRAWeights]:  # fmt: skip
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g) * scale

    return [
        LoRAWeights(
            normal(N, K, scale=K**-0.5).to(dtype),
            normal(R, K, scale=K**-0.5).to(adapter_dtype or dtype),
            normal(N, R, scale=R**-0.5).to(adapter_dtype or dtype),
            scaling,
            normal(N).to(dtype) if i != 1 else None,
            dropout_p,
            seed,
        )
        for i, ((N, R), seed, scaling) in enumerate(zip(SIZES, seeds, scalings, strict=True))
    ]


def outputs(
    x: Tensor, group: list[LoRAWeights], dys: list[Tensor], run: object
) -> dict[str, Tensor]:
    """y of every member and every gradient, with `run(x, group)` making the ys."""
    leaves = {"x": x.detach().clone().requires_grad_()}
    for i, m in enumerate(group):
        for name in ("weight", "lora_A", "lora_B", "bias"):
            t = getattr(m, name)
            if t is not None:
                leaves[f"{name} {i}"] = t.detach().clone().requires_grad_()
    live = [
        LoRAWeights(
            leaves[f"weight {i}"], leaves[f"lora_A {i}"], leaves[f"lora_B {i}"], m.scaling,
            leaves.get(f"bias {i}"), m.dropout_p, m.seed,
        )
        for i, m in enumerate(group)
    ]  # fmt: skip
    ys = run(leaves["x"], live)  # type: ignore[operator]
    torch.autograd.backward(ys, dys)
    found = {f"y {i}": y.detach() for i, y in enumerate(ys)}
    return found | {
        f"d {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None
    }


def by_reference(dtype: torch.dtype):  # type: ignore[no-untyped-def]
    """The members one by one by the reference, in dtype."""

    def run(x: Tensor, group: list[LoRAWeights]) -> list[Tensor]:
        ys = []
        for m in group:
            keep, scale = None, m.scaling
            if m.dropout_p:
                keep = keep_mask(m.seed, *x.shape, m.dropout_p)
                scale = effective_scaling(m.scaling, m.dropout_p)
            cast = [None if t is None else t.to(dtype) for t in m.params]
            ys.append(lora_linear_ref(x.to(dtype), *cast[:3], scale, cast[3], keep)[0])
        return ys

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("scalings", [(2.0, 2.0, 2.0), (1.0, 2.0, 1.0)], ids=["one scale", "two"])
def test_every_output(
    path: Path, dtype: torch.dtype, dropout_p: float, scalings: tuple[float, ...]
) -> None:
    group = members(dtype, dropout_p, scalings=scalings)
    x = torch.randn(37, K).to(dtype)
    dys = [torch.randn(37, N).to(dtype) for N, _ in SIZES]
    double = [dy.double() for dy in dys]
    truth = outputs(x.double(), group, double, by_reference(torch.float64))
    baseline = outputs(x, group, dys, by_reference(dtype))
    got = outputs(x, group, dys, lambda x, live: lora_linear_group(x, live, backend=path.backend))
    assert set(got) == set(truth)
    for name, tensor in got.items():
        assert_close_to_ref(name, tensor, truth[name].double(), baseline[name])


def test_members_with_one_seed_share_a_mask(main_path: Path) -> None:
    group = members(torch.float32, 0.5, seeds=(7, 7, 8))
    x = torch.randn(9, K)
    dys = [torch.randn(9, N) for N, _ in SIZES]
    got = outputs(x, group, dys, lambda x, g: lora_linear_group(x, g, backend=main_path.backend))
    want = outputs(x, group, dys, by_reference(torch.float32))
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, want[name], atol=1e-4, rtol=1e-4)


def test_members_without_seeds_have_independent_masks(main_path: Path) -> None:
    one = members(torch.float32, 0.5)[0]
    twins = [LoRAWeights(one.weight, one.lora_A, one.lora_B, 1.0, None, 0.5) for _ in range(2)]
    x = torch.randn(9, K)
    first, second = lora_linear_group(x, twins, backend=main_path.backend)
    assert not torch.allclose(first, second)
    first, second = lora_linear_group(x, twins, training=False, backend=main_path.backend)
    assert torch.equal(first, second)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_x_is_read_once_when_it_can_be(
    main_path: Path, dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = BACKENDS[main_path.backend]
    reads = {"shrink": 0, "reduce": 0}
    for name in reads:
        real = getattr(module, name)

        def counting(*args, real=real, name=name):  # type: ignore[no-untyped-def]
            reads[name] += 1
            return real(*args)

        monkeypatch.setattr(module, name, counting)
    group = members(torch.float32, dropout_p)
    x, dys = torch.randn(9, K), [torch.randn(9, N) for N, _ in SIZES]
    outputs(x, group, dys, lambda x, g: lora_linear_group(x, g, backend=main_path.backend))
    once = 1 if dropout_p == 0 else 3
    assert reads == {"shrink": once, "reduce": once}


def test_saved_once() -> None:
    group = members(torch.float32)
    x = torch.randn(9, K, requires_grad=True)
    group = [
        LoRAWeights(m.weight, m.lora_A.requires_grad_(), m.lora_B.requires_grad_(), 2.0, m.bias)
        for m in group
    ]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear_group(x, group)
    params = {t.data_ptr() for m in group for t in m.params if t is not None}
    own = [t for t in kept if t.data_ptr() not in params]
    assert sorted(tuple(t.shape) for t in own) == [(9, 14), (9, K)]


@pytest.mark.parametrize("unused", [0, 1, 2])
def test_unused_members_cost_and_get_nothing(main_path: Path, unused: int) -> None:
    group = members(torch.float32)
    x = torch.randn(9, K, requires_grad=True)
    a = [m.lora_A.requires_grad_() for m in group]
    ys = lora_linear_group(x, group, backend=main_path.backend)
    used = [i for i in range(3) if i != unused]
    sum(ys[i].sum() for i in used).backward()
    assert a[unused].grad is None
    total = sum((group[i].weight + 2 * group[i].lora_B @ a[i]).sum(0) for i in used)
    torch.testing.assert_close(x.grad, total.detach().expand(9, K), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("needs", ["x", "lora_A", "lora_B", "weight", "bias", "nothing"])
def test_only_what_is_asked_for(main_path: Path, needs: str) -> None:
    group = members(torch.float32, 0.3)
    x = torch.randn(9, K).requires_grad_(needs == "x")
    for m in group:
        for name in ("weight", "lora_A", "lora_B", "bias"):
            if getattr(m, name) is not None:
                getattr(m, name).requires_grad_(name == needs)
    ys = lora_linear_group(x, group, backend=main_path.backend)
    assert ys[0].requires_grad == (needs != "nothing")
    if needs == "nothing":
        return
    dys = [torch.randn_like(y) for y in ys]
    used = [(y, dy) for y, dy in zip(ys, dys, strict=True) if y.requires_grad]
    torch.autograd.backward(*map(list, zip(*used, strict=True)))
    want = outputs(x, group, dys, by_reference(torch.float32))
    if needs == "x":
        torch.testing.assert_close(x.grad, want["d x"], atol=1e-4, rtol=1e-4)
    for i, m in enumerate(group):
        if needs != "x" and getattr(m, needs) is not None:
            torch.testing.assert_close(
                getattr(m, needs).grad, want[f"d {needs} {i}"], atol=1e-4, rtol=1e-4
            )


def test_fp32_adapters_autocast_and_batch_shape(main_path: Path) -> None:
    group = members(torch.float32)
    x = torch.randn(2, 5, K, requires_grad=True)
    a = group[0].lora_A.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ys = lora_linear_group(x, group, backend=main_path.backend)
    assert [tuple(y.shape) for y in ys] == [(2, 5, N) for N, _ in SIZES]
    assert all(y.dtype == torch.bfloat16 for y in ys)
    sum(y.float().sum() for y in ys).backward()
    assert a.grad.dtype == x.grad.dtype == torch.float32
    exact = by_reference(torch.float32)(x.detach().view(10, K), group)
    for y, want in zip(ys, exact, strict=True):
        torch.testing.assert_close(y.float().view(10, -1), want, atol=0.1, rtol=0.05)


def test_members_with_adapters_of_different_dtypes(main_path: Path) -> None:
    group = members(torch.bfloat16)
    wide = members(torch.bfloat16, adapter_dtype=torch.float32)[1]
    mixed = [group[0], wide, group[2]]
    x = torch.randn(9, K).bfloat16()
    dys = [torch.randn(9, N).bfloat16() for N, _ in SIZES]
    got = outputs(x, mixed, dys, lambda x, g: lora_linear_group(x, g, backend=main_path.backend))
    for i, m in enumerate(mixed):
        assert got[f"d lora_A {i}"].dtype == m.lora_A.dtype
        assert got[f"d lora_B {i}"].dtype == m.lora_B.dtype
    if main_path.backend == "cpu":  # not rounded to its neighbours' dtype on the way
        wide_da = got["d lora_A 1"]
        assert (wide_da != wide_da.bfloat16().float()).float().mean() > 0.9


def test_empty_group_and_rank_zero_member(main_path: Path) -> None:
    x = torch.randn(9, K)
    assert lora_linear_group(x, []) == []
    m = members(torch.float32)[0]
    none = LoRAWeights(m.weight, m.lora_A[:0].requires_grad_(), m.lora_B[:, :0], 1.0)
    ys = lora_linear_group(x, [none, m], backend=main_path.backend)
    torch.testing.assert_close(ys[0], x @ m.weight.T)
    (ys[0].sum() + ys[1].sum()).backward()
    assert none.lora_A.grad.shape == (0, K)


def test_layers_as_members(main_path: Path) -> None:
    x = torch.randn(9, K)
    layers = [
        FusedLoRALinear(K, N, r=R, fan_in_fan_out=fifo, lora_dropout=0.2).eval()
        for (N, R), fifo in zip(SIZES, (False, True, False), strict=True)
    ]
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B)
    group = [layer.lora_weights() for layer in layers]
    for layer, y in zip(
        layers, lora_linear_group(x, group, training=False, backend=main_path.backend), strict=True
    ):
        torch.testing.assert_close(y, layer(x))
    layers[0].merge()
    with pytest.raises(RuntimeError, match="no adapter apart from its weight"):
        layers[0].lora_weights()


def test_create_graph_is_refused() -> None:
    x = torch.randn(9, K, requires_grad=True)
    ys = lora_linear_group(x, members(torch.float32))
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(ys[0].sum(), x, create_graph=True)


def test_torch_func_and_dispatch_modes_see_members() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x, group = torch.randn(9, K), members(torch.float32)
    grads = torch.func.grad(lambda x: sum(y.sum() for y in lora_linear_group(x, group)))(x)
    leaf = x.clone().requires_grad_()
    sum(y.sum() for y in lora_linear_group(leaf, group)).backward()
    torch.testing.assert_close(grads, leaf.grad)
    with FlopCounterMode(display=False) as counter:
        lora_linear_group(x, group)
    assert counter.get_total_flops() == sum(2 * 9 * (N * K + R * (N + K)) for N, R in SIZES)
