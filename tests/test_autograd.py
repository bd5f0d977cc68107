"""LoRALinearFunction as an autograd citizen: gradcheck, repeated and partial backward, refusals."""

import gc
import weakref

import pytest
import torch
from torch.autograd import forward_ad, gradcheck

from lora_fused import lora_linear
from lora_fused.testing import check_case, make_case, run_case
from tests.conftest import Path

NO_DOUBLE = r"lora_linear has no double backward \(create_graph=True\); nested torch.func.grad"


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_gradcheck(dropout_p: float, bias: bool, rank: int) -> None:
    case = make_case(4, 6, 5, rank, torch.float64, bias=bias)
    inputs = (case.x, case.weight, case.lora_A, case.lora_B, case.bias)
    leaves = tuple(None if t is None else t.detach().requires_grad_() for t in inputs)

    def run(x, w, a, b, bias):  # type: ignore[no-untyped-def]
        return lora_linear(x, w, a, b, 1.5, bias, dropout_p, seed=8)

    assert gradcheck(run, leaves)


def test_gradcheck_transposed_weight_and_batch() -> None:
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    a = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, w, a, b: lora_linear(x, w.t(), a, b, 0.7), (x, w, a, b))


def test_retain_graph_gives_the_same_gradients_twice(path: Path) -> None:
    case = make_case(20, 64, 48, 4, torch.bfloat16, bias=True)
    leaves = [t.requires_grad_() for t in (case.x, case.weight, case.lora_A, case.lora_B)]
    y = lora_linear(*leaves, case.scaling, backend=path.backend)
    first = torch.autograd.grad(y, leaves, case.dy, retain_graph=True)
    second = torch.autograd.grad(y, leaves, case.dy)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


def test_backward_twice_without_retain_graph_is_refused(main_path: Path) -> None:
    case = make_case(2, 16, 8, 2)
    y = lora_linear(
        case.x.requires_grad_(),
        case.weight,
        case.lora_A,
        case.lora_B,
        1.0,
        backend=main_path.backend,
    ).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_one_layer_called_twice_in_a_graph(path: Path) -> None:
    case = make_case(20, 32, 32, 4)
    a = case.lora_A.requires_grad_()
    inner = lora_linear(case.x, case.weight, a, case.lora_B, 0.5, backend=path.backend)
    lora_linear(inner, case.weight, a, case.lora_B, 0.5, backend=path.backend).backward(case.dy)
    got, a.grad = a.grad, None
    total = case.weight + 0.5 * case.lora_B @ a
    (case.x @ total.T @ total.T).backward(case.dy)
    torch.testing.assert_close(got, a.grad)


def test_gradients_accumulate(main_path: Path) -> None:
    case = make_case(20, 32, 16, 4)
    a = case.lora_A.requires_grad_()
    for _ in range(2):
        lora_linear(
            case.x, case.weight, a, case.lora_B, case.scaling, backend=main_path.backend
        ).backward(case.dy)
    torch.testing.assert_close(a.grad, 2 * run_case(case, main_path.backend)["da"])


def test_create_graph_is_refused(main_path: Path) -> None:
    case = make_case(2, 16, 8, 2)
    y = lora_linear(
        case.x.requires_grad_(),
        case.weight,
        case.lora_A,
        case.lora_B,
        1.0,
        backend=main_path.backend,
    )
    with pytest.raises(RuntimeError, match=NO_DOUBLE):
        torch.autograd.grad(y.sum(), case.x, create_graph=True)


def test_forward_mode_is_refused() -> None:
    case = make_case(2, 16, 8, 2)
    match = "lora_linear has no forward-mode derivative; torch.func.jvp is supported."
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=match):
        dual = forward_ad.make_dual(case.x, case.x)
        lora_linear(dual, case.weight, case.lora_A.requires_grad_(), case.lora_B, 1.0)


def test_writing_a_saved_parameter_before_backward_is_noticed(main_path: Path) -> None:
    case = make_case(2, 16, 8, 2)
    y = lora_linear(
        case.x.requires_grad_(),
        case.weight,
        case.lora_A,
        case.lora_B,
        1.0,
        backend=main_path.backend,
    )
    case.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_unused_output_needs_no_gradient() -> None:
    case = make_case(2, 16, 8, 2)
    x = case.x.requires_grad_()
    y = lora_linear(x, case.weight, case.lora_A, case.lora_B, 1.0)
    (x.sum() + 0 * y.detach().sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_graph_is_freed(main_path: Path) -> None:
    case = make_case(2, 16, 8, 2)
    x = (case.x.requires_grad_() * 1).detach().requires_grad_()
    y = lora_linear(x, case.weight, case.lora_A, case.lora_B, 1.0, backend=main_path.backend)
    y.sum().backward()
    reference = weakref.ref(x)
    del x, y
    gc.collect()
    assert reference() is None


def test_backward_in_another_thread(main_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    case = make_case(60, 64, 48, 4, bias=True)
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(check_case, case, main_path.backend) for _ in range(8)]:
            future.result()


def test_hooks_see_the_gradients(main_path: Path) -> None:
    case = make_case(5, 16, 8, 2)
    a = case.lora_A.requires_grad_()
    seen: list[torch.Tensor] = []
    a.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    lora_linear(
        case.x, case.weight, a, case.lora_B, case.scaling, backend=main_path.backend
    ).backward(case.dy)
    assert torch.equal(seen[0], a.grad)
