"""Fault injection: each fault that the numerics checks exist for is made, and must be caught."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_fused import dispatch, functional, lora_linear
from lora_fused.backends import BACKENDS, cpu_layer
from lora_fused.testing import Case, assert_close_to_ref, check_case, make_case, run_case
from tests.conftest import Path

Op = Callable[..., Any]
M, K, N, R = 48, 512, 512, 16  # square, so that a wrong transposition still has the right shape


def case_of(dtype: torch.dtype) -> Case:
    return make_case(M, K, N, R, dtype, bias=True, dropout_p=0.1, scaling=2.0)


def drop_last_k_column(matmul: Op) -> Op:
    def faulty(route: Any, direction: str, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        if direction == "forward":
            x = x.clone()
            x[..., -1] = 0
        return matmul(route, direction, x, *rest, **options)

    return faulty


def drop_last_column_of_dy(matmul: Op) -> Op:
    def faulty(route: Any, direction: str, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        if direction == "dx":
            x = x.clone()
            x[..., -1] = 0
        return matmul(route, direction, x, *rest, **options)

    return faulty


def drop_rank_column(where: str) -> Callable[[Op], Op]:
    def make(matmul: Op) -> Op:
        def faulty(
            route: Any, direction: str, x: Tensor, w: Tensor, s: Tensor, *rest: Any, **options: Any
        ) -> Tensor:
            if direction == where:
                s = s.clone()
                s[:, -1] = 0
            return matmul(route, direction, x, w, s, *rest, **options)

        return faulty

    return make


def forget_bias(matmul: Op) -> Op:
    def faulty(
        route: Any,
        direction: str,
        x: Tensor,
        w: Tensor,
        s: Tensor,
        a: Tensor,
        bias: Any = None,
        **options: Any,
    ) -> Tensor:
        return matmul(route, direction, x, w, s, a, None, **options)

    return faulty


def wrong_transposition_of_weight(matmul: Op) -> Op:
    def faulty(
        route: Any, direction: str, x: Tensor, w: Tensor, *rest: Any, **options: Any
    ) -> Tensor:
        return matmul(route, direction, x, w.t() if direction == "dx" else w, *rest, **options)

    return faulty


def mask_ignored_in_dx(matmul: Op) -> Op:
    def faulty(*args: Any, mask: Any = None, **options: Any) -> Tensor:
        return matmul(*args, **options)

    return faulty


def dropout_on_the_base_branch(matmul: Op) -> Op:
    def faulty(route: Any, direction: str, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        if direction == "forward":
            case = case_of(x.dtype)
            keep = functional.keep_mask(case.seed, M, K, case.dropout_p)
            x = x * keep / (1 - case.dropout_p)
        return matmul(route, direction, x, *rest, **options)

    return faulty


def stale_buffer(matmul: Op) -> Op:
    """The second call returns the buffer of the first."""
    buffers: dict[str, Tensor] = {}

    def faulty(route: Any, direction: str, *rest: Any, **options: Any) -> Tensor:
        return buffers.setdefault(direction, matmul(route, direction, *rest, **options))

    return faulty


def scale_in_shrink(change: Callable[[float], float]) -> Callable[[Op], Op]:
    def make(shrink: Op) -> Op:
        def faulty(route: Any, x: Tensor, a: Tensor, scale: float, mask: Any = None) -> Tensor:
            return shrink(route, x, a, change(scale), mask)

        return faulty

    return make


def mask_ignored_in_forward(shrink: Op) -> Op:
    def faulty(route: Any, x: Tensor, a: Tensor, scale: float, mask: Any = None) -> Tensor:
        return shrink(route, x, a, scale, None)

    return faulty


def scale_in_ds(change: Callable[[float], float]) -> Callable[[Op], Op]:
    def make(shrink_reduce: Op) -> Op:
        def faulty(route: Any, dy: Tensor, b: Tensor, scale: float, *rest: Any) -> Any:
            return shrink_reduce(route, dy, b, change(scale), *rest)

        return faulty

    return make


def last_token_missing_in_db(shrink_reduce: Op) -> Op:
    def faulty(route: Any, dy: Tensor, b: Tensor, scale: float, s: Tensor, *rest: Any) -> Any:
        s = s.clone()
        s[-1] = 0
        return shrink_reduce(route, dy, b, scale, s, *rest)

    return faulty


def mask_ignored_in_da(reduce: Op) -> Op:
    def faulty(route: Any, ds: Tensor, x: Tensor, mask: Any, dtype: torch.dtype) -> Tensor:
        return reduce(route, ds, x, None, dtype)

    return faulty


def last_token_missing_in_da(reduce: Op) -> Op:
    def faulty(route: Any, ds: Tensor, *rest: Any) -> Tensor:
        ds = ds.clone()
        ds[-1] = 0
        return reduce(route, ds, *rest)

    return faulty


def rank_rows_swapped_in_da(reduce: Op) -> Op:
    return lambda *args: reduce(*args).flip(0).contiguous()


# fault: (the operation it sits in, the outputs that must fail; all others must pass)
FAULTS: dict[str, tuple[str, Callable[[Op], Op], set[str]]] = {
    "last K column dropped": ("matmul", drop_last_k_column, {"y"}),
    "last N column of dy dropped": ("matmul", drop_last_column_of_dy, {"dx"}),
    "rank column dropped in y": ("matmul", drop_rank_column("forward"), {"y"}),
    "rank column dropped in dx": ("matmul", drop_rank_column("dx"), {"dx"}),
    "bias forgotten": ("matmul", forget_bias, {"y"}),
    "dx through the transposed weight": ("matmul", wrong_transposition_of_weight, {"dx"}),
    "mask ignored in dx": ("matmul", mask_ignored_in_dx, {"dx"}),
    "dropout on the base branch": ("matmul", dropout_on_the_base_branch, {"y"}),
    "scaled twice": ("shrink", scale_in_shrink(lambda s: s * s), {"y", "db"}),
    "never scaled": ("shrink", scale_in_shrink(lambda s: 1.0), {"y", "db"}),
    "1 / (1 - p) forgotten": ("shrink", scale_in_shrink(lambda s: s * 0.9), {"y", "db"}),
    "mask ignored in forward": ("shrink", mask_ignored_in_forward, {"y", "db"}),
    "ds scaled twice": ("shrink_reduce", scale_in_ds(lambda s: s * s), {"dx", "da"}),
    "ds never scaled": ("shrink_reduce", scale_in_ds(lambda s: 1.0), {"dx", "da"}),
    "last token missing in db": ("shrink_reduce", last_token_missing_in_db, {"db"}),
    "mask ignored in da": ("reduce", mask_ignored_in_da, {"da"}),
    "last token missing in da": ("reduce", last_token_missing_in_da, {"da"}),
    "rows of da out of order": ("reduce", rank_rows_swapped_in_da, {"da"}),
}  # fmt: skip


def failing_outputs(case: Case, backend: str) -> set[str]:
    truth, baseline, failing = case.truth(), case.baseline(), set()
    for name, got in run_case(case, backend).items():
        try:
            assert_close_to_ref(name, got, truth[name], baseline[name])
        except AssertionError:
            failing.add(name)
    return failing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_without_a_fault_nothing_fails(main_path: Path, dtype: torch.dtype) -> None:
    check_case(case_of(dtype), main_path.backend)


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Operations called one by one: a fault cannot be put between those of one native call."""
    monkeypatch.setattr(cpu_layer, "layer_of", lambda *call: (None, None))
    dispatch.forget_choices()
    yield
    dispatch.forget_choices()


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(
    main_path: Path, dtype: torch.dtype, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation, make_faulty, expected = FAULTS[fault]
    module = BACKENDS[main_path.backend]
    monkeypatch.setattr(module, operation, make_faulty(getattr(module, operation)))
    assert failing_outputs(case_of(dtype), main_path.backend) == expected


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_stale_buffer_is_caught_on_the_second_call(
    main_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = BACKENDS[main_path.backend]
    monkeypatch.setattr(module, "matmul", stale_buffer(module.matmul))
    assert failing_outputs(case_of(dtype), main_path.backend) == set()
    other = make_case(M, K, N, R, dtype, bias=True, dropout_p=0.1, seed=1)
    assert failing_outputs(other, main_path.backend) == {"y", "dx"}


def checkpointed_gradient(x: Tensor, a: Tensor, case: Case, replay: bool) -> Tensor:
    def layer(x: Tensor) -> Tensor:
        return lora_linear(x, case.weight, a, case.lora_B, case.scaling, dropout_p=0.5)

    torch.manual_seed(2)
    y = checkpoint(layer, x, use_reentrant=False) if replay else layer(x)
    y.backward(case.dy)
    gradient, a.grad = a.grad, None
    return gradient


def test_seed_not_replayed_under_checkpointing_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(M, 64, 48, R)
    a = case.lora_A.requires_grad_()
    plain = checkpointed_gradient(case.x, a, case, replay=False)
    assert torch.equal(checkpointed_gradient(case.x, a, case, replay=True), plain)
    seeds = itertools.count(1)
    monkeypatch.setattr(functional, "draw_seed", lambda device: torch.tensor(next(seeds)))
    assert not torch.allclose(
        checkpointed_gradient(case.x, a, case, replay=True),
        checkpointed_gradient(case.x, a, case, replay=False),
    )


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_one_bad_element_is_caught(poison: float) -> None:
    case = case_of(torch.float32)
    y = run_case(case)["y"]
    y[3, 5] = poison
    with pytest.raises(AssertionError, match=r"worst at \(3, 5\)"):
        assert_close_to_ref("y", y, case.truth()["y"], case.baseline()["y"])


def test_wrong_shape_is_caught() -> None:
    case = case_of(torch.float32)
    with pytest.raises(AssertionError, match="shape"):
        assert_close_to_ref(
            "y", run_case(case)["y"][:, 1:], case.truth()["y"], case.baseline()["y"]
        )
