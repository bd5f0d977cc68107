"""What Triton emits for sm_100: `tcgen05.cp` belongs to block-scaled products, to nothing else."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .variants import with_a_test

TILE = 128


@triton.jit
def products(x, w, y, X_T: tl.constexpr, W_T: tl.constexpr, TILE: tl.constexpr):
    """A loop of products, and one whose first operand is the sum of those."""
    i = tl.arange(0, TILE)
    at = i[:, None] * TILE + i[None, :]
    acc = tl.zeros((TILE, TILE), tl.float32)
    for k in range(0, 4):
        a, b = tl.load(x + k * TILE * TILE + at), tl.load(w + k * TILE * TILE + at)
        if X_T:
            a = a.trans()
        if W_T:
            b = b.trans()
        acc = tl.dot(a, b, acc)
    acc = tl.dot(acc.to(x.dtype.element_ty), tl.load(w + at))
    tl.store(y + at, acc)


@triton.jit
def scaled(x, w, x_scale, w_scale, y, TILE: tl.constexpr):
    i = tl.arange(0, TILE)
    acc = tl.zeros((TILE, TILE), tl.float32)
    for k in range(0, 4):
        a, b = x.load([0, k * TILE]), w.load([0, k * TILE]).T
        sa = x_scale.load([0, k, 0, 0, 0]).reshape(1, 1, 32, 4, 4)
        sb = w_scale.load([0, k, 0, 0, 0]).reshape(1, 1, 32, 4, 4)
        sa = sa.trans(0, 3, 2, 1, 4).reshape(TILE, 4)
        sb = sb.trans(0, 3, 2, 1, 4).reshape(TILE, 4)
        acc = tl.dot_scaled(a, sa, "e4m3", b, sb, "e4m3", acc)
    tl.store(y + i[:, None] * TILE + i[None, :], acc)


def emitted(fn, types: dict[str, str], constants: dict[str, object]) -> set[str]:
    """The tcgen05 instructions of a kernel compiled for sm_100."""
    signature = {name: types.get(name, "constexpr") for name in fn.arg_names}
    position = {name: (fn.arg_names.index(name),) for name in fn.arg_names}
    source = ASTSource(
        fn,
        signature,
        constexprs={position[name]: value for name, value in constants.items()},
        attrs={
            position[name]: [["tt.divisibility", 16]] for name in types if types[name][0] == "*"
        },
    )
    target, options = GPUTarget("cuda", 100, 32), {"num_warps": 4, "num_stages": 3}
    text = triton.compile(source, target=target, options=options).asm["ptx"]
    return set(re.findall(r"tcgen05\.[\w.:]*\w", text))


@pytest.mark.full
@pytest.mark.parametrize("w_transposed", [False, True])
@pytest.mark.parametrize("x_transposed", [False, True])
@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32"])
def test_products_need_no_copies(kind: str, x_transposed: bool, w_transposed: bool) -> None:
    types = {"x": f"*{kind}", "w": f"*{kind}", "y": "*fp32"}
    constants = {"X_T": x_transposed, "W_T": w_transposed, "TILE": TILE}
    found = emitted(products, types, constants)
    assert any(name.startswith("tcgen05.mma") for name in found)
    assert found - with_a_test() == set()


@pytest.mark.full
def test_scaled_products_have_copies() -> None:
    matrix = f"tensordesc<fp8e4nv[{TILE}, {TILE}]>"
    scales = "tensordesc<u8[1, 1, 1, 2, 256]>"
    types = {"x": matrix, "w": matrix, "x_scale": scales, "w_scale": scales, "y": "*fp32"}
    found = emitted(scaled, types, {"TILE": TILE})
    assert any(name.startswith("tcgen05.cp") for name in found)
