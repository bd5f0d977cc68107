"""Every refusal, word for word, and their order: device, dtype, shape, layout."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_fused import FusedLoRALinear, LoRAWeights, lora_linear, lora_linear_group
from tests.conftest import Path


def arguments(**changes: Any) -> dict[str, Any]:
    good = {
        "x": torch.randn(2, 8), "weight": torch.randn(6, 8), "lora_A": torch.randn(4, 8),
        "lora_B": torch.randn(6, 4), "scaling": 1.0, "bias": torch.randn(6),
    }  # fmt: skip
    return good | changes


def meta(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


def sparse(*shape: int) -> Tensor:
    return torch.randn(*shape).to_sparse()


CASES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"weight": meta(6, 8)}, ValueError,
     "lora_linear: weight is on meta, expected cpu, the device of x."),
    ({"lora_A": meta(4, 8)}, ValueError,
     "lora_linear: lora_A is on meta, expected cpu, the device of x."),
    ({"lora_B": meta(6, 4)}, ValueError,
     "lora_linear: lora_B is on meta, expected cpu, the device of x."),
    ({"bias": meta(6)}, ValueError,
     "lora_linear: bias is on meta, expected cpu, the device of x."),
    ({"x": torch.ones(2, 8, dtype=torch.int64)}, TypeError,
     "lora_linear: x has dtype torch.int64, expected a floating-point dtype."),
    ({"x": torch.ones(2, 8, dtype=torch.complex64)}, TypeError,
     "lora_linear: x has dtype torch.complex64, expected a floating-point dtype."),
    ({"weight": torch.ones(6, 8, dtype=torch.int8)}, TypeError,
     "lora_linear: weight has dtype torch.int8, expected a floating-point dtype."),
    ({"lora_A": torch.ones(4, 8, dtype=torch.int32)}, TypeError,
     "lora_linear: lora_A has dtype torch.int32, expected a floating-point dtype."),
    ({"weight": torch.randn(6, 8).bfloat16()}, TypeError,
     "lora_linear: weight has dtype torch.bfloat16, expected torch.float32, the dtype of x."),
    ({"weight": torch.randn(6, 8).double()}, TypeError,
     "lora_linear: weight has dtype torch.float64, expected torch.float32, the dtype of x."),
    ({"weight": torch.randn(8)}, ValueError,
     "lora_linear: weight has shape [8], expected [out_features, in_features]."),
    ({"x": torch.randn(2, 7)}, ValueError,
     "lora_linear: x has shape [2, 7], expected [..., 8], the in_features of weight."),
    ({"x": torch.tensor(1.0)}, ValueError,
     "lora_linear: x has shape [], expected [..., 8], the in_features of weight."),
    ({"lora_A": torch.randn(4, 7)}, ValueError,
     "lora_linear: lora_A has shape [4, 7], expected [r, 8], rank by the in_features of weight."),
    ({"lora_A": torch.randn(8)}, ValueError,
     "lora_linear: lora_A has shape [8], expected [r, 8], rank by the in_features of weight."),
    ({"lora_B": torch.randn(5, 4)}, ValueError,
     "lora_linear: lora_B has shape [5, 4], expected [6, 4], "
     "the out_features of weight by the rank of lora_A."),
    ({"lora_B": torch.randn(6, 3)}, ValueError,
     "lora_linear: lora_B has shape [6, 3], expected [6, 4], "
     "the out_features of weight by the rank of lora_A."),
    ({"bias": torch.randn(5)}, ValueError,
     "lora_linear: bias has shape [5], expected [6], the out_features of weight."),
    ({"bias": torch.randn(1, 6)}, ValueError,
     "lora_linear: bias has shape [1, 6], expected [6], the out_features of weight."),
    ({"x": sparse(2, 8)}, ValueError,
     "lora_linear: x has layout torch.sparse_coo, expected torch.strided."),
    ({"lora_A": sparse(4, 8)}, ValueError,
     "lora_linear: lora_A has layout torch.sparse_coo, expected torch.strided."),
    ({"weight": sparse(6, 8)}, ValueError,
     "lora_linear: weight has layout torch.sparse_coo, expected torch.strided."),
    ({"dropout_p": 1.5}, ValueError,
     "lora_linear: dropout_p is 1.5, expected a number in [0, 1]."),
    ({"dropout_p": -0.1}, ValueError,
     "lora_linear: dropout_p is -0.1, expected a number in [0, 1]."),
    ({"dropout_p": float("nan")}, ValueError,
     "lora_linear: dropout_p is nan, expected a number in [0, 1]."),
    ({"dropout_p": 0.5, "seed": 1 << 64}, ValueError,
     "lora_linear: seed is 18446744073709551616, expected 64 bits."),
    ({"dropout_p": 0.5, "seed": 1.5}, TypeError,
     "lora_linear: seed is a float, expected an int or an int64 tensor."),
    ({"dropout_p": 0.5, "seed": torch.tensor([1, 2])}, TypeError,
     "lora_linear: seed is a tensor of 2 torch.int64, expected one torch.int64."),
    ({"scaling": torch.tensor(2.0)}, TypeError,
     "lora_linear: scaling is a Tensor, expected a float."),
    ({"backend": "gpu"}, ValueError,
     "backend is 'gpu', expected one of auto, cpu, cuda, triton, torch."),
    # Two mistakes at once: the order is device, dtype, shape, layout.
    ({"lora_B": meta(6, 4), "weight": torch.ones(6, 8, dtype=torch.int8)}, ValueError,
     "lora_linear: lora_B is on meta, expected cpu, the device of x."),
    ({"bias": torch.ones(6, dtype=torch.int8), "x": torch.randn(2, 7)}, TypeError,
     "lora_linear: bias has dtype torch.int8, expected a floating-point dtype."),
    ({"x": sparse(2, 8), "bias": torch.randn(5)}, ValueError,
     "lora_linear: bias has shape [5], expected [6], the out_features of weight."),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "sentence"), CASES, ids=[s[:60] for _, _, s in CASES])
def test_sentences(changes: dict[str, Any], kind: type[Exception], sentence: str) -> None:
    for _ in range(2):  # a refusal is not remembered as a success
        with pytest.raises(kind, match=f"^{re.escape(sentence)}$"):
            lora_linear(**arguments(**changes))


@pytest.mark.parametrize("path_of_check", ["torch.func", "compile", "group"])
def test_sentences_are_the_same_however_it_is_called(path_of_check: str) -> None:
    given = arguments(x=torch.randn(2, 7))
    sentence = "lora_linear: x has shape [2, 7], expected [..., 8], the in_features of weight."
    with pytest.raises(Exception, match=re.escape(sentence)):
        if path_of_check == "torch.func":
            torch.func.grad(lambda x: lora_linear(**{**given, "x": x}).sum())(given["x"])
        elif path_of_check == "compile":
            torch._dynamo.reset()
            torch.compile(lambda: lora_linear(**given), backend="eager")()
        else:
            names = ("weight", "lora_A", "lora_B", "scaling", "bias")
            lora_linear_group(given["x"], [LoRAWeights(*(given[name] for name in names))])


@pytest.mark.parametrize("weight_dtype", [torch.float64], ids=str)
def test_autocast_sentence(weight_dtype: torch.dtype) -> None:
    sentence = (
        "lora_linear: weight has dtype torch.float64, expected torch.bfloat16, "
        "the dtype of autocast."
    )
    given = arguments(weight=torch.randn(6, 8, dtype=weight_dtype))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=re.escape(sentence)):
        lora_linear(**given)


def test_a_backend_that_cannot_run_the_call_says_why() -> None:
    given = {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments().items()}
    sentence = (
        "backend 'cpu' cannot run M=2 K=8 N=6 R=4 float64 on cpu: "
        "there are no native kernels for float64"
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        lora_linear(**given, backend="cpu")


@pytest.mark.parametrize(("options", "sentence"), [
    ({"r": -1}, "FusedLoRALinear: r is -1, expected 0 or more."),
    ({"lora_dropout": 2.0}, "FusedLoRALinear: lora_dropout is 2.0, expected a number in [0, 1]."),
])  # fmt: skip
def test_module_options(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        FusedLoRALinear(8, 6, **options)


def test_from_linear_refuses_what_has_no_weight_to_share() -> None:
    with pytest.raises(
        TypeError, match=r"^from_linear: ReLU has no 2-D weight Parameter to share\.$"
    ):
        FusedLoRALinear.from_linear(nn.ReLU())
    quantised = nn.Linear(8, 6)
    quantised.weight = nn.Parameter(torch.ones(6, 8, dtype=torch.int8), requires_grad=False)
    sentence = "from_linear: the weight has dtype torch.int8, expected a floating-point dtype."
    with pytest.raises(TypeError, match=f"^{re.escape(sentence)}$"):
        FusedLoRALinear.from_linear(quantised)


def test_modules_give_the_same_sentences(main_path: Path) -> None:
    layer = FusedLoRALinear(8, 6, r=4, backend=main_path.backend)
    with pytest.raises(ValueError, match=r"x has shape \[2, 9\], expected \[\.\.\., 8\]"):
        layer(torch.randn(2, 9))
    with pytest.raises(TypeError, match=r"weight has dtype torch.float32, expected torch.bfloat16"):
        layer(torch.randn(2, 8).bfloat16())
