"""The contract between autograd and a GPU backend, held by a backend in plain torch."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from lora_fused import LoRAWeights, backends, lora_linear, lora_linear_group
from lora_fused.backends import BACKENDS
from lora_fused.config import Config, Problem, Tiles, group_columns
from lora_fused.dispatch import choose, forcing, forget_choices
from lora_fused.testing import assert_close_to_ref, check_case, make_case
from tests import fake_backend

TILES = Tiles(64, 64, 32, num_warps=4)
STRATEGIES = ("library", "split", "s_first", "one_pass", "decode")


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(BACKENDS, "triton", sys.modules["tests.fake_backend"])
    fake_backend.calls.clear()
    forget_choices()
    yield
    forget_choices()


def config(forward: str, dx: str, reduce: Tiles | None = TILES) -> Config:
    return Config("triton", forward, dx, reduce_tiles=reduce)


def test_importing_and_running_on_the_cpu_loads_no_gpu_backend() -> None:
    code = (
        "import sys, torch, lora_fused; from lora_fused.testing import check_case, make_case; "
        "check_case(make_case(9, 40, 24, 4)); "
        "print([m for m in sys.modules if m.startswith(('lora_fused.backends.triton', "
        "'lora_fused.backends.cuda'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_backend_that_is_not_there_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_missing", {"cuda": "No module named 'x'"})
    monkeypatch.delitem(BACKENDS, "cuda", raising=False)
    with pytest.raises(ValueError, match=r"'cuda' cannot run .*not in this installation \(No mod"):
        choose(Problem(8, 8, 8, 2, torch.float32), "cuda")


@pytest.mark.parametrize(("forward", "dx"), list(itertools.product(STRATEGIES, STRATEGIES)))
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("paired", [False, True])
def test_every_strategy_of_each_direction(
    forward: str, dx: str, dropout_p: float, paired: bool
) -> None:
    with forcing(config(forward, dx, TILES if paired else None)):
        case = make_case(24, 64, 48, 5, torch.bfloat16, bias=True, dropout_p=dropout_p)
        check_case(case, backend="triton")
    calls = set(fake_backend.calls)
    for direction, strategy in (("forward", forward), ("dx", dx)):
        fused = strategy in ("s_first", "one_pass", "decode")
        assert (f"shrink_matmul {direction}" in calls) == fused
        assert (f"matmul {direction}" in calls) != fused
    assert ("reduce_pair" in calls) == paired
    assert ("reduce" in calls) != paired


@pytest.mark.parametrize("needs", range(1, 32))
@pytest.mark.parametrize("strategy", ["split", "s_first"])
def test_every_subset_of_gradients(strategy: str, needs: int) -> None:
    case = make_case(9, 40, 24, 3, bias=True)
    names = ("x", "weight", "lora_A", "lora_B", "bias")
    leaves = [getattr(case, name).clone() for name in names]
    wanted = [i for i in range(5) if needs >> i & 1]
    grads = {}
    for backend in ("torch", "triton"):
        inputs = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(leaves)]
        with forcing(config(strategy, strategy) if backend == "triton" else Config("torch")):
            y = lora_linear(*inputs[:4], 2.0, inputs[4], backend=backend)
            y.backward(case.dy)
        grads[backend] = [t.grad for t in inputs]
    for i, (ours, theirs) in enumerate(zip(grads["triton"], grads["torch"], strict=True)):
        assert (ours is None) == (theirs is None) == (i not in wanted)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_ds_is_computed_once() -> None:
    with forcing(config("s_first", "s_first")):
        check_case(make_case(24, 64, 48, 5), backend="triton")
    assert fake_backend.calls == ["shrink_matmul forward", "shrink_matmul dx", "reduce_pair"]


def test_ds_without_dx_comes_from_a_shrink() -> None:
    case = make_case(24, 64, 48, 5)
    with forcing(config("s_first", "s_first")):
        y = lora_linear(
            case.x, case.weight, case.lora_A.requires_grad_(), case.lora_B, 1.0, backend="triton"
        )
        y.backward(case.dy)
    assert fake_backend.calls == ["shrink_matmul forward", "shrink_reduce", "reduce_pair"]


@pytest.mark.parametrize("strategy", ["split", "s_first"])
def test_fp32_adapters_reach_kernels_that_take_them(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []
    for name in ("shrink", "shrink_matmul"):
        original = getattr(fake_backend, name)

        def watched(*args, original=original, name=name):  # type: ignore[no-untyped-def]
            seen.append(args[2 if name == "shrink" else 4].dtype)
            return original(*args)

        monkeypatch.setattr(fake_backend, name, watched)
    with forcing(config(strategy, strategy)):
        check_case(make_case(24, 64, 48, 5, torch.bfloat16, adapter_dtype=torch.float32), "triton")
    assert set(seen) == {torch.float32}


def test_the_library_gets_cast_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = fake_backend.shrink, []

    def watched(route, x, a, *rest):  # type: ignore[no-untyped-def]
        seen.append(a.dtype)
        return original(route, x, a, *rest)

    monkeypatch.setattr(fake_backend, "shrink", watched)
    with forcing(config("split", "library")):
        check_case(make_case(24, 64, 48, 5, torch.bfloat16, adapter_dtype=torch.float32), "triton")
    assert set(seen) == {torch.bfloat16}


# --- groups -------------------------------------------------------------------------------------


def members(dropout_p: float, bias: bool, dtype: torch.dtype) -> tuple[torch.Tensor, list]:
    torch.manual_seed(4)
    x = torch.randn(2, 9, 40, dtype=dtype)
    sizes = ((48, 3), (16, 17), (32, 16))
    group = [
        LoRAWeights(
            torch.randn(N, 40, dtype=dtype) / 6,
            torch.randn(R, 40, dtype=dtype) / 6,
            torch.randn(N, R, dtype=dtype),
            scaling=1.0 + i,
            bias=torch.randn(N, dtype=dtype) if bias else None,
            dropout_p=dropout_p,
            seed=100 + i,
        )
        for i, (N, R) in enumerate(sizes)
    ]
    return x, group


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_is_its_members(dropout_p: float, bias: bool, dtype: torch.dtype) -> None:
    x, group = members(dropout_p, bias, dtype)
    leaves = [x, *(t for m in group for t in m.params if t is not None)]
    dys = [torch.randn(2, 9, m.weight.shape[0], dtype=dtype) for m in group]

    def run(cast: torch.dtype, backend: str) -> list[torch.Tensor]:
        inputs = [t.detach().to(cast).requires_grad_() for t in leaves]
        given = iter(inputs[1:])
        with forcing(config("s_first", "s_first") if backend == "triton" else Config("torch")):
            mine = [
                LoRAWeights(
                    next(given), next(given), next(given), m.scaling,
                    next(given) if bias else None, m.dropout_p, m.seed,
                )
                for m in group
            ]  # fmt: skip
            ys = lora_linear_group(inputs[0], mine, backend=backend)
            torch.autograd.backward(ys, [dy.to(cast) for dy in dys])
        grads = [t.grad for t in inputs]
        assert all(grad is not None for grad in grads)
        return [*ys, *(grad for grad in grads if grad is not None)]

    outputs = {
        "ours": run(dtype, "triton"),
        "truth": run(torch.float64, "torch"),
        "baseline": run(dtype, "torch"),
    }
    assert {"group_forward", "group_backward"} == set(fake_backend.calls)
    for i, (got, truth, baseline) in enumerate(zip(*outputs.values(), strict=True)):
        assert_close_to_ref(f"output {i}", got, truth, baseline)


def test_a_group_with_an_unused_member_and_partial_needs() -> None:
    x, group = members(0.0, False, torch.float32)
    x.requires_grad_()
    for m in group[1:]:
        m.lora_A.requires_grad_()
    group[0].lora_B.requires_grad_()
    with forcing(config("s_first", "s_first")):
        ys = lora_linear_group(x, group, backend="triton")
        (ys[0].sum() + ys[1].sum()).backward()
    expected = torch.ones(18, 48) @ group[0].weight + torch.ones(18, 16) @ group[1].weight
    expected += torch.ones(18, 48) @ group[0].lora_B.detach() @ group[0].lora_A
    expected += 2 * torch.ones(18, 16) @ group[1].lora_B @ group[1].lora_A.detach()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.view(18, 40), expected, rtol=1e-4, atol=1e-3)
    assert group[0].lora_A.grad is None and group[0].lora_B.grad is not None
    assert group[1].lora_A.grad is not None and group[2].lora_A.grad is None


def test_groups_that_the_hook_does_not_take() -> None:
    x, group = members(0.0, False, torch.float32)
    with forcing(config("s_first", "s_first")):
        lora_linear_group(x, group[:1], backend="triton")
        plain = LoRAWeights(group[0].weight, torch.zeros(0, 40), torch.zeros(48, 0), 1.0)
    with forcing(config("split", "split")):
        lora_linear_group(x, [group[1], plain], backend="triton")
    assert "group_forward" not in fake_backend.calls


def test_group_columns() -> None:
    assert group_columns([3, 17, 16]) == ([0, 16, 48], 64)
    assert group_columns([]) == ([], 0)
