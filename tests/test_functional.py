"""lora_linear as torch users know functions: batch shapes, autocast, gradient modes, torch.func."""

import pytest
import torch
import torch.nn.functional as F

from lora_fused import lora_linear
from lora_fused.testing import assert_close_to_ref, check_case, make_case
from tests.conftest import Path


@pytest.mark.parametrize("lead", [(), (1,), (6,), (2, 3), (2, 1, 4), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_leading_dimensions(path: Path, lead: tuple[int, ...], dropout_p: float) -> None:
    case = make_case(torch.Size(lead).numel(), 40, 24, 4, bias=True, dropout_p=dropout_p)
    x = case.x.reshape(*lead, 40).requires_grad_()
    backend = path.backend if x.numel() else "auto"
    y = lora_linear(
        x, case.weight, case.lora_A, case.lora_B, case.scaling, case.bias, dropout_p,
        seed=case.seed, backend=backend,
    )  # fmt: skip
    assert y.shape == (*lead, 24)
    y.backward(case.dy.reshape(*lead, 24))
    truth, baseline = case.truth(), case.baseline()
    assert_close_to_ref("y", y.reshape(-1, 24), truth["y"], baseline["y"])
    assert_close_to_ref("dx", x.grad.reshape(-1, 40), truth["dx"], baseline["dx"])


def test_leading_dimensions_that_cannot_be_flattened_by_a_view(path: Path) -> None:
    case = make_case(6, 40, 24, 4)
    x = case.x.view(2, 3, 40).transpose(0, 1).contiguous().transpose(0, 1)
    assert not x.is_contiguous()
    y = lora_linear(x, case.weight, case.lora_A, case.lora_B, case.scaling, backend=path.backend)
    assert_close_to_ref("y", y.reshape(6, 24), case.truth()["y"], case.baseline()["y"])


def test_equals_the_documented_formula(path: Path) -> None:
    case = make_case(7, 40, 24, 4, bias=True)
    y = lora_linear(
        case.x, case.weight, case.lora_A, case.lora_B, case.scaling, case.bias, backend=path.backend
    )
    expected = F.linear(case.x, case.weight, case.bias)
    expected = expected + case.scaling * (case.x @ case.lora_A.T @ case.lora_B.T)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B", "x"])
def test_one_operand_zero(path: Path, name: str) -> None:
    case = make_case(7, 40, 24, 4, torch.bfloat16, bias=True)
    getattr(case, name).zero_()
    check_case(case, path.backend)


@pytest.mark.parametrize("scaling", [0.0, 1.0, -3.5, 100])
def test_any_scaling(path: Path, scaling: float) -> None:
    case = make_case(7, 40, 24, 4)
    case.scaling = scaling
    check_case(case, path.backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, None], ids=["fp32 x", "low x"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, None], ids=["fp32 base", "low base"])
def test_autocast_does_what_it_does_for_linear(
    main_path: Path,
    dtype: torch.dtype,
    x_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
) -> None:
    case = make_case(30, 64, 48, 4, dtype, adapter_dtype=torch.float32, bias=True)
    x = case.x.to(x_dtype or dtype).requires_grad_()
    weight = case.weight.to(weight_dtype or dtype).requires_grad_()
    bias = case.bias.to(weight_dtype or dtype).requires_grad_()
    a, b = case.lora_A.requires_grad_(), case.lora_B.requires_grad_()
    with torch.autocast("cpu", dtype):
        y = lora_linear(x, weight, a, b, case.scaling, bias, backend=main_path.backend)
        assert y.dtype == F.linear(x, weight, bias).dtype == dtype
    y.backward(case.dy)
    got = {
        "y": y,
        "dx": x.grad,
        "dweight": weight.grad,
        "da": a.grad,
        "db": b.grad,
        "dbias": bias.grad,
    }
    for tensor, leaf in (("dx", x), ("dweight", weight), ("da", a), ("db", b), ("dbias", bias)):
        assert got[tensor].dtype == leaf.dtype
    truth, baseline = case.truth(), case.baseline()
    for name, tensor in got.items():
        assert_close_to_ref(name, tensor, truth[name], baseline[name])


def test_backward_inside_autocast_does_not_cast_again(main_path: Path) -> None:
    case = make_case(30, 64, 48, 4)
    x = case.x.requires_grad_()
    y = lora_linear(x, case.weight, case.lora_A, case.lora_B, 2.0, backend=main_path.backend)
    with torch.autocast("cpu", torch.bfloat16):
        y.backward(case.dy)
    assert_close_to_ref("dx", x.grad, case.truth()["dx"], case.baseline()["dx"])


def test_autocast_leaves_float64_alone() -> None:
    case = make_case(3, 16, 8, 2, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(case.x, case.weight, case.lora_A, case.lora_B, 2.0)
    assert y.dtype == torch.float64


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradient_modes_keep_nothing(main_path: Path, mode: type) -> None:
    case = make_case(5, 40, 24, 4)
    a = case.lora_A.requires_grad_()
    with mode(), torch.autograd.graph.saved_tensors_hooks(pytest.fail, pytest.fail):
        y = lora_linear(case.x, case.weight, a, case.lora_B, 2.0, backend=main_path.backend)
    assert y.grad_fn is None and not y.requires_grad
    torch.testing.assert_close(y, (case.x @ (case.weight + 2 * case.lora_B @ a).T).detach())


def test_meta_tensors_give_shapes() -> None:
    x, w, a, b = (torch.empty(s, device="meta") for s in ((2, 3, 8), (6, 8), (4, 8), (6, 4)))
    y = lora_linear(x, w, a.requires_grad_(), b, 1.0, dropout_p=0.5)
    assert y.shape == (2, 3, 6) and y.device.type == "meta"


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_torch_func(main_path: Path, dropout_p: float) -> None:
    case = make_case(6, 20, 12, 3, dropout_p=dropout_p)

    def loss(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        y = lora_linear(
            x, case.weight, a, case.lora_B, 2.0, dropout_p=dropout_p, seed=4,
            backend=main_path.backend,
        )  # fmt: skip
        return y.square().sum()

    grads = torch.func.grad(loss, argnums=(0, 1))(case.x, case.lora_A)
    x, a = case.x.clone().requires_grad_(), case.lora_A.clone().requires_grad_()
    expected = torch.autograd.grad(loss(x, a), (x, a))
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want)
    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(0, None))
    each = per_sample(case.x[:, None], case.lora_A)
    alone = [torch.func.grad(loss, argnums=1)(row[None], case.lora_A) for row in case.x]
    torch.testing.assert_close(each, torch.stack(alone))
    _, tangent = torch.func.jvp(lambda t: loss(t, a.detach()), (case.x,), (case.x,))
    torch.testing.assert_close(tangent, (expected[0] * case.x).sum())


def test_second_derivative_through_torch_func() -> None:
    case = make_case(3, 6, 5, 2, torch.float64)

    def loss(a: torch.Tensor) -> torch.Tensor:
        return lora_linear(case.x, case.weight, a, case.lora_B, 2.0).pow(3).sum()

    hessian = torch.func.hessian(loss)(case.lora_A)
    expected = torch.autograd.functional.hessian(
        lambda a: (case.x @ (case.weight + 2 * case.lora_B @ a).T).pow(3).sum(), case.lora_A
    )
    torch.testing.assert_close(hessian, expected)


def test_seeds_of_all_kinds(main_path: Path) -> None:
    case = make_case(6, 20, 12, 3)
    args = (case.x, case.weight, case.lora_A, case.lora_B, 2.0, None, 0.5)

    def run(seed: object) -> torch.Tensor:
        return lora_linear(*args, seed=seed, backend=main_path.backend)

    assert torch.equal(run(-1), run((1 << 64) - 1))
    assert torch.equal(run(7), run(torch.tensor(7)))
    assert torch.equal(run(7), run(torch.tensor([7])))
    assert not torch.equal(run(7), run(8))


def test_no_dropout_outside_training(main_path: Path) -> None:
    case = make_case(6, 20, 12, 3)
    args = (case.x, case.weight, case.lora_A, case.lora_B, 2.0)
    off = lora_linear(*args, dropout_p=0.5, training=False, backend=main_path.backend)
    assert torch.equal(off, lora_linear(*args, backend=main_path.backend))
