"""Inputs and comparisons shared by the tests and the benchmarks.

The rule (flash-attention's, per output): with `truth` from float64 and `baseline` from plain torch
in the dtype under test,

    max  |got − truth|  <=  2   · max  |baseline − truth| + rounding floor
    mean |got − truth|  <=  1.5 · mean |baseline − truth| + rounding floor / 4

where the floor is one rounding of the largest value in the compute dtype: a baseline may be exact
by luck. In float64, where truth and baseline are one and the truth has errors of its own, the floor
is eight roundings. It calibrates itself: there are no tolerances per dtype to set wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_fused.config import GRADIENT_NAMES
from lora_fused.functional import lora_linear
from lora_fused.reference import (
    effective_scaling,
    keep_mask,
    lora_linear_backward_ref,
    lora_linear_ref,
)


@dataclass
class Case:
    """One problem with data. Tensors are 2-D; weight may be a transposed view."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    dy: Tensor
    scaling: float
    dropout_p: float
    seed: int

    def truth(self) -> dict[str, Tensor]:
        """Every output in float64, of the rounded inputs (adapters rounded to x's dtype)."""
        return _outputs(self._as(torch.float64))

    def baseline(self) -> dict[str, Tensor]:
        """Every output by plain torch operations in x's dtype."""
        return _outputs(self._as(self.x.dtype))

    def _as(self, dtype: torch.dtype) -> Case:
        compute = self.x.dtype
        return replace(
            self,
            x=self.x.to(dtype),
            weight=self.weight.to(compute).to(dtype),
            lora_A=self.lora_A.to(compute).to(dtype),
            lora_B=self.lora_B.to(compute).to(dtype),
            bias=None if self.bias is None else self.bias.to(compute).to(dtype),
            dy=self.dy.to(dtype),
        )


def make_case(
    M: int,
    K: int,
    N: int,
    R: int,
    dtype: torch.dtype = torch.float32,
    *,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = False,
    scaling: float = 2.0,
    dropout_p: float = 0.0,
    fan_in_fan_out: bool = False,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Case:
    """Normal inputs, scaled so that x Wᵀ and scaling · (x Aᵀ) Bᵀ are both of order one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, cols: int, divide_by: float = 1.0) -> Tensor:
        values = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
        return (values / max(divide_by, 1.0) ** 0.5).to(device)

    adapters = adapter_dtype or dtype
    weight = normal(K, N, K).to(dtype).t() if fan_in_fan_out else normal(N, K, K).to(dtype)
    return Case(
        x=normal(M, K).to(dtype),
        weight=weight,
        lora_A=normal(R, K, K).to(adapters),
        lora_B=(normal(N, R, R) / scaling).to(adapters),
        bias=normal(1, N)[0].to(dtype) if bias else None,
        dy=normal(M, N).to(dtype),
        scaling=scaling,
        dropout_p=dropout_p,
        seed=seed + 12345,
    )


def _outputs(case: Case) -> dict[str, Tensor]:
    keep, scale = None, case.scaling
    if case.dropout_p > 0:
        keep = keep_mask(
            case.seed, case.x.shape[0], case.x.shape[1], case.dropout_p, device=case.x.device
        )
        scale = effective_scaling(case.scaling, case.dropout_p)
    y, s = lora_linear_ref(case.x, case.weight, case.lora_A, case.lora_B, scale, case.bias, keep)
    gradients = lora_linear_backward_ref(
        case.dy, case.x, case.weight, case.lora_A, case.lora_B, scale, keep
    )
    outputs = {"y": y, "s": s, **gradients._asdict()}
    return {name: t for name, t in outputs.items() if case.bias is not None or name != "dbias"}


def assert_close_to_ref(name: str, got: Tensor, truth64: Tensor, baseline: Tensor) -> None:
    """Raise AssertionError unless `got` obeys the rule above. NaN and a wrong shape fail."""
    if got.shape != truth64.shape:
        raise AssertionError(f"{name}: shape {list(got.shape)}, expected {list(truth64.shape)}")
    if got.numel() == 0:
        return
    error = (got.detach().double() - truth64).abs()
    allowed = (baseline.double() - truth64).abs()
    roundings = 8 if baseline.dtype == torch.float64 else 1
    floor = roundings * torch.finfo(baseline.dtype).eps * truth64.abs().max().item()
    limits = {
        "max": (error.max().item(), 2 * allowed.max().item() + floor),
        "mean": (error.mean().item(), 1.5 * allowed.mean().item() + floor / 4),
    }
    for measure, (value, limit) in limits.items():
        if not value <= limit:
            worst = torch.unravel_index(error.nan_to_num(nan=torch.inf).argmax(), error.shape)
            at = tuple(int(i) for i in worst)
            raise AssertionError(
                f"{name}: {measure} error {value:.3g}, at most {limit:.3g} allowed; worst at {at}: "
                f"got {got[at].item():.6g}, expected {truth64[at].item():.6g}"
            )


def run_case(
    case: Case, backend: str = "auto", needs: frozenset[str] = frozenset(GRADIENT_NAMES)
) -> dict[str, Tensor]:
    """y of lora_linear on a case, and the gradients of the inputs named in `needs`."""

    def leaf(name: str, tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_(name in needs)

    x, weight = leaf("x", case.x), leaf("weight", case.weight)
    lora_A, lora_B = leaf("lora_A", case.lora_A), leaf("lora_B", case.lora_B)
    bias = None if case.bias is None else leaf("bias", case.bias)
    y = lora_linear(
        x, weight, lora_A, lora_B, case.scaling, bias, case.dropout_p, seed=case.seed,
        backend=backend,
    )  # fmt: skip
    if y.requires_grad:
        y.backward(case.dy)
    leaves = {"dx": x, "dweight": weight, "da": lora_A, "db": lora_B, "dbias": bias}
    gradients = {n: t.grad for n, t in leaves.items() if t is not None and t.grad is not None}
    return {"y": y.detach(), **gradients}


def check_case(
    case: Case, backend: str = "auto", needs: frozenset[str] = frozenset(GRADIENT_NAMES)
) -> None:
    """Run a case and hold every output against the reference. Raises AssertionError."""
    check_cases([case], backend, needs)


def check_cases(
    cases: Sequence[Case],
    backend: str = "auto",
    needs: frozenset[str] = frozenset(GRADIENT_NAMES),
) -> None:
    """check_case on several cases of one shape, judged together.

    For tiny sizes, where a baseline that happens to be exact would make the rule a matter of luck.
    """
    got = _stacked([run_case(case, backend, needs) for case in cases])
    truth = _stacked([case.truth() for case in cases])
    baseline = _stacked([case.baseline() for case in cases])
    for name, tensor in got.items():
        assert_close_to_ref(name, tensor, truth[name], baseline[name])


def _stacked(outputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([each[name] for each in outputs]) for name in outputs[0]}


def assert_close_together(
    got: Sequence[dict[str, Tensor]],
    truth: Sequence[dict[str, Tensor]],
    baseline: Sequence[dict[str, Tensor]],
) -> float:
    """The numerics rule for whole models: of the mean error of a tensor, on geometric average.

    The first layers' rounding goes through all that follows, and a gradient that nearly cancels
    magnifies it: over 16 models the error of all tensors together was 0.75 to 1.0 of the
    baseline's and once 2.3, by one such gradient. The average over tensors and inputs does not
    depend on it. What is wrong, and not merely rounded, has fewer than half of the baseline's
    digits right. Layers alone are held to the whole rule.

    One dict of outputs per input. Returns the average, at most 1.5.
    """
    logs = []
    for mine, true, plain in zip(got, truth, baseline, strict=True):
        assert mine.keys() == true.keys() == plain.keys()
        for name, exact in true.items():
            error, allowed = (float((t[name].double() - exact).abs().mean()) for t in (mine, plain))
            eps, largest = torch.finfo(plain[name].dtype).eps, exact.abs().max().item()
            floor = eps * largest / 4
            half_of_the_digits = (largest * max(allowed, floor)) ** 0.5
            assert error <= half_of_the_digits, f"{name}: mean error {error:.3g} of {largest:.3g}"
            logs.append(math.log((error + floor) / (allowed + floor)) if largest > 0 else 0.0)
    ratio = math.exp(sum(logs) / len(logs))
    assert ratio <= 1.5, f"errors are {ratio:.2f} times the baseline's, at most 1.5 allowed"
    return ratio
