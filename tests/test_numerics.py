"""The 2x rule for every output, over dtypes, shapes, strides, options, gradients and paths."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_fused import autograd, dispatch, lora_linear
from lora_fused.config import GRADIENT_NAMES, Call
from lora_fused.testing import assert_close_to_ref, check_case, check_cases, make_case, run_case
from tests.conftest import Path

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # M, K, N, R
    (1, 64, 96, 8),
    (1, 33, 17, 1),
    (2, 736, 48, 16),
    (16, 96, 160, 4),
    (37, 129, 65, 5),
    (64, 256, 1, 3),
    (130, 1, 40, 2),
    (151, 200, 72, 64),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_output(path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    seeds = range(8 if shape[0] < 16 else 1)
    check_cases([make_case(*shape, dtype, bias=True, seed=seed) for seed in seeds], path.backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("fan_in_fan_out", [False, True], ids=["", "fan_in_fan_out"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.05, 0.5], ids=["", "p05", "p50"])
def test_options(
    path: Path, dtype: torch.dtype, bias: bool, fan_in_fan_out: bool, dropout_p: float
) -> None:
    case = make_case(
        41, 130, 70, 6, dtype, bias=bias, fan_in_fan_out=fan_in_fan_out, dropout_p=dropout_p
    )
    check_case(case, path.backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rank_activations(path: Path, dtype: torch.dtype) -> None:
    case = make_case(41, 130, 70, 6, dtype, dropout_p=0.25)
    s = torch.ops.lora_fused.lora_linear(
        case.x, case.weight, case.lora_A, case.lora_B, None, torch.tensor(case.seed),
        case.scaling, case.dropout_p, path.backend,
    )[1]  # fmt: skip
    assert_close_to_ref("s", s, case.truth()["s"], case.baseline()["s"])


def test_float64_everywhere() -> None:
    check_case(make_case(9, 30, 20, 4, torch.float64, bias=True, dropout_p=0.3))


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_wide_adapters_over_a_bf16_base(
    path: Path, adapter_dtype: torch.dtype, dropout_p: float
) -> None:
    case = make_case(
        50, 96, 64, 8, torch.bfloat16, adapter_dtype=adapter_dtype, dropout_p=dropout_p, bias=True
    )
    got = run_case(case, path.backend)
    assert got["da"].dtype == got["db"].dtype == adapter_dtype
    assert got["y"].dtype == got["dx"].dtype == torch.bfloat16
    check_case(case, path.backend)


@pytest.mark.skipif(not dispatch.BACKENDS["cpu"].native(), reason="needs the native module")
def test_native_adapter_gradients_are_not_rounded_to_bf16() -> None:
    case = make_case(200, 96, 64, 8, torch.bfloat16, adapter_dtype=torch.float32)
    got, truth = run_case(case, "cpu"), case.truth()
    for name in ("da", "db"):
        assert (got[name].double() - truth[name]).abs().max() < 0.03 * truth[name].abs().max()
        assert (got[name] != got[name].bfloat16().float()).float().mean() > 0.9


@pytest.mark.parametrize("needs", [
    frozenset(subset)
    for size in range(len(GRADIENT_NAMES) + 1)
    for subset in itertools.combinations(GRADIENT_NAMES, size)
], ids=lambda needs: "+".join(sorted(needs)) or "nothing")  # fmt: skip
def test_only_what_is_asked_for(main_path: Path, needs: frozenset[str]) -> None:
    case = make_case(20, 64, 48, 4, bias=True, dropout_p=0.2)
    names = dict(zip(GRADIENT_NAMES, ("dx", "dweight", "da", "db", "dbias"), strict=True))
    got = run_case(case, main_path.backend, needs)
    assert set(got) == {"y"} | {names[name] for name in needs}
    check_case(case, main_path.backend, needs)


@pytest.mark.parametrize("zero", ["M", "K", "N", "R"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_empty_sizes(path: Path, zero: str, dropout_p: float) -> None:
    sizes = {"M": 5, "K": 12, "N": 7, "R": 3, zero: 0}
    case = make_case(*sizes.values(), bias=True, dropout_p=dropout_p)
    backend = path.backend if zero == "R" else "auto"
    check_case(case, backend)


def test_nan_and_infinity_reach_the_output(main_path: Path) -> None:
    case = make_case(4, 16, 8, 2)
    case.x[1, 3], case.x[2, 0] = float("nan"), float("inf")
    y = run_case(case, main_path.backend)["y"]
    assert y[1].isnan().all() and not y[2].isfinite().any()
    assert y[0].isfinite().all() and y[3].isfinite().all()


def strided(t: torch.Tensor, kind: str, poison: float) -> torch.Tensor:
    """The same values behind other strides, with `poison` in the memory between them."""
    if kind == "transposed":
        return t.t().contiguous().t()
    if kind == "sliced":
        wide = torch.full((t.shape[0], t.shape[1] + 5), poison, dtype=t.dtype)
        wide[:, 3 : 3 + t.shape[1]] = t
        return wide[:, 3 : 3 + t.shape[1]]
    if kind == "skipping":
        wide = torch.full((2 * t.shape[0], 3 * t.shape[1]), poison, dtype=t.dtype)
        wide[::2, ::3] = t
        return wide[::2, ::3]
    return t


KINDS = ["contiguous", "transposed", "sliced", "skipping"]


@settings(
    max_examples=10, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 90), st.integers(1, 90), st.integers(1, 20)),
    kinds=st.tuples(*[st.sampled_from(KINDS)] * 5),
    dtype=st.sampled_from(DTYPES),
    dropout_p=st.sampled_from([0.0, 0.1]),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_strides(
    path: Path, sizes: tuple[int, ...], kinds: tuple[str, ...], dtype: torch.dtype,
    dropout_p: float, bias: bool, seed: int,
) -> None:  # fmt: skip
    # torch's own bf16 matmul on AMX multiplies what lies behind a sliced row by zero, so that a NaN
    # there reaches its result; finite values do not. Native code must not read them at all.
    poison = float("nan") if path.strategy == "own" else 3e4
    cases = [
        make_case(*sizes, dtype, bias=bias, dropout_p=dropout_p, seed=seed + i) for i in range(4)
    ]
    for case in cases:
        for name, kind in zip(("x", "weight", "lora_A", "lora_B", "dy"), kinds, strict=True):
            setattr(case, name, strided(getattr(case, name), kind, poison))
    check_cases(cases, path.backend)


def test_expanded_and_broadcast_inputs(path: Path) -> None:
    """Zero strides: an expanded x, and the dy that sum() sends back."""
    case = make_case(8, 64, 48, 4)
    case.x = case.x[:1].expand(8, 64)
    case.dy = torch.ones(()).expand(8, 48)
    check_case(case, path.backend)


def test_negative_bit_views(main_path: Path) -> None:
    """x whose sign flip is still pending: a pointer to its memory would give the wrong sign."""
    case = make_case(6, 32, 24, 4)
    pending = torch.complex(torch.zeros(6, 32), -case.x).conj().imag
    assert pending.is_neg() and torch.equal(pending, case.x)
    args = (case.weight, case.lora_A, case.lora_B, case.scaling)
    torch.testing.assert_close(lora_linear(pending, *args), lora_linear(case.x, *args))


@pytest.mark.parametrize("M", [4, 33, 150])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_permutation_is_bit_exact(own_path: Path, M: int, dtype: torch.dtype) -> None:
    """Each token is computed by itself: its place in the batch changes no bit of y and dx."""
    case = make_case(M, 200, 72, 8, dtype, bias=True)
    order = torch.randperm(M)
    first = run_case(case, own_path.backend)
    case.x, case.dy = case.x[order].contiguous(), case.dy[order].contiguous()
    second = run_case(case, own_path.backend)
    if own_path.backend == "cpu":  # a vendor's GEMM promises nothing here
        assert torch.equal(first["y"][order], second["y"])
        assert torch.equal(first["dx"][order], second["dx"])
    check_case(case, own_path.backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeated_runs_are_bit_exact(path: Path, dtype: torch.dtype) -> None:
    case = make_case(97, 200, 72, 8, dtype, bias=True, dropout_p=0.1)
    first = run_case(case, path.backend)
    for _ in range(5):
        for name, got in run_case(case, path.backend).items():
            assert torch.equal(first[name], got), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thread_count_changes_no_bit(own_path: Path, dtype: torch.dtype) -> None:
    if own_path.backend != "cpu":
        pytest.skip("the CPU runs no native kernels: a vendor's GEMM promises nothing here")
    case = make_case(150, 320, 270, 8, dtype, bias=True, dropout_p=0.1)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run_case(case, "cpu", frozenset(("x", "lora_A", "lora_B"))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, got in other.items():
            assert torch.equal(results[0][name], got), name


def test_saved_tensors_are_x_s_and_parameters(main_path: Path) -> None:
    case = make_case(20, 64, 48, 4, torch.bfloat16, adapter_dtype=torch.float32, dropout_p=0.2)
    leaves = [case.weight, case.lora_A.requires_grad_(), case.lora_B.requires_grad_()]
    x = case.x.requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear(x, *leaves, case.scaling, dropout_p=0.2, backend=main_path.backend)
    known = {t.data_ptr() for t in (x, *leaves)}
    own = [t for t in kept if t.data_ptr() not in known]
    assert [tuple(t.shape) for t in own] == [(20, 4)]  # s alone


@pytest.mark.parametrize(
    ("needs", "shapes"),
    [
        ({"lora_B"}, [(20, 4)]),
        ({"lora_A"}, [(20, 64), (48, 4)]),
        ({"x"}, [(48, 64), (4, 64), (48, 4)]),
        ({"weight"}, [(20, 64)]),
        ({"bias"}, []),
    ],
)
def test_only_what_backward_reads_is_saved(
    main_path: Path, needs: set[str], shapes: list[tuple[int, int]]
) -> None:
    case = make_case(20, 64, 48, 4, bias=True)
    inputs = (case.x, case.weight, case.lora_A, case.lora_B, case.bias)
    x, weight, a, b, bias = (
        t.requires_grad_(name in needs) for name, t in zip(GRADIENT_NAMES, inputs, strict=True)
    )
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear(x, weight, a, b, 2.0, bias, backend=main_path.backend)
    assert [tuple(t.shape) for t in kept] == shapes


def test_strided_bias(path: Path) -> None:
    case = make_case(20, 64, 48, 4, bias=True)
    truth, baseline = case.truth(), case.baseline()
    case.bias = torch.stack((case.bias, torch.full((48,), float("nan"))), 1)[:, 0]
    for name, got in run_case(case, path.backend).items():
        assert_close_to_ref(name, got, truth[name], baseline[name])


def test_direct_calls_to_the_core_agree_with_the_public_function() -> None:
    case = make_case(5, 16, 8, 2)
    route = dispatch.route_for(case.x, case.weight, case.lora_A, case.lora_B, None, False, "auto")
    y, s = autograd.lora_forward(
        Call(route, case.scaling), case.x, case.weight, case.lora_A, case.lora_B, None
    )
    assert torch.equal(y, run_case(make_case(5, 16, 8, 2), "auto", frozenset())["y"])
    assert s is not None and s.shape == (5, 2)
