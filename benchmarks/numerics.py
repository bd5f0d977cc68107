"""Correct before timed: every output of every provider against float64, by the project's rule."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.providers import Built, Provider
from benchmarks.record import OK, WRONG
from benchmarks.shapes import Case
from benchmarks.tensors import CaseTensors
from lora_fused.functional import draw_seed
from lora_fused.reference import (
    dropout_threshold,
    effective_scaling,
    keep_mask,
    lora_linear_ref,
)
from lora_fused.testing import assert_close_to_ref

_SEED = 20211
_LARGEST_RATIO = 1e9  # JSON has no infinity


@dataclass(frozen=True)
class Verdict:
    """`error_ratios`: largest error ÷ that of plain torch, per output; empty if unchecked."""

    status: str
    message: str = ""
    error_ratios: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Expected:
    """y, dx, da, db in float64 and as plain torch computes them in the case's precision."""

    truth: dict[str, Tensor]
    baseline: dict[str, Tensor]


class Checker:
    """Judges the providers of one case. References are computed once per dropout and kept."""

    def __init__(self, case: Case, tensors: CaseTensors) -> None:
        self.case = case
        self.tensors = tensors
        self._expected: dict[tuple[bool, float, bool], Expected] = {}

    def check(self, provider: Provider, built: Built, dropout: float) -> Verdict:
        """With dropout only our own providers can be: torch's random stream is another one.

        Theirs is one of two masks: the one that a seed regenerates, or, where a GPU's kernels are
        not used, one that torch draws after that seed.
        """
        if dropout and not provider.ours:
            return Verdict(OK, "unchecked: another random stream")
        outputs, lora = _outputs(built), provider.lora or provider.merged
        verdict = judge(outputs, self._expect(lora, dropout))
        if dropout and verdict.status == WRONG:
            drawn = judge(outputs, self._expect(lora, dropout, drawn=True))
            return drawn if drawn.status == OK else verdict
        return verdict

    def _expect(self, lora: bool, dropout: float, drawn: bool = False) -> Expected:
        key = (lora, dropout, drawn)
        if key not in self._expected:
            keep = self._mask(dropout, drawn) if dropout else None
            t, scaling = self.tensors, effective_scaling(self.tensors.scaling, dropout)
            self._expected[key] = Expected(
                truth=_reference(t, torch.float64, scaling, keep, lora),
                baseline=_reference(t, t.x.dtype, scaling, keep, lora),
            )
        return self._expected[key]

    def _mask(self, dropout: float, drawn: bool) -> Tensor:
        """bool [M, K], from the random state in which the provider was called."""
        torch.manual_seed(_SEED)
        M, K, where = self.case.M, self.case.layer.K, self.tensors.x.device
        seed = draw_seed(where)
        if not drawn:
            return keep_mask(seed, M, K, dropout)
        keep = torch.empty(M, K, dtype=torch.bool, device=where)
        return keep.bernoulli_(1.0 - dropout_threshold(dropout) / 65536)


def judge(outputs: Iterable[tuple[str, Tensor]], expected: Expected) -> Verdict:
    """Each output by the project's rule; one name may come several times."""
    ratios: dict[str, float] = {}
    complaints = []
    for name, got in outputs:
        truth, baseline = expected.truth[name], expected.baseline[name]
        ratios[name] = max(ratios.get(name, 0.0), _error_ratio(got, truth, baseline))
        try:
            assert_close_to_ref(name, got, truth, baseline)
        except AssertionError as error:
            complaints.append(" ".join(str(error).split()))
    return Verdict(WRONG if complaints else OK, "; ".join(complaints), ratios)


def _outputs(built: Built) -> Sequence[tuple[str, Tensor]]:
    """y without autograd, y of a training step and its gradients, from the same random state."""
    torch.manual_seed(_SEED)
    y_inference = built.forward()
    torch.manual_seed(_SEED)
    y = built.call(built.x)
    gradients = torch.autograd.grad(y, (built.x, *built.adapters), built.dy)
    return [
        ("y", y_inference),
        ("y", y.detach()),
        *zip(("dx", "da", "db"), gradients, strict=False),
    ]


def _reference(
    t: CaseTensors, dtype: torch.dtype, scaling: float, keep: Tensor | None, lora: bool
) -> dict[str, Tensor]:
    x, w, a, b, dy = (v.detach().to(dtype) for v in (t.x, t.w, t.a, t.b, t.dy))
    bias = None if t.bias is None else t.bias.to(dtype)
    x.requires_grad_()
    if not lora:
        y = torch.nn.functional.linear(x, w, bias)
        return {"y": y.detach(), "dx": torch.autograd.grad(y, x, dy)[0]}
    a.requires_grad_()
    b.requires_grad_()
    y, _ = lora_linear_ref(x, w, a, b, scaling, bias, keep)
    dx, da, db = torch.autograd.grad(y, (x, a, b), dy)
    return {"y": y.detach(), "dx": dx, "da": da, "db": db}


def _error_ratio(got: Tensor, truth: Tensor, baseline: Tensor) -> float:
    if got.shape != truth.shape:
        return _LARGEST_RATIO
    ours, plain = ((v.double() - truth).abs().max().item() for v in (got, baseline))
    ratio = ours / plain if plain else float(ours > 0) * _LARGEST_RATIO
    return ratio if ratio < _LARGEST_RATIO else _LARGEST_RATIO
