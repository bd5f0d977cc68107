"""Choosing on GPUs without one: candidates, model, groups, the library, and what explain tells."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_fused import (
    FusedLoRALinear,
    LoRAWeights,
    backends,
    dispatch,
    explain,
    gpu_choice,
    gpu_store,
    gpu_tuning,
    lora_linear,
    lora_linear_group,
)
from lora_fused.backends import torch_ops
from lora_fused.config import Problem
from lora_fused.devices import DEVICES
from lora_fused.testing import check_case, make_case
from tests import fake_backend
from tests.gpu_double import NEEDS, PROBLEM, Clock, config_of, pretended_gpu, run

# --- by the model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("device", sorted(DEVICES))
@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 20_000), st.integers(1, 9000), st.integers(1, 9000)),
    st.integers(0, 512),
    st.sets(st.sampled_from(sorted(NEEDS))),
    st.booleans(),
    st.booleans(),
)
def test_only_legal_configurations_and_the_library_always(
    device: str,
    sizes: tuple[int, int, int],
    R: int,
    needs: set[str],
    dropout: bool,
    given_mask: bool,
) -> None:
    M, K, N = sizes
    problem = Problem(
        M, K, N, R, torch.bfloat16, "cuda", dropout=dropout, needs=frozenset(needs),
        device=DEVICES[device], given_mask=given_mask,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.BACKENDS, "triton", fake_backend)  # type: ignore[arg-type]
        gpu_choice.options.cache_clear()
        config = gpu_choice.configure_by_model(problem, ("triton",))
        for part in gpu_choice.parts_of(problem):
            found = gpu_choice.options(problem, part, ("triton",))
            assert [o.name for o in found].count("library") == 1
            assert list(found) == sorted(found, key=lambda o: o.predicted_us)
            listed = gpu_choice.shortlist(found)
            assert listed[0].is_library and len(listed) <= 4 and len(set(listed)) == len(listed)
            legal = {
                (c.strategy, c.tiles)
                for c in fake_backend.candidates(problem, DEVICES[device], part)
            } | {("library", None)}
            if part not in ("reduce", "backward"):
                assert (getattr(config, part), config.tiles(part)) in legal
        if given_mask:
            assert {config.forward, config.dx} <= {"library", "split"}
        if R == 0:
            assert config.backend == "torch"
        gpu_choice.options.cache_clear()


def test_a_gpu_without_our_kernels_takes_the_library() -> None:
    with pretended_gpu(names=()):
        run()
        config = config_of()
        assert config.backend == "torch" and config.forward == config.dx == "library"
        assert any(
            note.startswith("triton: it is not in this installation") for note in config.notes
        )


def test_large_problems_by_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_FUSED_AUTOTUNE", "0")
    with pretended_gpu(names=("cuda", "triton")):
        config = dispatch.choose(PROBLEM)
        assert config.backend == "cuda" and config.forward == "s_first"
        assert config.predicted_us is not None and config.measured_us is None
        assert dispatch.choose(PROBLEM, "triton").backend == "triton"
        few = dispatch.choose(replace(PROBLEM, M=4))
        assert few.forward == "decode"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("together_us", [100, 900])
def test_dx_and_gradients_are_one_launch_where_that_is_faster(
    together_us: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part but the library takes 200 us: dx and reduce 400 apart."""
    together = together_us / 1e6
    clock = Clock(0.001, shrink_matmul_reduce=together, shrink=0.0002, reduce=0.0002)
    monkeypatch.setattr(gpu_tuning, "stopwatch", clock)
    monkeypatch.setattr(fake_backend, "offers_backward", True)
    run()
    fake_backend.calls.clear()
    run()
    wins = together < 0.0004
    after = ["shrink_matmul_reduce"] if wins else ["shrink_matmul dx", "reduce_pair"]
    assert fake_backend.calls == ["shrink_matmul forward", *after]
    config = config_of()
    assert (config.tiles("backward") is not None) == wins
    assert config.measured_us == pytest.approx(300 if wins else 600)
    layer = FusedLoRALinear(PROBLEM.K, PROBLEM.N, r=PROBLEM.R, dtype=torch.bfloat16)
    x = torch.randn(PROBLEM.M, PROBLEM.K, dtype=torch.bfloat16, requires_grad=True)
    text = str(explain(layer, x))
    assert ("da and db in 2 parts" in text) == ("backward: " in text) == wins
    assert ("reduce: " in text) != wins


@pytest.mark.parametrize(("changes", "parts"), [
    ({}, True), ({"dropout": True}, False), ({"needs": frozenset({"x", "lora_A"})}, False),
    ({"group": ((48, 8), (32, 8))}, False),
])  # fmt: skip
def test_when_one_launch_may_make_dx_and_gradients(changes: dict, parts: bool) -> None:
    assert ("backward" in gpu_choice.parts_of(replace(PROBLEM, **changes))) == parts


# --- what surrounds it ----------------------------------------------------------------------------


def group_call(dropout_p: float = 0.2) -> list[torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(24, 64, dtype=torch.bfloat16, requires_grad=True)
    group = [
        LoRAWeights(torch.randn(n, 64, dtype=x.dtype) / 8, torch.randn(8, 64, dtype=x.dtype) / 8,
                    torch.randn(n, 8, dtype=x.dtype).requires_grad_(), 1.5, dropout_p=p)
        for n, p in ((48, 0.0), (32, dropout_p))
    ]  # fmt: skip
    ys = lora_linear_group(x, group)
    torch.autograd.backward([y.sum() for y in ys])
    assert x.grad is not None and all(m.lora_B.grad is not None for m in group)
    return ys


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_a_group_is_run_as_one_where_that_is_faster(
    dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(0.001, group=0.0001, shrink_matmul=0.0002, reduce=0.0002)
    monkeypatch.setattr(gpu_tuning, "stopwatch", clock)
    group_call(dropout_p)
    timed = clock.runs
    fake_backend.calls.clear()
    group_call(dropout_p)
    assert fake_backend.calls == ["group_forward", "group_backward"] and clock.runs == timed
    keys = [answer["key"] for answer in gpu_store.answers(DEVICES["H100"], "timing")]
    assert sum("48r8 32r8" in key for key in keys) == 3


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("fault", ["slow", "wrong", "missing"])
def test_a_group_is_run_layer_by_layer_where_its_launches_are_no_good(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"group": 0.002, "shrink_matmul": 0.0002, "reduce": 0.0002}
    monkeypatch.setattr(gpu_tuning, "stopwatch", Clock(0.001, **times))
    if fault == "missing":
        monkeypatch.delattr(fake_backend, "group_forward")
    original = fake_backend.group_forward if fault == "wrong" else None

    def wrong(*args):  # type: ignore[no-untyped-def]
        ys, s = original(*args)  # type: ignore[misc]
        ys[-1][0, 0] += 3
        return ys, s

    if fault == "wrong":
        monkeypatch.setattr(fake_backend, "group_forward", wrong)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group_call()
    fake_backend.calls.clear()
    ys = group_call()
    assert [y.shape[-1] for y in ys] == [48, 32]
    assert not {"group_forward", "group_backward"} & set(fake_backend.calls)
    assert "shrink_matmul forward" in fake_backend.calls


def test_the_library_draws_its_mask_on_a_gpu() -> None:
    with pretended_gpu(names=()):
        case = make_case(64, 64, 48, 16)
        x = case.x.requires_grad_()
        torch.manual_seed(3)
        y = lora_linear(x, case.weight, case.lora_A, case.lora_B, 1.0, dropout_p=0.5)
        y.backward(case.dy)
        torch.manual_seed(3)
        again = lora_linear(x, case.weight, case.lora_A, case.lora_B, 1.0, dropout_p=0.5)
        assert torch.equal(y, again)
        kept = (y - case.x @ case.weight.t()).detach()
        assert kept.abs().max() > 0
        seeded = [
            lora_linear(
                x,
                case.weight,
                case.lora_A,
                case.lora_B,
                1.0,
                dropout_p=0.5,
                seed=7,
                backend="torch",
            )
            for _ in range(2)
        ]
        assert torch.equal(*seeded)
    ours = lora_linear(x, case.weight, case.lora_A, case.lora_B, 1.0, dropout_p=0.5, seed=7)
    torch.testing.assert_close(seeded[0], ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_the_library_on_gpus(
    dropout_p: float, bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    original_problem, original = dispatch.problem_of, torch_ops.rank_first
    monkeypatch.setattr(
        dispatch, "problem_of", lambda *args: replace(original_problem(*args), device_type="cuda")
    )
    seen: list[str] = []
    monkeypatch.setattr(
        torch_ops, "rank_first", lambda *args: seen.append("rank first") or original(*args)
    )
    check_case(make_case(24, 64, 48, 16, dtype, bias=bias, dropout_p=dropout_p), "torch")
    assert seen == ["rank first"] * 2
    check_case(make_case(24, 64, 48, 0, dtype, bias=bias), "torch")
    assert len(seen) == 2


# --- explain --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("gpu")
def test_explain_tells_times_and_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(route, direction, *rest):  # type: ignore[no-untyped-def]
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(gpu_tuning, "stopwatch", Clock(0.001, shrink=0.0007, reduce=0.002))
    monkeypatch.setattr(fake_backend, "shrink_matmul", wrong)
    layer = FusedLoRALinear(4096, 4096, r=16, dtype=torch.bfloat16)
    x = torch.randn(64, 4096, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = str(explain(layer, x))
    assert "M=64 K=4096 N=4096 R=16 bfloat16 on H100" in text
    assert "runs on  triton: forward split" in text and "dx split" in text
    assert "us modelled" in text and "us measured, all launches of the layer" in text
    assert "forward: triton split 128x256x64" in text
    assert "not triton s_first" in text and "demoted, RuntimeError: no kernel image" in text
    assert "cuda: it is not in this installation" in text
    assert "the native CPU kernels" not in text


@pytest.mark.usefixtures("gpu")
def test_explain_tells_what_was_slower_when_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tuning, "stopwatch", Clock(0.001, shrink=0.002, reduce=0.002))
    layer = FusedLoRALinear(4096, 4096, r=16, dtype=torch.bfloat16)
    text = str(explain(layer, torch.randn(64, 4096, dtype=torch.bfloat16)))
    assert "runs on  torch: forward library" in text
    assert "forward: library" in text and "1000.0 us measured" in text
    assert "2000.0 us measured: measured slower" in text
